"""The ``Profile``: a machine, and what was planned and measured on it."""

from __future__ import annotations

from autotune.probe.machine import Machine, Value

SCHEMA_VERSION = 1


class PhaseMeasurement(Value, frozen=True):
    """What a phase of a real generation took; ``peak_bytes`` includes the weights."""

    name: str
    seconds: float
    peak_bytes: int | None = None


class RunRecord(Value, frozen=True):
    """One verified run: what was asked, what was chosen, predicted against measured.

    Attributes:
        workload: The workload's key (model, size, batch, steps, dtype).
        optimizations: Settings as written on the command line, ``"tome:ratio=0.3"``.
        predicted: The prediction per phase, in the same form as the measurement.
        measured: The measurement per phase.
    """

    workload: str
    optimizations: tuple[str, ...]
    predicted: tuple[PhaseMeasurement, ...]
    measured: tuple[PhaseMeasurement, ...]
    at: str


class Profile(Value, frozen=True):
    """One file in the cache folder.

    Attributes:
        key: What the file is named after: GPU UUID and driver, or the CPU's name and cores.
        machine: The measured machine. Its free memory is as it was then; never use it without
            reading it again.
        runs: The latest verified runs, newest last.
    """

    key: str
    machine: Machine
    created_at: str
    updated_at: str
    runs: tuple[RunRecord, ...] = ()
    schema_version: int = SCHEMA_VERSION
