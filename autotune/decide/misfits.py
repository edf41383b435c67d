"""What ran out of memory is not tried again until more is free.

The prediction was too low, and nobody knows by how much. But the same model orders all sets: while
no more memory is available than when one ran out, only those that are predicted to need less than
that one are considered.
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


class _Held(NamedTuple):
    """A misfit that counts, and what it is predicted to need now of the memory that ran out."""

    misfit: Misfit
    needed_bytes: int


def is_outgrown(misfit: Misfit, budget: Budget) -> bool:
    """Whether more memory is available than when the set ran out."""
    available = budget.host_bytes if misfit.of_host else budget.device_bytes
    return available is None or available > _as_much(misfit)


def counting(history: History, budget: Budget) -> History:
    """The history without the misfits that are outgrown: all of it that decides."""
    held = tuple(m for m in history.misfits if not is_outgrown(m, budget))
    return msgspec.structs.replace(history, misfits=held)


def lowered(budget: Budget, predictor: Predictor) -> Budget:
    """The budget in which nothing fits that needs as much as what ran out."""
    for held in _held(budget, predictor):
        budget = _with_less(budget, held)
    return budget


def notes(budget: Budget, predictor: Predictor) -> tuple[str, ...]:
    """One sentence on each set that ran out of memory and still counts."""
    return tuple(_note(budget, held) for held in _held(budget, predictor))


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
        needed = prediction.host_bytes if misfit.of_host else prediction.needed_bytes
        yield _Held(misfit, needed)


def _distinct(misfits: Iterable[Misfit]) -> Iterable[Misfit]:
    """Of the same set, the latest."""
    return {(tuple(map(str, m.settings)), m.of_host): m for m in misfits}.values()


def _with_less(budget: Budget, held: _Held) -> Budget:
    most = max(0, held.needed_bytes - 1)
    if not held.misfit.of_host:
        return budget._replace(device_bytes=min(budget.device_bytes, most))
    return budget._replace(host_bytes=min(budget.host_bytes or 0, most))


def _note(budget: Budget, held: _Held) -> str:
    misfit = held.misfit
    names = ", ".join(map(str, misfit.settings)) or "no optimization"
    now = budget.host_bytes if misfit.of_host else budget.device_bytes
    memory = " of host RAM" if misfit.of_host else ""
    return (
        f"{names} ran out of memory when {format_bytes(misfit.available_bytes)}{memory} were "
        f"available; {format_bytes(now or 0)} are now: only what is predicted to need less than "
        f"{format_bytes(held.needed_bytes)} is considered"
    )
