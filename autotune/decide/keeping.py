"""A set that is on already is kept until changing it has paid for itself.

Changing a set moves weights and may compile anew, which takes longer than many an image; where
requests alternate, it would be done at every one. So the seconds that keeping costs are added up,
and the set is changed when they have come to what changing takes: at most twice the time of who
knew all requests beforehand. What gains no more than the tolerance, or would take from the quality
or from the memory that the user wants free, is not weighed so: it is changed, or left, at once.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from autotune.decide.decision import TOLERANCE, Decision
from autotune.decide.explain import Terms
from autotune.decide.history import Applied
from autotune.decide.plan import Postponed, Reason
from autotune.decide.prediction import Prediction
from autotune.decide.search import Candidate, loss_of
from autotune.errors import OptimizationError
from autotune.optimizations.base import Setting
from autotune.probe.machine import Machine
from autotune.units import format_seconds


class Kept(NamedTuple):
    """A decision for what is on, and what was not changed to, if that would be faster.

    ``is_kept``: what is on is no choice that would be made anew.
    """

    decision: Decision
    postponed: Postponed | None = None
    is_kept: bool = False


def keeping(decision: Decision, applied: Applied, machine: Machine) -> Kept:
    """The decision for the set that is on, where changing it does not pay yet; else the same."""
    settings = applied.settings
    if settings == decision.chosen.settings or not decision.fits:
        return Kept(decision)
    if decision.space.judge.rule_in((*decision.kept, *settings)) is not None:
        return Kept(decision)
    try:
        prediction = decision.space.predict(settings)
    except OptimizationError:  # it needs a code path that this request does not have
        return Kept(decision)
    candidate = _candidate(settings, prediction)
    if not _may_stay(decision, candidate):
        return Kept(decision)
    kept = decision._replace(chosen=candidate)
    if candidate.seconds <= decision.pool.fastest_seconds * (1 + TOLERANCE):
        return Kept(kept, is_kept=True)
    postponed = _postponed(decision, prediction, machine)
    if applied.cost_s + postponed.saves_s >= postponed.takes_s:
        return Kept(decision)
    return Kept(kept, postponed, is_kept=True)


def said_of_kept(reason: Reason, without: Prediction, terms: Terms) -> Reason:
    """Why a member is there that nothing would be lost without: it was there before."""
    as_fast = without.mean_seconds <= terms.chosen.mean_seconds * (1 + TOLERANCE)
    largest = terms.chosen.needed_bytes * (1 + TOLERANCE)
    as_small = not terms.pool.least_bytes or without.needed_bytes <= largest
    if not (reason.fits_without and as_fast and as_small):
        return reason
    return msgspec.structs.replace(reason, text="on already, and changing it does not pay yet")


def note_on(postponed: Postponed) -> str:
    """One sentence on what was not changed to."""
    names = ", ".join(map(str, postponed.optimizations)) or "no optimization"
    return (
        f"what is on is kept: {names} would save {format_seconds(postponed.saves_s)} each time, "
        f"and changing takes {format_seconds(postponed.takes_s)}"
    )


def _may_stay(decision: Decision, candidate: Candidate) -> bool:
    """Whether it holds all that was asked for, but for the time."""
    pool = decision.pool
    is_small = not pool.least_bytes or candidate.needed_bytes <= pool.least_bytes * (1 + TOLERANCE)
    is_lossier = candidate.loss > decision.chosen.loss
    return is_small and not is_lossier and decision.budget.holds(candidate)


def _postponed(decision: Decision, prediction: Prediction, machine: Machine) -> Postponed:
    best = decision.space.predict(decision.chosen.settings)
    return Postponed(
        optimizations=decision.chosen.settings,
        saves_s=prediction.mean_seconds - best.mean_seconds,
        takes_s=_changing_s(prediction, best, machine),
    )


def _changing_s(on: Prediction, best: Prediction, machine: Machine) -> float:
    """Weights leave the device and come back, and what the other set does once is done again."""
    crossing = 0.0
    if machine.link is not None:
        outward, inward = machine.link.module_d2h_bytes_per_s, machine.link.module_h2d_bytes_per_s
        crossing = _resident(on) / outward.value + _resident(best) / inward.value
    return crossing + best.once_s


def _resident(prediction: Prediction) -> int:
    """The most weights that it has on the device at once."""
    return max(p.resident_bytes for p in prediction.phases)


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
