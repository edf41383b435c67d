"""Group offload and layerwise casting on real pipelines.

On the CPU, weights that a hook forgets to fetch are still there, and nothing is noticed. Weights on
the disk are not: so the disk stands for the device here, and a layer that was not fetched draws
another image.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autotune.optimizations import find
from autotune.optimizations.casting import LayerwiseCasting
from autotune.optimizations.group_offload import GroupCpuOffload
from autotune.testing.pipelines import BUILDERS, call
from autotune.testing.state import differences, whole_state
from autotune.workload.architecture import describe_pipeline
from autotune.workload.groups import block_bytes
from autotune.workload.phases import trace_workload
from autotune.workload.workload import Request
from tests.thorough import part

KINDS = ("sd", "sd3", "flux", "ltx-video", "qwen-image", "hunyuandit", "wan22", "animatediff")

ROUNDING = 1e-5
"""Weights read from a file lie at other addresses, where the CPU's kernels add in another order."""


def state(pipe: Any) -> dict[str, torch.Tensor]:
    modules = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    return {
        f"{n}.{key}": value.clone()
        for n, m in modules.items()
        for key, value in m.state_dict().items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


@pytest.mark.parametrize("level", ["block", "leaf"])
@pytest.mark.parametrize("kind", part(tuple(KINDS), 2))
def test_every_layer_is_fetched_before_it_is_used(kind: str, level: str) -> None:
    pipe, offload = BUILDERS[kind](), GroupCpuOffload()
    plain, before = call(pipe), state(pipe)
    parameters = {"level": level, "stream": True, "low_ram": False, "disk": True}
    undo = offload.apply(pipe, parameters, "cpu")
    found = offload.found(pipe)
    assert found is not None
    assert found["disk"]
    torch.testing.assert_close(call(pipe), plain, atol=ROUNDING, rtol=0)
    undo()
    assert offload.found(pipe) is None
    assert same(state(pipe), before)
    assert torch.equal(call(pipe), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_those_that_diffusers_makes(kind: str) -> None:
    from diffusers.hooks import apply_group_offloading

    pipe = BUILDERS[kind]()
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    expected = sorted(block_bytes(denoiser))
    device = torch.device("cpu")
    apply_group_offloading(denoiser, device, offload_type="block_level", num_blocks_per_group=1)
    registries = [getattr(m, "_diffusers_hook", None) for m in denoiser.modules()]
    hooks = [r.get_hook("group_offloading") for r in registries if r is not None]
    groups = {id(h.group): h.group for h in hooks if h is not None}
    # The group of what is in no list hooks the network itself.
    made = sorted(
        sum(t.nbytes for m in g.modules for t in (*m.parameters(), *m.buffers()))
        for g in groups.values()
        if g.offload_leader is not denoiser
    )
    assert made == expected


@pytest.mark.parametrize("kind", ["sd", "flux", "wan"])
def test_casting_is_undone_to_the_bit_and_saves_what_was_said(kind: str) -> None:
    pipe, casting = BUILDERS[kind](), LayerwiseCasting()
    request = Request(64, 64, 1, 2, 1.0, "float32", 9 if kind == "wan" else 1)
    workload = trace_workload(describe_pipeline(pipe), request)
    plain, before = call(pipe), state(pipe)
    size = sum(v.nbytes for v in before.values())
    undo = casting.apply(pipe, {}, "cpu")
    assert casting.found(pipe) == {}
    assert size - sum(v.nbytes for v in state(pipe).values()) == sum(
        c.casting_saves_bytes for c in workload.components
    )
    assert not torch.equal(call(pipe), plain)
    undo()
    assert casting.found(pipe) is None
    assert same(state(pipe), before)
    assert torch.equal(call(pipe), plain)


def test_a_level_that_does_not_exist_is_refused() -> None:
    from autotune.errors import OptimizationError

    with pytest.raises(OptimizationError, match="use block or leaf"):
        find("group_offload").setting({"level": "row"})
    with pytest.raises(OptimizationError, match="give one of them"):
        find("group_offload").setting({"low_ram": True, "disk": True})


def test_another_layout_is_written_to_the_disk_and_comes_back() -> None:
    """safetensors refuses it as it lies."""
    pipe = BUILDERS["sd"]()
    undo_layout = find("channels_last").apply(pipe, {}, "cpu")
    plain, before = call(pipe), whole_state(pipe)
    given = {"level": "leaf", "stream": False, "low_ram": False, "disk": True}
    undo = find("group_offload").apply(pipe, given, "cpu")
    torch.testing.assert_close(call(pipe), plain, rtol=0, atol=1e-4)
    undo()
    call(pipe)
    assert differences(before, whole_state(pipe)) == {}
    undo_layout()


def test_layers_with_the_same_weights_share_a_file() -> None:
    """T5 has its embedding twice."""
    pipe = BUILDERS["flux"]()
    plain, before = call(pipe), whole_state(pipe)
    t5 = pipe.text_encoder_2
    one, other = t5.shared, t5.encoder.embed_tokens
    assert one is not other and one.weight is other.weight
    given = {"level": "leaf", "stream": False, "low_ram": False, "disk": True}
    undo = find("group_offload").apply(pipe, given, "cpu")
    assert t5.shared is t5.encoder.embed_tokens
    registries = (getattr(m, "_diffusers_hook", None) for m in t5.encoder.block[0].modules())
    assert any(r is not None and r.get_hook("group_offloading") for r in registries), "by layer"
    torch.testing.assert_close(call(pipe), plain, rtol=0, atol=1e-4)
    undo()
    assert (t5.shared, t5.encoder.embed_tokens) == (one, other)
    call(pipe)
    assert differences(before, whole_state(pipe)) == {}
