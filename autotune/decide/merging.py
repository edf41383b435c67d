"""What token merging (tomesd) does to a block's self-attention, and what it costs."""

from __future__ import annotations

import msgspec

from autotune.optimizations.execution import TokenMerge
from autotune.optimizations.tome import downsample
from autotune.workload.workload import AttentionShape, Operator

MATCHING_LAUNCHES = 40
"""Kernels that tomesd 0.1.3 launches per block: matching once, one merge, one unmerge (counted in
``tomesd/merge.py``)."""

CPU_FLOPS_PER_VALUE = 1150
"""What a CPU computes of float32 products while tomesd moves one value of the hidden states, which
its kernels do index by index: 3.3 gathers of 2.1 ns, a quarter of a ``scatter_reduce`` of 12 ns,
3 scatters of 0.8 ns and a fill of 0.6 ns, where it did 86 GFLOP/s (one core of an AMD EPYC, PyTorch
2.13). A GPU does the same at the rate of its memory."""

_MOST_MERGED = 0.75
"""tomesd keeps one destination token in each 2 by 2 cell."""


def merges(merge: TokenMerge | None, operator: Operator, latent_tokens: int) -> bool:
    """Whether tomesd shortens this operator: it asks how far below the latent the block is."""
    if merge is None or not operator.block_tokens:
        return False
    return downsample(latent_tokens, operator.block_tokens) <= merge.max_downsample


def merged(merge: TokenMerge, operator: Operator) -> Operator:
    """The operator over the tokens that are left."""
    left = 1 - min(merge.ratio, _MOST_MERGED)
    shape = operator.attention
    if shape is None:
        # Weights are read whole; in these layers they are small beside the activations.
        return msgspec.structs.replace(
            operator, flops=operator.flops * left, bytes=int(operator.bytes * left)
        )
    tokens = int(operator.block_tokens * left)
    shorter = msgspec.structs.replace(shape, q_tokens=tokens, kv_tokens=tokens)
    return msgspec.structs.replace(
        operator, attention=shorter, flops=shorter.flops, bytes=int(operator.bytes * left)
    )


class Matching(msgspec.Struct, frozen=True):
    """The extra work of merging for one self-attention call; ``values`` are the hidden states'."""

    flops: float
    bytes: int
    transient_bytes: int
    values: int


def matching(shape: AttentionShape, tokens: int, element_bytes: int) -> Matching:
    """Cost of finding and moving the tokens of one block.

    Args:
        shape: The self-attention before merging.
        tokens: Tokens of the block.
        element_bytes: Size of one activation element.
    """
    batch, channels = shape.batch, shape.heads * shape.head_dim
    scores = batch * (tokens * 3 // 4) * (tokens // 4)
    hidden = batch * tokens * channels
    # Similarities of every source with every destination: written once, read once by the maximum;
    # hidden states are normalised, gathered, scattered and spread again: about eight passes.
    return Matching(
        flops=2.0 * scores * channels,
        bytes=(2 * scores + 8 * hidden) * element_bytes,
        transient_bytes=(scores + hidden) * element_bytes,
        values=hidden,
    )
