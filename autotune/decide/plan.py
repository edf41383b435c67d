"""The ``Plan``: what was decided for a workload on a machine, and why."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from autotune.decide.prediction import Bottleneck, Budget, Prediction
from autotune.optimizations.base import Setting
from autotune.optimizations.execution import Execution
from autotune.probe.machine import Machine
from autotune.workload.architecture import Architecture
from autotune.workload.workload import Role, Workload


class MachineSummary(msgspec.Struct, frozen=True):
    """Which machine was planned for. ``source`` is ``"measured"`` or ``"datasheet"``.

    ``index`` is CUDA's, of the device.
    """

    name: str
    source: str
    device: str
    total_bytes: int
    free_bytes: int
    index: int = 0


class WorkloadSummary(msgspec.Struct, frozen=True):
    """What was asked; ``weight_bytes`` is all components together in the dtype they run in.

    ``encoders``, ``denoisers`` and ``autoencoders`` are names of components.
    """

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
    encoders: tuple[str, ...] = ()
    denoisers: tuple[str, ...] = ()
    autoencoders: tuple[str, ...] = ()


class Bottlenecks(msgspec.Struct, frozen=True):
    """What holds the generation back with no optimization, and with the chosen ones."""

    before: Bottleneck
    after: Bottleneck


class Reason(msgspec.Struct, frozen=True):
    """Why an optimization was taken: with it against without it, the rest of the set being there.

    Attributes:
        optimization: Its name.
        text: One sentence.
        attacks: What held the rest back, and no longer does.
        before_bytes: Device memory needed without it.
        after_bytes: Device memory needed with it: that of the whole set.
        before_seconds: One generation without it, with its share of what is done once.
        after_seconds: The same with it.
        fits_without: Whether the rest would fit.
    """

    optimization: str
    text: str
    attacks: Bottleneck
    before_bytes: int
    after_bytes: int
    before_seconds: float
    after_seconds: float
    fits_without: bool


class Rejection(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why an optimization was left out; numbers only where it could have been taken.

    Attributes:
        optimization: Its name.
        text: One sentence.
        rule: Id of the coherence rule where one decided.
        needs_quality: The strictest level that allows it, where quality decided.
        setting: The parameters that the numbers are for: its fastest that fit.
        instead_of: Members of the chosen set that it does not go with.
        beside: Where there are such: the other members of the set that the numbers are of.
        seconds: One generation with it, with its share of what is done once.
        needed_bytes: Device memory needed with it.
        saved_bytes: Most device memory that it saves in a phase; negative where it needs more.
        saved_in: That phase.
        fits: Whether the set with it would fit.
    """

    optimization: str
    text: str
    rule: str | None = None
    needs_quality: str | None = None
    setting: Setting | None = None
    instead_of: tuple[str, ...] = ()
    beside: tuple[Setting, ...] = ()
    seconds: float | None = None
    needed_bytes: int | None = None
    saved_bytes: int | None = None
    saved_in: str | None = None
    fits: bool | None = None


WayOutKind = Literal[
    "processes", "dtype", "limits", "batch", "options", "quality", "size", "frames", "ram", "vram"
]


Option = bool | int | float | str
Change = dict[str, int | str | tuple[int | str, ...] | dict[str, Option] | None]
"""Names of limits or of the request's fields, and what to set them to."""


class WayOut(msgspec.Struct, frozen=True):
    """What would make it fit, as predicted.

    Attributes:
        kind: What it costs: other programs' memory, precision, the user's own limits, fewer images
            or frames at once, quality, a smaller image, a shorter video, or hardware; where it
            takes two of these, the dearer.
        text: A few words with the numbers.
        change: The same for a program: ``{"batch": 1}``, ``{"quality": "high"}``,
            ``{"vram_limit": None}``, ``{"options": {"decode_chunk_size": 2}}``, or two of these
            together; ``"pids"`` of programs to close; ``"device_bytes"`` and
            ``"host_bytes"`` of memory to be had besides.
        optimizations: The set that would then be chosen.
        seconds: One generation with it.
        needed_bytes: Device memory needed with it.
        host_bytes: Host RAM needed with it.
        budget_bytes: Device memory that would be available.
        host_budget_bytes: Host RAM that would be available.
    """

    kind: WayOutKind
    text: str
    change: Change
    optimizations: tuple[Setting, ...]
    seconds: float
    needed_bytes: int
    host_bytes: int
    budget_bytes: int
    host_budget_bytes: int | None


