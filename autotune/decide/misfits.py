"""What ran out of memory is not tried again until more is free.

The prediction was too low, and nobody knows by how much. But the same model orders all sets: while
no more memory is available than when one ran out, only those are considered that are predicted to
need less in the phase that it ran out in; where that is not known, less in the largest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from autotune.decide.history import History, Misfit
from autotune.decide.prediction import Budget
from autotune.errors import OptimizationError
from autotune.optimizations import execution_of
from autotune.units import format_bytes

if TYPE_CHECKING:
    from autotune.decide.predict import Predictor

MORE = 0.02
"""What is free wanders by so much from one reading to the next: that is no more than before."""


STEPS = (0.05, 0.0)
"""How much less it must be, relatively: predictions that differ by little do not say which needs
less, and each that is tried in vain costs time. Where that leaves nothing: any less."""


class _Held(NamedTuple):
    """A misfit that counts, and what it is predicted to need now of the memory that ran out.

    ``phase`` is that in which it did, if that is known and predicted.
    """

    misfit: Misfit
    needed_bytes: int
    phase: str | None


def is_outgrown(misfit: Misfit, budget: Budget) -> bool:
    """Whether more memory is available than when the set ran out."""
    available = budget.host_bytes if misfit.of_host else budget.device_bytes
    return available is None or available > _as_much(misfit)


def counting(history: History, budget: Budget) -> History:
    """The history without the misfits that are outgrown: all of it that decides."""
    held = tuple(m for m in history.misfits if not is_outgrown(m, budget))
    return msgspec.structs.replace(history, misfits=held)


def lowered(budget: Budget, predictor: Predictor, step: float = 0.0) -> Budget:
    """The budget in which nothing fits that needs as much as what ran out.

    Args:
        budget: What there is.
        predictor: With the history.
        step: How much less it must be, relatively.
    """
    for held in _held(budget, predictor):
        budget = _with_less(budget, held, _most(held, step))
    return budget


def notes(budget: Budget, predictor: Predictor, step: float) -> tuple[str, ...]:
    """One sentence on each set that ran out of memory and still counts."""
    return tuple(_note(budget, held, _most(held, step)) for held in _held(budget, predictor))


def with_more(budget: Budget, predictor: Predictor) -> Iterator[Budget]:
    """The budgets with just so much more memory that one misfit less counts, of each kind."""
    found = [h.misfit for h in _held(budget, predictor)]
    for misfit in sorted(found, key=lambda m: (m.of_host, m.available_bytes)):
        more = _as_much(misfit) + 1
        if misfit.of_host:
            yield budget._replace(host_bytes=more)
        else:
            yield budget._replace(device_bytes=more)


def _as_much(misfit: Misfit) -> int:
    """The most that counts as no more than there was."""
    return int(misfit.available_bytes * (1 + MORE))


def _held(budget: Budget, predictor: Predictor) -> Iterator[_Held]:
    for misfit in _distinct(predictor.history.misfits):
        if is_outgrown(misfit, budget):
            continue
        try:
            prediction = predictor.predict(execution_of(misfit.settings))
        except OptimizationError:  # it cannot be predicted, nor chosen
            continue
        in_phase = None if misfit.of_host else prediction.phase_needs.get(misfit.phase or "")
        if in_phase is not None:
            yield _Held(misfit, in_phase, misfit.phase)
        elif misfit.of_host:
            yield _Held(misfit, prediction.host_bytes, None)
        else:
            yield _Held(misfit, prediction.needed_bytes, None)


def _distinct(misfits: Iterable[Misfit]) -> Iterable[Misfit]:
    """Of the same set in the same phase, the latest."""
    return {(tuple(map(str, m.settings)), m.of_host, m.phase): m for m in misfits}.values()


def _most(held: _Held, step: float) -> int:
    return max(0, min(held.needed_bytes - 1, int(held.needed_bytes * (1 - step))))


def _with_less(budget: Budget, held: _Held, most: int) -> Budget:
    if held.phase is not None:
        most = min(most, budget.phase_bytes.get(held.phase, most))
        return budget._replace(phase_bytes={**budget.phase_bytes, held.phase: most})
    if not held.misfit.of_host:
        return budget._replace(device_bytes=min(budget.device_bytes, most))
    return budget._replace(host_bytes=min(budget.host_bytes or 0, most))


def _note(budget: Budget, held: _Held, most: int) -> str:
    misfit = held.misfit
    names = ", ".join(map(str, misfit.settings)) or "no optimization"
    now = budget.host_bytes if misfit.of_host else budget.device_bytes
    memory = " of host RAM" if misfit.of_host else ""
    where = f" in {held.phase}" if held.phase else ""
    return (
        f"{held.phase or 'it'} ran out of memory with {names} when "
        f"{format_bytes(misfit.available_bytes)}{memory} were available; "
        f"{format_bytes(now or 0)} are now: only what is predicted to need less than "
        f"{format_bytes(most + 1)}{where} is tried (this: {format_bytes(held.needed_bytes)})"
    )
