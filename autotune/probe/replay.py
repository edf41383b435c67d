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
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional

from autotune.probe.deadline import Deadline
from autotune.probe.devices import at_most, empty_cache
from autotune.probe.machine import Figure, OperatorTime
from autotune.probe.samples import DISTURBED_SPREAD, figure_of, spread
from autotune.probe.timing import Timer, block_seconds, wall_seconds
from autotune.workload.workload import Operator, Trace

UNET_MODULE = "diffusers.models.unets.unet_2d_condition"

_ROUNDS_MAX = 9

_WARM_UP_SHARE = 0.3
"""Of the budget, for the first calls of each operator: lazy kernels and algorithm choice."""

_LONG_SHARE = 0.02
"""Of the budget: a first call that takes longer is not made again at once, the rounds do that."""

_PLANNED_SHARE = 0.75
"""Of the memory given, for arguments and output; the rest is for workspaces and allocators."""

_CUDA_CALLS, _CUDA_SAMPLE_S = 10, 1e-3
"""Calls in a sample: as many as last so long, up to a number. Events resolve half a microsecond."""

_VALUES_MATTER = {
    *("_assert_async", "_assert_scalar", "_functional_assert_async", "_local_scalar_dense"),
    *("bernoulli", "bernoulli_", "binomial", "multinomial", "poisson", "bincount", "histc"),
    *("masked_select", "nonzero", "repeat_interleave"),
    *("unique", "_unique2", "unique_consecutive", "unique_dim"),
}
"""Operators whose work, or whose success, depends on values that a trace does not have. On a GPU
some answer bad values with an assertion, after which the process can use the device no more."""


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
        return OperatorTime(seconds, self.workspace_bytes, extra)


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
    heaviest_first = sorted(wanted.values(), key=weight, reverse=True)
    groups, unfit = _fitting(heaviest_first, int(_PLANNED_SHARE * memory_bytes))
    found = {operator.key: OperatorTime(None) for operator in unfit}
    with torch.no_grad(), _own_random_state(device), at_most(device, memory_bytes):
        for group in groups:
            if deadline.has_passed:
                break
            found |= _replay_group(group, list(wanted), device, deadline)
            empty_cache(device)
    return found


def _replay_group(
    group: _Group, order: list[str], device: torch.device, deadline: Deadline
) -> dict[str, OperatorTime]:
    """Times of operators that share buffers; the group has them heaviest first."""
    buffers = _Buffers(group, device)
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


def _warmed_up(operator: Operator, buffers: _Buffers, long_s: float) -> _Prepared:
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


def _affordable(heaviest_first: list[_Prepared], seconds: float) -> set[str]:
    """As many of the heaviest as go into the seconds left, one round; the first for certain."""
    total = 0.0
    chosen: set[str] = set()
    for prepared in heaviest_first:
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


def host_seconds_per_operator(timer: Timer) -> Figure | None:
    """What one operator inside a diffusers model costs the host: modules, views, arguments.

    Measured on a UNet so narrow that its arithmetic is negligible. On the CPU, where the host also
    computes, the operators' own time is replayed and taken off.

    Returns:
        ``None`` where the deadline passed before that was done.
    """
    device = timer.device
    from autotune.workload.trace import trace

    call = _narrow_unet(device)
    traced = trace(torch.nn.Module(), _narrow_unet(torch.device("meta")), [])
    with torch.no_grad(), _one_thread():
        forward = timer.time(call, share=3.0)
        own = _sum_of(traced, timer) if device.type == "cpu" else 0.0
    if own is None:
        return None
    samples = [max(s - own, 0.0) / traced.dispatches for s in forward.samples]
    return figure_of(samples, forward.source, forward.disturbances)


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
    from diffusers import UNet2DConditionModel  # UNET_MODULE has it

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


def _sum_of(traced: Trace, timer: Timer) -> float | None:
    """Seconds of all operators alone; ``None`` where time did not suffice."""
    times = replay(
        traced.operators,
        timer.device,
        known={},
        budget_s=min(3.0, timer.deadline.left_s),  # where nothing gets in the way, a tenth of it
        memory_bytes=1 << 30,
        weight=lambda operator: operator.bytes,
    )
    if any(o.key not in times for o in traced.operators):
        return None
    return sum(o.count * (times[o.key].seconds or 0.0) for o in traced.operators)


# ---- what fits into memory together --------------------------------------------------------------


@dataclass
class _Group:
    """Operators whose arguments are views of the same buffers, one per dtype."""

    operators: list[Operator] = field(default_factory=list)
    elements: dict[str, int] = field(default_factory=dict)
    out_bytes: int = 0
    spare: bool = True

    def fits(self, operator: Operator, elements: dict[str, int], memory_bytes: int) -> bool:
        """Whether buffers large enough for it too leave memory for the largest output."""
        return self._bytes_with(operator, elements) <= memory_bytes

    def add(self, operator: Operator, elements: dict[str, int], memory_bytes: int) -> None:
        # Twice the largest where possible, so that what an operator reads is not what the last
        # one left.
        self.spare = 2 * self._bytes_with(operator, elements) <= memory_bytes
        self.operators.append(operator)
        self.elements = _maxima(self.elements, elements)
        self.out_bytes = max(self.out_bytes, operator.out_bytes)

    def _bytes_with(self, operator: Operator, elements: dict[str, int]) -> int:
        buffers = _maxima(self.elements, elements).items()
        return sum(_itemsize(dtype) * count for dtype, count in buffers) + max(
            self.out_bytes, operator.out_bytes
        )


