"""What a user asks for, and what is refused whatever the model and the machine."""

from __future__ import annotations

import msgspec

from autotune.decide.limits import Limits, check_limits
from autotune.errors import RequestError


class Ask(msgspec.Struct, frozen=True):
    """What a user asks for; ``None`` means the model's own default.

    Attributes:
        height: Pixels.
        width: Pixels.
        batch: Images per call.
        steps: Denoise steps.
        guidance_scale: Above 1 doubles the denoiser's batch.
        dtype: ``"auto"``, ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        limits: Quality, memory limits, optimizations allowed.
        frames: Video frames; image models draw one.
        options: Further arguments of the pipeline that decide what runs (``strength``).
    """

    height: int | None = None
    width: int | None = None
    batch: int = 1
    steps: int | None = None
    guidance_scale: float | None = None
    dtype: str = "auto"
    limits: Limits = Limits()
    frames: int | None = None
    options: dict[str, bool | int | float | str] = {}


_SAID_OTHERWISE = {
    "height": "height",
    "width": "width",
    "num_frames": "frames",
    "num_inference_steps": "steps",
    "num_images_per_prompt": "batch",
    "num_videos_per_prompt": "batch",
    "prompt": "prompt",
    "image": "image",
    "mask_image": "mask",
    "generator": "seed",
}
"""Arguments of pipelines that have an option of their own; guidance may have two."""


def check_ask(ask: Ask) -> None:
    """Refuse what is wrong whatever the model and the machine.

    Raises:
        RequestError: an unknown quality level, or an argument of the pipeline that has an option
            of its own or is no plain value.
        OptimizationError: an unknown name in ``only`` or ``without``.
    """
    check_limits(ask.limits)
    for name, value in ask.options.items():
        if name in _SAID_OTHERWISE:
            option = _SAID_OTHERWISE[name]
            raise RequestError(
                f"the pipeline's {name} has an option of its own",
                f"use --{option}, in Python {option}=",
            )
        if not isinstance(value, (bool, int, float, str)):
            raise RequestError(
                f"{name} is a {type(value).__name__}, and a plan is made for plain values",
                "give a bool, an int, a float or a str here; pass others when you draw",
            )
