"""Complete and check a request: defaults from the model, limits from the model's sizes."""

from __future__ import annotations

from autotune.errors import ModelError, RequestError
from autotune.probe.machine import Machine
from autotune.workload.architecture import Architecture
from autotune.workload.workload import Request

MAX_SIDE, MAX_BATCH, MAX_STEPS = 16384, 1024, 1000
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
) -> Request:
    """Fill in what the user left out, and refuse what the model cannot draw.

    Raises:
        RequestError: a size that the model's factor does not divide, or an absurd number.
    """
    native_height, native_width = native_size(architecture)
    default_steps, default_guidance = _pipeline_defaults(architecture)
    request = Request(
        height=native_height if height is None else height,
        width=native_width if width is None else width,
        batch=batch,
        steps=default_steps if steps is None else steps,
        guidance_scale=default_guidance if guidance_scale is None else guidance_scale,
        dtype=_resolve_dtype(dtype, architecture, machine),
    )
    if frames not in (None, 1):
        raise RequestError(
            f"{architecture.name} draws images, not {frames} frames", "leave --frames out"
        )
    _check_range("batch", request.batch, 1, MAX_BATCH)
    _check_range("steps", request.steps, 1, MAX_STEPS)
    if not 0 <= request.guidance_scale <= 1000:
        raise RequestError(
            f"guidance {request.guidance_scale} is out of range", "use 0 to 30; 7.5 is usual"
        )
    for name, pixels in (("height", request.height), ("width", request.width)):
        _check_side(name, pixels, vae_factor(architecture))
    return request


def native_size(architecture: Architecture) -> tuple[int, int]:
    """Height and width in pixels that the model was trained at."""
    config = architecture.config("unet") or architecture.config("transformer")
    sample = config.get("sample_size")
    if sample is None:
        sample = architecture.config("vae").get("sample_size", 512) // vae_factor(architecture)
    height, width = sample if isinstance(sample, (list, tuple)) else (sample, sample)
    return height * vae_factor(architecture), width * vae_factor(architecture)


def vae_factor(architecture: Architecture) -> int:
    """Pixels per latent element along a side."""
    channels = architecture.config("vae").get("block_out_channels")
    if not channels:
        raise ModelError(
            f"{architecture.name} has no VAE that can be traced",
            "give a latent diffusion pipeline with a `vae`",
        )
    return int(2 ** (len(channels) - 1))


def latent_size(architecture: Architecture, request: Request) -> tuple[int, int]:
    """Height and width of the latent."""
    factor = vae_factor(architecture)
    return request.height // factor, request.width // factor


def denoiser_calls(architecture: Architecture, steps: int) -> int:
    """Forwards of the denoiser for so many steps: second-order schedulers look twice.

    As ``len(scheduler.timesteps)`` after ``set_timesteps(steps)`` in diffusers.
    """
    name = architecture.scheduler
    if name.startswith(("Heun", "KDPM2")):
        return 2 * steps - 1
    return steps + 1 if name == "PNDMScheduler" and steps > 1 else steps


def is_guided(architecture: Architecture, request: Request) -> bool:
    """Whether classifier-free guidance runs: distilled UNets take the scale as an input instead."""
    takes_scale = architecture.config("unet").get("time_cond_proj_dim") is not None
    return request.guidance_scale > 1 and not takes_scale


def _pipeline_defaults(architecture: Architecture) -> tuple[int, float]:
    """Steps and guidance of the pipeline's own ``__call__``, unless the architecture says."""
    if architecture.steps is not None and architecture.guidance_scale is not None:
        return architecture.steps, architecture.guidance_scale
    import inspect

    import diffusers

    cls = getattr(diffusers, architecture.pipeline, None)
    parameters = inspect.signature(cls.__call__).parameters if cls else {}

    def default(name: str, fallback: float) -> float:
        value = parameters[name].default if name in parameters else fallback
        return float(value) if isinstance(value, (int, float)) else fallback

    steps = architecture.steps or int(default("num_inference_steps", 50))
    guidance = architecture.guidance_scale
    return steps, default("guidance_scale", 7.5) if guidance is None else guidance


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


def _check_side(name: str, pixels: int, factor: int) -> None:
    if not factor <= pixels <= MAX_SIDE:
        raise RequestError(f"{name} {pixels} is out of range", f"use {factor} to {MAX_SIDE} pixels")
    if pixels % factor:
        below = pixels // factor * factor
        near = f"{below} or {below + factor}" if below else str(factor)
        raise RequestError(
            f"{name} {pixels} is not a multiple of {factor}, the model's factor", f"use {near}"
        )
