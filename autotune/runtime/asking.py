"""What a call of a pipeline asks for: the request that its arguments come to."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from autotune.workload.arguments import UPSCALED, call_parameters, copies_name, guidance_name
from autotune.workload.workload import Request

DECIDING = (
    "strength",
    "max_sequence_length",
    "denoising_start",
    "denoising_end",
    "decode_chunk_size",
)
"""Arguments without a name of their own in requests that decide what runs, if not planned for."""


def asked_for(pipe: Any, planned: Request, given: Mapping[str, Any], drawn: int) -> Request:
    """The request that a call comes to.

    Args:
        pipe: The pipeline.
        planned: What is drawn where nothing else is given.
        given: The call's arguments.
        drawn: Images or videos.
    """
    parameters = call_parameters(type(pipe))
    found = _numbers(given, guidance_name(parameters))
    if "height" not in parameters:
        found |= _side_of_picture(given, UPSCALED.get(type(pipe).__name__, 1))
    found |= _side_of_latents(pipe, given)
    names = (*planned.options, *DECIDING)
    values = {n: _plain(given.get(n)) for n in names if n in parameters}
    options: dict[str, Any] = {n: v for n, v in values.items() if v is not None}
    options |= _second_guidance(given, parameters)
    return msgspec.structs.replace(
        planned, **found, batch=drawn, options={**planned.options, **options}
    )


def drawn_by(planned: Mapping[str, Any], given: Mapping[str, Any], prompts: int) -> int:
    """Images or videos of a call: copies of each prompt, where the pipeline makes any.

    Args:
        planned: The arguments that were planned.
        given: The call's.
        prompts: In the call.
    """
    name = copies_name(planned)
    copies = given.get(name, planned[name]) if name is not None else 1
    return prompts * (_count(copies) or 1)


def _numbers(given: Mapping[str, Any], guidance: str) -> dict[str, Any]:
    """The fields of a request that are given by arguments of their own."""
    names = {
        "height": "height",
        "width": "width",
        "num_inference_steps": "steps",
        "num_frames": "frames",
    }
    counts = {field: _count(given.get(name)) for name, field in names.items()}
    found: dict[str, Any] = {field: count for field, count in counts.items() if count}
    for name in ("timesteps", "sigmas"):  # in place of a number of steps
        steps: Any = given.get(name)
        if hasattr(steps, "__len__") and len(steps):  # a list, an array or a tensor
            found["steps"] = len(steps)
    scale = number_of(given.get(guidance))
    if scale is not None:
        found["guidance_scale"] = scale
    return found


def _second_guidance(given: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Distilled models are guided besides, and run twice, where a negative prompt is given, too."""
    scale = number_of(given.get("true_cfg_scale"))
    texts = (given.get("negative_prompt"), given.get("negative_prompt_embeds"))
    if scale is None or scale <= 1 or all(t is None for t in texts):
        return {}
    if guidance_name(parameters) == "true_cfg_scale":
        return {}
    return {"true_cfg_scale": scale, "negative_prompt": ""}


def _side_of_latents(pipe: Any, given: Mapping[str, Any]) -> dict[str, int]:
    """Of what is drawn from noise of one's own, as long as that is not packed."""
    shape: Sequence[int] = getattr(given.get("latents"), "shape", ())
    factors = (getattr(pipe, f"vae_scale_factor{end}", None) for end in ("_spatial", ""))
    factor = next((f for f in factors if isinstance(f, int)), None)
    if len(shape) < 4 or factor is None:
        return {}
    return {"height": int(shape[-2]) * factor, "width": int(shape[-1]) * factor}


def _side_of_picture(given: Mapping[str, Any], times: int) -> dict[str, int]:
    """Of what is drawn from a picture where it is as large as that."""
    picture: Any = given.get("image")
    picture = picture[0] if isinstance(picture, (list, tuple)) and picture else picture
    if hasattr(picture, "shape") and len(picture.shape) >= 3:  # a tensor, or an array
        is_last = picture.shape[-1] in (1, 3, 4)
        height, width = picture.shape[-3:-1] if is_last else picture.shape[-2:]
    elif hasattr(picture, "size") and isinstance(picture.size, tuple):
        width, height = picture.size
    else:
        return {}
    return {"height": _whole(height) * times, "width": _whole(width) * times}


def _whole(side: int) -> int:
    """Pipelines round pictures down to what every model's sides are multiples of."""
    return max(8, int(side) // 8 * 8)


def _count(value: Any) -> int | None:
    """A whole number above 0, of Python's or NumPy's; ``None`` for anything else."""
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
    return count if count > 0 else None


def number_of(value: Any) -> float | None:
    """A number of Python's, NumPy's or PyTorch's; ``None`` for anything else."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # of several elements
        return None


def _plain(value: Any) -> bool | int | float | str | None:
    """A value of Python's own, also where it is one of NumPy's; ``None`` for anything else."""
    single = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
    return single if isinstance(single, (bool, int, float, str)) else None
