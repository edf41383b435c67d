"""Trace one module's forward on the meta device: every operator and what is alive meanwhile.

Meta tensors have shapes and storages but no data: a trace needs no weights, no GPU, and for SDXL's
UNet about a second.
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from autotune.workload.workload import AttentionShape, Operator, Trace

ALLOCATION_BYTES = 512
"""CUDA's caching allocator rounds every tensor up to this (``kMinBlockSize`` in PyTorch)."""

_ALLOCATES_ONLY = {"empty", "new_empty", "empty_like", "empty_strided", "empty_permuted"}


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
    index: int = 0
    count: int = 0
    live_bytes: int = 0


class _Result(NamedTuple):
    """What an operator returned: enough to return the like again."""

    tensors: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    is_single: bool

    @staticmethod
    def fits(out: Any) -> bool:
        """Whether shapes are all there is to it: meta tensors, with nothing else among them."""
        items = out if isinstance(out, tuple) else (out,)
        return all(isinstance(t, Tensor) and t.is_meta for t in items)

    @classmethod
    def of(cls, out: Any) -> _Result:
        described = ((tuple(t.shape), t.stride(), t.dtype) for t in _tensors(out))
        return cls(tuple(described), isinstance(out, Tensor))

    def again(self) -> Any:
        made = tuple(
            torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            for shape, stride, dtype in self.tensors
        )
        return made[0] if self.is_single else made


@dataclass
class _Recorder:
    """Follows storages by lifetime and sums operators by signature."""

    weights: set[int]
    calls: dict[tuple[str, int], _Calls] = field(default_factory=dict)
    results: dict[str, _Result] = field(default_factory=dict)
    live_bytes: int = 0
    peak_bytes: int = 0
    block_tokens: int = 0
    timeline: list[int] = field(default_factory=list)
    timed: list[int] = field(default_factory=list)
    _alive: set[int] = field(default_factory=set)
    _numbers: dict[int, int] = field(default_factory=dict)
    _allocations: int = 0

    def adopt(self, tensor: Tensor) -> bool:
        """Count the tensor's storage as alive until it is freed; False if it already was."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self.weights:
            return False
        size = -(-storage.nbytes() // ALLOCATION_BYTES) * ALLOCATION_BYTES
        self._alive.add(key)
        if size:
            self._numbers[key] = self._allocations = self._allocations + 1
            self.timeline.append(storage.nbytes())
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._free, key, size).atexit = False
        return True

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        if size:
            self.timeline.append(-self._numbers.pop(key))
        self.live_bytes -= size

    def is_weight(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.weights

    def count(self, signature: str, make: Callable[[], _Calls]) -> None:
        calls = self.calls.get((signature, self.block_tokens))
        if calls is None:
            calls = self.calls[signature, self.block_tokens] = make()
            calls.index = len(self.calls) - 1
        if calls.kind in ("convolution", "attention"):
            self.timeline.append(0)
            self.timed.append(calls.index)
        calls.count += 1
        calls.live_bytes = max(calls.live_bytes, self.live_bytes)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one dispatched operator and record it, unless it only makes a view or is memory.

        A call whose like was seen before is not run again: PyTorch computes the shapes of many
        operators in Python, which takes longer than everything else here.
        """
        if _is_view(func):
            return func(*args, **kwargs)
        signature = _signature(str(func), args, kwargs)
        made = self.results.get(signature)
        out = _run(func, args, kwargs) if made is None else made.again()
        outputs = _tensors(out)
        is_new = [self.adopt(t) for t in outputs]
        if made is None and all(is_new) and not func._schema.is_mutable and _Result.fits(out):
            self.results[signature] = _Result.of(out)
        works = any(is_new) or func._schema.is_mutable
        if works and func.overloadpacket.__name__ not in _ALLOCATES_ONLY:
            self.count(signature, lambda: self._measure(func, args, kwargs, outputs))
        return out

    def _measure(self, func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> _Calls:
        inputs = _tensors((args, kwargs))
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
        in_bytes = sum(_bytes(t) for t in _tensors((query, key, value, options)))
        self.count(
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
            ),
        )

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
            )
            for (signature, _), c in self.calls.items()
        )
        return Trace(
            operators=operators,
            activation_bytes=self.peak_bytes,
            dispatches=sum(o.count for o in operators),
            timeline=tuple(self.timeline),
            timed=tuple(self.timed),
        )


