"""Attention, symbolic in the trace, as a concrete implementation: its time and its own memory."""

from __future__ import annotations

import math
from typing import NamedTuple

from autotune.probe.machine import AttentionRate, Machine
from autotune.workload.workload import AttentionShape

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

FUSED_FRACTION = 0.5
"""Where no timing is at hand: fused attention reaches about half of the matmul rate
(FlashAttention-2, Dao 2023, forward without mask: 50 to 73 % of the peak on an A100)."""


class Kernel(NamedTuple):
    """``"sdpa"``, ``"xformers"``, ``"sage"``, ``"vanilla"``, or ``"sliced"`` with its slices."""

    implementation: str
    slices: str = ""

    @property
    def writes_scores(self) -> bool:
        """Whether the score matrix goes through memory."""
        return self.implementation in ("vanilla", "sliced")


def transient_bytes(kernel: Kernel, shape: AttentionShape, dtype: str) -> int:
    """Memory of its own while it runs, inputs and output excluded.

    Vanilla holds the scores twice (diffusers' ``get_attention_scores``: product and softmax);
    slicing holds so many heads of it; fused kernels keep one float32 per query (log-sum-exp), and
    SageAttention its inputs in fewer bits: queries and keys in 8, values in up to 16.
    """
    if not kernel.writes_scores:
        kept = 4 * shape.batch * shape.heads * shape.q_tokens
        if kernel.implementation != "sage":
            return kept
        values = shape.q_tokens + 3 * shape.kv_tokens
        return kept + shape.batch * shape.heads * shape.head_dim * values
    at_once = shape.batch * shape.heads
    if kernel.implementation == "sliced":
        at_once = max(1, shape.heads // 2) if kernel.slices == "auto" else 1
    return 2 * at_once * shape.q_tokens * shape.kv_tokens * BYTES.get(dtype, 4)


def seconds(machine: Machine, kernel: Kernel, shape: AttentionShape, dtype: str) -> float:
    """Time of one call, from the nearest measured shape, else from matmul and memory rates.

    Slices compute what the default kernel does, in more pieces and with scores in memory: where
    they were not timed, they are no faster than it.
    """
    rate = _nearest_rate(machine, kernel.implementation, shape, dtype)
    if rate is not None and rate.flops_per_s is not None:
        return shape.flops / rate.flops_per_s.value
    matmul = machine.kernels.matmul_flops_per_s
    peak = (matmul.get(dtype) or matmul["float32"]).value
    if not kernel.writes_scores:
        return shape.flops / (FUSED_FRACTION * peak)
    # The score matrix is written, read by softmax, written, and read by the second product.
    traffic = 4 * shape.scores * BYTES.get(dtype, 4)
    found = shape.flops / peak + traffic / machine.kernels.memory_bytes_per_s.value
    if kernel.implementation != "sliced":
        return found
    return max(found, seconds(machine, Kernel(machine.default_attention), shape, dtype))


def calls_per_operator(kernel: Kernel, shape: AttentionShape) -> int:
    """Kernels launched for one attention: one fused, three vanilla, three for every slice."""
    if not kernel.writes_scores:
        return 1
    if kernel.implementation == "vanilla":
        return 3
    at_once = max(1, shape.heads // 2) if kernel.slices == "auto" else 1
    return 3 * math.ceil(shape.batch * shape.heads / at_once)


def _nearest_rate(
    machine: Machine, implementation: str, shape: AttentionShape, dtype: str
) -> AttentionRate | None:
    """The measured rate at the most similar shape: rates follow tokens and head size, not batch."""
    rates = [
        r
        for r in machine.attention
        if r.implementation == implementation and r.flops_per_s is not None and r.dtype == dtype
    ]
    return min(rates, key=lambda r: _distance(r, shape), default=None)


def _distance(rate: AttentionRate, shape: AttentionShape) -> float:
    pairs = (
        (rate.q_tokens, shape.q_tokens),
        (rate.kv_tokens, shape.kv_tokens),
        (rate.head_dim, shape.head_dim),
        (rate.heads * rate.batch, shape.heads * shape.batch),
    )
    return sum(abs(math.log2(a / b)) for a, b in pairs)
