"""The choice: the smallest coherent set that is as good as any.

Of the coherent sets that the quality allows, and that need less than what ran out of memory before
(``misfits.py``):

1. those that fit, on the device and in host RAM, margins included;
2. where memory comes first, of these those that need little: within 3 % of the least that any needs
   which takes at most twice the time of the fastest that fits (``memory``) or a quarter more
   (``balanced``);
3. of these, those within 3 % of the fastest of them;
4. of these, the least lossy, then the fewest members, then the fewest GPUs, then the least device
   memory.

The tolerance is counted once, from the fastest set and not from the chosen one: without any of its
members the choice would not fit or be more than 3 % behind the fastest; any other would gain less
than 3 %. (Counted from the chosen one, two that gain 2 % each would both be dropped.) It follows
that more memory never makes a plan slower by more than the tolerance, and that a stricter quality
never makes it lossier.

Where none fits, the choice is the nearest miss: of the sets that lack the fewest memories, those
within 3 % of the one that lacks least; of these, the least lossy; of these, by time and number as
before, the one that lacks least.

Where only what ran out of memory before is in the way, and this is a new try, the set that needs
least of that is tried again: others may have held more then, and failing once more does no harm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from autotune.decide import misfits
from autotune.decide.limits import (
    QUALITIES,
    Limits,
    allows,
    budget_within,
    check_limits,
    level_of,
    nothing_left,
)
from autotune.decide.plan import Rejection
from autotune.decide.predict import Predictor
from autotune.decide.prediction import Budget, Shortage
from autotune.decide.search import Candidate, Space, execution_of
from autotune.errors import MachineError, OptimizationError
from autotune.optimizations.base import Optimization, Setting
from autotune.optimizations.execution import Execution
from autotune.optimizations.plugins import failure_of
from autotune.probe.machine import Machine
from autotune.workload.workload import Workload

TOLERANCE = 0.03
"""A set must be faster than another by more than this to be worth one more optimization."""

SLACK = {"balanced": 0.25, "memory": 1.0}
"""Priority → how much more time than the fastest takes a set may take to save memory."""

Catalogue = Mapping[str, Optimization]
Options = dict[str, tuple[Setting, ...]]


class Pool(NamedTuple):
    """What is chosen from: all fit, or none does and these are the least lossy of the nearest.

    Attributes:
        candidates: The sets.
        longest_seconds: What a set may take to save memory; infinite where speed comes first.
        least_bytes: Device memory that the smallest needs; 0 where speed comes first.
    """

    candidates: Sequence[Candidate]
    longest_seconds: float = math.inf
    least_bytes: int = 0

    @property
    def fastest_seconds(self) -> float:
        """Of the fastest set."""
        return min(c.seconds for c in self.candidates)


class Decision(NamedTuple):
    """A choice, and what it was made from.

    Attributes:
        space: Predicts sets and knows which go together.
        options: What each optimization offers within the limits.
        offered: The same, had the user set no limit to quality.
        refused: The optimizations that offer nothing, each with the reason.
        kept: What is set by hand, as far as it can be predicted.
        notes: One sentence on each that is set by hand, and on each that ran out of memory before.
        available: The memory that there is.
        budget: What must hold the choice: less of it, where something ran out of memory before.
        candidates: All sets that there are to choose from.
        pool: Those of them that memory lets it be chosen from.
        chosen: The choice.
        is_retry: It ran out of memory before, or needs no less than what did.
    """

    space: Space
    options: Options
    offered: Options
    refused: tuple[Rejection, ...]
    kept: tuple[Setting, ...]
    notes: tuple[str, ...]
    available: Budget
    budget: Budget
    candidates: Sequence[Candidate]
    pool: Pool
    chosen: Candidate
    is_retry: bool = False

    @property
    def fits(self) -> bool:
        """Whether the budget holds the choice."""
        return self.budget.holds(self.chosen)


def decide(
    predictor: Predictor, limits: Limits, catalogue: Catalogue, retries: bool = False
) -> Decision:
    """Choose, without explaining.

    Args:
        predictor: Of the machine and the workload, with what it learnt.
        limits: What the user allows.
        catalogue: The optimizations by name.
        retries: Whether what ran out of memory before may be tried again, where all else is out.

    Raises:
        RequestError: an unknown quality level or priority.
        OptimizationError: an unknown name in ``only`` or ``without``.
    """
    check_limits(limits)
    machine, workload = predictor.machine, predictor.workload
    kept, notes = _predictable(predictor, limits.keep)
    offered, refused = _offered(machine, workload, limits, catalogue)
    options, too_lossy = _allowed(offered, limits, catalogue)
    space = Space(predictor, options, kept)
    candidates = space.candidates()
    available = budget_within(machine, limits)
    budget, pool, step = within(candidates, available, predictor, limits.priority)
    again = (
        ()
        if not retries or budget.holds(pool.candidates[0])
        else _least(candidates, available, budget)
    )
    ran_out = misfits.notes(available, predictor, step)
    if again:
        budget, pool = available, Pool(again)
        ran_out = (*ran_out, RETRY)
    return Decision(
        space=space,
        options=options,
        offered=offered,
        refused=(*refused, *too_lossy),
        kept=kept,
        notes=(
            *notes,
            *nothing_left(machine, limits),
            *ran_out,
        ),
        available=available,
        budget=budget,
        candidates=candidates,
        pool=pool,
        chosen=smallest_of(pool, budget),
        is_retry=bool(again),
    )


RETRY = "nothing smaller is left: it is tried again all the same"


def _least(
    candidates: Sequence[Candidate], available: Budget, lowered: Budget
) -> Sequence[Candidate]:
    """Of the sets that would fit had nothing run out, those that need least of what did."""
    fitting = [c for c in candidates if available.holds(c)]
    return _nearest(fitting, lowered) if fitting else ()


class Held(NamedTuple):
    """What there is to choose from, and the budget that holds it.

    Attributes:
        budget: What is available, less where something ran out of memory before.
        pool: The sets.
        step: By how much less, of ``misfits.STEPS``.
    """

    budget: Budget
    pool: Pool
    step: float


def within(
    candidates: Sequence[Candidate], available: Budget, predictor: Predictor, priority: str
) -> Held:
    """What there is to choose from in so much memory."""
    for step in misfits.STEPS:
        budget = misfits.lowered(available, predictor, step)
        held = Held(budget, pool_of(candidates, budget, priority), step)
        if budget.holds(held.pool.candidates[0]):
            break
    return held


def select(candidates: Sequence[Candidate], budget: Budget, priority: str = "speed") -> Candidate:
    """The choice as the module's first lines say."""
    return smallest_of(pool_of(candidates, budget, priority), budget)


