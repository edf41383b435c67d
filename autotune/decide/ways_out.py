"""When nothing fits: the cheapest things that would change it, each checked by a prediction."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from autotune.decide import misfits
from autotune.decide.changes import (
    LARGEST_GPU_BYTES,
    LARGEST_RAM_BYTES,
    Situation,
    Steps,
    asked,
    changed,
    closing,
    fewer_at_once,
    fewer_frames_at_once,
    holding,
    in_half_precision,
    is_there,
    lifting,
    lifting_memory,
    of_less_quality,
    said_of_memory,
    shorter,
    smaller,
)
from autotune.decide.decision import Catalogue, Decision, decide, smallest_of, within
from autotune.decide.limits import QUALITIES, Limits, budget_within
from autotune.decide.plan import Change, WayOut, WayOutKind
from autotune.decide.predict import Predictor
from autotune.decide.prediction import Budget
from autotune.decide.search import Candidate
from autotune.errors import AutotuneError
from autotune.units import format_bytes, format_seconds
from autotune.workload.workload import Request, Workload

Rework = Callable[[Request], Workload]
"""Traces the same model for another request."""

MOST_WAYS = 3
"""More would not be read."""

MOST_TRACES = 5
"""A trace takes a second or two, and somebody is waiting."""

MOST_SPACES = 12
"""So many times the sets are enumerated anew, which takes up to a second each."""


def ways_out(
    predictor: Predictor,
    limits: Limits,
    catalogue: Catalogue,
    decision: Decision,
    rework: Rework | None = None,
) -> tuple[WayOut, ...]:
    """The first few that help, the cheapest first; none where nothing within reason does.

    What costs the image nothing comes first: closing other programs, half the bytes per number,
    lifting the user's own limits, fewer images or frames at once. Then quality, a smaller image, a
    shorter video, and memory that could be freed. Then two of these together where neither helps
    alone, and at last hardware.

    Args:
        predictor: Of the workload that does not fit.
        limits: What the user allows.
        catalogue: The optimizations by name.
        decision: The nearest miss.
        rework: Traces another request; without it, what needs another trace is not offered.
    """
    search = _Search(predictor, limits, catalogue, decision, rework)
    return tuple(itertools.islice(search.ways(), MOST_WAYS))


class _Offer(NamedTuple):
    """What there is to choose from, however much memory there is."""

    predictor: Predictor
    candidates: Sequence[Candidate]


class _Search:
    """Looks for ways out."""

    def __init__(
        self,
        predictor: Predictor,
        limits: Limits,
        catalogue: Catalogue,
        decision: Decision,
        rework: Rework | None,
    ) -> None:
        self._predictor = predictor
        self._limits = limits
        self._catalogue = catalogue
        self._decision = decision
        self._rework = rework
        self._traces_left, self._spaces_left = MOST_TRACES, MOST_SPACES
        self._traced: dict[str, Workload | None] = {}
        offer = _Offer(predictor, decision.candidates)
        request = predictor.workload.request
        self._offers: dict[str, _Offer | None] = {_key(request, limits): offer}

    def ways(self) -> Iterator[WayOut]:
        """The cheapest first."""
        helpless: list[Steps] = []
        for steps in filter(None, self._kinds()):
            way = self._mildest([(step,) for step in steps])
            if way is None:
                helpless.append(steps)
            else:
                yield way
        memory = list(self._more_memory())
        freed = [way for way in memory if is_there(self._predictor.machine, way.change)]
        yield from freed
        for cheaper, dearer in _pairs(helpless):
            way = self._mildest([(a, b) for b in dearer for a in cheaper])
            if way is not None:
                yield way
        yield from (way for way in memory if way not in freed)

    def _kinds(self) -> Iterator[Steps]:
        """What can be changed, the cheapest first."""
        machine, limits, request = self._situation
        yield closing(machine)
        yield in_half_precision(request, machine)
        yield lifting(limits)
        if self._ram_suffices():
            yield fewer_at_once(request)
            yield fewer_frames_at_once(request, self._predictor.workload.pipeline)
        yield of_less_quality(limits)
        if self._ram_suffices():
            yield smaller(request)
            yield shorter(request)

    def _ram_suffices(self) -> bool:
        """Whether a smaller request could fit: in host RAM lie weights, whatever is asked."""
        available = self._decision.available._replace(
            host_bytes=self._predictor.machine.host.ram_available_bytes
        )
        if self._decision.available.host_bytes is None:
            return True
        loosest = msgspec.structs.replace(self._limits, quality=QUALITIES[-1])
        offers = (self._offer(self._predictor.workload.request, x) for x in (self._limits, loosest))
        return any(available.host_holds(c) for o in offers if o for c in o.candidates)

    @property
    def _situation(self) -> Situation:
        workload = self._predictor.workload
        return Situation(self._predictor.machine, self._limits, workload.request)

    # ---- whether it helps -----------------------------------------------------------------------

    def _mildest(self, ways: Sequence[Steps]) -> WayOut | None:
        """The first that leads out; none does unless the last does, which changes most."""
        last = self._way(ways[-1])
        if last is None:
            return None
        return next(filter(None, map(self._way, ways[:-1])), last)

    def _way(self, steps: Steps) -> WayOut | None:
        """All these steps together, where they lead out."""
        change: Change = {}
        for step in steps:
            change |= step.change
        found = self._after(change)
        if found is None:
            return None
        what = " and ".join(step.what for step in steps)
        return _worded(steps[-1].kind, what, change, *found)

    def _after(self, change: Change) -> tuple[Candidate, Budget] | None:
        """What would then be chosen; ``None`` where nothing would fit."""
        machine, limits, request = changed(self._situation, change)
        offer = self._offer(request, limits)
        if offer is None:
            return None
        available = budget_within(machine, limits)
        held = within(offer.candidates, available, offer.predictor, limits.priority)
        chosen = smallest_of(held.pool, held.budget)
        return (chosen, held.budget) if held.budget.holds(chosen) else None

    def _offer(self, request: Request, limits: Limits) -> _Offer | None:
        key = _key(request, limits)
        if key not in self._offers:
            self._offers[key] = self._offered(request, limits)
        return self._offers[key]

    def _offered(self, request: Request, limits: Limits) -> _Offer | None:
        predictor = self._predictor
        if request != predictor.workload.request:
            workload = self._workload(request)
            if workload is None:
                return None
            predictor = Predictor(predictor.machine, workload, limits.images)
        if not self._spaces_left:
            return None
        self._spaces_left -= 1
        return _Offer(predictor, decide(predictor, limits, self._catalogue).candidates)

    def _workload(self, request: Request) -> Workload | None:
        """Another request, unless it cannot be traced or enough was."""
        key = str(request)
        if key not in self._traced and self._rework is not None and self._traces_left:
            self._traces_left -= 1
            try:
                self._traced[key] = self._rework(request)
            except AutotuneError:  # the model refuses it
                self._traced[key] = None
        return self._traced.get(key)

    # ---- the same sets, with more memory for them -----------------------------------------------

    def _more_memory(self) -> Iterator[WayOut]:
        """The least that would do; the user's limits are lifted where they leave no room for it."""
        lifts: tuple[Change, Change] = ({}, lifting_memory(self._limits))
        for lift in lifts:
            found = list(filter(None, map(self._with_memory, self._memory_changes(lift))))
            yield from found
            if found:
                return

    def _memory_changes(self, lift: Change) -> Iterator[Change]:
        """What could be asked for.

        More than there was when something ran out; of RAM alone, or of the device's alone; of both
        only where no set makes do with one.
        """
        situation = changed(self._situation, lift)
        available = budget_within(situation.machine, situation.limits)
        targets = list(misfits.with_more(available, self._predictor))
        most: Change = {"device_bytes": LARGEST_GPU_BYTES, "host_bytes": LARGEST_RAM_BYTES}
        most_machine, most_limits, _ = changed(situation, most)
        roomy = budget_within(most_machine, most_limits)
        sets = [c for c in self._decision.candidates if roomy.holds(c)]
        short_of_ram = [c for c in sets if c.needed_bytes <= available.device_bytes]
        short_on_device = [c for c in sets if available.host_holds(c)]
        one_is_enough = [found for found in (short_of_ram, short_on_device) if found]
        for curable in one_is_enough or [sets] if sets else []:
            nearest = min(curable, key=lambda c: (available.shortage(c), c.seconds))
            targets.append(holding(available, nearest))
        more = (asked(situation, available, target) for target in targets)
        yield from (change | lift for change in more if change)

    def _with_memory(self, change: Change) -> WayOut | None:
        found = self._after(change)
        if found is None:
            return None
        kind: WayOutKind = "vram" if "device_bytes" in change else "ram"
        what = said_of_memory(self._predictor.machine, change)
        return _worded(kind, what, change, *found)


def _key(request: Request, limits: Limits) -> str:
    """All that the sets to choose from depend on, memory aside."""
    return f"{request} {limits.quality} {limits.only} {limits.without}"


def _pairs(kinds: Sequence[Steps]) -> Iterator[tuple[Steps, Steps]]:
    """Two kinds each, those first whose dearer one is cheap."""
    for place, dearer in enumerate(kinds):
        for cheaper in kinds[:place]:
            yield cheaper, dearer


def _worded(
    kind: WayOutKind, what: str, change: Change, chosen: Candidate, budget: Budget
) -> WayOut:
    names = ", ".join(s.name for s in chosen.settings) or "no optimization"
    cost = f"{format_seconds(chosen.seconds)}, needs {format_bytes(chosen.needed_bytes)}"
    return WayOut(
        kind=kind,
        text=f"{what} ({names}: {cost})",
        change=change,
        optimizations=chosen.settings,
        seconds=chosen.seconds,
        needed_bytes=chosen.needed_bytes,
        host_bytes=chosen.host_bytes,
        budget_bytes=budget.device_bytes,
        host_budget_bytes=budget.host_bytes,
    )
