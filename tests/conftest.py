"""What all tests share: a cache folder of their own, recorded machines, small real pipelines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autotune.probe.machine import Machine
from autotune.probe.reference import load_machine

if "PYTEST_XDIST_WORKER" in os.environ:  # workers that each start a thread per core starve
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test reads or writes the user's profiles, and none reaches for the hub."""
    monkeypatch.setenv("AUTOTUNE_CACHE", str(tmp_path / "autotune-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield


@pytest.fixture
def rtx_3080() -> Machine:
    """A desktop card on today's stack: xFormers ties with SDPA."""
    return load_machine("rtx-3080-10gb")


@pytest.fixture
def rtx_3080_torch1() -> Machine:
    """The same card where the default attention is vanilla and xFormers measures faster."""
    return load_machine("rtx-3080-10gb-torch1")


@pytest.fixture
def cpu_machine() -> Machine:
    """A machine without a GPU."""
    return load_machine("cpu-16-cores")


# ---- small real pipelines: random but seeded weights, float32, milliseconds per step ------------

Draw = Callable[..., Any]


@pytest.fixture
def sd_pipe() -> Any:
    """Like SD 1.5: one text encoder, cross-attention at every level of the UNet."""
    return build_sd()


@pytest.fixture
def sdxl_pipe() -> Any:
    """Like SDXL: two text encoders, size conditions, no attention at the latent's resolution."""
    return build_sdxl()


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request: pytest.FixtureRequest) -> Any:
    """Each of the two in turn."""
    return {"sd": build_sd, "sdxl": build_sdxl}[request.param]()


@pytest.fixture
def draw() -> Draw:
    """``draw(pipe, seed=0, side=64, images=2)``: a pipeline's images as one float tensor."""

    def draw_images(pipe: Any, seed: int = 0, side: int = 64, images: int = 2) -> Any:
        import torch

        return pipe(
            "a small cat",
            height=side,
            width=side,
            num_inference_steps=2,
            num_images_per_prompt=images,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images

    return draw_images


def build_sd() -> Any:
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        cross_attention_dim=32,
        attention_head_dim=4,  # as in SD 1.5, diffusers reads this as the number of heads
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    pipe = StableDiffusionPipeline(
        vae=_build_vae(),
        text_encoder=_build_encoder(CLIPTextModel),
        tokenizer=_build_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _ready(pipe)


def build_sdxl() -> Any:
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    pipe = StableDiffusionXLPipeline(
        vae=_build_vae(),
        text_encoder=_build_encoder(CLIPTextModel),
        text_encoder_2=_build_encoder(CLIPTextModelWithProjection),
        tokenizer=_build_tokenizer(),
        tokenizer_2=_build_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    return _ready(pipe)


def _ready(pipe: Any) -> Any:
    for module in pipe.components.values():
        if hasattr(module, "eval"):
            module.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _build_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
    )


def _build_encoder(cls: Any) -> Any:
    from transformers import CLIPTextConfig

    return cls(
        CLIPTextConfig(
            vocab_size=54,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            projection_dim=32,
            bos_token_id=52,
            eos_token_id=53,
            pad_token_id=53,
        )
    )


def _build_tokenizer() -> Any:
    """Byte pairs of single letters, so that no vocabulary file is needed."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


# ---- state --------------------------------------------------------------------------------------

Snapshot = Callable[[Any], dict[str, Any]]


@pytest.fixture
def snapshot() -> Snapshot:
    """All that an optimization could leave changed on a pipeline, to compare by ``==``."""
    return take_snapshot


def take_snapshot(pipe: Any) -> dict[str, Any]:
    components = {n: m for n, m in pipe.components.items() if hasattr(m, "named_modules")}
    state: dict[str, Any] = {
        "pipe": sorted(pipe.__dict__),
        "device": str(pipe._execution_device),
        "random state": _digest_of_random_state(),
    }
    for component, root in components.items():
        for path, module in root.named_modules():
            state[f"{component}.{path}"] = _describe_module(module)
        for path, tensor in (*root.named_parameters(), *root.named_buffers()):
            state[f"{component}.{path}"] = _describe_tensor(tensor)
    return state


def _digest_of_random_state() -> int:
    import torch

    return hash(torch.get_rng_state().numpy().tobytes())


def _describe_module(module: Any) -> dict[str, Any]:
    plain = {k: v for k, v in module.__dict__.items() if isinstance(v, (bool, int, float, str))}
    return {
        "class": type(module),
        "attributes": sorted(module.__dict__),
        "values": plain,
        "processor": id(getattr(module, "processor", None)),
        "forward hooks": list(module._forward_hooks),
        "forward pre-hooks": list(module._forward_pre_hooks),
        "children": list(module._modules),
    }


def _describe_tensor(tensor: Any) -> tuple[Any, ...]:
    data = None if tensor.is_meta else tensor.detach().contiguous().numpy().tobytes()
    return (
        str(tensor.dtype),
        str(tensor.device),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.requires_grad,
        hash(data),
    )
