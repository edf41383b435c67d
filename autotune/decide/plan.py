"""The ``Plan``: what was decided for a workload on a machine, and why."""

from __future__ import annotations

from typing import Any

import msgspec

from autotune.decide.prediction import Bottleneck, Prediction
from autotune.optimizations.base import Setting
from autotune.optimizations.execution import Execution
from autotune.probe.machine import Machine
from autotune.workload.workload import Workload


class MachineSummary(msgspec.Struct, frozen=True):
    """Which machine was planned for. ``source`` is ``"measured"`` or ``"datasheet"``."""

    name: str
    source: str
    device: str
    total_bytes: int
    free_bytes: int


class WorkloadSummary(msgspec.Struct, frozen=True):
    """What was asked; ``weight_bytes`` is all components together in the dtype they run in."""

    model: str
    pipeline: str
    height: int
    width: int
    batch: int
    steps: int
    guidance_scale: float
    dtype: str
    weight_bytes: int
    frames: int = 1
    options: dict[str, bool | int | float | str] = {}


class Bottlenecks(msgspec.Struct, frozen=True):
    """What holds the generation back with no optimization, and with the chosen ones."""

    before: Bottleneck
    after: Bottleneck


class Reason(msgspec.Struct, frozen=True):
    """Why an optimization was taken."""

    optimization: str
    text: str


class Rejection(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why an optimization was left out; ``rule`` is the coherence rule's id where one decided."""

    optimization: str
    text: str
    rule: str | None = None


class Plan(msgspec.Struct, frozen=True):
    """The smallest coherent set for a workload on a machine; the ``--json`` contract of ``plan``.

    Attributes:
        fits: Whether device and host have the memory that the prediction needs.
        budget_bytes: Free memory less the runtime's context and the reserve, or the user's limit.
        host_budget_bytes: Available host RAM; ``None`` where the device computes in it.
        baseline: The prediction with no optimization at all.
        kept: Optimizations that the user had set by hand and that were left alone.
        ways_out: When it does not fit: what would help, one phrase each.
        execution: The same set as the runtime and the predictor read it.
    """

    machine: MachineSummary
    workload: WorkloadSummary
    quality: str
    fits: bool
    budget_bytes: int
    host_budget_bytes: int | None
    bottleneck: Bottlenecks
    optimizations: tuple[Setting, ...]
    prediction: Prediction
    baseline: Prediction
    reasons: tuple[Reason, ...]
    rejected: tuple[Rejection, ...]
    execution: Execution
    kept: tuple[Setting, ...] = ()
    ways_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The documented JSON object, as plain Python values."""
        return _plain(self)


class PredictionReport(msgspec.Struct, frozen=True):
    """The ``--json`` contract of ``predict``: a given set, predicted without choosing."""

    machine: MachineSummary
    workload: WorkloadSummary
    optimizations: tuple[Setting, ...]
    prediction: Prediction
    fits: bool
    budget_bytes: int
    host_budget_bytes: int | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The documented JSON object, as plain Python values."""
        return _plain(self)


def _plain(value: Plan | PredictionReport) -> dict[str, Any]:
    """Plain values, with ``parameters`` always present, also when there are none."""
    plain: dict[str, Any] = msgspec.to_builtins(value)
    plain["optimizations"] = [
        {"name": s.name, "parameters": dict(s.parameters)} for s in value.optimizations
    ]
    return plain


def summarize_machine(machine: Machine) -> MachineSummary:
    """The few facts of a machine that a plan repeats."""
    device = machine.device
    return MachineSummary(
        machine.name, machine.source, device.kind, device.total_bytes, device.free_bytes
    )


def summarize_workload(workload: Workload) -> WorkloadSummary:
    """The few facts of a workload that a plan repeats."""
    r = workload.request
    return WorkloadSummary(
        model=workload.model,
        pipeline=workload.pipeline,
        height=r.height,
        width=r.width,
        batch=r.batch,
        steps=r.steps,
        guidance_scale=r.guidance_scale,
        dtype=r.dtype,
        weight_bytes=workload.weight_bytes,
        frames=r.frames,
        options=r.options,
    )
