"""Every coherent set of optimizations, predicted: those that could be anybody's choice.

Sets multiply: two dozen optimizations with their parameters make millions. But seconds add up over
phases and the memory needed is that of the largest, so an optimization that reaches one phase only
(``scope.py``) is decided there: within a phase, a combination is left out when another is at least
as fast and as small, as exact and as few. What is left out can be no one's choice, as a test holds
against the plain enumeration.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import add, le
from typing import NamedTuple, TypeVar

from autotune.decide.limits import QUALITIES, level_of
from autotune.decide.predict import Predictor
from autotune.decide.prediction import Prediction, most_of_each
from autotune.decide.rules import broken_rule, transfer_dominates
from autotune.decide.scope import reach_of
from autotune.optimizations import execution_of, find
from autotune.optimizations.base import Setting
from autotune.optimizations.execution import Execution
from autotune.optimizations.rule import Rule

__all__ = ["Candidate", "Judge", "Loss", "Space", "execution_of", "loss_of"]

Loss = tuple[int, ...]
"""How many members need each quality level, the loosest first; exact ones are not counted."""


class Candidate(NamedTuple):
    """One coherent set and what it comes to.

    Attributes:
        settings: Its members, in the catalogue's order.
        seconds: Of one generation, with its share of what is done once.
        needed_bytes: Of device memory.
        host_bytes: Of host RAM.
        loss: What it takes of the quality.
        phases_bytes: The needs of all phases together: where the largest is the same, the others
            may still be smaller.
        elsewhere_bytes: Of other GPUs' memory, by their index.
        phase_needs: Of device memory, by phase.
    """

    settings: tuple[Setting, ...]
    seconds: float
    needed_bytes: int
    host_bytes: int
    loss: Loss
    phases_bytes: int
    elsewhere_bytes: dict[int, int]
    phase_needs: dict[str, int]


def loss_of(settings: Iterable[Setting]) -> Loss:
    """What a set takes of the quality."""
    levels = [level_of(find(s.name), s.parameters) for s in settings]
    return tuple(levels.count(level) for level in range(len(QUALITIES) - 1, 0, -1))


class Judge:
    """Which optimizations go together on this machine for this workload.

    A set is coherent when each two of its members are. A rule that depends on a prediction is asked
    about the two alone: otherwise a third, useless member could make a set coherent again.

    Args:
        predictor: Predicts.
        kept: What is set by hand, in every prediction.
    """

    def __init__(self, predictor: Predictor, kept: Sequence[Setting]) -> None:
        self._predictor = predictor
        self._base = execution_of(kept)
        self._kept = frozenset(s.name for s in kept)
        self._by_names: dict[frozenset[str], tuple[Rule | None, Rule | None]] = {}

    def rule_between(self, first: Setting, second: Setting) -> Rule | None:
        """The rule that two members break, if any."""
        names = frozenset((first.name, second.name))
        if names not in self._by_names:
            self._by_names[names] = (
                broken_rule(names, kept=self._kept),
                broken_rule(names, kept=self._kept, dominated=True),
            )
        always, while_dominated = self._by_names[names]
        if always is not None or while_dominated is None:
            return always
        both = execution_of((first, second), self._base)
        return while_dominated if transfer_dominates(self._predictor.phases(both)) else None

    def rule_with(self, others: Iterable[Setting], setting: Setting) -> Rule | None:
        """The first rule that a member breaks with any of the others."""
        return next(filter(None, (self.rule_between(s, setting) for s in others)), None)

    def rule_in(self, settings: Sequence[Setting]) -> Rule | None:
        """The first rule that a set breaks, ``None`` where it is coherent."""
        found = (self.rule_with(settings[:i], s) for i, s in enumerate(settings))
        return next(filter(None, found), None)


_T = TypeVar("_T")


class _Member(NamedTuple):
    """A setting that may be taken, by its place among all: sets are bits of an integer."""

    place: int
    setting: Setting
    loss: Loss
    clashes: int

    @property
    def bit(self) -> int:
        return 1 << self.place


class _Part(NamedTuple):
    """A combination of what reaches one phase only, and what the phase then comes to.

    Or several phases, one after the other, with what reaches each and what reaches all of them.
    """

    members: tuple[_Member, ...]
    seconds: float
    needs: tuple[int, ...]
    loss: Loss
    elsewhere_bytes: dict[int, int]

    def plus(self, later: _Part) -> _Part:
        """These phases, then others."""
        both = self.elsewhere_bytes, later.elsewhere_bytes
        return _Part(
            self.members + later.members,
            self.seconds + later.seconds,
            self.needs + later.needs,
            tuple(map(add, self.loss, later.loss)),
            most_of_each(both) if any(both) else {},
        )


class _Costs(NamedTuple):
    """A combination of what reaches one phase only, and what it costs wherever weights are."""

    members: tuple[_Member, ...]
    values: tuple[float, ...]
    loss: Loss


_Groups = tuple[tuple[_Member, ...], ...]
"""The members that each optimization offers; at most one of each is taken."""


class Space:
    """The coherent sets for one workload on one machine.

    Args:
        predictor: Predicts.
        options: The settings that each optimization offers.
        kept: What is set by hand, in every set.
    """

    def __init__(
        self,
        predictor: Predictor,
        options: Mapping[str, Sequence[Setting]],
        kept: Sequence[Setting],
    ) -> None:
        self._predictor = predictor
        self._base = execution_of(kept)
        self.judge = Judge(predictor, kept)
        groups = self._members(options, kept)
        self._shared, self._local = self._split(groups)
        self._placeable: dict[tuple[object, ...], list[_Costs]] = {}

    def predict(self, settings: Iterable[Setting]) -> Prediction:
        """A set on top of what is set by hand."""
        return self._predictor.predict(execution_of(settings, self._base))

    def candidates(self) -> list[Candidate]:
        """The empty set, and every set that is not worse in all respects than another."""
        return [
            candidate
            for members, execution in self._combinations(self._shared, 0, self._base)
            for candidate in self._completed(members, execution)
        ]

    # ---- what there is to combine ---------------------------------------------------------------

    def _members(
        self, options: Mapping[str, Sequence[Setting]], kept: Sequence[Setting]
    ) -> list[tuple[_Member, ...]]:
        """The settings that go with what is set by hand, and what each of them clashes with."""
        judge = self.judge
        settings = [s for o in options.values() for s in o if judge.rule_with(kept, s) is None]
        clashes = [0] * len(settings)
        for (i, first), (j, second) in itertools.combinations(enumerate(settings), 2):
            if first.name == second.name or judge.rule_between(first, second):
                clashes[i] |= 1 << j
                clashes[j] |= 1 << i
        members = [
            _Member(place, s, loss_of((s,)), clashes[place]) for place, s in enumerate(settings)
        ]
        return [tuple(g) for _, g in itertools.groupby(members, key=lambda m: m.setting.name)]

    def _split(self, groups: list[tuple[_Member, ...]]) -> tuple[_Groups, tuple[_Groups, ...]]:
        """What reaches several phases, and for each phase what reaches it alone.

        What reaches nothing is left out: with and without it, everything is the same.
        """
        reached = [self._phases_reached(g) for g in groups]
        for (i, a), (j, b) in itertools.combinations(enumerate(groups), 2):
            others = sum(m.bit for m in b)
            apart = len(reached[i]) == len(reached[j]) == 1 and reached[i] != reached[j]
            if apart and any(m.clashes & others for m in a):
                reached[i] = reached[j] = reached[i] | reached[j]
        shared = tuple(g for g, found in zip(groups, reached, strict=True) if len(found) > 1)
        local = tuple(
            tuple(g for g, found in zip(groups, reached, strict=True) if found == {phase})
            for phase in range(len(self._predictor.workload.phases))
        )
        return shared, local

    def _phases_reached(self, group: tuple[_Member, ...]) -> set[int]:
        """Places of the phases that an optimization can change; loading is one more place."""
        phases = self._predictor.workload.phases
        attention = self._predictor.machine.default_attention
        reach = frozenset().union(*(reach_of(execution_of((m.setting,)), attention) for m in group))
        if "load" in reach:
            return {-1, *range(len(phases))}
        return {i for i, p in enumerate(phases) if any(r.role in reach for r in p.runs)}

    # ---- combining it ---------------------------------------------------------------------------

    def _combinations(
        self, groups: _Groups, taken: int, execution: Execution
    ) -> Iterator[tuple[tuple[_Member, ...], Execution]]:
        """Every way to take at most one member of each group, cut off where two clash."""
        if not groups:
            yield (), execution
            return
        for rest, done in self._combinations(groups[1:], taken, execution):
            yield rest, done
        for member in groups[0]:
            if not member.clashes & taken:
                extended = execution_of((member.setting,), execution)
                for rest, done in self._combinations(groups[1:], taken | member.bit, extended):
                    yield (member, *rest), done

    def _completed(self, members: tuple[_Member, ...], execution: Execution) -> Iterator[Candidate]:
        """What reaches several phases being given: the combinations of each phase's own."""
        loading_bytes, host_bytes = self._predictor.around(execution)
        taken = sum(m.bit for m in members)
        names = [p.name for p in self._predictor.workload.phases]
        wholes = [_Part(members, 0.0, (), _loss(members), {})]
        for phase in range(len(names)):
            front = self._front(phase, taken, execution)
            wholes = [whole.plus(part) for whole in wholes for part in front]
        for whole in wholes:
            yield Candidate(
                settings=tuple([m.setting for m in sorted(whole.members)]),
                seconds=whole.seconds,
                needed_bytes=max(loading_bytes, *whole.needs),
                host_bytes=host_bytes,
                loss=whole.loss,
                phases_bytes=sum(whole.needs),
                elsewhere_bytes=whole.elsewhere_bytes,
                phase_needs=dict(zip(names, whole.needs, strict=True)),
            )

    def _front(self, phase: int, taken: int, execution: Execution) -> list[_Part]:
        """The phase's combinations that no other is at least as good as in every respect."""
        worth_placing = self._worth_placing(phase, taken, execution)
        parts = [self._part(phase, costs, execution) for costs in worth_placing]
        # What another is better than comes after it.
        parts.sort(key=_cost)
        return _undominated(parts, _is_as_good)

    def _worth_placing(self, phase: int, taken: int, execution: Execution) -> list[_Costs]:
        """The phase's combinations that may be best wherever weights are: once for all places."""
        clashing = sum(m.bit for g in self._local[phase] for m in g if m.clashes & taken)
        key = (phase, clashing, self._predictor.costed(phase, execution))
        if key not in self._placeable:
            costs = [
                _Costs(members, self._predictor.costs(phase, done), _loss(members))
                for members, done in self._combinations(self._local[phase], taken, execution)
            ]
            costs.sort(key=lambda c: (c.values, len(c.members), c.loss))
            self._placeable[key] = _undominated(costs, _costs_no_more)
        return self._placeable[key]

    def _part(self, phase: int, costs: _Costs, execution: Execution) -> _Part:
        placed = execution_of((m.setting for m in costs.members), execution)
        found = self._predictor.phase(phase, placed)
        seconds = found.seconds + found.once_s / self._predictor.images
        return _Part(
            costs.members, seconds, (found.needed_bytes,), costs.loss, found.elsewhere_bytes
        )


