"""How much is computed under a step cache, against small pipelines that really run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from autotune.decide.step_caches import kept_bytes, share_computed
from autotune.optimizations import find
from autotune.optimizations.execution import Execution, StepCache
from autotune.optimizations.modules import registries_of
from autotune.optimizations.step_caches import (
    FasterCache,
    FirstBlockCache,
    PyramidAttentionBroadcast,
    TaylorSeerCache,
)
from autotune.probe.reference import load_machine
from autotune.testing.pipelines import build_chroma, build_cogvideox, build_flux, call
from autotune.workload.workload import Component
from tests.decide.operators import attention, linear, trace_of
from tests.workloads import workload_of

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


@pytest.mark.parametrize("steps", [20, 40])
def test_late_attention_as_it_is_counted(steps: int) -> None:
    pipe = build_flux()
    FasterCache().apply(pipe, {"range": 2}, "cpu")
    blocks, inside = computed(pipe, steps)
    share = share_computed(StepCache("faster", 2), steps, FIFTY_BLOCKS)
    assert blocks == share.blocks == 1
    assert inside == pytest.approx(share.attention, abs=1.5 / steps)


def test_of_guided_passes_in_a_batch_one_is_skipped_late() -> None:
    """Counted in rows of the batch: half of them are the pass without prompt."""
    pipe, steps = build_cogvideox(), 40
    FasterCache().apply(pipe, {"range": 2}, "cpu")
    rows: Counter[str] = Counter()
    for name in ("norm1", "attn1.to_q"):
        layer = pipe.transformer.transformer_blocks[0].get_submodule(name)
        layer.register_forward_hook(
            lambda _module, args, _result, name=name: rows.update({name: len(args[0])})
        )
    call(pipe, steps=steps)
    share = share_computed(StepCache("faster", 2), steps, FIFTY_BLOCKS, guided_in_batch=True)
    assert rows["norm1"] / (2 * steps) == pytest.approx(share.blocks, abs=1 / steps)
    assert rows["attn1.to_q"] / (2 * steps) == pytest.approx(share.attention, abs=1 / steps)


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


@pytest.mark.parametrize("passes", [1, 2])
def test_what_is_kept_from_step_to_step(passes: int) -> None:
    """Hidden states of 6 tokens and 8 values in 16 bits, in 3 layers; a result of 4 values."""
    trace = trace_of(attention(tokens=6, heads=2, head_dim=4, count=3), linear(6, 8, 4))
    kept = [
        kept_bytes(StepCache(method, 3), trace, passes)
        for method in ("first_block", "taylor", "attention")
    ]
    assert kept == [passes * 3 * 6 * 8 * 2, passes * 2 * 6 * 4 * 2, 3 * 6 * 8 * 2]


@pytest.mark.parametrize(
    ("cache", "parameters", "slack"),
    [
        # The first block's own change is kept of the image alone, a fifth less than of both.
        (FirstBlockCache(), {"threshold": 0.5}, 0.08),
        (TaylorSeerCache(), {"interval": 3}, 0.0),
        (PyramidAttentionBroadcast(), {"range": 2}, 0.0),
        (FasterCache(), {"range": 2}, 0.0),
    ],
)
def test_as_much_is_kept_as_is_predicted(cache: Any, parameters: Any, slack: float) -> None:
    workload = workload_of("flux")
    runs = (run for phase in workload.phases for run in phase.runs)
    trace = next(run.trace for run in runs if run.role == "denoiser")
    method = cache.configure(Execution(), parameters).step_cache
    pipe = build_flux()
    cache.apply(pipe, parameters, "cpu")
    predicted = kept_bytes(method, trace, workload.guided_passes)
    assert predicted == pytest.approx(bytes_kept(pipe), rel=slack)


def bytes_kept(pipe: Any) -> int:
    """Of tensors that the hooks hold before the last step."""
    found: dict[int, int] = {}
    hooks = [h for r in registries_of(pipe.transformer) for h in r.hooks.values()]

    def look(_pipe: Any, _step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        found.clear()
        found.update((t.data_ptr(), t.nbytes) for hook in hooks for t in tensors(vars(hook)))
        return kwargs

    call(pipe, steps=3, callback_on_step_end=look)
    return sum(found.values())


def tensors(held: Any) -> Iterator[torch.Tensor]:
    """In dictionaries, sequences, and the states of diffusers' hooks."""
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, dict):
        for value in held.values():
            yield from tensors(value)
    elif isinstance(held, (list, tuple)):
        yield from tensors(dict(enumerate(held)))
    elif type(held).__name__.endswith(("State", "StateManager")):
        yield from tensors(vars(held))


@pytest.mark.parametrize(("scale", "allowed"), [(6.0, True), (1.0, False)])
def test_a_pass_is_skipped_only_where_there_are_two(scale: float, allowed: bool) -> None:
    workload = workload_of("cogvideox")
    asked = replace(workload, request=replace(workload.request, guidance_scale=scale))
    reason = FasterCache().unavailable(load_machine("h100-80gb"), asked)
    assert (reason is None) == allowed


@pytest.mark.parametrize(("scale", "allowed"), [(1.0, True), (5.0, False)])
def test_broadcast_attention_is_kept_from_guided_passes(scale: float, allowed: bool) -> None:
    """Chroma calls its network twice a step: within the range, both get the first one's result."""
    workload = workload_of("chroma")
    denoise = next(p for p in workload.phases if p.name == "denoise")
    (run,) = denoise.runs
    assert run.calls == 2 * workload.request.steps
    single = replace(denoise, runs=(replace(run, calls=workload.request.steps),), order=())
    phases = tuple(single if scale == 1 and p is denoise else p for p in workload.phases)
    machine = load_machine("h100-80gb")
    reason = PyramidAttentionBroadcast().unavailable(machine, replace(workload, phases=phases))
    assert (reason is None) == allowed


def test_broadcast_attention_mixes_guided_passes() -> None:
    pipe = build_chroma()
    PyramidAttentionBroadcast().apply(pipe, {"range": 2}, "cpu")
    results: list[torch.Tensor] = []
    pipe.transformer.transformer_blocks[0].attn.register_forward_hook(
        lambda _module, _args, result: results.append(result[0].clone())
    )
    call(pipe, steps=6)
    outside, inside = results[0:2], results[6:8]
    assert not torch.equal(*outside)
    assert torch.equal(*inside)


def test_what_has_no_caches_is_told_from_what_was_not_tried(traced, rtx_3080):
    cache = find("first_block_cache")
    assert cache.unavailable(rtx_3080, traced("sdxl")) == (
        "diffusers has no caches for the steps of UNet2DConditionModel"
    )
    reason = cache.unavailable(rtx_3080, traced("chroma", dtype="bfloat16"))
    assert reason == "it has not been tried with ChromaPipeline"
