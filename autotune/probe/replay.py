"""Operator replay: run each distinct operator of a trace on random data, and note its time.

A model's step is then predicted without its weights: the sum of its operators, plus what the
Python around them costs (``host_seconds_per_operator``). Operators run in the order of the trace,
each once a round, on changing parts of one buffer: so caches hold about what they hold in the real
forward, and memory is needed for the largest operator only.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional

from autotune.probe.devices import empty_cache
from autotune.probe.machine import Figure, OperatorTime
from autotune.probe.timing import (
    DISTURBED_SPREAD,
    block_seconds,
    spread,
    synchronize,
    time_call,
)
from autotune.workload.workload import Operator, Trace

_ROUNDS_MIN, _ROUNDS_MAX = 3, 9

_WARM_UP_SHARE = 0.3
"""Of the budget, for the first call of each operator: lazy kernels and algorithm choice."""


_CUDA_CALLS = 10


class _Prepared(NamedTuple):
    operator: Operator
    calls: tuple[Callable[[], Any], ...]


def replay(
    operators: Iterable[Operator],
    device: torch.device,
    *,
    known: Mapping[str, OperatorTime],
    budget_s: float,
    memory_bytes: int,
    weight: Callable[[Operator], float],
) -> dict[str, OperatorTime]:
    """Time distinct operators, the heaviest for certain, as many more as the budget allows.

    Args:
        operators: Of any number of traces, in their order; equal ones are run once.
        device: Where to run them.
        known: Timed before: not run again.
        budget_s: Seconds to spend; what is not reached is left out.
        memory_bytes: An operator that reads and writes more than this is left out.
        weight: Estimated seconds of all calls of an operator.

    Returns:
        New times by ``Operator.key``; ``seconds`` is ``None`` where one cannot be run alone.
    """
    start = time.perf_counter()
    wanted = {o.key: o for o in operators if o.key not in known and o.bytes <= memory_bytes}
    buffers = _Buffers(wanted.values(), device)
    ready: dict[str, _Prepared] = {}
    alone: dict[str, OperatorTime] = {}  # cannot be run alone
    with torch.no_grad():
        for operator in sorted(wanted.values(), key=weight, reverse=True):
            if time.perf_counter() - start > _WARM_UP_SHARE * budget_s:
                break
            calls = _warmed_up(operator, buffers)
            if calls:
                ready[operator.key] = _Prepared(operator, calls)
            else:
                alone[operator.key] = OperatorTime(None)
        in_order = [ready[key] for key in wanted if key in ready]
        times = _time_in_rounds(in_order, device, start + budget_s)
    empty_cache(device)
    return alone | times


def _warmed_up(operator: Operator, buffers: _Buffers) -> tuple[Callable[[], Any], ...]:
    """Calls of the operator, each on other parts of the buffers; empty when it cannot run alone."""
    copies = 1 if buffers.device.type == "cpu" else _CUDA_CALLS
    try:
        calls = tuple(rebuild(operator.signature, buffers) for _ in range(copies))
        calls[0]()
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return ()  # its values matter (an index, a mask): rates stand in for it
    return calls


def _time_in_rounds(
    prepared: list[_Prepared], device: torch.device, deadline: float
) -> dict[str, OperatorTime]:
    samples: list[list[float]] = [[] for _ in prepared]
    for done in range(_ROUNDS_MAX):
        if done >= _ROUNDS_MIN and time.perf_counter() > deadline:
            break
        for (_, calls), taken in zip(prepared, samples, strict=True):
            taken.append(_once(calls, device))
    return {
        operator.key: OperatorTime(_typical(taken), _workspace(calls[0], device))
        for (operator, calls), taken in zip(prepared, samples, strict=True)
    }


def _once(calls: tuple[Callable[[], Any], ...], device: torch.device) -> float:
    """Mean seconds of the calls, back to back."""
    every = itertools.cycle(calls)
    return block_seconds(lambda: next(every)(), device, len(calls), ahead=True)


def _typical(samples: list[float]) -> float:
    """The median; where something got in the way, the quickest: it suffered least."""
    disturbed = spread(samples) > 2 * DISTURBED_SPREAD
    return min(samples) if disturbed else statistics.median(samples)


def host_seconds_per_operator(device: torch.device) -> Figure:
    """What one operator inside a diffusers model costs the host: modules, views, arguments.

    Measured on a UNet so narrow that its arithmetic is negligible. On the CPU, where the host also
    computes, the operators' own time is replayed and taken off.
    """
    from autotune.workload.trace import trace

    call = _narrow_unet(device)
    traced = trace(torch.nn.Module(), _narrow_unet(torch.device("meta")), [])
    with torch.no_grad(), _one_thread():
        forward = time_call(call, device, budget_s=0.3)
        own = _sum_of(traced, device) if device.type == "cpu" else 0.0
    return Figure(
        value=max(forward.value - own, 0.0) / traced.dispatches,
        samples=tuple(max(s - own, 0.0) / traced.dispatches for s in forward.samples),
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Dispatching is one thread's work; on a busy CPU a pool would wait for its own threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _narrow_unet(device: torch.device) -> Callable[[], object]:
    """A call of SD 1.5's UNet with eight channels instead of 320 to 1280."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=2,
        )
    torch.nn.Module.to(unet, device).eval().requires_grad_(False)
    latent, text = torch.zeros(2, 4, 8, 8, device=device), torch.zeros(2, 8, 8, device=device)
    step = torch.tensor(1.0, device=device)
    return lambda: unet(latent, step, encoder_hidden_states=text, return_dict=False)