def smallest_of(pool: Pool, budget: Budget) -> Candidate:
    """Of those within the tolerance of the fastest; where none fits, the one that lacks least.

    Raises:
        MachineError: a prediction is no time at all: figures of the machine are absurd.
    """
    fastest = pool.fastest_seconds
    if not 0 <= fastest < math.inf:
        message = f"a generation is predicted to take {fastest:g} s"
        raise MachineError(message, "`autotune probe` measures this machine again")
    longest = fastest * (1 + TOLERANCE)
    as_fast = [c for c in pool.candidates if c.seconds <= longest]
    if budget.holds(as_fast[0]):
        return min(as_fast, key=smallness)
    return min(as_fast, key=lambda c: (len(c.settings), budget.shortage(c), *smallness(c)))


def smallness(candidate: Candidate) -> tuple[object, ...]:
    """What makes one set smaller than another that is as fast."""
    return (
        candidate.loss,
        len(candidate.settings),
        len(candidate.elsewhere_bytes),
        candidate.needed_bytes,
        candidate.phases_bytes,
        candidate.seconds,
        _order(candidate),
    )


def _order(candidate: Candidate) -> list[str]:
    """Only makes the order total, so that the same input gives the same plan."""
    return [str(s) for s in candidate.settings]


def pool_of(candidates: Sequence[Candidate], budget: Budget, priority: str) -> Pool:
    """The sets that fit, where memory comes first those that need little; else the nearest."""
    fitting = [c for c in candidates if budget.holds(c)]
    if not fitting:
        return Pool(_nearest(candidates, budget))
    if priority not in SLACK:
        return Pool(fitting)
    longest = min(c.seconds for c in fitting) * (1 + SLACK[priority])
    affordable = [c for c in fitting if c.seconds <= longest]
    least = min(c.needed_bytes for c in affordable)
    small = [c for c in affordable if c.needed_bytes <= least * (1 + TOLERANCE)]
    return Pool(small, longest, least)