class Validity(msgspec.Struct, frozen=True):
    """The budgets between which the same is chosen; ``None``: however much there is.

    Attributes:
        least_bytes: Of device memory.
        least_host_bytes: Of host RAM; 0 where the device computes in it.
        least_elsewhere_bytes: Of the other GPUs' memory, by CUDA's index.
        most_bytes: Of device memory.
        most_host_bytes: Of host RAM.
        most_elsewhere_bytes: Of the other GPUs' memory.
    """

    least_bytes: int
    least_host_bytes: int
    least_elsewhere_bytes: dict[int, int]
    most_bytes: int | None
    most_host_bytes: int | None
    most_elsewhere_bytes: dict[int, int] | None

    def is_outgrown(self, budget: Budget, more: float = 0.0) -> bool:
        """Whether there is more than for which the same is chosen, by more than a share."""
        if self.most_bytes is None:
            return False
        most = self.most_elsewhere_bytes or {}
        pairs = (
            (budget.device_bytes, self.most_bytes),
            (budget.host_bytes, self.most_host_bytes),
            *((free, most.get(gpu, 0)) for gpu, free in budget.elsewhere_bytes.items()),
        )
        return any(
            free is not None and limit is not None and free > limit * (1 + more)
            for free, limit in pairs
        )

    def holds(self, budget: Budget) -> bool:
        """Whether the same is chosen with this budget."""
        elsewhere = budget.elsewhere_bytes
        return (
            budget.device_bytes >= self.least_bytes
            and (budget.host_bytes or 0) >= self.least_host_bytes
            and all(elsewhere.get(g, 0) >= b for g, b in self.least_elsewhere_bytes.items())
            and not self.is_outgrown(budget)
        )


class Postponed(msgspec.Struct, frozen=True):
    """A faster set that is not worth changing to yet.

    Attributes:
        optimizations: It.
        saves_s: What it would save per generation.
        takes_s: What changing to it takes once.
    """

    optimizations: tuple[Setting, ...]
    saves_s: float
    takes_s: float


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
        priority: ``"speed"``, ``"balanced"`` or ``"memory"``.
        fastest_seconds: Of the fastest set in the choice: the tolerance counts from there.
        remedies: The ways out with their predictions.
        elsewhere_budget_bytes: As ``budget_bytes``, of the other GPUs, by CUDA's index.
        phase_budget_bytes: The most that a phase may be predicted to need, where one ran out of
            memory before.
        validity: The budgets between which the same is chosen; ``None`` where nothing fits.
        postponed: The choice, where something else is on that is kept for now.
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
    priority: str = "speed"
    fastest_seconds: float | None = None
    remedies: tuple[WayOut, ...] = ()
    elsewhere_budget_bytes: dict[int, int] = {}
    validity: Validity | None = None
    phase_budget_bytes: dict[str, int] = {}
    postponed: Postponed | None = None

    @property
    def budget(self) -> Budget:
        """What must hold the prediction."""
        return Budget(
            self.budget_bytes,
            self.host_budget_bytes,
            self.elsewhere_budget_bytes,
            self.phase_budget_bytes,
        )

    def to_dict(self) -> dict[str, Any]:
        """The documented JSON object, as plain Python values."""
        return _plain(self)

    def code(self, architecture: Architecture | None = None) -> str:
        """Plain diffusers lines that load and run the pipeline in the same way, to paste.

        Args:
            architecture: Of the model; says where its weights are and in which dtypes they run.
        """
        from autotune.decide.code import code_of

        return code_of(self, architecture)


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
    elsewhere_budget_bytes: dict[int, int] = {}

    @property
    def budget(self) -> Budget:
        """What must hold the prediction."""
        return Budget(self.budget_bytes, self.host_budget_bytes, self.elsewhere_budget_bytes)

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
        machine.name,
        machine.source,
        device.kind,
        device.total_bytes,
        device.free_bytes,
        device.index,
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
        encoders=_names(workload, "encoder"),
        denoisers=_names(workload, "denoiser"),
        autoencoders=_names(workload, "autoencoder"),
    )


def _names(workload: Workload, role: Role) -> tuple[str, ...]:
    return tuple(c.name for c in workload.components_as(role))
