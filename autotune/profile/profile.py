"""The ``Profile``: a machine, and what was planned and measured on it."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from autotune.probe.machine import Machine, Value

SCHEMA_VERSION = 2


class PhaseMeasurement(Value, frozen=True):
    """What a phase of a real generation took.

    Attributes:
        name: ``"encode"``, ``"denoise"``, ``"decode"``.
        seconds: Of a whole generation in steady state.
        peak_bytes: Most that the allocator had given out at once, weights included.
        reserved_bytes: Most that the allocator had taken from the device.
        device_bytes: Most that this process held of the device's memory.
        first_seconds: The first time, kernels being loaded and algorithms chosen.
    """

    name: str
    seconds: float
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    device_bytes: int | None = None
    first_seconds: float | None = None


class RunRecord(Value, frozen=True):
    """One verified run: what was asked, what was chosen, predicted against measured.

    Attributes:
        workload: The workload's key (model, size, batch, steps, dtype).
        optimizations: Settings as written on the command line, ``"tome:ratio=0.3"``.
        predicted: The prediction per phase, in the same form as the measurement.
        measured: The measurement per phase.
        weight_bytes: All weights: tells pipelines of one name apart. ``None``: not recorded.
    """

    workload: str
    optimizations: tuple[str, ...]
    predicted: tuple[PhaseMeasurement, ...]
    measured: tuple[PhaseMeasurement, ...]
    at: str
    weight_bytes: int | None = None


class Available(Value, frozen=True):
    """Memory for a pipeline, in bytes: a budget.

    Attributes:
        device_bytes: Of the device.
        host_bytes: Of host RAM; ``None`` where the device computes in it.
        elsewhere_bytes: Of the other GPUs, by CUDA's index.
    """

    device_bytes: int
    host_bytes: int | None = None
    elsewhere_bytes: dict[int, int] = {}


class PlanRecord(Value, frozen=True):
    """A decision, valid as long as it would be made again.

    Attributes:
        workload: The workload's key.
        basis: A digest of all that decided, but for free memory: machine, model, limits, history;
            then one of ``plan``, which tells whether it is still what was decided.
        optimizations: What was chosen.
        predicted: The prediction per phase.
        least: Smallest budget with which the same is chosen.
        most: Largest for which that is certain; ``None``: any.
        plan: The plan as plain values.
        at: When it was made.
    """

    workload: str
    basis: str
    optimizations: tuple[str, ...]
    predicted: tuple[PhaseMeasurement, ...]
    least: Available
    most: Available | None
    plan: dict[str, Any]
    at: str


class MisfitRecord(Value, frozen=True):
    """A set that ran out of memory.

    Attributes:
        workload: The workload's key as far as memory is concerned.
        optimizations: What was on, set by hand or chosen.
        available_bytes: The budget when it ran out, of the memory that did.
        predicted_bytes: What it was predicted to need of it.
        phase: In which phase, as far as is known.
        error: The error's first line.
        at: When.
        of_host: It was host RAM, beside a device with memory of its own.
        weight_bytes: All weights: tells pipelines of one name apart. ``None``: not recorded.
    """

    workload: str
    optimizations: tuple[str, ...]
    available_bytes: int
    predicted_bytes: int
    phase: str | None
    error: str
    at: str
    of_host: bool = False
    weight_bytes: int | None = None


class Profile(Value, frozen=True):
    """One file in the cache folder.

    Attributes:
        key: What the file is named after: GPU UUID and driver, or the CPU's name and cores.
        machine: The measured machine. Its free memory is as it was then; never use it without
            reading it again.
        runs: The latest verified runs, newest last.
        plans: The latest decisions, newest last.
        misfits: What ran out of memory lately, newest last.
        changed_at: When figures were last measured again because driver, software or hardware had
            changed; ``None``: never. What was recorded before is of the machine as it was then.
    """

    key: str
    machine: Machine
    created_at: str
    updated_at: str
    runs: tuple[RunRecord, ...] = ()
    plans: tuple[PlanRecord, ...] = ()
    misfits: tuple[MisfitRecord, ...] = ()
    schema_version: int = SCHEMA_VERSION
    changed_at: str | None = None

    def is_outdated(self, record: RunRecord | PlanRecord | MisfitRecord) -> bool:
        """Whether a record is from before the machine's last change."""
        return is_before(record.at, self.changed_at)


def is_before(at: str, other: str | None) -> bool:
    """Whether a moment is before another; no if either is missing or no ISO 8601 timestamp."""
    first, second = moment(at), moment(other or "")
    return first is not None and second is not None and first < second


def moment(timestamp: str) -> datetime | None:
    """An ISO 8601 timestamp, in UTC where it names no zone; ``None`` for any other text."""
    try:
        # Python 3.10 does not read the "Z".
        found = datetime.fromisoformat(timestamp.replace("Z", "+00:00"))
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=timezone.utc)
