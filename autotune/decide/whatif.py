"""What if: the same question for other machines and models, or for every price in time."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from autotune.decide.decision import Catalogue, decide, smallness
from autotune.decide.history import History
from autotune.decide.limits import Limits
from autotune.decide.plan import Plan
from autotune.decide.predict import Predictor
from autotune.decide.prediction import Bottleneck
from autotune.optimizations import CATALOGUE
from autotune.optimizations.base import Setting
from autotune.probe.machine import Machine
from autotune.workload.workload import Workload


class ComparisonRow(msgspec.Struct, frozen=True):
    """One plan of several, in short.

    Attributes:
        machine: Its name.
        model: What the user called it.
        width: Pixels.
        height: Pixels.
        frames: 1 for images.
        batch: Images or videos per call.
        optimizations: The chosen set.
        bottleneck: What holds it back with the chosen set.
        seconds: One generation, with its share of what is done once.
        needed_bytes: Device memory that must be free.
        budget_bytes: Device memory available.
        fits: Whether it fits; if not, the set is the nearest miss.
    """

    machine: str
    model: str
    width: int
    height: int
    frames: int
    batch: int
    optimizations: tuple[Setting, ...]
    bottleneck: Bottleneck
    seconds: float
    needed_bytes: int
    budget_bytes: int
    fits: bool


def compare(plans: Iterable[Plan]) -> tuple[ComparisonRow, ...]:
    """One row per plan, in the order given."""
    return tuple(
        ComparisonRow(
            machine=plan.machine.name,
            model=plan.workload.model,
            width=plan.workload.width,
            height=plan.workload.height,
            frames=plan.workload.frames,
            batch=plan.workload.batch,
            optimizations=plan.optimizations,
            bottleneck=plan.bottleneck.after,
            seconds=plan.prediction.mean_seconds,
            needed_bytes=plan.prediction.needed_bytes,
            budget_bytes=plan.budget_bytes,
            fits=plan.fits,
        )
        for plan in plans
    )


class FrontierPoint(msgspec.Struct, frozen=True):
    """A set that no other is both as fast and as small as.

    Attributes:
        optimizations: The set, the smallest where several come to the same.
        seconds: One generation, with its share of what is done once.
        needed_bytes: Device memory that must be free.
        host_bytes: Host RAM that must be available.
        fits: Whether both are, within the limits.
    """

    optimizations: tuple[Setting, ...]
    seconds: float
    needed_bytes: int
    host_bytes: int
    fits: bool


def frontier(
    machine: Machine,
    workload: Workload,
    limits: Limits | None = None,
    catalogue: Catalogue = CATALOGUE,
    history: History | None = None,
) -> tuple[FrontierPoint, ...]:
    """What memory costs in time: from the fastest coherent set to the smallest.

    Every difference counts here, the tolerance of the choice does not. What is set by hand is in
    every set.

    Raises:
        RequestError: an unknown quality level or priority.
        OptimizationError: an unknown name in ``only`` or ``without``.
    """
    limits = limits or Limits()
    decision = decide(Predictor(machine, workload, limits.images, history), limits, catalogue)
    points: list[FrontierPoint] = []
    for c in sorted(decision.candidates, key=lambda c: (c.seconds, c.needed_bytes, *smallness(c))):
        if not points or c.needed_bytes < points[-1].needed_bytes:
            fits = decision.budget.holds(c)
            points.append(FrontierPoint(c.settings, c.seconds, c.needed_bytes, c.host_bytes, fits))
    return tuple(points)
