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


LATE_ATTENTION, LATE_GUIDANCE, GUIDED_EVERY = 0.681, 0.641, 5
"""FasterCache's defaults: shares of the timesteps, the last ones, on which it skips attention and
the unguided pass; and how often that pass is computed all the same."""


def share_computed(
    cache: StepCache, steps: int, component: Component, guided_in_batch: bool = False
) -> Share:
    """How much of the repeated blocks is computed in a generation of so many steps.

    Args:
        cache: Of the denoiser.
        steps: Denoise steps.
        component: The denoiser.
        guided_in_batch: Whether half of each call's batch is the unguided pass.
    """
    if cache.method == "faster":
        return _faster(cache.value, guided_in_batch)
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


def _faster(every: float, guided_in_batch: bool) -> Share:
    """Attention is skipped where the unguided pass is, which leaves half of the batch."""
    skipped = 1 - 1 / every
    if not guided_in_batch:
        return Share(1.0, 1 - LATE_ATTENTION * skipped)
    halved = LATE_GUIDANCE * (1 - 1 / GUIDED_EVERY)
    return Share(1 - halved / 2, (1 - halved) + halved * (1 - skipped) / 2)


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


def kept_bytes(cache: StepCache, trace: Trace, passes: int, guided_in_batch: bool = False) -> int:
    """Device memory of what is kept from step to step.

    Args:
        cache: Of the denoiser.
        trace: One call of it.
        passes: Calls in one step, each of which keeps its own, but for attention.
        guided_in_batch: Whether half of each call's batch is the unguided pass.
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
    if cache.method in ("attention", "faster"):
        # FasterCache keeps two results of each layer, and none of the unguided pass.
        results = 2 if cache.method == "faster" and not guided_in_batch else 1
        return results * sum(values * size * count for values, size, count in states)
    largest = max((values * size for values, size, _ in states), default=0)
    return passes * FIRST_BLOCK_KEPT * largest


def _result_values(trace: Trace) -> int:
    """Of the last linear layer, which follows the blocks: what is extrapolated is its result."""
    layers = [o for o in trace.operators if o.kind == "matmul" and o.weight_bytes]
    return layers[-1].out_bytes // BYTES.get(layers[-1].dtype, 4) if layers else 0
