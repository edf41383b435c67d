"""Operator replay: run each distinct operator of a trace on random data, and note its time.

A model's step is then predicted without its weights: the sum of its operators, plus what the
Python around them costs (``host_seconds_per_operator``). Operators run in the order of the trace,
each once a round, on changing parts of one buffer: so caches hold about what they hold in the real
forward, and memory is needed for the largest operator only.

A trace may hold anything. What cannot be rebuilt, or raises, is left to rates; nothing of it ends
the replay.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from autotune.probe.deadline import Deadline
from autotune.probe.devices import at_most, empty_cache
from autotune.probe.machine import OperatorTime
from autotune.probe.operands import Buffers, Group, fitting, rebuild
from autotune.probe.samples import DISTURBED_SPREAD, spread
from autotune.probe.timing import block_seconds, wall_seconds
from autotune.workload.workload import Operator

_ROUNDS_MAX = 9

_WARM_UP_SHARE = 0.3
"""Of the budget, for the first calls of each operator: lazy kernels and algorithm choice."""

_LONG_SHARE = 0.02
"""Of the budget: a first call that takes longer is not made again at once, the rounds do that."""

_PLANNED_SHARE = 0.75
"""Of the memory given, for arguments and output; the rest is for workspaces and allocators."""

_CUDA_CALLS, _CUDA_SAMPLE_S = 10, 1e-3
"""Calls in a sample: as many as last so long, up to a number. Events resolve half a microsecond."""


class _Prepared(NamedTuple):
    """An operator that has run.

    Attributes:
        operator: Which.
        calls: Of it, each on other parts of the buffers; a sample goes through all.
        first_s: Its first call, by the clock.
        steady_s: Its second one; the first, where that took long.
        workspace_bytes: What that took besides its output; only CUDA's allocator tells.
    """

    operator: Operator
    calls: tuple[Callable[[], Any], ...]
    first_s: float
    steady_s: float
    workspace_bytes: int | None

    @property
    def sample_s(self) -> float:
        """About what a sample takes."""
        return self.steady_s * len(self.calls)

    def timed(self, samples: list[float]) -> OperatorTime:
        seconds = _typical(samples)
        steady_s = seconds if self.steady_s == self.first_s else max(self.steady_s, seconds)
        extra = max(0.0, self.first_s - steady_s)
        raw = tuple(float(f"{sample:.4g}") for sample in samples)
        return OperatorTime(seconds, self.workspace_bytes, extra, raw)


def replay(
    operators: Iterable[Operator],
    device: torch.device,
    *,
    known: Mapping[str, OperatorTime],
    budget_s: float,
    memory_bytes: int,
    weight: Callable[[Operator], float],
) -> dict[str, OperatorTime]:
    """Time distinct operators, of each name the heaviest, as many more as the budget allows.

    Args:
        operators: Of any number of traces, in their order; equal ones are run once.
        device: Where to run them.
        known: Timed before: not run again.
        budget_s: Seconds to spend; what is not reached is left out. A call that has begun is
            waited for.
        memory_bytes: Device memory that all of this may take; larger operators are left out.
        weight: Estimated seconds of all calls of an operator.

    Returns:
        New times by ``Operator.key``; ``seconds`` is ``None`` where one cannot be run alone, or not
        within the memory.
    """
    deadline = Deadline(budget_s)
    wanted = {o.key: o for o in operators if o.key not in known and o.bytes <= memory_bytes}
    groups, unfit = fitting(_in_order(wanted.values(), weight), int(_PLANNED_SHARE * memory_bytes))
    found = {operator.key: OperatorTime(None) for operator in unfit}
    with torch.no_grad(), _own_random_state(device), at_most(device, memory_bytes):
        for group in groups:
            if deadline.has_passed:
                break
            found |= _replay_group(group, list(wanted), device, deadline)
            empty_cache(device)
    return found


def _in_order(operators: Iterable[Operator], weight: Callable[[Operator], float]) -> list[Operator]:
    """The heaviest first; before them all, the heaviest of each name: it stands for the others."""
    heaviest_first = sorted(operators, key=weight, reverse=True)
    of_each_name = {o.name: o for o in reversed(heaviest_first)}
    first = {o.key for o in of_each_name.values()}
    return sorted(heaviest_first, key=lambda o: o.key not in first)


def _replay_group(
    group: Group, order: list[str], device: torch.device, deadline: Deadline
) -> dict[str, OperatorTime]:
    """Times of operators that share buffers; the group has the most telling first."""
    buffers = Buffers(group, device)
    ready: dict[str, _Prepared] = {}
    alone: dict[str, OperatorTime] = {}  # cannot be run alone
    warm_up = deadline.part(_WARM_UP_SHARE * deadline.left_s)
    long_s = _LONG_SHARE * deadline.left_s
    for operator in group.operators:
        if warm_up.has_passed:
            break
        try:
            ready[operator.key] = _warmed_up(operator, buffers, long_s)
        except Exception as error:  # its values matter, or anything else: rates stand in for it
            if not _is_out_of_memory(error):  # which another time may be different
                alone[operator.key] = OperatorTime(None)
    chosen = _affordable(list(ready.values()), deadline.left_s)
    in_order = [ready[key] for key in order if key in chosen]
    return alone | _time_in_rounds(in_order, device, deadline)


def _warmed_up(operator: Operator, buffers: Buffers, long_s: float) -> _Prepared:
    device, signature = buffers.device, operator.signature
    call = rebuild(signature, buffers)
    first_s = wall_seconds(call, device)
    if device.type != "cuda" and first_s > long_s:
        return _Prepared(operator, (call,), first_s, first_s, None)
    steady_s, workspace = _second_call(call, device)
    calls = 1
    if device.type == "cuda":
        calls = max(1, min(_CUDA_CALLS, round(_CUDA_SAMPLE_S / max(steady_s, 1e-9))))
    others = (rebuild(signature, buffers) for _ in range(calls - 1))
    return _Prepared(operator, (call, *others), first_s, steady_s, workspace)


def _second_call(call: Callable[[], Any], device: torch.device) -> tuple[float, int | None]:
    """Seconds by the clock, and bytes allocated besides the output."""
    if device.type != "cuda":
        return wall_seconds(call, device), None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    out: list[Any] = []
    seconds = wall_seconds(lambda: out.append(call()), device)
    held = torch.cuda.memory_allocated(device) - before
    peak = torch.cuda.max_memory_allocated(device) - before
    return seconds, peak - held


def _affordable(most_telling_first: list[_Prepared], seconds: float) -> set[str]:
    """As many of the first as go into the seconds left, one round; the very first for certain."""
    total = 0.0
    chosen: set[str] = set()
    for prepared in most_telling_first:
        total += prepared.sample_s
        if chosen and total > seconds:
            break
        chosen.add(prepared.operator.key)
    return chosen


def _time_in_rounds(
    prepared: list[_Prepared], device: torch.device, deadline: Deadline
) -> dict[str, OperatorTime]:
    samples: list[list[float]] = [[] for _ in prepared]
    broken: set[str] = set()
    for done in range(_ROUNDS_MAX):
        for one, taken in zip(prepared, samples, strict=True):
            if deadline.has_passed and (done or any(samples)):
                break
            if one.operator.key in broken:
                continue
            try:
                taken.append(_once(one.calls, device))
            except Exception:  # memory that was there before, perhaps
                broken.add(one.operator.key)
    return {
        one.operator.key: one.timed(taken)
        for one, taken in zip(prepared, samples, strict=True)
        if taken and one.operator.key not in broken
    }


def _once(calls: tuple[Callable[[], Any], ...], device: torch.device) -> float:
    """Mean seconds of the calls, back to back."""
    every = itertools.cycle(calls)
    return block_seconds(lambda: next(every)(), device, len(calls), ahead=True)


def _typical(samples: list[float]) -> float:
    """The median; where something got in the way, the quickest: it suffered least."""
    disturbed = spread(samples) > 2 * DISTURBED_SPREAD
    return min(samples) if disturbed else statistics.median(samples)


def _is_out_of_memory(error: Exception) -> bool:
    """A CPU's allocator raises a plain error, and only its words tell."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "allocate memory" in str(error)


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """Some operators draw random numbers: the user's sequence goes on as if they had not."""
    devices = [device.index or 0] if device.type in ("cuda", "xpu") else []
    kind = device.type if devices else "cuda"
    with torch.random.fork_rng(devices, device_type=kind):
        yield
