"""Trace one module's forward on the meta device: every operator and what is alive meanwhile.

Meta tensors have shapes and storages but no data: a trace needs no weights, no GPU, and for SDXL's
UNet about a second.
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from autotune.workload.layouts import NO_LAYOUTS, Layouts
from autotune.workload.regions import regions_marked, self_attention_marked
from autotune.workload.values import (
    Values,
    facts_of,
    key_of,
    run_by_shapes,
    tensors_in,
)
from autotune.workload.workload import AttentionShape, Operator, Region, Trace

ALLOCATION_BYTES = 512
"""CUDA's caching allocator rounds every tensor up to this (``kMinBlockSize`` in PyTorch)."""


@dataclass
class _Calls:
    """What accumulates per distinct signature."""

    name: str
    kind: str
    dtype: str
    flops: float
    bytes: int
    in_bytes: int
    out_bytes: int
    attention: AttentionShape | None
    block_tokens: int
    region: Region
    index: int = 0
    count: int = 0
    live_bytes: int = 0
    unwritten: int = 0
    saved_bytes: int = 0


class _Result(NamedTuple):
    """What an operator returned: enough to return the like again."""

    tensors: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    is_single: bool

    @classmethod
    def of(cls, out: Any) -> _Result | None:
        """``None`` unless it is meta tensors and nothing else."""
        items = out if isinstance(out, tuple) else (out,)
        if not all(isinstance(t, Tensor) and t.is_meta for t in items):
            return None
        described = tuple((tuple(t.shape), t.stride(), t.dtype) for t in items)
        return cls(described, isinstance(out, Tensor))

    def again(self) -> Any:
        made = [
            torch.empty_strided(shape, stride, dtype=dtype, device=_META)
            for shape, stride, dtype in self.tensors
        ]
        return made[0] if self.is_single else tuple(made)


_META = torch.device("meta")


class _Pending(NamedTuple):
    """What an elementwise operator wrote, and nothing but its like has read since.

    Fused with what reads it, it is never written to memory.
    """

    writer: _Calls
    bytes: int
    barrier: int
    is_first: bool


class _Seen(NamedTuple):
    """An operator with arguments of certain shapes; what it returned, if that decides it."""

    signature: str
    result: _Result | None