_NO_LOSS: Loss = (0,) * (len(QUALITIES) - 1)


def _loss(members: Iterable[_Member]) -> Loss:
    return tuple(map(sum, zip(_NO_LOSS, *[m.loss for m in members], strict=True)))


def _undominated(ordered: list[_T], is_as_good: Callable[[_T, _T], bool]) -> list[_T]:
    """Those that none before them is as good as."""
    kept: list[_T] = []
    for item in ordered:
        if not any(is_as_good(other, item) for other in kept):
            kept.append(item)
    return kept


def _costs_no_more(one: _Costs, other: _Costs) -> bool:
    return (
        len(one.members) <= len(other.members)
        and all(map(le, one.values, other.values))
        and all(map(le, one.loss, other.loss))
    )


def _cost(part: _Part) -> tuple[object, ...]:
    elsewhere = sum(part.elsewhere_bytes.values())
    return part.seconds, part.needs, len(part.members), part.loss, elsewhere


def _is_as_good(one: _Part, other: _Part) -> bool:
    return (
        one.needs <= other.needs
        and one.seconds <= other.seconds
        and len(one.members) <= len(other.members)
        and all(map(le, one.loss, other.loss))
        and all(b <= other.elsewhere_bytes[gpu] for gpu, b in one.elsewhere_bytes.items())
    )
