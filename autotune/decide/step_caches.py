"""Steps that reuse what an earlier one computed: how much of the denoiser is left to compute."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

from autotune.decide.attention import BYTES
from autotune.optimizations.execution import StepCache
from autotune.workload.workload import Component, Trace

WARM_UP_STEPS = 4
"""diffusers' ``TaylorSeerCacheConfig`` computes the first three steps and extrapolates the fourth;
from then on it computes one step in so many."""

SKIPPABLE = (100, 800)
"""Timesteps of 1,000 between which pyramid attention broadcast skips (diffusers' default)."""

FIRST_BLOCK_COMPUTED = ((0.0, 1.0), (0.06, 0.82), (0.08, 0.63), (0.10, 0.59), (0.12, 0.50))
"""Threshold → share of the steps that are computed: 23, 18, 16 or 17, and 14 of 28. From times of
Flux on one GPU, 21.83, 17.01, 16.00 and 13.78 s over 26.36 s without a cache (ParaAttention's
documentation), less the 4 % that no cache saves: one block of 57, encode and decode. What changes
little from step to step depends on model, prompt and scheduler: this is an estimate wherever it is
used, and a cautious one for video."""


class Share(NamedTuple):
    """What is still computed, averaged over the calls: of blocks, and of attention inside them."""

    blocks: float
    attention: float


ALL_COMPUTED = Share(1.0, 1.0)


def share_computed(cache: StepCache, steps: int, component: Component) -> Share:
    """How much of the repeated blocks is computed in a generation of so many steps."""
    if cache.method == "attention":
        first, last = SKIPPABLE
        skippable = (last - first) / 1000
        return Share(1.0, 1 - skippable * (1 - 1 / cache.value))
    if cache.method == "taylor":
        computed = _taylor_steps(steps, int(cache.value)) / steps
        return Share(computed, computed)
    computed = _interpolated(cache.value)
    first_block = 1 / max(len(component.block_bytes), 1)
    computed = first_block + (1 - first_block) * computed
    return Share(computed, computed)


def _taylor_steps(steps: int, interval: int) -> int:
    """Steps that are computed."""
    computed_first = min(steps, WARM_UP_STEPS - 1)
    return computed_first + math.ceil(max(0, steps - WARM_UP_STEPS) / interval)


def _interpolated(threshold: float) -> float:
    points = FIRST_BLOCK_COMPUTED
    for (low, before), (high, after) in itertools.pairwise(points):
        if threshold <= high:
            return before + (after - before) * (threshold - low) / (high - low)
    return points[-1][1]


FIRST_BLOCK_KEPT = 3
"""Tensors as large as the hidden states: what comes out of the first block, what it changed, and
what the others did."""

FACTORS_KEPT, FACTOR_BYTES = 2, 2
"""Value and slope of what is extrapolated, in bfloat16 whatever the network computes in."""


def kept_bytes(cache: StepCache, trace: Trace, passes: int) -> int:
    """Device memory of what is kept from step to step.

    Args:
        cache: Of the denoiser.
        trace: One call of it.
        passes: Calls in one step, each of which keeps its own, but for attention.
    """
    if cache.method == "taylor":
        return passes * FACTORS_KEPT * FACTOR_BYTES * _result_values(trace)
    states = [
        (
            o.attention.batch * o.attention.q_tokens * o.attention.heads * o.attention.head_dim,
            BYTES.get(o.dtype, 4),
            o.count,
        )
        for o in trace.operators
        if o.attention is not None and o.region == "attention"
    ]
    if cache.method == "attention":
        return sum(values * size * count for values, size, count in states)
    largest = max((values * size for values, size, _ in states), default=0)
    return passes * FIRST_BLOCK_KEPT * largest


def _result_values(trace: Trace) -> int:
    """Of the last linear layer, which follows the blocks: what is extrapolated is its result."""
    layers = [o for o in trace.operators if o.kind == "matmul" and o.weight_bytes]
    return layers[-1].out_bytes // BYTES.get(layers[-1].dtype, 4) if layers else 0
