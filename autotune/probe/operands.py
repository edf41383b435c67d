"""From a recorded signature back to a call: operands of its shapes, dtypes and strides.

The operands of all calls are views of a few buffers; operators that together would need more
memory than they may have are grouped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as functional

from autotune.workload.workload import NHWC, Operator, channels_last_strides

_VALUES_MATTER = {
    *("_assert_async", "_assert_scalar", "_functional_assert_async", "_local_scalar_dense"),
    *("bernoulli", "bernoulli_", "binomial", "multinomial", "poisson", "bincount", "histc"),
    *("masked_select", "nonzero", "repeat_interleave"),
    *("unique", "_unique2", "unique_consecutive", "unique_dim"),
}
"""Operators whose work, or whose success, depends on values that a trace does not have. On a GPU
some answer bad values with an assertion, after which the process can use the device no more."""


@dataclass
class Group:
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


def fitting(operators: list[Operator], memory_bytes: int) -> tuple[list[Group], list[Operator]]:
    """Groups that fit, the order kept, and what is in none: too large alone, or unreadable."""
    groups: list[Group] = []
    unfit: list[Operator] = []
    for operator in operators:
        try:
            elements = _spans(json.loads(operator.signature))
            target = next((g for g in groups if g.fits(operator, elements, memory_bytes)), None)
            if target is None and Group().fits(operator, elements, memory_bytes):
                groups.append(target := Group())
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


class Buffers:
    """One flat buffer per dtype, which all arguments are views of; each takes the next part.

    Args:
        group: Whose arguments must fit, one operator at a time.
        device: Where the buffers live.
    """

    _ALIGNMENT = 64
    _ROOM = 64 * _ALIGNMENT  # between the tensors of a call; with more of them some overlap

    def __init__(self, group: Group, device: torch.device) -> None:
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
        stride = self._strides(plain)
        span = _span(shape, stride)
        if own and not _is_inexact(getattr(torch, dtype)):
            return _filled(span, getattr(torch, dtype), self.device).as_strided(shape, stride)
        flat = self._buffer(dtype)
        start = self._next.get(dtype, 0)
        if start + span > flat.numel():
            start = 0
        self._next[dtype] = start + -(-span // self._ALIGNMENT) * self._ALIGNMENT
        return flat.as_strided(shape, stride, start)

    def _strides(self, plain: dict[str, Any]) -> list[int]:
        shape = plain["s"]
        if "l" not in plain or self.device.type != "cpu":
            return plain.get("st") or _contiguous(shape)
        return channels_last_strides(shape) if plain["l"] == NHWC else _contiguous(shape)

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


def rebuild(signature: str, buffers: Buffers) -> Callable[[], Any]:
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


def _value(plain: Any, buffers: Buffers, writes: bool) -> Any:
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
