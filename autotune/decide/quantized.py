"""Linear layers with weights of eight or four bits: what they weigh, and what unpacking takes."""

from __future__ import annotations

from typing import NamedTuple

from autotune.optimizations.execution import Execution
from autotune.workload.workload import Operator, Trace


class Scheme(NamedTuple):
    """One way to quantize.

    Bytes of traffic are what one layer's call adds, while nothing fuses it: a compiler computes it
    along with what it reads anyway.

    Attributes:
        name: In ``Execution.quantization``.
        bits: Per weight, scales included.
        unpacking_bytes: Per weight: read narrow, written and read again as often as unpacking is
            written in PyTorch's operators.
        result_bytes: Per element of the result: read and written again to be scaled.
        argument_bytes: Per element of the input: read and written to be quantized too.
        dtype: What products are computed in; empty for what the others are.
        launches: Kernels per layer besides the product.
    """

    name: str
    bits: float
    unpacking_bytes: float
    result_bytes: float
    argument_bytes: float
    dtype: str
    launches: int


_SCHEMES = (
    # Widened (1 + 2); the result is multiplied by the scales and added to the bias (4 + 4).
    Scheme("int8", 8.0, 3.0, 8.0, 0.0, "", 3),
    # Widened to float32, multiplied by the scale, narrowed: 1 + 4, 4 + 4, 4 + 2.
    Scheme("float8", 8.0, 19.0, 0.0, 0.0, "", 4),
    # The input's maximum, scaled and rounded by way of float32: 2, 2 + 4, 4 + 4, 4 + 1, and its
    # absolute value before (2 + 2).
    Scheme("float8_dynamic", 8.0, 0.0, 0.0, 25.0, "float8_e4m3fn", 6),
    # One kernel reads half a byte and writes two; scales of 64 weights are quantized themselves
    # (QLoRA, Dettmers 2023: 0.127 bits per weight).
    Scheme("nf4", 4.127, 2.5, 0.0, 0.0, "", 1),
    # Blocks of 32 with a scale of 16 bits. Multiplied by it in float16 (1 + 2), cast (2 + 2).
    Scheme("gguf_q8_0", 8.5, 7.0, 0.0, 0.0, "", 2),
    # Copied apart (1/2 + 1/2), shifted (1/2 + 1), masked, made signed and shifted (3 x 2),
    # multiplied in float16 (1 + 2), cast (2 + 2).
    Scheme("gguf_q4_0", 4.5, 15.5, 0.0, 0.0, "", 7),
)

SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _SCHEMES}
"""``Execution.quantization`` → how: torchao's weight-only and dynamic forms, bitsandbytes' four
bits, GGUF's blocks as diffusers unpacks them in PyTorch's operators."""


def scheme_of(execution: Execution, operator: Operator) -> Scheme | None:
    """How an operator of the denoiser is quantized, if it is a linear layer."""
    if not execution.quantization or operator.kind != "matmul" or not operator.weight_bytes:
        return None
    return SCHEMES[execution.quantization]


def added_bytes(scheme: Scheme, operator: Operator, element_bytes: int) -> int:
    """Traffic of one call beyond that of the product in the usual dtype."""
    weights = operator.weight_bytes / element_bytes
    added = weights * scheme.unpacking_bytes
    added += operator.out_bytes / element_bytes * scheme.result_bytes
    added += operator.in_bytes / element_bytes * scheme.argument_bytes
    return int(added)


def shared_bytes(quantization: str, trace: Trace) -> int:
    """Traffic of one call that is saved where queries, keys and values are one product.

    Their input, as large as what self-attention computes of it, is quantized once and not three
    times.
    """
    if not quantization:
        return 0
    values = sum(
        o.count
        * o.attention.batch
        * o.attention.q_tokens
        * o.attention.heads
        * o.attention.head_dim
        for o in trace.operators
        if o.attention is not None and o.attention.q_tokens == o.attention.kv_tokens
    )
    return int(2 * values * SCHEMES[quantization].argument_bytes)


def saved_bytes(quantization: str, linear_bytes: int, element_bytes: int) -> int:
    """What quantization takes off the weights of linear layers."""
    if not quantization:
        return 0
    return int(linear_bytes * (1 - SCHEMES[quantization].bits / (8 * element_bytes)))
