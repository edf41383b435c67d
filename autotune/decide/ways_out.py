"""When nothing fits: the cheapest things that would change it, each checked by a prediction."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import msgspec

from autotune.decide import misfits
from autotune.decide.decision import Catalogue, Decision, decide, select
from autotune.decide.limits import Limits, budget_within, looser_than
from autotune.decide.plan import Change, WayOut, WayOutKind
from autotune.decide.predict import Predictor
from autotune.decide.prediction import Budget
from autotune.decide.search import Candidate
from autotune.errors import AutotuneError
from autotune.probe.machine import GpuProcess, Machine
from autotune.units import format_bytes, format_seconds
from autotune.workload.workload import Request, Workload

Rework = Callable[[Request], Workload]
"""Traces the same model for another request."""

MOST_WAYS = 3
"""More would not be read."""

MOST_TRACES = 5
"""A trace takes a second or two, and somebody is waiting."""

SMALLER_SIDES = (3 / 4, 1 / 2)
SIDE_FACTOR = 64
"""Pixels: every model's sides may be multiples of it."""

HALF_DTYPES = ("bfloat16", "float16")


def ways_out(
    predictor: Predictor,
    limits: Limits,
    catalogue: Catalogue,
    decision: Decision,
    rework: Rework | None = None,
) -> tuple[WayOut, ...]:
    """The first few that help, the cheapest first.

    What costs the image nothing comes first: closing other programs, half the bytes per number,
    lifting the user's own limits, fewer images at once. Then quality, a smaller image, a shorter
    video, and at last hardware: how much memory is missing for the nearest miss is always known.

    Args:
        predictor: Of the workload that does not fit.
        limits: What the user allows.
        catalogue: The optimizations by name.
        decision: The nearest miss.
        rework: Traces another request; without it, what needs another trace is not offered.
    """
    search = _Search(predictor, limits, catalogue, decision, _counted(rework))
    kinds = (
        search.closing,
        search.in_half_precision,
        search.within_no_limits,
        search.fewer_at_once,
        search.at_less_quality,
        search.smaller,
        search.shorter,
        search.more_than_ran_out,
        search.more_host_memory,
        search.more_memory,
    )
    ways = itertools.chain.from_iterable(kind() for kind in kinds)
    return tuple(itertools.islice(ways, MOST_WAYS))


def _counted(rework: Rework | None) -> Rework | None:
    """The same, giving up after a few traces."""
    if rework is None:
        return None
    left = iter(range(MOST_TRACES))

    def trace(request: Request) -> Workload:
        if next(left, None) is None:
            raise AutotuneError("enough was traced")
        return rework(request)

    return trace


