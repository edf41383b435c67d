"""How pipelines are called: the names of their arguments, and what a user would pass."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

from autotune.errors import RequestError
from autotune.workload.live import config_of, is_denoiser, modules_of, parts_of
from autotune.workload.workload import Request

PROMPT = " ".join(["a"] * 50)
"""As long as people's prompts are. Most pipelines pad every prompt to one length; for the others
this length is what is predicted."""

UPSCALED = {"StableDiffusionUpscalePipeline": 4, "StableDiffusionLatentUpscalePipeline": 2}
"""How many times larger than the image given the image drawn is."""


def call_arguments(pipe: Any, request: Request) -> dict[str, Any]:
    """What a user would pass to draw the request, as far as this pipeline takes it."""
    import torch

    parameters = call_parameters(type(pipe))
    upscaled = UPSCALED.get(type(pipe).__name__, 1)
    side = (request.height // upscaled, request.width // upscaled)
    guidance = request.guidance_scale
    wanted: dict[str, Any] = {
        "prompt": PROMPT,
        "height": request.height,
        "width": request.width,
        "num_frames": request.frames,
        "num_inference_steps": request.steps,
        "guidance_scale": guidance,
        "output_type": "pt",
        "generator": torch.Generator("cpu").manual_seed(0),
    }
    options: dict[str, Any] = dict(request.options)
    copies = copies_name(parameters)
    if copies is None or _overwrites(type(pipe), copies):
        texts = {"prompt": PROMPT, **options}
        texts = {n: v for n, v in texts.items() if "prompt" in n and isinstance(v, str)}
        options |= {n: [text] * request.batch for n, text in texts.items()}
    else:
        wanted[copies] = request.batch
    if guidance_name(parameters) == "true_cfg_scale":
        wanted |= {"true_cfg_scale": guidance, "negative_prompt": ""}
        del wanted["guidance_scale"]
    if not _has_bins(pipe):
        wanted["use_resolution_binning"] = False
    wanted |= dict(_images(pipe, parameters, side, request.frames))
    wanted |= dict(_embeddings(pipe, parameters))
    unknown = sorted(set(request.options) - set(parameters))
    if unknown:
        raise RequestError(
            f"{type(pipe).__name__} takes no argument {unknown[0]!r}",
            f"it takes: {', '.join(parameters)}",
        )
    return {k: v for k, v in (wanted | options).items() if k in parameters}


def require_steps(pipe: Any, request: Request) -> None:
    """Where a picture is given, only the share ``strength`` of the steps is taken.

    Raises:
        RequestError: that is less than one step.
    """
    parameter = call_parameters(type(pipe)).get("strength")
    default = None if parameter is None else parameter.default
    strength, steps = request.options.get("strength", default), request.steps
    if not isinstance(strength, (int, float)) or int(steps * strength) >= 1:
        return
    more = f"ask for at least {math.ceil(1 / strength)} steps, or for" if strength else "ask for"
    raise RequestError(
        f"strength {strength:g} times {steps} steps leaves less than one step to draw in",
        f"{more} a strength of {math.ceil(100 / steps) / 100:g} or more",
    )


def call_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """What ``__call__`` takes; a subclass that passes on ``**kwargs`` takes what its base takes."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__call__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__call__"]).parameters
        passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        named = {
            n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        }
        found = named | found
        if not passes_on:
            break
    return {n: p for n, p in found.items() if n != "self"}


def _overwrites(cls: Any, argument: str) -> bool:
    """CogVideoX takes a number of videos, and then draws one for each prompt."""
    try:
        return f" {argument} = 1\n" in inspect.getsource(cls.__call__)
    except (OSError, TypeError):  # no source to be found
        return False


def _has_bins(pipe: Any) -> bool:
    """PixArt's pipelines know aspect ratios for a few latent sizes, and fail at others."""
    config = config_of(getattr(pipe, "transformer", None))
    return config.get("sample_size") in (32, 64, 128, 256)


def copies_name(parameters: Mapping[str, Any]) -> str | None:
    """The argument for images (or videos) per prompt, if there is one."""
    return next((p for p in parameters if p.startswith("num_") and "_per_prompt" in p), None)


def guidance_name(parameters: Mapping[str, Any]) -> str:
    """The argument that guides: Qwen-Image leaves ``guidance_scale`` to distilled models."""
    found = parameters.get("true_cfg_scale")
    distilled = parameters.get("guidance_scale")
    if found is not None and (distilled is None or distilled.default is None):
        return "true_cfg_scale"
    return "guidance_scale"


def _images(
    pipe: Any, parameters: Mapping[str, inspect.Parameter], side: tuple[int, int], frames: int
) -> Iterator[tuple[str, Any]]:
    """Pictures for the arguments that ask for some: black ones, masks all white."""
    import torch
    from PIL import Image

    height, width = side
    picture = Image.new("RGB", (width, height))
    controls = getattr(getattr(pipe, "controlnet", None), "nets", None)  # of several ControlNets
    for name, parameter in parameters.items():
        if name in ("mask_image", "mask", "control_mask") and "image" in parameters:
            yield name, Image.new("L", (width, height), 255)
        elif name in ("image", "control_image") or (
            name.endswith("_image") and parameter.default is parameter.empty
        ):
            is_control = name == "control_image" or "control_image" not in parameters
            yield name, [picture] * len(controls) if controls and is_control else picture
        elif name in ("video", "control_video") and parameter.default in (None, parameter.empty):
            yield name, torch.zeros(1, frames, 3, height, width)


USUAL_TOKENS = 77
"""Of a prompt, where nothing says how many."""

_WIDTHS = (
    *("cross_attention_dim", "joint_attention_dim", "caption_channels", "text_embed_dim"),
    *("text_dim", "cap_feat_dim", "encoder_hid_dim"),
)
"""What the configurations of denoisers call the width of the prompt's embeddings."""


def prompt_width(denoiser: Any) -> int:
    """The width of the prompt's embeddings that a denoiser takes; 1 where it does not say."""
    config = config_of(denoiser)
    return next((w for n in _WIDTHS if isinstance(w := config.get(n), int)), 1)


def _embeddings(
    pipe: Any, parameters: Mapping[str, inspect.Parameter]
) -> Iterator[tuple[str, Any]]:
    """Embeddings in place of the prompt, for a pipeline without a text encoder."""
    import torch

    parts = parts_of(pipe)
    if "prompt_embeds" not in parameters or any(
        n.startswith("text_encoder") and part is not None for n, part in parts.items()
    ):
        return
    denoiser = next((m for n, m in modules_of(pipe).items() if is_denoiser(n, m)), None)
    limit = parameters.get("max_sequence_length")
    tokens = limit.default if limit and isinstance(limit.default, int) else USUAL_TOKENS
    yield "prompt", None
    for name in parameters:
        if "prompt" in name and name.endswith("_mask"):
            yield name, torch.ones(1, tokens, dtype=torch.long)
        elif name.endswith("pooled_prompt_embeds"):
            yield name, torch.zeros(1, _pooled_width(pipe, denoiser))
        elif name.endswith("prompt_embeds"):
            yield name, torch.zeros(1, tokens, prompt_width(denoiser))


def _pooled_width(pipe: Any, denoiser: Any) -> int:
    """SDXL's is what six embedded numbers (sizes) leave of one input; its refiner takes five."""
    config = config_of(denoiser)
    whole = config.get("projection_class_embeddings_input_dim")
    if whole is None:
        return int(config.get("pooled_projection_dim") or 1)
    numbers = 5 if config_of(pipe).get("requires_aesthetics_score") else 6
    return int(whole - numbers * config["addition_time_embed_dim"])
