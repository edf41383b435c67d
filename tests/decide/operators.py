"""Operators and traces so small that what becomes of them can be worked out by hand."""

from __future__ import annotations

from autotune.workload.workload import AttentionShape, Operator, Region, Trace


def linear(tokens: int, wide: int, narrow: int, count: int = 1, region: Region = "") -> Operator:
    """``wide`` values in and ``narrow`` out, in sixteen bits, without a bias."""
    read, written = 2 * tokens * wide, 2 * tokens * narrow
    return Operator(
        name="aten.mm.default",
        kind="matmul",
        signature=f'["aten.mm.default",[{tokens},{wide},{narrow}],{{}}]',
        dtype="bfloat16",
        count=count,
        flops=2.0 * tokens * wide * narrow,
        bytes=read + written + 2 * wide * narrow,
        live_bytes=read + written,
        in_bytes=read,
        out_bytes=written,
        region=region,
    )


def elementwise(values: int, count: int, fused_calls: int, region: Region = "") -> Operator:
    """Reads and writes so many values; fused, only the calls that are left do."""
    return Operator(
        name="aten.mul.Tensor",
        kind="memory",
        signature=f'["aten.mul.Tensor",[{values}],{{}}]',
        dtype="bfloat16",
        count=count,
        flops=float(values),
        bytes=4 * values,
        live_bytes=4 * values,
        in_bytes=2 * values,
        out_bytes=2 * values,
        region=region,
        fused_calls=fused_calls,
        fused_bytes=4 * values * fused_calls,
    )


def attention(tokens: int, heads: int, head_dim: int, count: int = 1) -> Operator:
    """Of one image with itself, in a repeated block."""
    shape = AttentionShape(1, heads, tokens, tokens, head_dim)
    size = 2 * tokens * heads * head_dim
    return Operator(
        name="attention",
        kind="attention",
        signature=f'["attention",[{tokens},{heads},{head_dim}],{{}}]',
        dtype="bfloat16",
        count=count,
        flops=shape.flops,
        bytes=4 * size,
        live_bytes=4 * size,
        in_bytes=3 * size,
        out_bytes=size,
        attention=shape,
        region="attention",
    )


def trace_of(*operators: Operator) -> Trace:
    """One forward of these."""
    return Trace(
        operators,
        max(o.live_bytes for o in operators),
        sum(o.count for o in operators),
    )
