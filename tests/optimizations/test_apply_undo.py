"""Applying and undoing in detail: by hand and by us, after one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autotune.errors import OptimizationError
from autotune.optimizations import CATALOGUE, find
from autotune.optimizations.base import Setting


def apply(pipe: Any, setting: Setting) -> Any:
    handler = find(setting.name)
    complete = handler.setting(setting.parameters)
    return handler.apply(pipe, complete.parameters, "cpu")


# ---- what the user had set stays ----------------------------------------------------------------


def test_processors_set_by_hand_come_back_by_identity(sd_pipe: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    mine = AttnProcessor()
    sd_pipe.unet.set_attn_processor(mine)
    undo = apply(sd_pipe, Setting("attention_slicing", {"slices": "max"}))
    assert mine not in sd_pipe.unet.attn_processors.values()
    undo()
    assert all(p is mine for p in sd_pipe.unet.attn_processors.values())


def test_a_module_that_was_channels_last_stays_so(sd_pipe: Any, snapshot: Any) -> None:
    sd_pipe.vae.to(memory_format=torch.channels_last)
    before = snapshot(sd_pipe)
    assert find("channels_last").is_set(sd_pipe)
    apply(sd_pipe, Setting("channels_last"))()
    assert snapshot(sd_pipe) == before


def test_each_half_of_a_decode_is_undone_alone(sd_pipe: Any) -> None:
    undo_slicing = apply(sd_pipe, Setting("vae_slicing"))
    undo_tiling = apply(sd_pipe, Setting("vae_tiling", {"tile": 64}))
    undo_slicing()
    assert not sd_pipe.vae.use_slicing
    assert sd_pipe.vae.use_tiling
    undo_tiling()
    assert not sd_pipe.vae.use_tiling


def test_a_forward_set_by_hand_survives_token_merging(sd_pipe: Any) -> None:
    blocks = [m for m in sd_pipe.unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    mine = lambda *args, **kwargs: None  # noqa: E731
    blocks[0].forward = mine
    apply(sd_pipe, Setting("tome"))()
    assert blocks[0].__dict__["forward"] is mine


# ---- offload ------------------------------------------------------------------------------------


def test_token_merging_still_merges_after_offload_came_and_went(sd_pipe: Any, draw: Any) -> None:
    merge = Setting("tome", {"ratio": 0.5, "max_downsample": 2})
    plain = draw(sd_pipe)
    # accelerate's own way, as a user would: it leaves bound forwards on the instances.
    sd_pipe.enable_model_cpu_offload(device="cpu")
    sd_pipe.remove_all_hooks()
    undo = apply(sd_pipe, merge)
    assert not torch.allclose(draw(sd_pipe), plain, atol=1e-4)
    undo()
    assert torch.equal(draw(sd_pipe), plain)


def test_sequential_offload_by_accelerate_itself_is_recognised(sd_pipe: Any, draw: Any) -> None:
    from accelerate import cpu_offload

    plain = draw(sd_pipe)
    for module in (sd_pipe.unet, sd_pipe.vae, sd_pipe.text_encoder):
        cpu_offload(module, torch.device("cpu"))
    assert find("sequential_cpu_offload").is_set(sd_pipe)
    assert torch.equal(draw(sd_pipe), plain)
    sd_pipe.remove_all_hooks()
    assert not find("sequential_cpu_offload").is_set(sd_pipe)


def test_offload_keeps_what_diffusers_noted_before(sd_pipe: Any) -> None:
    sd_pipe._offload_gpu_id = 3
    undo = apply(sd_pipe, Setting("model_cpu_offload"))
    undo()
    assert sd_pipe._offload_gpu_id == 3
    assert "_offload_device" not in sd_pipe.__dict__


# ---- where it cannot run ------------------------------------------------------------------------


def test_xformers_on_a_cpu_is_one_error_and_no_change(pipe: Any, draw: Any, snapshot: Any) -> None:
    plain = draw(pipe)
    before = snapshot(pipe)
    with pytest.raises(OptimizationError, match="xformers cannot run here"):
        apply(pipe, Setting("xformers"))
    assert snapshot(pipe) == before
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize(
    "error", [RuntimeError("no kernel\nimage"), ModuleNotFoundError(""), ValueError("x")]
)
def test_whatever_xformers_raises_is_one_line_and_undone(
    sd_pipe: Any, error: Exception, snapshot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    before = snapshot(sd_pipe)

    def half_way() -> None:
        sd_pipe.unet.set_attn_processor(AttnProcessor())
        raise error

    monkeypatch.setattr(sd_pipe.unet, "enable_xformers_memory_efficient_attention", half_way)
    with pytest.raises(OptimizationError) as caught:
        apply(sd_pipe, Setting("xformers"))
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert snapshot(sd_pipe) == before


def test_a_vae_without_tile_sizes_is_refused(sd_pipe: Any, snapshot: Any) -> None:
    del sd_pipe.vae.tile_sample_min_size
    before = snapshot(sd_pipe)
    with pytest.raises(OptimizationError, match="AutoencoderKL has no vae_tiling"):
        apply(sd_pipe, Setting("vae_tiling", {"tile": 64}))
    assert snapshot(sd_pipe) == before


def test_a_pipeline_without_a_vae_has_nothing_set() -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    pipe = DDPMPipeline(unet=unet, scheduler=DDPMScheduler())
    assert [name for name, handler in CATALOGUE.items() if handler.is_set(pipe)] == []


# ---- token merging ------------------------------------------------------------------------------


def test_token_merging_at_the_latent_resolution_does_nothing_on_sdxl(
    sdxl_pipe: Any, draw: Any
) -> None:
    plain = draw(sdxl_pipe)
    apply(sdxl_pipe, Setting("tome", {"ratio": 0.5, "max_downsample": 1}))
    assert torch.equal(draw(sdxl_pipe), plain)


def test_the_same_seed_merges_the_same_tokens(sd_pipe: Any, draw: Any) -> None:
    setting = find("tome").setting({"ratio": 0.5, "max_downsample": 2})
    apply(sd_pipe, setting)
    draw(sd_pipe)  # starts tomesd's generator, which runs on
    images = []
    for _ in range(2):
        find("tome").before_image(sd_pipe, setting.parameters, 5)
        images.append(draw(sd_pipe, seed=5))
    assert torch.equal(images[0], images[1])
    assert not torch.equal(draw(sd_pipe, seed=5), images[0])  # what it is for