def _sum_of(traced: Trace, device: torch.device) -> float:
    times = replay(
        traced.operators,
        device,
        known={},
        budget_s=1.0,
        memory_bytes=1 << 30,
        weight=lambda operator: operator.bytes,
    )
    known = {key: measured.seconds or 0.0 for key, measured in times.items()}
    return sum(o.count * known.get(o.key, 0.0) for o in traced.operators)


def _workspace(call: Callable[[], Any], device: torch.device) -> int | None:
    """What the operator allocates besides its output; only CUDA's allocator tells."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    out = call()
    synchronize(device)
    held = torch.cuda.memory_allocated(device) - before
    peak = torch.cuda.max_memory_allocated(device) - before
    del out
    return peak - held


# ---- from a signature back to a call -------------------------------------------------------------


class _Buffers:
    """One flat buffer per dtype, which all arguments are views of; each takes the next part.

    Args:
        operators: Whose arguments must fit, one operator at a time.
        device: Where the buffers live.
    """

    _ALIGNMENT = 64

    def __init__(self, operators: Iterable[Operator], device: torch.device) -> None:
        self.device = device
        self._sizes: dict[str, int] = {}
        for operator in operators:
            for dtype, size in _spans(json.loads(operator.signature)).items():
                self._sizes[dtype] = max(self._sizes.get(dtype, 0), size)
        self._flat: dict[str, torch.Tensor] = {}
        self._next: dict[str, int] = {}

    def view(self, plain: dict[str, Any]) -> torch.Tensor:
        """A tensor of the recorded dtype, shape and strides."""
        dtype, shape = plain["t"], plain["s"]
        stride = plain.get("st") or _contiguous(shape)
        span = _span(shape, stride)
        flat = self._buffer(dtype)
        start = self._next.get(dtype, 0)
        if start + span > flat.numel():
            start = 0
        self._next[dtype] = start + -(-span // self._ALIGNMENT) * self._ALIGNMENT
        return flat.as_strided(shape, stride, start)

    def _buffer(self, dtype: str) -> torch.Tensor:
        if dtype not in self._flat:
            # Twice the largest, so that what an operator reads is not what the last one left.
            size = 2 * self._sizes.get(dtype, 0) + self._ALIGNMENT
            self._flat[dtype] = _random(size, getattr(torch, dtype), self.device)
        return self._flat[dtype]


def _random(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Standard normal values, repeated: drawing gigabytes would take longer than the replay."""
    if not dtype.is_floating_point:
        return torch.zeros(size, dtype=dtype, device=device)  # valid as index, id and mask alike
    generator = torch.Generator(device).manual_seed(0)
    block = torch.randn(min(size, 1 << 20), generator=generator, device=device).to(dtype)
    return block.repeat(-(-size // block.numel()))


def _spans(plain: Any) -> dict[str, int]:
    """Elements that a call's tensors cover, by dtype."""
    if isinstance(plain, dict) and "t" in plain:
        shape = plain["s"]
        return {plain["t"]: _span(shape, plain.get("st") or _contiguous(shape)) + 64}
    values = plain.values() if isinstance(plain, dict) else plain
    total: dict[str, int] = {}
    if isinstance(plain, (dict, list)):
        for value in values:
            for dtype, size in _spans(value).items():
                total[dtype] = total.get(dtype, 0) + size
    return total


def _contiguous(shape: list[int]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _span(shape: list[int], stride: list[int]) -> int:
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def rebuild(signature: str, buffers: _Buffers) -> Callable[[], Any]:
    """The operator with random arguments of the recorded shapes, dtypes and strides.

    Args:
        signature: As ``Operator.signature``.
        buffers: Where the tensors' values come from.

    Raises:
        AttributeError: this PyTorch has no such operator.
    """
    name, arguments, keywords = json.loads(signature)
    positional = [_value(a, buffers) for a in arguments]
    named = {k: _value(v, buffers) for k, v in keywords.items()}
    function: Any = functional.scaled_dot_product_attention
    if name != "attention":
        function = torch.ops
        for part in name.split("."):
            function = getattr(function, part)
    return lambda: function(*positional, **named)


def _value(plain: Any, buffers: _Buffers) -> Any:
    if isinstance(plain, list):
        return [_value(v, buffers) for v in plain]
    if not isinstance(plain, dict):
        return plain
    if "t" in plain:
        return buffers.view(plain)
    text = str(plain["o"])
    if text.startswith("torch."):
        return getattr(torch, text.removeprefix("torch."))
    return buffers.device  # the only other values that operators take are devices ("meta")
