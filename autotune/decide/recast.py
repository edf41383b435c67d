"""A forward that is traced in float32, as it would be in sixteen bits."""

from __future__ import annotations

import msgspec

from autotune.workload.workload import Operator, Trace


def recast(trace: Trace, dtype: str) -> Trace:
    """The same operators on tensors of half the size.

    Args:
        trace: In float32 throughout, as a decode that is widened is.
        dtype: ``"float16"`` or ``"bfloat16"``.
    """
    return msgspec.structs.replace(
        trace,
        operators=tuple(_recast(o, dtype) for o in trace.operators),
        activation_bytes=trace.activation_bytes // 2,
        timeline=_halved(trace.timeline),
    )


def _recast(operator: Operator, dtype: str) -> Operator:
    if operator.dtype != "float32":
        return operator
    return msgspec.structs.replace(
        operator,
        dtype=dtype,
        signature=operator.signature.replace('"t":"float32"', f'"t":"{dtype}"'),
        bytes=operator.bytes // 2,
        live_bytes=operator.live_bytes // 2,
        in_bytes=operator.in_bytes // 2,
        out_bytes=operator.out_bytes // 2,
        fused_bytes=operator.fused_bytes // 2,
    )


def _halved(timeline: tuple[int, ...]) -> tuple[int, ...]:
    """Requests are positive; what is negative names one."""
    return tuple([(event // 2 or 1) if event > 0 else event for event in timeline])
