"""Complete and check a request: defaults from the model, limits from the model's sizes."""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any, NamedTuple

import msgspec

from autotune.errors import RequestError
from autotune.probe.machine import Machine
from autotune.workload.architecture import Architecture, builtin_names
from autotune.workload.workload import Request

log = logging.getLogger("autotune")

MAX_SIDE, MAX_BATCH, MAX_STEPS, MAX_FRAMES = 16384, 1024, 1000, 10_000
DTYPES = ("float32", "float16", "bfloat16")
_SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def complete_request(
    architecture: Architecture,
    machine: Machine,
    *,
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
    steps: int | None = None,
    guidance_scale: float | None = None,
    dtype: str = "auto",
    frames: int | None = None,
    options: dict[str, bool | int | float | str] | None = None,
) -> Request:
    """Fill in what the user left out, and refuse what the model cannot draw.

    Raises:
        RequestError: a size that the model's factor does not divide and its pipeline does not
            round, or an absurd number.
    """
    native = native_request(architecture)
    request = Request(
        height=native.height if height is None else height,
        width=native.width if width is None else width,
        batch=batch,
        steps=native.steps if steps is None else steps,
        guidance_scale=native.guidance_scale if guidance_scale is None else guidance_scale,
        dtype=_resolve_dtype(dtype, architecture, machine),
        frames=native.frames if frames is None else frames,
        options=options or {},
    )
    if native.frames == 1 and request.frames != 1:
        raise RequestError(
            f"{architecture.name} draws images, not {request.frames} frames", "leave --frames out"
        )
    _check_range("frames", request.frames, 1, MAX_FRAMES)
    _check_range("batch", request.batch, 1, MAX_BATCH)
    _check_range("steps", request.steps, 1, MAX_STEPS)
    if not 0 <= request.guidance_scale <= 1000:
        raise RequestError(
            f"guidance {request.guidance_scale} is out of range", "use 0 to 30; 7.5 is usual"
        )
    sides = {
        name: _checked_side(name, pixels, architecture)
        for name, pixels in (("height", request.height), ("width", request.width))
    }
    return msgspec.structs.replace(request, **sides)


class Native(NamedTuple):
    """What a model is asked for when the user says nothing."""

    height: int
    width: int
    frames: int
    steps: int
    guidance_scale: float


def native_request(architecture: Architecture) -> Native:
    """Size, steps and guidance: the architecture's, else those of its pipeline's ``__call__``."""
    defaults = _Defaults(architecture.pipeline)
    height, width = native_size(architecture, defaults)
    guidance = architecture.guidance_scale
    return Native(
        height=height,
        width=width,
        frames=architecture.frames or _native_frames(architecture, defaults),
        steps=architecture.steps or int(defaults.number("num_inference_steps", 50)),
        guidance_scale=defaults.guidance() if guidance is None else guidance,
    )


def _native_frames(architecture: Architecture, defaults: _Defaults) -> int:
    """1 for images; video pipelines take ``num_frames``, whose default may be the model's.

    Built-in files of video models say it themselves, so that diffusers need not be imported.
    """
    if architecture.name in builtin_names() or not defaults.takes("num_frames"):
        return 1
    frames = architecture.config("transformer").get("sample_frames") or USUAL_FRAMES
    return int(defaults.number("num_frames", frames))


USUAL_FRAMES = 49
"""Of a video where neither the model nor its pipeline says: two to six seconds."""


