"""How pipelines are called: the names of their arguments, and what a user would pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from autotune.errors import RequestError
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
    wanted |= dict(_images(parameters, side, request.frames))
    unknown = sorted(set(request.options) - set(parameters))
    if unknown:
        raise RequestError(
            f"{type(pipe).__name__} takes no argument {unknown[0]!r}",
            f"it takes: {', '.join(parameters)}",
        )
    return {k: v for k, v in (wanted | options).items() if k in parameters}


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
    config = getattr(getattr(pipe, "transformer", None), "config", None)
    return getattr(config, "sample_size", None) in (32, 64, 128, 256)


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
    parameters: Mapping[str, inspect.Parameter], side: tuple[int, int], frames: int
) -> Iterator[tuple[str, Any]]:
    """Pictures for the arguments that ask for some: black ones, masks all white."""
    import torch
    from PIL import Image

    height, width = side
    for name, parameter in parameters.items():
        if name in ("mask_image", "mask", "control_mask"):
            yield name, Image.new("L", (width, height), 255)
        elif name in ("image", "control_image") or (
            name.endswith("_image") and parameter.default is parameter.empty
        ):
            yield name, Image.new("RGB", (width, height))
        elif name == "video" and parameter.default in (None, parameter.empty):
            yield name, torch.zeros(1, frames, 3, height, width)