class _Search(NamedTuple):
    """Looks for ways out; every method yields one or none."""

    predictor: Predictor
    limits: Limits
    catalogue: Catalogue
    decision: Decision
    rework: Rework | None

    # ---- the same sets, with more memory for them -----------------------------------------------

    def closing(self) -> Iterator[WayOut]:
        """The fewest other programs whose memory would suffice."""
        device = self.predictor.machine.device
        holders = [p for p in device.processes if p.used_bytes]
        holders.sort(key=lambda p: (-(p.used_bytes or 0), p.pid))
        for count in range(1, len(holders) + 1):
            closed = holders[:count]
            freed = sum(p.used_bytes or 0 for p in closed)
            more = budget_within(_with_free(self.predictor.machine, freed), self.limits)
            budget = misfits.lowered(more, self.predictor)
            chosen = select(self.decision.candidates, budget, self.limits.priority)
            if budget.holds(chosen):
                names = " and ".join(map(_name, closed))
                hold = "holds" if count == 1 else "hold"
                what = f"closing {names}, which {hold} {format_bytes(freed)}"
                change: Change = {"pids": tuple(p.pid for p in closed)}
                yield _way("processes", what, change, chosen, budget)
                return

    def within_no_limits(self) -> Iterator[WayOut]:
        """Lifting one of the user's own restrictions."""
        for name, change in _LIFTS:
            lifted = msgspec.structs.replace(self.limits, **change)
            if lifted == self.limits:
                continue
            found = decide(self.predictor, lifted, self.catalogue)
            if found.fits:
                yield _way("limits", f"lifting {name}", change, found.chosen, found.budget)
                return

    def more_than_ran_out(self) -> Iterator[WayOut]:
        """More than there was when something ran out, where it would fit but for that."""
        available = self._available
        for more in misfits.with_more(available, self.predictor):
            budget = misfits.lowered(more, self.predictor)
            chosen = select(self.decision.candidates, budget, self.limits.priority)
            if not budget.holds(chosen):
                continue
            device = more.device_bytes - available.device_bytes
            if device:
                what = f"{format_bytes(device)} more free device memory"
                yield _way("vram", what, {"device_bytes": device}, chosen, budget)
            else:
                host = (more.host_bytes or 0) - (available.host_bytes or 0)
                what = f"{format_bytes(host)} more free host RAM"
                yield _way("ram", what, {"host_bytes": host}, chosen, budget)
            return

    def more_host_memory(self) -> Iterator[WayOut]:
        """The least that would do, where only host RAM is missing."""
        (device, host, *_), candidates = self._available, self._within_other_gpus()
        enough = [c.host_bytes for c in candidates if c.needed_bytes <= device]
        if host is None or not enough or min(enough) <= host:
            return
        budget = self._available._replace(host_bytes=min(enough))
        chosen = select(candidates, budget, self.limits.priority)
        what = f"{format_bytes(min(enough))} of free host RAM instead of {format_bytes(host)}"
        yield _way("ram", what, {"host_bytes": min(enough) - host}, chosen, budget)

    def more_memory(self) -> Iterator[WayOut]:
        """What the nearest miss lacks, unless it is host RAM alone."""
        available, candidates = self._available, self._within_other_gpus()
        device, host, elsewhere = available[:3]
        nearest = min(candidates, key=lambda c: (available.lacks(c), c.seconds))
        if nearest.needed_bytes <= device:
            return
        change: Change = {"device_bytes": nearest.needed_bytes - device}
        what = f"{format_bytes(nearest.needed_bytes - device)} more free device memory"
        if host is not None and nearest.host_bytes > host:
            change["host_bytes"] = nearest.host_bytes - host
            what += f" and {format_bytes(nearest.host_bytes - host)} more free host RAM"
            host = nearest.host_bytes
        enough = Budget(nearest.needed_bytes, host, elsewhere)
        chosen = select(candidates, enough, self.limits.priority)
        yield _way("vram", what, change, chosen, enough)

    @property
    def _available(self) -> Budget:
        """What there is, whatever ran out in it before."""
        return budget_within(self.predictor.machine, self.limits)

    def _within_other_gpus(self) -> list[Candidate]:
        """The sets that lack nothing of other GPUs' memory."""
        budget = self.decision.budget
        return [c for c in self.decision.candidates if budget.short_gpu(c) is None]

    # ---- other sets, or another request ---------------------------------------------------------

    def at_less_quality(self) -> Iterator[WayOut]:
        """The strictest looser level at which something fits."""
        for quality in looser_than(self.limits.quality):
            limits = msgspec.structs.replace(self.limits, quality=quality)
            found = decide(self.predictor, limits, self.catalogue)
            if found.fits:
                change: Change = {"quality": quality}
                what = f"quality {quality}"
                yield _way("quality", what, change, found.chosen, found.budget)
                return

    def in_half_precision(self) -> Iterator[WayOut]:
        """Half the bytes per number, where the device computes with such numbers."""
        rates = self.predictor.machine.kernels.matmul_flops_per_s
        half = next((d for d in HALF_DTYPES if d in rates), None)
        if self._request.dtype == "float32" and half is not None:
            yield from self._first("dtype", ((half, {"dtype": half}),))

    def fewer_at_once(self) -> Iterator[WayOut]:
        """Half of the batch, or one by one."""
        batch = self._request.batch
        fewer = sorted({batch // 2, 1} - {0, batch}, reverse=True)
        yield from self._first("batch", ((f"a batch of {n}", {"batch": n}) for n in fewer))

    def smaller(self) -> Iterator[WayOut]:
        """Three quarters or half of each side."""
        r = self._request
        sides = [(_shrunk(r.width, s), _shrunk(r.height, s)) for s in SMALLER_SIDES]
        yield from self._first(
            "size", ((f"{w}x{h}", {"width": w, "height": h}) for w, h in sides if w and h)
        )

    def shorter(self) -> Iterator[WayOut]:
        """Half or a quarter of the frames; video models want one more than a multiple of 8."""
        frames = self._request.frames
        fewer = [frames // part // 8 * 8 + 1 for part in (2, 4)] if frames > 8 else []
        yield from self._first("frames", ((f"{n} frames", {"frames": n}) for n in fewer))

    @property
    def _request(self) -> Request:
        return self.predictor.workload.request

    def _first(self, kind: WayOutKind, changes: Iterable[tuple[str, Change]]) -> Iterator[WayOut]:
        """The first changed request that fits; one that cannot be traced is passed over."""
        for what, change in changes:
            request = msgspec.structs.replace(self._request, **change)
            try:
                found = self._redecide(request)
            except AutotuneError:
                continue
            if found is not None and found.fits:
                yield _way(kind, what, change, found.chosen, found.budget)
                return

    def _redecide(self, request: Request) -> Decision | None:
        if self.rework is None:
            return None
        predictor = Predictor(self.predictor.machine, self.rework(request))
        return decide(predictor, self.limits, self.catalogue)


_LIFTS: tuple[tuple[str, Change], ...] = (
    ("--only and --without", {"only": (), "without": ()}),
    ("the VRAM limit", {"vram_limit": None}),
    ("the RAM limit", {"ram_limit": None}),
    ("the reserve", {"reserve": 0}),
)


def _way(kind: WayOutKind, what: str, change: Change, chosen: Candidate, budget: Budget) -> WayOut:
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


def _name(process: GpuProcess) -> str:
    return f"{process.name or 'the program'} (PID {process.pid})"


def _with_free(machine: Machine, more_bytes: int) -> Machine:
    free = min(machine.device.total_bytes, machine.device.free_bytes + more_bytes)
    device = msgspec.structs.replace(machine.device, free_bytes=free)
    return msgspec.structs.replace(machine, device=device)


def _shrunk(side: int, share: float) -> int:
    return int(side * share) // SIDE_FACTOR * SIDE_FACTOR