class _Dispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.run(func, args, kwargs or {})


class _Attention(TorchFunctionMode):
    """Keeps scaled-dot-product attention whole: on meta it would fall apart into its parts."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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


def trace(module: nn.Module, call: Callable[[], Any], inputs: list[Tensor]) -> Trace:
    """The first part of ``trace_call``."""
    return trace_call(module, call, inputs)[0]


def trace_call(
    module: nn.Module, call: Callable[[], Any], inputs: list[Tensor]
) -> tuple[Trace, Any]:
    """Run ``call`` once, on meta tensors, and record what it does.

    Args:
        module: The component, on the meta device, in the dtype it will run in.
        call: Runs its forward (or ``decode``).
        inputs: The tensors the call is given: they count as alive throughout.

    Returns:
        Its operators and the peak of its activations in bytes; and what the call returned.
    """
    weights = {
        t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers(recurse=True))
    }
    recorder = _Recorder(weights)
    for tensor in inputs:
        recorder.adopt(tensor)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_self_attention_marked(module, recorder))
        stack.enter_context(_Attention(recorder))
        stack.enter_context(_Dispatch(recorder))
        out = call()
    return recorder.trace(), out


@contextmanager
def _self_attention_marked(module: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Tell the recorder when it is inside a UNet block's self-attention, which ToMe shortens."""

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        recorder.block_tokens = hidden.shape[1]

    def leave(*_: Any) -> None:
        recorder.block_tokens = 0

    handles = []
    for child in module.modules():
        if type(child).__name__ == "BasicTransformerBlock":
            attention: Any = child.attn1
            handles.append(attention.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(attention.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run one operator; where shapes are not enough for it, run it on zeros.

    Some operators have no meta kernel, and some read values (``.item()``, ``.cpu()``): a model that
    asks whether its inputs are black, say, is told that they are.
    """
    try:
        return func(*args, **kwargs)
    except (NotImplementedError, RuntimeError):
        out = on_zeros(func, args, kwargs)
    wants_host = str(kwargs.get("device")) == "cpu"
    return out if wants_host else tree_map_only(Tensor, lambda t: t.to("meta"), out)


MOST_ZEROS_BYTES = 4 << 30
"""Zeros are real memory once they are written to: more than this is not worth an answer."""


def on_zeros(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator on the CPU with zeros in place of its meta tensors.

    Raises:
        RuntimeError: the operator refuses zeros too, or they would fill the host's memory.
    """
    size = sum(_bytes(t) for t in _tensors((args, kwargs)) if t.is_meta)
    if size > MOST_ZEROS_BYTES:
        raise RuntimeError(f"{func} would need {size} bytes of zeros to be run")
    args, kwargs = tree_map_only(Tensor, _zeros, (args, kwargs))
    if kwargs.get("device") is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    return func(*args, **kwargs)


def _zeros(tensor: Tensor) -> Tensor:
    if not tensor.is_meta:
        return tensor
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")


def _is_view(func: Any) -> bool:
    aliases = [r.alias_info for r in func._schema.returns]
    return any(a is not None and not a.is_write for a in aliases)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [t for item in value for t in _tensors(item)]


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


def _signature(name: str, args: Any, kwargs: Any) -> str:
    return json.dumps([name, _plain(args), _plain(kwargs)], separators=(",", ":"))


def _plain(value: Any) -> Any:
    """An argument as JSON: tensors by dtype, shape and (unless contiguous) strides."""
    if isinstance(value, Tensor):
        described: dict[str, Any] = {"t": str(value.dtype)[6:], "s": list(value.shape)}
        if not value.is_contiguous():
            described["st"] = list(value.stride())
        return described
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return {"o": str(value)}
