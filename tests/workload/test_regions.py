"""Chains of elementwise operators, and where in a network they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autotune.testing.pipelines import BUILDERS
from autotune.workload.components import describe, weight_bytes
from autotune.workload.groups import take_apart
from autotune.workload.trace import trace
from autotune.workload.workload import Operator
from tests.workloads import workload_of

SIZE = 1000
BYTES = 4 * SIZE


def traced(call: Any, module: nn.Module | None = None) -> dict[str, Operator]:
    """Operators by name; every one of them appears with one shape only."""
    made = trace(module or nn.Module(), lambda: call(x), [x := torch.empty(SIZE, device="meta")])
    return {o.name.split(".")[1]: o for o in made.operators}


def product(x: Tensor) -> Tensor:
    return (x.view(1, SIZE) @ torch.empty(SIZE, SIZE, device="meta")).view(SIZE)


def test_a_chain_reads_once_and_writes_once() -> None:
    found = traced(lambda x: torch.tanh(torch.exp(torch.sin(x))))
    assert [o.fused_calls for o in found.values()] == [0, 0, 1]
    assert found["sin"].fused_bytes == BYTES  # reads its input
    assert found["exp"].fused_bytes == 0
    assert found["tanh"].fused_bytes == BYTES  # writes the result


def test_what_a_product_reads_is_written() -> None:
    found = traced(lambda x: torch.sin(product(torch.exp(x))))
    assert [found[n].fused_calls for n in ("exp", "mm", "sin")] == [1, 1, 1]
    assert all(o.fused_bytes == o.bytes for o in found.values())


def test_what_lies_on_both_sides_of_a_product_is_written() -> None:
    def residual(x: Tensor) -> Tensor:
        hidden = torch.exp(x)
        return torch.add(product(torch.sin(hidden)), hidden)

    found = traced(residual)
    assert found["exp"].fused_bytes == 2 * BYTES
    assert found["sin"].fused_bytes == BYTES  # its input is still at hand
    assert found["add"].fused_bytes == 3 * BYTES


def test_an_operator_of_several_results_is_one_kernel() -> None:
    norm = nn.LayerNorm(SIZE, device="meta")
    found = traced(lambda x: torch.exp(norm(x)), norm)
    assert found["native_layer_norm"].fused_calls == 0
    assert found["exp"].fused_calls == 1


def test_never_more_calls_or_bytes_than_without() -> None:
    for kind in ("sd", "sd3", "ltx-video"):
        for phase in workload_of(kind).phases:
            for run in phase.runs:
                for o in run.trace.operators:
                    assert 0 <= o.fused_calls <= o.count
                    assert 0 <= o.fused_bytes <= o.bytes * o.count


@pytest.mark.parametrize("kind", ["sd", "flux", "cogvideox"])
def test_attention_lies_in_blocks(kind: str) -> None:
    (run, *_) = (r for p in workload_of(kind).phases for r in p.runs if r.role == "denoiser")
    regions = {o.region for o in run.trace.operators}
    assert regions == {"", "block", "attention"}
    assert {o.region for o in run.trace.operators if o.attention} == {"attention"}


@pytest.mark.parametrize(
    "kind", ["sd", "sdxl", "sd3", "flux", "hunyuandit", "cogvideox", "pixart-sigma"]
)
def test_what_fusing_projections_adds_is_what_diffusers_adds(kind: str) -> None:
    pipe = BUILDERS[kind]()
    module = getattr(pipe, "unet", None) or pipe.transformer
    component = take_apart(describe("denoiser", module), module, casts=False)
    before = weight_bytes(module)
    products = sum(type(m) is nn.Linear for m in module.modules())
    if not hasattr(module, "fuse_qkv_projections"):
        assert component.fusable_bytes == 0
        return
    module.fuse_qkv_projections()
    assert weight_bytes(module) - before == component.fusable_bytes > 0
    added = sum(type(m) is nn.Linear for m in module.modules()) - products
    assert added <= component.fusable_products <= 2 * added  # each stands for two or three


def test_abilities() -> None:
    assert workload_of("sd").component("unet").abilities == ("repeated_blocks",)
    flux = workload_of("flux").component("transformer").abilities
    assert flux == ("repeated_blocks", "attention_backend", "step_caches")
    assert workload_of("sd3").component("transformer").abilities == ()
