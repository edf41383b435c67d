"""The built-in architectures: they build, weigh what was published, and step as often as they say.

Parameter counts are checked against numbers that others published, never against what a build gave.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from autotune.probe.machine import Machine
from autotune.workload.architecture import (
    DEMO,
    Architecture,
    ComponentConfig,
    builtin_names,
    find_architecture,
)
from autotune.workload.components import build_on_meta
from autotune.workload.request import complete_request

NAMES = [n for n in builtin_names() if n != DEMO]

# ---- published numbers of parameters ------------------------------------------------------------
# Exact ones: sums over the published files, as the hub, model cards, papers or other projects'
# measurements of the checkpoints state them. FILES below has those that come from a file's size.

CLIP_L, CLIP_H, CLIP_G = 123_060_480, 340_387_840, 694_659_840
CLIP_L_PROJECTED = CLIP_L + 768 * 768
T5_XXL, UMT5_XXL, MT5_XL = 4_762_310_656, 5_680_910_336, 1_669_958_656
GEMMA_2B, QWEN3_4B, LLAMA_8B = 2_614_341_888, 4_022_468_096, 7_505_186_816
VAE_SD, VAE_16 = 83_653_863, 83_819_683
VAE_COGVIDEOX, VAE_WAN = 215_583_907, 126_892_531
UNET_SD, UNET_XL = 859_520_964, 2_567_463_684
FLUX, WAN_14B, SD35_LARGE = 11_901_408_320, 14_288_491_584, 8_056_627_520
MOTION = 453_209_280

_SD = {"text_encoder": CLIP_L, "unet": UNET_SD, "vae": VAE_SD}
_XL = {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "unet": UNET_XL, "vae": VAE_SD}
# Stable Diffusion 3.5's three encoders are published as 5,580,620,800 together.
_SD3 = {
    "text_encoder": CLIP_L_PROJECTED,
    "text_encoder_2": CLIP_G,
    "text_encoder_3": T5_XXL,
    "vae": VAE_16,
}
_FLUX = {"text_encoder": CLIP_L, "text_encoder_2": T5_XXL, "transformer": FLUX, "vae": VAE_16}
_WAN = {"text_encoder": UMT5_XXL, "vae": VAE_WAN}

EXACT: dict[str, dict[str, int]] = {
    "sd15": _SD,
    "sd15-inpaint": _SD | {"unet": 859_535_364},
    "sd15-controlnet": _SD | {"controlnet": 361_279_120},
    # from_unet2d puts the adapter's modules into the UNet
    "animatediff-sd15": _SD | {"unet": UNET_SD + MOTION, "motion_adapter": MOTION},
    "sd21": {"text_encoder": CLIP_H, "unet": 865_910_724, "vae": VAE_SD},
    "sd-x4-upscaler": {"text_encoder": CLIP_H},
    "sdxl": _XL,
    "sdxl-turbo": _XL,
    "sdxl-controlnet": _XL | {"controlnet": 1_251_014_160},
    "sdxl-refiner": {"text_encoder_2": CLIP_G, "unet": 2_259_526_660, "vae": VAE_SD},
    # Of a paper's table: encoder 34,163,592 and decoder 63,579,183, and 72 for quant_conv.
    "svd-xt": {"image_encoder": 632_076_800, "unet": 1_524_623_082, "vae": 97_742_847},
    "sd3-medium": _SD3 | {"transformer": 2_028_328_000},
    "sd35-medium": _SD3 | {"transformer": 2_243_171_520},
    "sd35-large": _SD3 | {"transformer": SD35_LARGE},
    "sd35-large-turbo": _SD3 | {"transformer": SD35_LARGE},
    "flux-dev": _FLUX,
    "flux-kontext": _FLUX,
    "flux-schnell": _FLUX | {"transformer": 11_891_178_560},
    "chroma": {"text_encoder": T5_XXL, "transformer": 8_899_983_424, "vae": VAE_16},
    "pixart-sigma": {"text_encoder": T5_XXL, "transformer": 610_856_096, "vae": VAE_SD},
    "sana": {"text_encoder": GEMMA_2B, "vae": 312_250_275},
    "auraflow": {"vae": VAE_SD},
    "hunyuandit": {"text_encoder_2": MT5_XL, "vae": VAE_SD},
    "cogvideox-2b": {
        "text_encoder": T5_XXL,
        "transformer": 1_693_783_872,
        "vae": VAE_COGVIDEOX,
    },
    "cogvideox-5b": {
        "text_encoder": T5_XXL,
        "transformer": 5_570_283_072,
        "vae": VAE_COGVIDEOX,
    },
    "ltx-video": {"text_encoder": T5_XXL, "transformer": 1_923_385_472},
    "wan21-1.3b": _WAN | {"transformer": 1_418_996_800},
    "wan21-14b": _WAN | {"transformer": WAN_14B},
    "wan22-5b": _WAN | {"transformer": 4_999_787_712, "vae": 704_688_668},
    "wan22-14b": _WAN | {"transformer": WAN_14B, "transformer_2": WAN_14B},
    "hunyuanvideo": {
        "text_encoder": LLAMA_8B,
        "text_encoder_2": CLIP_L,
        "transformer": 12_821_012_544,
        "vae": 246_478_803,
    },
    "qwen-image": {
        "text_encoder": 8_292_166_656,
        "transformer": 20_430_401_088,
        "vae": VAE_WAN,
    },
    "lumina2": {"text_encoder": GEMMA_2B, "transformer": 2_609_769_152, "vae": VAE_16},
    "z-image-turbo": {"text_encoder": QWEN3_4B, "transformer": 6_154_908_736, "vae": VAE_16},
}

# Where only a rounded size is known: (published number, how far off it may be).
ROUNDED: dict[str, dict[str, tuple[float, float]]] = {
    # 1.89 GB in float32. x4-upscaler-ema.ckpt, float32 too, is 3,531,514,018 bytes with the whole
    # text tower (354,032,640) and half a megabyte that is no parameter.
    "sd-x4-upscaler": {
        "unet": (1.89e9 / 4, 0.005),
        "vae": (3_531_514_018 / 4 - 354_032_640 - 473_398_020, 0.003),
    },
    # 3.21 GB in bfloat16; the card says 1648M, the paper 1.6B.
    "sana": {"transformer": (3.21e9 / 2, 0.003)},
    # v0.3: 27.43 GB and 4.89 GB in float32.
    "auraflow": {"transformer": (27.43e9 / 4, 0.001), "text_encoder": (4.89e9 / 4, 0.002)},
    # "1.5B" and 6 GB in float32; the BERT encoder is said to have 350M.
    "hunyuandit": {"transformer": (1.5e9, 0.01), "text_encoder": (350e6, 0.01)},
    # 1.68 GB in float32.
    "ltx-video": {"vae": (1.68e9 / 4, 0.005)},
}

# Published bytes of safetensors files: the values, then names and shapes, less than 200 bytes for
# each tensor. Buffers are in them: SD 3's position tables, early CLIP's position ids.
FILES: list[tuple[str, str, int, int]] = [
    ("sd21", "unet", 4, 3_463_726_498),
    ("sd21", "text_encoder", 4, 1_361_597_018),
    ("sdxl", "unet", 2, 5_135_149_760),
    ("sdxl", "unet", 4, 10_270_077_736),
    ("sdxl", "vae", 4, 334_643_268),
    ("sdxl", "text_encoder", 2, 246_144_152),
    ("sdxl", "text_encoder_2", 2, 1_389_382_176),
    ("cogvideox-2b", "transformer", 2, 3_387_650_264),
    ("cogvideox-2b", "vae", 4, 862_388_596),
    ("flux-dev", "text_encoder_2", 2, 4_994_582_104 + 4_530_066_248),
]

# "total_size" of the indexes of files in several parts: the values alone.
TOTALS: list[tuple[str, str, int, int]] = [
    ("flux-dev", "transformer", 2, 23_802_816_640),
    ("flux-schnell", "transformer", 2, 23_782_357_120),
    ("chroma", "transformer", 2, 17_799_966_848),
    ("sd35-large", "transformer", 2, 16_292_561_536),
    ("hunyuandit", "text_encoder_2", 4, 6_679_834_624),
    ("wan22-5b", "transformer", 4, 19_999_150_848),
]


@functools.cache
def _built(component: str) -> nn.Module:
    """Once for all models that share it: T5-XXL is part of ten."""
    return build_on_meta("part", ComponentConfig(**json.loads(component)), torch.bfloat16)


def built(component: ComponentConfig) -> nn.Module:
    fields = {f: getattr(component, f) for f in ("library", "class_name", "config")}
    return _built(json.dumps(fields, sort_keys=True))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def saved_values(module: nn.Module) -> tuple[int, int]:
    """Values and tensors in the module's file; what is shared is saved once."""
    tensors = {id(t): t for t in module.state_dict(keep_vars=True).values()}.values()
    return sum(t.numel() for t in tensors), len(tensors)