@dataclass
class _Recorder:
    """Follows storages by lifetime and sums operators by signature."""

    weights: set[int]
    parameters: set[int]
    values: Values
    layouts: Layouts = field(default_factory=Layouts)
    calls: dict[tuple[str, int, str], _Calls] = field(default_factory=dict)
    guesses: list[str] = field(default_factory=list)
    live_bytes: int = 0
    peak_bytes: int = 0
    block_tokens: int = 0
    region: Region = ""
    timeline: list[int] = field(default_factory=list)
    timed: list[int] = field(default_factory=list)
    _alive: dict[int, weakref.ref[Any]] = field(default_factory=dict)
    _numbers: dict[int, int] = field(default_factory=dict)
    _allocations: int = 0
    _seen: dict[Any, _Seen] = field(default_factory=dict)
    _pending: dict[int, _Pending] = field(default_factory=dict)
    _barrier: int = 0
    _read_bytes: int = 0
    _largest_bytes: int = 0
    _adjacent_bytes: int = 0

    def adopt(self, tensor: Tensor) -> bool:
        """Count the tensor's storage as alive until it is freed; False if it already was."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self.weights:
            return False
        size = -(-storage.nbytes() // ALLOCATION_BYTES) * ALLOCATION_BYTES
        self._alive[key] = weakref.ref(storage, lambda _: self._free(key, size))
        if size:
            self._numbers[key] = self._allocations = self._allocations + 1
            self.timeline.append(storage.nbytes())
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return True

    def _free(self, key: int, size: int) -> None:
        del self._alive[key]
        if size:
            self.timeline.append(-self._numbers.pop(key))
        self.live_bytes -= size
        self.values.forget(key)
        self.layouts.forget(key)
        pending = self._pending.pop(key, None)
        if pending is not None:
            pending.writer.unwritten += pending.is_first
            pending.writer.saved_bytes += pending.bytes

    def is_weight(self, tensor: Tensor) -> bool:
        return key_of(tensor) in self.weights

    def count(self, signature: str, make: Callable[[], _Calls]) -> _Calls:
        key = (signature, self.block_tokens, self.region)
        calls = self.calls.get(key)
        if calls is None:
            calls = self.calls[key] = make()
            calls.index = len(self.calls) - 1
        if calls.kind in ("convolution", "attention"):
            self.timeline.append(0)
            self.timed.append(calls.index)
        calls.count += 1
        calls.live_bytes = max(calls.live_bytes, self.live_bytes)
        return calls

    def read(self, inputs: list[Tensor]) -> None:
        """Follow which parameters are read one after another: a layer's with each operator."""
        size = sum(_bytes(t) for t in inputs if key_of(t) in self.parameters)
        if size:
            self._largest_bytes = max(self._largest_bytes, size)
            self._adjacent_bytes = max(self._adjacent_bytes, self._read_bytes + size)
            self._read_bytes = size

    def flow(self, calls: _Calls, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Follow what a compiler would keep in registers: chains of elementwise operators.

        A chain ends at every other operator, since what lies on both sides of it is no longer one
        kernel.
        """
        is_fusable = calls.kind == "memory"
        for tensor in inputs:
            key = key_of(tensor)
            pending = self._pending.get(key)
            if pending is None:
                continue
            if is_fusable and pending.barrier == self._barrier:
                calls.saved_bytes += pending.bytes
            else:
                del self._pending[key]
        if not is_fusable:
            self._barrier += 1
            return
        for index, tensor in enumerate(outputs):
            size = _bytes(tensor)
            self._pending[key_of(tensor)] = _Pending(calls, size, self._barrier, index == 0)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one dispatched operator and record it, unless it only makes a view or is memory.

        A call whose like was seen before is not run again: PyTorch computes the shapes of many
        operators in Python, which takes longer than everything else here.
        """
        facts = facts_of(func)
        if facts.is_view:
            return func(*args, **kwargs)
        key = (_key(func, args, kwargs, facts.is_linear), self.layouts.of_all(args))
        seen = self._seen.get(key)
        if seen is not None and seen.result is not None:
            out, is_by_shapes = seen.result.again(), True
        else:
            out, is_by_shapes = self._run(func, args, kwargs)
        outputs = tensors_in(out)
        is_new = [self.adopt(t) for t in outputs]
        if seen is None:
            is_like_any = is_by_shapes and all(is_new) and not facts.written
            signature = _signature(str(func), args, kwargs, facts.is_linear, self.layouts)
            seen = self._seen[key] = _Seen(signature, _Result.of(out) if is_like_any else None)
        if (any(is_new) or facts.written) and not facts.only_allocates:
            calls = self.count(seen.signature, lambda: self._measure(func, args, kwargs, outputs))
            made = [t for t, new in zip(outputs, is_new, strict=True) if new]
            inputs = tensors_in((args, kwargs))
            self.flow(calls, inputs, made)
            self.read(inputs)
        self.values.follow(func, args, kwargs, out)
        self.layouts.follow(func, args, outputs)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, bool]:
        """What the operator returns, and whether that is a matter of shapes.

        Where it is not, it runs on what is known; where that is not enough, this is a guess.
        """
        try:
            return run_by_shapes(func, args, kwargs), True
        except (NotImplementedError, RuntimeError):
            pass
        out = self.values.run(func, args, kwargs)
        if not self.values.decides(func, args, kwargs):
            self.guesses.append(str(func))
        if str(kwargs.get("device")) == "cpu":
            return out, False
        return tree_map_only(Tensor, _without_data, out), False

    def _measure(self, func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> _Calls:
        inputs = tensors_in((args, kwargs))
        flops = _flops(func, args, kwargs, outputs)
        out_bytes = sum(_bytes(t) for t in outputs)
        return _Calls(
            name=str(func),
            kind=_kind(func, flops),
            dtype=_dtype(outputs),
            flops=flops,
            bytes=sum(_bytes(t) for t in inputs) + out_bytes,
            in_bytes=sum(_bytes(t) for t in inputs if not self.is_weight(t)),
            out_bytes=out_bytes,
            attention=None,
            block_tokens=self.block_tokens,
            region=self.region,
        )

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any], out: Tensor
    ) -> None:
        """Record one symbolic attention call; inputs are (batch, heads, tokens, head_dim)."""
        *batch, heads, tokens, dim = query.shape if query.dim() > 3 else (1, *query.shape)
        shape = AttentionShape(
            batch=math.prod(batch),
            heads=heads,
            q_tokens=tokens,
            kv_tokens=key.shape[-2],
            head_dim=dim,
        )
        inputs = tensors_in((query, key, value, options))
        in_bytes = sum(map(_bytes, inputs))
        calls = self.count(
            _signature("attention", (query, key, value), options),
            lambda: _Calls(
                name="attention",
                kind="attention",
                dtype=_dtype([out]),
                flops=shape.flops,
                bytes=in_bytes + _bytes(out),
                in_bytes=in_bytes,
                out_bytes=_bytes(out),
                attention=shape,
                block_tokens=self.block_tokens,
                region=self.region,
            ),
        )
        self.flow(calls, inputs, [])

    def trace(self) -> Trace:
        operators = tuple(
            Operator(
                name=c.name,
                kind=c.kind,
                signature=signature,
                dtype=c.dtype,
                count=c.count,
                flops=c.flops,
                bytes=c.bytes,
                live_bytes=c.live_bytes,
                in_bytes=c.in_bytes,
                out_bytes=c.out_bytes,
                attention=c.attention,
                block_tokens=c.block_tokens,
                region=c.region,
                fused_calls=c.count - c.unwritten,
                fused_bytes=max(0, c.bytes * c.count - c.saved_bytes),
            )
            for (signature, *_), c in self.calls.items()
        )
        return Trace(
            operators=operators,
            activation_bytes=self.peak_bytes,
            dispatches=sum(o.count for o in operators),
            timeline=tuple(self.timeline),
            timed=tuple(self.timed),
            adjacent_layers=self._adjacent_bytes / max(self._largest_bytes, 1),
        )


