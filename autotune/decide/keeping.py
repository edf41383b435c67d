"""A set that is on already is kept where the best is no better than the tolerance.

Changing a set moves weights, which takes longer than many an image.
"""

from __future__ import annotations

import msgspec

from autotune.decide.decision import TOLERANCE, Decision
from autotune.decide.explain import Terms
from autotune.decide.plan import Reason
from autotune.decide.prediction import Prediction
from autotune.decide.search import Candidate, loss_of
from autotune.errors import OptimizationError
from autotune.optimizations.base import Setting


def keeping(decision: Decision, applied: tuple[Setting, ...]) -> Decision:
    """The decision for the set that is on, where it does as well as the choice; else the same."""
    if applied == decision.chosen.settings or not decision.fits:
        return decision
    if decision.space.judge.rule_in((*decision.kept, *applied)) is not None:
        return decision
    try:
        prediction = decision.space.predict(applied)
    except OptimizationError:  # it needs a code path that this request does not have
        return decision
    candidate = _candidate(applied, prediction)
    return decision._replace(chosen=candidate) if _does(decision, candidate) else decision


def said_of_kept(reason: Reason, without: Prediction, terms: Terms) -> Reason:
    """Why a member is there that nothing would be lost without: it was there before."""
    as_fast = without.mean_seconds <= terms.pool.fastest_seconds * (1 + TOLERANCE)
    if not (reason.fits_without and as_fast):
        return reason
    return msgspec.structs.replace(reason, text="on already, and not in the way")


def _does(decision: Decision, candidate: Candidate) -> bool:
    pool = decision.pool
    longest = min(pool.fastest_seconds * (1 + TOLERANCE), pool.longest_seconds)
    is_small = not pool.least_bytes or candidate.needed_bytes <= pool.least_bytes * (1 + TOLERANCE)
    return candidate.seconds <= longest and is_small and decision.budget.holds(candidate)


def _candidate(settings: tuple[Setting, ...], prediction: Prediction) -> Candidate:
    return Candidate(
        settings=settings,
        seconds=prediction.mean_seconds,
        needed_bytes=prediction.needed_bytes,
        host_bytes=prediction.host_bytes,
        loss=loss_of(settings),
        phases_bytes=sum(p.needed_bytes for p in prediction.phases),
        elsewhere_bytes=prediction.elsewhere_bytes,
        phase_needs=prediction.phase_needs,
    )