@pytest.fixture(params=NAMES)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    """Each file in turn, as far as the installed diffusers knows its pipeline."""
    found = find_architecture(request.param)
    if not hasattr(diffusers, found.pipeline):
        pytest.skip(f"{found.pipeline} is not in diffusers {diffusers.__version__}")
    return found


def test_every_file_is_checked_against_published_numbers() -> None:
    assert set(EXACT) == set(NAMES)
    for name in NAMES:
        components = set(find_architecture(name).components)
        exact, rounded = set(EXACT[name]), set(ROUNDED.get(name, ()))
        assert exact | rounded == components, name
        assert not exact & rounded, name


def test_modules_build_and_have_the_published_parameters(architecture: Architecture) -> None:
    counts = {n: count(built(c)) for n, c in architecture.components.items()}
    assert counts == architecture.parameters
    exact = EXACT[architecture.name]
    assert {n: counts[n] for n in exact} == exact
    for name, (published, tolerance) in ROUNDED.get(architecture.name, {}).items():
        assert counts[name] == pytest.approx(published, rel=tolerance)


@pytest.mark.parametrize(("name", "component", "size", "file"), FILES)
def test_modules_fill_the_published_files(name: str, component: str, size: int, file: int) -> None:
    values, tensors = saved_values(built(find_architecture(name).components[component]))
    assert 0 < file - values * size < 200 * tensors


