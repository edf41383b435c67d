"""Timing a callable on a device: warmed up, several samples, repeated once when disturbed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from autotune.probe.machine import Figure

DISTURBED_SPREAD = 0.15
"""Middle half of the samples wider than this fraction of the median: something got in the way."""

_BLOCK_S = (
    2e-3  # a sample lasts at least this long, so that clock and event resolution do not matter
)
_HEAD_START_CYCLES = 1_000_000  # about half a millisecond: longer than queueing some ten calls
_SAMPLES_MIN, _SAMPLES_MAX, _REPEATS_MAX = 3, 25, 1000

Call = Callable[[], object]


def time_call(call: Call, device: torch.device, *, budget_s: float = 0.1) -> Figure:
    """Seconds of one call, as the device sees them.

    The first call is warm-up (lazy kernels, algorithm choice, page faults) and is not counted.
    Quick calls are timed in blocks. A series whose spread is large is taken once more, and the
    quieter one is kept.

    Args:
        call: What to time; it may return before the device has finished.
        device: Where it runs. CUDA is timed by events, others by the clock.
        budget_s: About how long a series may take. A call three times as long is timed once.

    Returns:
        The median, with one raw sample per block.
    """
    block_seconds(call, device, 1)
    once = max(block_seconds(call, device, 1), 1e-9)
    if once >= 3 * budget_s:
        return Figure(value=once, samples=(once,))
    repeats = min(_REPEATS_MAX, max(1, round(_BLOCK_S / once)))
    series = _series(call, device, repeats, budget_s)
    if spread(series) > DISTURBED_SPREAD:
        series = min(series, _series(call, device, repeats, budget_s), key=spread)
    return Figure(value=statistics.median(series), samples=tuple(series))


def block_seconds(call: Call, device: torch.device, repeats: int, *, ahead: bool = False) -> float:
    """Mean seconds of ``repeats`` calls in a row, from an idle device to an idle device."""
    if device.type == "cuda":
        return _event_seconds(call, device, repeats, ahead=ahead)
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


def spread(samples: Figure | list[float] | tuple[float, ...]) -> float:
    """Width of the samples' middle half over their median; 0 for fewer than three samples."""
    values = samples.samples if isinstance(samples, Figure) else samples
    if len(values) < _SAMPLES_MIN:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle if middle else 0.0


def rate(seconds: Figure, amount: float) -> Figure:
    """``amount`` (FLOPs, bytes) per call, from the seconds of a call: amount per second."""
    samples = tuple(amount / sample for sample in seconds.samples)
    return Figure(value=amount / seconds.value, samples=samples, source=seconds.source)


def _series(call: Call, device: torch.device, repeats: int, budget_s: float) -> list[float]:
    samples: list[float] = []
    deadline = time.perf_counter() + budget_s
    while len(samples) < _SAMPLES_MAX:
        if len(samples) >= _SAMPLES_MIN and time.perf_counter() > deadline:
            break
        samples.append(block_seconds(call, device, repeats))
    return samples


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