class _Defaults:
    """The default arguments of a pipeline class's ``__call__``, looked up when first asked for.

    Built-in architectures say everything themselves, so that diffusers need not be imported.
    """

    def __init__(self, pipeline: str) -> None:
        self._pipeline = pipeline

    @functools.cached_property
    def _values(self) -> dict[str, Any]:
        import diffusers

        cls = getattr(diffusers, self._pipeline, None)
        parameters = inspect.signature(cls.__call__).parameters if cls else {}
        return {name: p.default for name, p in parameters.items()}

    def takes(self, name: str) -> bool:
        """Whether there is such an argument."""
        return name in self._values

    def number(self, name: str, fallback: float) -> float:
        """The default where it is a number."""
        value = self._values.get(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if is_number and value is not None else fallback

    def guidance(self) -> float:
        """Qwen-Image guides by ``true_cfg_scale``; its ``guidance_scale`` is ``None``."""
        return self.number("guidance_scale", self.number("true_cfg_scale", 7.5))


def native_size(architecture: Architecture, defaults: _Defaults | None = None) -> tuple[int, int]:
    """Height and width in pixels that the model was trained at."""
    if architecture.height and architecture.width:
        return architecture.height, architecture.width
    config = architecture.config("unet") or architecture.config("transformer")
    factor = vae_factor(architecture)
    sample = config.get("sample_size")
    height, width = sample if isinstance(sample, (list, tuple)) else (sample, sample)
    height = height or config.get("sample_height")
    width = width or config.get("sample_width")
    if isinstance(height, int) and isinstance(width, int):
        return height * factor, width * factor
    defaults = defaults or _Defaults(architecture.pipeline)
    pixels = architecture.config("vae").get("sample_size") or DEFAULT_SIDE
    side = int(pixels) // factor * factor
    return int(defaults.number("height", side)), int(defaults.number("width", side))


DEFAULT_SIDE = 1024
"""Pixels of a side where neither the model nor its pipeline says: what current models draw."""

_FACTOR_NAMES = ("spatial_compression_ratio", "scale_factor_spatial")
_CHANNEL_NAMES = ("block_out_channels", "encoder_block_out_channels")


def vae_factor(architecture: Architecture) -> int:
    """Pixels per latent element along a side."""
    return config_factor(architecture.config("vae"))


def config_factor(vae: dict[str, Any]) -> int:
    """The same by an autoencoder's configuration."""
    for name in _FACTOR_NAMES:
        if isinstance(vae.get(name), int):
            return int(vae[name])
    for name in _CHANNEL_NAMES:
        if vae.get(name):
            patch = vae.get("patch_size")
            return int(2 ** (len(vae[name]) - 1)) * (patch if isinstance(patch, int) else 1)
    halved = vae.get("temperal_downsample") or vae.get("temporal_downsample")  # so it is spelled
    return int(2 ** len(halved)) if halved else USUAL_FACTOR


USUAL_FACTOR = 8
"""Of nearly every autoencoder; the pipeline itself refuses what it cannot draw."""


def size_factor(architecture: Architecture) -> int:
    """What a side must be a multiple of: latent elements times a transformer's patch.

    Flux and its kin say a patch of 1 and are given latents packed two by two into channels.
    """
    transformer = architecture.config("transformer")
    patch = transformer.get("patch_size") or transformer.get("all_patch_size") or 1
    spatial = int(patch[-1] if isinstance(patch, (list, tuple)) else patch)
    return vae_factor(architecture) * max(spatial, 2 if _is_packed(architecture) else 1)


def _is_packed(architecture: Architecture) -> bool:
    """Whether latents are packed two by two into channels."""
    latent = architecture.config("vae").get("latent_channels")
    channels = architecture.config("transformer").get("in_channels")
    return isinstance(latent, int) and channels == 4 * latent


def _resolve_dtype(dtype: str, architecture: Architecture, machine: Machine) -> str:
    dtype = _SHORT_DTYPES.get(dtype, dtype)
    if dtype == "auto":
        return _preferred_dtype(architecture, machine)
    if dtype not in DTYPES:
        raise RequestError(f"unknown dtype {dtype!r}", f"use auto, {', '.join(DTYPES)}")
    return dtype


def _preferred_dtype(architecture: Architecture, machine: Machine) -> str:
    """16 bit where the device computes it faster, in the flavour the weights are published in."""
    rates = machine.kernels.matmul_flops_per_s
    wanted = architecture.half_dtype
    if wanted == "bfloat16" and wanted not in rates:
        wanted = "float16"
    if machine.device.kind == "cpu" or wanted not in rates:
        return "float32"
    return wanted if rates[wanted].value > rates["float32"].value else "float32"


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise RequestError(f"{name} {value} is out of range", f"use {low} to {high}")


def _checked_side(name: str, pixels: int, architecture: Architecture) -> int:
    """A side that can be drawn. Pipelines that pack latents round it down; others refuse it."""
    factor = size_factor(architecture)
    if not factor <= pixels <= MAX_SIDE:
        raise RequestError(f"{name} {pixels} is out of range", f"use {factor} to {MAX_SIDE} pixels")
    below = pixels // factor * factor
    if pixels != below and not _is_packed(architecture):
        raise RequestError(
            f"{name} {pixels} is not a multiple of {factor}, the model's factor",
            f"use {below} or {below + factor}",
        )
    if pixels != below:
        _say_rounded(name, pixels, below, factor)
    return below


@functools.cache
def _say_rounded(name: str, pixels: int, below: int, factor: int) -> None:
    """Once: requests are completed at every call."""
    log.warning("%s %d is drawn as %d, a multiple of %d", name, pixels, below, factor)