def _fitting(operators: list[Operator], memory_bytes: int) -> tuple[list[_Group], list[Operator]]:
    """Groups that fit, the order kept, and what is in none: too large alone, or unreadable."""
    groups: list[_Group] = []
    unfit: list[Operator] = []
    for operator in operators:
        try:
            elements = _spans(json.loads(operator.signature))
            target = next((g for g in groups if g.fits(operator, elements, memory_bytes)), None)
            if target is None and _Group().fits(operator, elements, memory_bytes):
                groups.append(target := _Group())
            if target is not None:
                target.add(operator, elements, memory_bytes)
                continue
        except Exception:  # a dtype of another version, say
            pass
        unfit.append(operator)
    return groups, unfit


def _maxima(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {key: max(one.get(key, 0), other.get(key, 0)) for key in one | other}


def _itemsize(dtype: str) -> int:
    kind = getattr(torch, dtype)
    return int(kind.itemsize)


# ---- from a signature back to a call -------------------------------------------------------------


class _Buffers:
    """One flat buffer per dtype, which all arguments are views of; each takes the next part.

    Args:
        group: Whose arguments must fit, one operator at a time.
        device: Where the buffers live.
    """

    _ALIGNMENT = 64
    _ROOM = 64 * _ALIGNMENT  # between the tensors of a call; with more of them some overlap

    def __init__(self, group: _Group, device: torch.device) -> None:
        self.device = device
        self._group = group
        self._flat: dict[str, torch.Tensor] = {}
        self._next: dict[str, int] = {}

    def view(self, plain: dict[str, Any], *, own: bool = False) -> torch.Tensor:
        """A tensor of the recorded dtype, shape and strides.

        Args:
            plain: From a signature.
            own: It will be written: where its values must stay valid for others (indices, masks),
                it is made for this call alone.
        """
        dtype, shape = plain["t"], plain["s"]
        stride = plain.get("st") or _contiguous(shape)
        span = _span(shape, stride)
        if own and not _is_inexact(getattr(torch, dtype)):
            return _filled(span, getattr(torch, dtype), self.device).as_strided(shape, stride)
        flat = self._buffer(dtype)
        start = self._next.get(dtype, 0)
        if start + span > flat.numel():
            start = 0
        self._next[dtype] = start + -(-span // self._ALIGNMENT) * self._ALIGNMENT
        return flat.as_strided(shape, stride, start)

    def _buffer(self, dtype: str) -> torch.Tensor:
        if dtype not in self._flat:
            size = (1 + self._group.spare) * self._group.elements.get(dtype, 0) + self._ROOM
            self._flat[dtype] = _filled(size, getattr(torch, dtype), self.device)
        return self._flat[dtype]


def _filled(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Standard normal values, repeated: drawing gigabytes would take longer than the replay.

    Masks are all true: attention that may look at nothing computes NaN, and may be let off work.
    Other numbers are 0, which is valid as an index, a token and a position.
    """
    if dtype is torch.bool:
        return torch.ones(size, dtype=dtype, device=device)
    if not _is_inexact(dtype):
        return torch.zeros(size, dtype=dtype, device=device)
    drawn = dtype if dtype.is_complex else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    block = torch.randn(max(1, min(size, 1 << 20)), generator=generator, device=device, dtype=drawn)
    return block.to(dtype).repeat(-(-size // block.numel()))


def _is_inexact(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _spans(plain: Any) -> dict[str, int]:
    """Elements that a call's tensors cover, by dtype."""
    if isinstance(plain, dict) and "t" in plain:
        shape = plain["s"]
        span = _span(shape, plain.get("st") or _contiguous(shape))
        return {plain["t"]: span}
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
        NotImplementedError: running it tells nothing, or is dangerous, without its real values.
        Exception: it cannot be read, or this PyTorch has no such operator or dtype.
    """
    name, arguments, keywords = json.loads(signature)
    function, writes = _function(name)
    positional = [_value(a, buffers, writes) for a in arguments]
    named = {k: _value(v, buffers, writes) for k, v in keywords.items()}
    return lambda: function(*positional, **named)


def _function(name: str) -> tuple[Any, bool]:
    """What the name stands for, and whether it writes to its arguments."""
    if name == "attention":
        return functional.scaled_dot_product_attention, False
    parts = name.split(".")
    if _VALUES_MATTER.intersection(parts):
        raise NotImplementedError(f"{name} depends on values")
    function: Any = torch.ops
    for part in parts:
        function = getattr(function, part)
    return function, bool(function._schema.is_mutable)


def _value(plain: Any, buffers: _Buffers, writes: bool) -> Any:
    if isinstance(plain, list):
        return [_value(v, buffers, writes) for v in plain]
    if not isinstance(plain, dict):
        return plain
    if "t" in plain:
        return buffers.view(plain, own=writes)
    text = str(plain["o"])
    if text.startswith("torch."):
        return getattr(torch, text.removeprefix("torch."))
    if text.startswith("<"):
        return None  # a generator, which the device's own stands in for
    return buffers.device  # the only other values that operators take are devices ("meta")
