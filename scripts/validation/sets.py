"""Which sets are tried, and what of a set each phase sees. Pure: imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

from autotune.decide.decision import Catalogue
from autotune.decide.predict import Predictor
from autotune.decide.scope import reach_of
from autotune.decide.search import Judge, execution_of
from autotune.errors import OptimizationError
from autotune.optimizations import CATALOGUE, parse_setting
from autotune.optimizations.base import Optimization, Parameters, Setting
from autotune.probe.machine import Machine
from autotune.workload.workload import Workload

Set = tuple[Setting, ...]
Names = tuple[str, ...]
"""A set as on the command line: it can be a key."""

Key = tuple[str, frozenset[str]]
"""A phase, and the settings that it sees."""

MOST_IN_DENOISER = 2
"""The list is bounded: so many members at most that reach the denoiser, and any that do not."""


def names_of(settings: Iterable[Setting]) -> Names:
    """In the catalogue's order, so that equal sets have equal names."""
    order = list(CATALOGUE)
    return tuple(map(str, sorted(settings, key=lambda s: order.index(s.name))))


def set_of(names: Iterable[str]) -> Set:
    """The settings of these names."""
    return tuple(map(parse_setting, names))


def reach(setting: Setting, machine: Machine) -> frozenset[str]:
    """Roles of the components that a setting reaches."""
    return reach_of(execution_of((setting,)), machine.default_attention)


def in_denoiser(settings: Iterable[Setting], machine: Machine) -> int:
    """How many members reach the denoiser."""
    return sum("denoiser" in reach(s, machine) for s in settings)


def keys_of(settings: Iterable[Setting], machine: Machine, workload: Workload) -> dict[str, Key]:
    """Phase → what it sees of a set: where two sets look the same, the phase is the same."""
    reached = [(str(s), reach(s, machine)) for s in settings]
    keys = {}
    for phase in workload.phases:
        roles = {run.role for run in phase.runs}
        keys[phase.name] = (phase.name, frozenset(s for s, r in reached if r & roles))
    return keys


class _AsTried:
    """An optimization that offers nothing but what was tried of it, whatever is installed."""

    def __init__(self, optimization: Optimization, tried: Names) -> None:
        self._optimization = optimization
        self._tried = tried

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimization, name)

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        reason = self._optimization.unavailable(machine, workload)
        if reason is None and not self.worth_trying(machine, workload):
            return "it was not tried when this was recorded"
        return reason

    def worth_trying(self, machine: Machine, workload: Workload) -> tuple[Parameters, ...]:
        every = self._optimization.worth_trying(machine, workload)
        return tuple(p for p in every if str(self._optimization.setting(p)) in self._tried)


def catalogue_of(tried: Names) -> Catalogue:
    """Today's catalogue, as far as a recording has tried it; all of it where none is said."""
    if not tried:
        return CATALOGUE
    return {name: cast("Optimization", _AsTried(o, tried)) for name, o in CATALOGUE.items()}


def offered(
    machine: Machine, workload: Workload, without: Sequence[str], catalogue: Catalogue = CATALOGUE
) -> list[list[Setting]]:
    """For each optimization that can be tried here, its settings."""
    found = []
    for name, optimization in catalogue.items():
        if name not in without and not optimization.unavailable(machine, workload):
            parameters = optimization.worth_trying(machine, workload)
            found.append([optimization.setting(p) for p in parameters])
    return found


def offered_names(machine: Machine, workload: Workload, without: Sequence[str]) -> Names:
    """The same, as on the command line: what a recording says that it tried."""
    return tuple(str(s) for some in offered(machine, workload, without) for s in some)


def coherent_sets(
    predictor: Predictor, without: Sequence[str], catalogue: Catalogue = CATALOGUE
) -> list[Set]:
    """The bounded list: every coherent set, the empty one first."""
    machine = predictor.machine
    groups = offered(machine, predictor.workload, without, catalogue)
    judge = Judge(predictor, ())
    sets = _grown(groups, judge, machine)
    return [s for s in sets if _is_predictable(predictor, s)]


def _grown(groups: list[list[Setting]], judge: Judge, machine: Machine) -> Iterator[Set]:
    """Every way to take at most one setting of each optimization."""
    if not groups:
        yield ()
        return
    for rest in _grown(groups[1:], judge, machine):
        yield rest
        for setting in groups[0]:
            whole = (setting, *rest)
            if in_denoiser(whole, machine) <= MOST_IN_DENOISER and not judge.rule_with(
                rest, setting
            ):
                yield whole


def _is_predictable(predictor: Predictor, settings: Set) -> bool:
    try:
        predictor.predict(execution_of(settings))
    except OptimizationError:
        return False
    return True


def covering(predictor: Predictor, sets: Sequence[Set], first: Sequence[Set]) -> list[Set]:
    """Few sets in which every phase meets everything that it can see.

    Args:
        predictor: Says what comes early: what is simple, then what is predicted to be fast.
        sets: To choose from.
        first: Taken in any case, and counted.
    """
    machine, workload = predictor.machine, predictor.workload
    seconds = [predictor.predict(execution_of(s)).seconds for s in sets]
    by_promise = sorted(
        range(len(sets)), key=lambda i: (in_denoiser(sets[i], machine) > 1, seconds[i])
    )
    chosen: dict[Names, Set] = {}
    covered: set[Key] = set()
    for candidate in (*first, *(sets[i] for i in by_promise)):
        keys = set(keys_of(candidate, machine, workload).values())
        if keys - covered or (len(chosen) < len(first) and candidate in first):
            chosen[names_of(candidate)] = candidate
            covered |= keys
    return list(chosen.values())
