"""How much is computed under a step cache, against small pipelines that really run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from autotune.decide.step_caches import HIDDEN_STATES, kept_bytes, share_computed
from autotune.optimizations.execution import StepCache
from autotune.optimizations.step_caches import PyramidAttentionBroadcast, TaylorSeerCache
from autotune.testing.pipelines import build_flux, call
from autotune.workload.workload import Component
from tests.decide.operators import attention, linear, trace_of

FIFTY_BLOCKS = Component("transformer", "T", 0, 0, 0, 0, 0, block_bytes=(1,) * 50)


def computed(pipe: Any, steps: int) -> tuple[float, float]:
    """Share of the calls of blocks that compute them, and their attention."""
    calls: Counter[str] = Counter()
    transformer = pipe.transformer
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    for block in blocks:
        norm = block.norm1 if hasattr(block, "norm1") else block.norm
        for name, layer in (("block", norm), ("attention", block.attn.to_q)):
            layer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    call(pipe, steps=steps)
    whole = steps * len(blocks)
    return calls["block"] / whole, calls["attention"] / whole


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 12])
@pytest.mark.parametrize("interval", [2, 3, 5])
def test_extrapolated_steps_as_they_are_counted(steps: int, interval: int) -> None:
    pipe = build_flux()
    TaylorSeerCache().apply(pipe, {"interval": interval}, "cpu")
    share = share_computed(StepCache("taylor", interval), steps, FIFTY_BLOCKS)
    assert computed(pipe, steps) == pytest.approx(share)


@pytest.mark.parametrize(("steps", "every"), [(20, 2), (20, 3), (40, 3)])
def test_broadcast_attention_as_it_is_counted(steps: int, every: int) -> None:
    """Timesteps are evenly spaced here, so that where they begin is worth a step either way."""
    pipe = build_flux()
    PyramidAttentionBroadcast().apply(pipe, {"range": every}, "cpu")
    share = share_computed(StepCache("attention", every), steps, FIFTY_BLOCKS)
    blocks, inside = computed(pipe, steps)
    assert blocks == share.blocks == 1
    assert inside == pytest.approx(share.attention, abs=1 / steps)


def test_the_first_block_is_always_computed() -> None:
    """At a threshold of 0.06, 0.82 of the other 49."""
    share = share_computed(StepCache("first_block", 0.06), 28, FIFTY_BLOCKS)
    assert share == pytest.approx((1 / 50 + 49 / 50 * 0.82,) * 2)


def test_a_higher_threshold_computes_less() -> None:
    shares = [
        share_computed(StepCache("first_block", value), 28, FIFTY_BLOCKS).blocks
        for value in (0.01, 0.05, 0.06, 0.07, 0.08, 0.11, 0.12, 0.5)
    ]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == shares[-2]  # beyond what was measured


def test_what_is_kept_from_step_to_step() -> None:
    """Hidden states of 6 tokens and 8 values in 16 bits; attention's result in each of 3 layers."""
    trace = trace_of(attention(tokens=6, heads=2, head_dim=4, count=3), linear(6, 8, 8))
    states = 6 * 8 * 2
    assert (
        kept_bytes(StepCache("first_block", 0.08), trace) == HIDDEN_STATES["first_block"] * states
    )
    assert kept_bytes(StepCache("taylor", 3), trace) == HIDDEN_STATES["taylor"] * states
    assert kept_bytes(StepCache("attention", 2), trace) == 3 * states