def _without_data(real: Tensor) -> Tensor:
    return torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device="meta")


class _Dispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper would take as long as the rest, at every operator

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Keeps scaled-dot-product attention whole: on meta it would fall apart into its parts.

    And knows the copies that a group norm makes of its input: a CPU makes none.
    """

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "group_norm":
            with self.recorder.layouts.kept_by_copies():
                return func(*args, **(kwargs or {}))
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(_SDPA_ARGUMENTS, args, strict=False)) | (kwargs or {})
        query, key, value = (given.pop(name) for name in ("query", "key", "value"))
        *batch, tokens, _ = query.shape
        if query.dim() < 4:
            out = query.new_empty(*batch, tokens, value.shape[-1])
        else:
            # Flash kernels return (batch, heads, tokens, dim) laid out as (batch, tokens, heads,
            # dim).
            *outer, heads = batch
            out = query.new_empty(*outer, tokens, heads, value.shape[-1]).transpose(-3, -2)
        options = {k: v for k, v in given.items() if isinstance(v, Tensor) or v}
        self.recorder.attention(query, key, value, options, out)
        return out


_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class Traced(NamedTuple):
    """A call as it was traced.

    Attributes:
        trace: Its operators and the peak of its activations.
        out: What it returned, on the meta device.
        guesses: Operators that were given zeros, because they ask for more than shapes: all that
            comes after them is a guess.
    """

    trace: Trace
    out: Any
    guesses: tuple[str, ...]


def trace(module: nn.Module, call: Callable[[], Any], inputs: Iterable[Tensor]) -> Trace:
    """The first part of ``trace_call``."""
    return trace_call(module, call, inputs).trace


def trace_call(
    module: nn.Module,
    call: Callable[[], Any],
    inputs: Iterable[Tensor],
    known: Iterable[tuple[Tensor, Tensor]] = (),
) -> Traced:
    """Run ``call`` once, on meta tensors, and record what it does.

    Args:
        module: The component, on the meta device, in the dtype it will run in.
        call: Runs its forward (or ``decode``).
        inputs: The tensors the call is given: they count as alive throughout.
        known: Those of them whose values are known, with their values.
    """
    parameters = {p.untyped_storage()._cdata for p in module.parameters()}
    weights = parameters | {b.untyped_storage()._cdata for b in module.buffers()}
    values = Values()
    for tensor, real in known:
        values.given(tensor, real)
    recorder = _Recorder(weights, parameters, values)
    for tensor in inputs:
        recorder.adopt(tensor)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(self_attention_marked(module, recorder))
        stack.enter_context(regions_marked(module, recorder))
        stack.enter_context(_Functions(recorder))
        stack.enter_context(_Dispatch(recorder))
        out = call()
    return Traced(recorder.trace(), out, tuple(dict.fromkeys(recorder.guesses)))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _dtype(outputs: list[Tensor]) -> str:
    return str(outputs[0].dtype).removeprefix("torch.") if outputs else "float32"


def _flops(func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> float:
    formula = flop_registry.get(func.overloadpacket)
    if formula is None:
        return 0.0
    return float(formula(*args, **kwargs, out_val=outputs[0]))


def _kind(func: Any, flops: float) -> str:
    if flops == 0:
        return "memory"
    return "convolution" if "convolution" in func.overloadpacket.__name__ else "matmul"


def _key(func: Any, args: Any, kwargs: Any, is_linear: bool) -> Any:
    """A call by what decides its result's shape: names it in a dictionary, quickly."""
    parts: list[Any] = [id(func)]
    for value in args:
        if isinstance(value, Tensor):
            parts += (value.dtype, value.shape, value.stride(), value.is_meta)
        elif type(value) is int or value is None:
            parts.append(value)
        else:
            parts.append(_hashable(value, is_linear))
    if kwargs:
        parts += [(k, _hashable(v, is_linear)) for k, v in kwargs.items()]
    return tuple(parts)