def _nearest(candidates: Sequence[Candidate], budget: Budget) -> list[Candidate]:
    """Of the sets that lack about as little as any, the least lossy."""
    shortages = [budget.shortage(c) for c in candidates]
    count, shares = min(shortages)
    farthest = Shortage(count, shares * (1 + TOLERANCE))
    near = [c for c, s in zip(candidates, shortages, strict=True) if s <= farthest]
    least_loss = min(c.loss for c in near)
    return [c for c in near if c.loss == least_loss]


# ---- what there is to choose from ---------------------------------------------------------------


def _offered(
    machine: Machine, workload: Workload, limits: Limits, catalogue: Catalogue
) -> tuple[Options, tuple[Rejection, ...]]:
    """Settings worth trying per optimization, whatever they do to the image; why others are out."""
    offered: Options = {}
    refused = []
    for name, optimization in catalogue.items():
        try:
            reason = _refusal(optimization, machine, workload, limits)
            settings = () if reason else _tried(optimization, machine, workload)
        except Exception as error:
            reason = failure_of(optimization, error)
        if reason is None:
            offered[name] = settings
        else:
            refused.append(Rejection(name, reason))
    return offered, tuple(refused)


def _tried(optimization: Optimization, machine: Machine, workload: Workload) -> tuple[Setting, ...]:
    """The settings worth trying, each proven to be one that can be predicted."""
    settings = tuple(map(optimization.setting, optimization.worth_trying(machine, workload)))
    for setting in settings:
        optimization.configure(Execution(), setting.parameters)
    return settings


def _refusal(
    optimization: Optimization, machine: Machine, workload: Workload, limits: Limits
) -> str | None:
    name = optimization.name
    if name in {s.name for s in limits.keep}:
        return "you set it by hand: left as it is"
    if name in limits.without:
        return "you left it out (--without)"
    if limits.only and name not in limits.only:
        return "not among the ones you allowed (--only)"
    return optimization.unavailable(machine, workload)


def _allowed(
    offered: Options, limits: Limits, catalogue: Catalogue
) -> tuple[Options, tuple[Rejection, ...]]:
    """What of it the quality allows, and what it does not allow at all."""
    options: Options = {}
    refused = []
    for name, settings in offered.items():
        optimization = catalogue[name]
        allowed = [s for s in settings if allows(limits.quality, optimization, s.parameters)]
        if allowed:
            options[name] = tuple(allowed)
        else:
            needed = QUALITIES[min(level_of(optimization, s.parameters) for s in settings)]
            text = f"{optimization.exactness}: needs --quality {needed}"
            refused.append(Rejection(name, text, needs_quality=needed))
    return options, tuple(refused)


def _predictable(
    predictor: Predictor, keep: tuple[Setting, ...]
) -> tuple[tuple[Setting, ...], tuple[str, ...]]:
    """What was set by hand, as far as it can be predicted here, and a note on each."""
    kept: list[Setting] = []
    notes = []
    for setting in keep:
        try:
            predictor.predict(execution_of((*kept, setting)))
        except OptimizationError as error:
            notes.append(f"{setting} was set by hand and is kept, but not predicted: {error}")
        else:
            kept.append(setting)
            notes.append(f"{setting} was set by hand and is kept")
    return tuple(kept), tuple(notes)
