"""What a call needs when it cannot be traced: a guess from the module's weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from autotune.workload.components import weight_bytes
from autotune.workload.rehearsal import Call
from autotune.workload.trace import ALLOCATION_BYTES
from autotune.workload.workload import Operator, Role, Trace

LAYERS_ALIVE = 8
"""Activations of a layer's width alive at once: in a transformer block the hidden states, the
residual, query, key, value, and the feed-forward's inner states, which are four times as wide."""


def estimated_call(call: Call, role: Role) -> tuple[Trace, Any]:
    """A trace of one dense product with all weights, and an output like the first input.

    Models take their latents, ids or images first.

    Args:
        call: It has failed to be traced.
        role: What the component is for.
    """
    given = [t for t in call.tensors if t.dim() > 1]
    main = next(iter(given), torch.empty(1, 1, device="meta"))
    parameters = list(call.module.parameters())
    dtype = parameters[0].dtype if parameters else torch.float32
    width = max((p.shape[-1] for p in parameters if p.dim() > 1), default=1)
    rows = _rows(main, role)
    flops = 2.0 * sum(p.numel() for p in parameters) * rows
    alive = LAYERS_ALIVE * rows * width * dtype.itemsize
    out_bytes = _bytes(main)
    size = -(-(alive + out_bytes) // ALLOCATION_BYTES) * ALLOCATION_BYTES
    operator = Operator(
        name="estimated",
        kind="matmul",
        signature=f'["estimated","{type(call.module).__name__}",{rows}]',
        dtype=str(dtype).removeprefix("torch."),
        count=1,
        flops=flops,
        bytes=weight_bytes(call.module) + alive,
        live_bytes=size,
        in_bytes=out_bytes,
        out_bytes=out_bytes,
    )
    leaves = sum(1 for _ in call.module.modules())
    return Trace((operator,), size, dispatches=leaves), _output(call, main, dtype, width)


def _rows(main: Tensor, role: Role) -> int:
    """Positions that every weight is multiplied with: tokens, or latent elements by patches."""
    if role == "encoder" or main.dim() < 4:
        return max(1, math.prod(main.shape[:-1] if main.dim() > 2 else main.shape))
    batch, *inner = main.shape[0], *main.shape[2:]
    return max(1, batch * math.prod(inner) // 4)


def _output(call: Call, main: Tensor, dtype: torch.dtype, width: int) -> Any:
    """Something that the pipeline can go on with."""
    if main.is_floating_point():
        like = torch.empty(main.shape, dtype=dtype, device="meta")
    else:
        like = torch.empty(*main.shape, width, dtype=dtype, device="meta")
    if call.kwargs.get("return_dict") is False:
        return (like,)
    return _Output(like)


class _Output(tuple):  # type: ignore[type-arg]
    """Answers to every name that models give their output."""

    def __new__(cls, value: Tensor) -> _Output:
        return super().__new__(cls, (value, [False] * value.shape[0]))  # a checker's verdict

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return [self[0]] * 64 if name == "hidden_states" else self[0]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