@pytest.mark.parametrize(("name", "component", "size", "total"), TOTALS)
def test_modules_fill_the_published_indexes(
    name: str, component: str, size: int, total: int
) -> None:
    values, _ = saved_values(built(find_architecture(name).components[component]))
    assert values * size == total


def test_configurations_say_only_what_their_classes_read(architecture: Architecture) -> None:
    """A misspelled key would leave a default in place."""
    for component in (*architecture.components.values(), *architecture.schedulers.values()):
        if component.library == "diffusers":
            cls = getattr(diffusers, component.class_name)
            assert set(component.config) <= set(inspect.signature(cls.__init__).parameters)
        else:
            _assert_read_by_transformers(built(component).config, component.config)


def _assert_read_by_transformers(config: Any, given: dict[str, Any]) -> None:
    known = set(type(config)().to_dict()) | {"rope_theta", "rope_scaling"}  # renamed by now
    assert set(given) <= known
    for name, value in given.items():
        if name.endswith("_config"):
            _assert_read_by_transformers(getattr(config, name), value)


def test_parts_are_what_the_pipeline_is_made_of(architecture: Architecture) -> None:
    parameters = inspect.signature(getattr(diffusers, architecture.pipeline).__init__).parameters
    named = {
        *architecture.components,
        *architecture.schedulers,
        *architecture.tokenizers,
        *architecture.options,
    }
    assert named <= set(parameters)
    required = {n for n, p in parameters.items() if p.default is p.empty and n != "self"}
    apart = {"safety_checker", "feature_extractor"}
    if architecture.name == "sdxl-refiner":  # its model_index.json holds null for both
        apart |= {"text_encoder", "tokenizer"}
    assert required - named <= apart
    encoders = {n for n in architecture.components if n.startswith("text_encoder")}
    assert {n.replace("tokenizer", "text_encoder") for n in architecture.tokenizers} == encoders


