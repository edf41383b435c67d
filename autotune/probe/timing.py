"""Timing a callable on a device: warmed up, several samples, repeated once when disturbed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from autotune.probe.deadline import Deadline, never
from autotune.probe.machine import Figure
from autotune.probe.noise import Watch
from autotune.probe.samples import UNSTEADY, figure_of, flagged, spread

COLD = "measured once, warm-up included: no time was left"

_BLOCK_S = (
    2e-3  # a sample lasts at least this long, so that clock and event resolution do not matter
)
_HEAD_START_CYCLES = 1_000_000  # about half a millisecond: longer than queueing some ten calls
_SAMPLES_MIN, _SAMPLES_MAX, _REPEATS_MAX = 3, 25, 1000
_LONGEST_CALL_S = 0.1
_TRIES = 5

Call = Callable[[], object]


@dataclass(frozen=True)
class Timer:
    """How everything on one device is timed.

    Attributes:
        device: CUDA is timed by events, others by the clock.
        budget_s: About how long a series of samples may take.
        deadline: When all must end; what is begun after it is timed once, without warm-up.
        watch: Tells what else went on; without one only the samples' spread does.
    """

    device: torch.device
    budget_s: float = 0.1
    deadline: Deadline = field(default_factory=never)
    watch: Watch | None = None

    def time(self, call: Call, share: float = 1.0) -> Figure:
        """Seconds of one call, as the device sees them.

        The first call is warm-up (lazy kernels, algorithm choice, page faults) and is not counted.
        Quick calls are timed in blocks. A series with a large spread, or during which something
        else went on, is taken once more, and the quieter one kept: see ``Figure.disturbances``.

        Args:
            call: What to time; it may return before the device has finished.
            share: Of ``budget_s``, for this figure. A call that takes three times as long is timed
                once.

        Returns:
            The median, with one raw sample per block.
        """
        cold = block_seconds(call, self.device, 1)
        if self.deadline.has_passed:
            return figure_of([cold], COLD)
        finish = self._begin()
        once = max(block_seconds(call, self.device, 1), 1e-9)
        budget_s = share * self.budget_s
        repeats = min(_REPEATS_MAX, max(1, round(_BLOCK_S / once)))

        def take() -> list[float]:
            if once >= 3 * budget_s:
                return [block_seconds(call, self.device, 1)]
            return self._series(call, repeats, budget_s)

        is_enough = once >= 3 * budget_s or self.deadline.has_passed
        first = (flagged([once], finish()),) if is_enough else None
        return self.watched(lambda: (take(),), first)[0]

    def watched(
        self,
        take: Callable[[], tuple[list[float], ...]],
        first: tuple[Figure, ...] | None = None,
    ) -> tuple[Figure, ...]:
        """Figures of series that are taken together: once more, where something disturbed one.

        Args:
            take: Takes them.
            first: What a first time came to, if it was watched already.
        """
        found = first or self._take(take)
        if any(figure.disturbances for figure in found) and not self.deadline.has_passed:
            again = self._take(take)
            found = min(found, again, key=lambda figures: max(map(_loudness, figures)))
        return found

    def largest(self, sizes: tuple[int, ...], call_of: Callable[[int], Call], power: int) -> int:
        """The largest of the sizes at which a call should take no more than a tenth of a second.

        On a slow device a call of the largest size could take longer than all the rest.

        Args:
            sizes: Smallest first.
            call_of: A call of that size.
            power: The call's time grows with this power of the size.
        """
        for size, larger in itertools.pairwise(sizes):
            if self.deadline.has_passed:
                return size
            longest = min(_LONGEST_CALL_S, self.deadline.left_s / 10)
            if self._quickest(call_of(size)) * (larger / size) ** power > longest:
                return size
        return sizes[-1]

    def _quickest(self, call: Call) -> float:
        """Seconds of the quickest of a few calls: one that nothing got in the way of.

        On a CPU they are this thread's own: on a busy one the threads of a small call wait for one
        another longer than they work, and a large call waits no longer.
        """

        def once() -> float:
            start = time.thread_time()
            seconds = block_seconds(call, self.device, 1)
            return time.thread_time() - start if self.device.type == "cpu" else seconds

        end = self.deadline.part(self.deadline.left_s / 20)
        seconds = [once()]
        while len(seconds) < _TRIES and not end.has_passed:
            seconds.append(once())
        return min(seconds)

    def within(self, seconds: float) -> Timer:
        """The same for a part that may take so long."""
        return replace(self, deadline=self.deadline.part(seconds))

    def _begin(self) -> Callable[[], tuple[str, ...]]:
        return tuple if self.watch is None else self.watch.begin()

    def _take(self, take: Callable[[], tuple[list[float], ...]]) -> tuple[Figure, ...]:
        finish = self._begin()
        every = take()
        disturbances = finish()
        return tuple(flagged(samples, disturbances) for samples in every)

    def _series(self, call: Call, repeats: int, budget_s: float) -> list[float]:
        samples: list[float] = []
        end = self.deadline.part(budget_s)
        while len(samples) < _SAMPLES_MAX:
            enough = 1 if self.deadline.has_passed else _SAMPLES_MIN
            if len(samples) >= enough and end.has_passed:
                break
            samples.append(block_seconds(call, self.device, repeats))
        return samples


def time_call(call: Call, device: torch.device, *, budget_s: float = 0.1) -> Figure:
    """Seconds of one call; see :meth:`Timer.time`."""
    return Timer(device, budget_s).time(call)


def block_seconds(call: Call, device: torch.device, repeats: int, *, ahead: bool = False) -> float:
    """Mean seconds of ``repeats`` calls in a row, from an idle device to an idle device.

    Args:
        call: May return before the device has finished.
        device: CUDA is timed by events, others by the clock.
        repeats: How many calls.
        ahead: Let the calls queue up first where the device can wait (CUDA): so are kernels timed,
            not their dispatch.
    """
    if device.type == "cuda":
        return _event_seconds(call, device, repeats, ahead=ahead)
    return wall_seconds(call, device, repeats)


def wall_seconds(call: Call, device: torch.device, repeats: int = 1) -> float:
    """The same by the clock: what the host does counts too."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what was asked of it; nothing to wait for on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _loudness(figure: Figure) -> tuple[bool, float]:
    """What somebody else did to a series is worse than what cannot be explained.

    Beside somebody else the quicker of two series suffered less, however steady the other.
    """
    beside_others = any(reason != UNSTEADY for reason in figure.disturbances)
    return beside_others, figure.value if beside_others else spread(figure)


def _event_seconds(call: Call, device: torch.device, repeats: int, *, ahead: bool) -> float:
    with torch.cuda.device(device):
        start, end = (_timing_event() for _ in range(2))
        torch.cuda.synchronize(device)
        if ahead:
            # The device waits while the calls are queued: short kernels are timed, not dispatch.
            torch.cuda._sleep(_HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeats


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
