"""For which budgets a choice stays the same: what lets it be remembered though free memory changes.

With less memory the sets that fit become fewer. As long as the choice, the fastest set and the one
that needs least are among them, nothing has changed: the tolerance counts from the same places, and
the choice was the smallest of more. With more memory, others come in; when these three are the same
with much more, they are with anything in between. Where something ran out of memory before, any
more may be enough for it.
"""

from __future__ import annotations

from autotune.decide.decision import Decision, Pool, pool_of, smallest_of
from autotune.decide.plan import Validity
from autotune.decide.prediction import Budget, most_of_each
from autotune.decide.search import Candidate

_UNLIMITED = 1 << 62
_MORE = (2.0, 1.25, 1.05)
"""How many times the budget to try where the choice would be another with unlimited memory."""


def validity_of(decision: Decision, priority: str) -> Validity | None:
    """Where the decision would be made again; ``None`` where nothing fits."""
    if not decision.fits:
        return None
    anchors = _anchors(decision, priority)
    most = _most(decision, priority)
    return Validity(
        least_bytes=max(c.needed_bytes for c in anchors),
        least_host_bytes=_least_host(decision.budget, anchors),
        least_elsewhere_bytes=most_of_each(c.elsewhere_bytes for c in anchors),
        most_bytes=most.device_bytes if most else None,
        most_host_bytes=most.host_bytes if most else None,
        most_elsewhere_bytes=dict(most.elsewhere_bytes) if most else None,
    )


def _least_host(budget: Budget, anchors: tuple[Candidate, ...]) -> int:
    return 0 if budget.host_bytes is None else max(c.host_bytes for c in anchors)


def _anchors(decision: Decision, priority: str) -> tuple[Candidate, ...]:
    """The sets that decide where tolerances count from, and the choice."""
    small = decision.pool.candidates
    if priority == "speed":  # all that fit
        return min(small, key=lambda c: c.seconds), decision.chosen
    fitting = [c for c in decision.candidates if decision.budget.holds(c)]
    fastest = min(fitting, key=lambda c: c.seconds)
    leanest = min(small, key=lambda c: c.needed_bytes)
    return fastest, leanest, min(small, key=lambda c: c.seconds), decision.chosen


def _most(decision: Decision, priority: str) -> Budget | None:
    """The largest budget tried for which nothing has changed."""
    if decision.is_retry or decision.budget != decision.available:
        return decision.available

    def is_same(budget: Budget) -> bool:
        pool = pool_of(decision.candidates, budget, priority)
        same_places = _places(pool) == _places(decision.pool)
        return same_places and smallest_of(pool, budget) == decision.chosen

    if is_same(_times(decision.budget, None)):
        return None
    larger = (_times(decision.budget, factor) for factor in _MORE)
    return next((b for b in larger if is_same(b)), decision.budget)


def _places(pool: Pool) -> tuple[float, float, int]:
    return pool.fastest_seconds, pool.longest_seconds, pool.least_bytes


def _times(budget: Budget, factor: float | None) -> Budget:
    def more(size: int) -> int:
        return _UNLIMITED if factor is None else int(size * factor)

    return Budget(
        more(budget.device_bytes),
        None if budget.host_bytes is None else more(budget.host_bytes),
        {gpu: more(size) for gpu, size in budget.elsewhere_bytes.items()},
        budget.phase_bytes,
    )