def test_a_file_says_what_to_ask_for(architecture: Architecture, rtx_3080: Machine) -> None:
    assert architecture.half_dtype in ("float16", "bfloat16")
    assert architecture.source.endswith(".") and "\n" not in architecture.source
    assert set(architecture.stored) <= set(architecture.components)
    assert set(architecture.stored.values()) <= {"float16", "bfloat16", "float32"}
    assert not architecture.stored or "Dtypes: " in architecture.source
    request = complete_request(architecture, rtx_3080)
    asked = (request.height, request.width, request.steps, request.guidance_scale)
    assert asked == (
        architecture.height,
        architecture.width,
        architecture.steps,
        architecture.guidance_scale,
    )
    call = inspect.signature(getattr(diffusers, architecture.pipeline).__call__).parameters
    assert ("num_frames" in call) == (architecture.frames is not None)
    assert request.frames == (architecture.frames or 1)


# ---- schedulers ---------------------------------------------------------------------------------


def _down_to_last(steps: int) -> Any:
    return np.linspace(1.0, 1 / steps, steps)


def _plain(architecture: Architecture) -> dict[str, Any]:
    return {"num_inference_steps": architecture.steps}


def _down_to_zero(architecture: Architecture) -> dict[str, Any]:
    return {"sigmas": np.linspace(1.0, 0.0, int(architecture.steps or 0) + 1)[:-1]}


def _shifted(architecture: Architecture) -> dict[str, Any]:
    """By the number of latent tokens, with what the scheduler's configuration says for both ends.

    Every pipeline of this kind asks for the same, whether or not its scheduler shifts.
    """
    height, width = int(architecture.height or 0), int(architecture.width or 0)
    tokens = (height // 16) * (width // 16)
    if architecture.pipeline == "LTXPipeline":  # 32 pixels and 8 frames in each latent
        tokens = (height // 32) * (width // 32) * ((int(architecture.frames or 0) - 1) // 8 + 1)
    config = architecture.schedulers["scheduler"].config
    shorts, longs = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) / (longs - shorts) * (tokens - shorts)
    return {"sigmas": _down_to_last(int(architecture.steps or 0)), "mu": mu}


ASKED: dict[str, Callable[[Architecture], dict[str, Any]]] = {
    "ChromaPipeline": _shifted,
    "FluxKontextPipeline": _shifted,
    "FluxPipeline": _shifted,
    "HunyuanVideoPipeline": _down_to_zero,
    "LTXPipeline": _shifted,
    "Lumina2Pipeline": _shifted,
    "QwenImagePipeline": _shifted,
    "ZImagePipeline": _shifted,
}
"""What pipelines ask their scheduler for, other than a number of steps."""


def test_schedulers_step_as_the_pipeline_asks_them_to(architecture: Architecture) -> None:
    made = {
        n: getattr(diffusers, c.class_name).from_config(c.config)
        for n, c in architecture.schedulers.items()
    }
    scheduler = made["scheduler"]
    scheduler.set_timesteps(**ASKED.get(architecture.pipeline, _plain)(architecture))
    steps = int(architecture.steps or 0)
    # PNDM takes its second step twice.
    extra = 1 if isinstance(scheduler, diffusers.PNDMScheduler) else 0
    timesteps = [float(t) for t in scheduler.timesteps]
    assert len(timesteps) == steps + extra
    assert all(math.isfinite(t) for t in timesteps)
    assert timesteps == sorted(timesteps, reverse=True)
    if getattr(scheduler.config, "timestep_type", "discrete") == "discrete":
        assert 0 <= timesteps[-1] <= timesteps[0] <= 1000
        assert timesteps[0] > 900


def test_an_upscaler_has_a_second_scheduler() -> None:
    found = find_architecture("sd-x4-upscaler")
    assert set(found.schedulers) == {"scheduler", "low_res_scheduler"}
    assert found.config("unet")["in_channels"] == 7