def _hashable(value: Any, is_linear: bool) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.stride(), value.is_meta
    if isinstance(value, (list, tuple)):
        return tuple([_hashable(v, is_linear) for v in value])
    kind = type(value)
    if kind is int or value is None:
        return value
    if kind is float and is_linear:
        return kind
    return kind, value  # 1 == 1.0 == True, and each gives another dtype


def _signature(
    name: str, args: Any, kwargs: Any, is_linear: bool = False, layouts: Layouts = NO_LAYOUTS
) -> str:
    plain = [name, _plain(args, is_linear, layouts), _plain(kwargs, is_linear, layouts)]
    return json.dumps(plain, separators=(",", ":"))


def _plain(value: Any, is_linear: bool, layouts: Layouts) -> Any:
    """An argument as JSON: tensors by dtype, shape and (unless contiguous) strides.

    ``"l"`` is the layout of images that lie otherwise on a CPU.

    A number that is only multiplied with is any number: tiles are blended with a thousand weights.
    """
    if isinstance(value, Tensor):
        described: dict[str, Any] = {"t": str(value.dtype)[6:], "s": list(value.shape)}
        if not value.is_contiguous():
            described["st"] = list(value.stride())
        layout = layouts.of(value)
        if layout:
            described["l"] = layout
        return described
    if isinstance(value, (list, tuple)):
        return [_plain(v, is_linear, layouts) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v, is_linear, layouts) for k, v in value.items()}
    if isinstance(value, float) and is_linear:
        return 1.0
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return {"o": str(value)}
