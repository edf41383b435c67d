"""What a call of a pipeline asks for: the request that its arguments come to."""

from __future__ import annotations

from collections.abc import Mapping
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
    names = (*planned.options, *DECIDING)
    options = {n: given[n] for n in names if n in parameters and _is_plain(given.get(n))}
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
    return prompts * (copies if isinstance(copies, int) and copies > 0 else 1)


def _numbers(given: Mapping[str, Any], guidance: str) -> dict[str, Any]:
    """The fields of a request that are given by arguments of their own."""
    names = {
        "height": "height",
        "width": "width",
        "num_inference_steps": "steps",
        "num_frames": "frames",
    }
    found = {field: given[name] for name, field in names.items() if _is_count(given.get(name))}
    for name in ("timesteps", "sigmas"):  # in place of a number of steps
        steps = given.get(name)
        if isinstance(steps, (list, tuple)) and steps:
            found["steps"] = len(steps)
    scale = given.get(guidance)
    if isinstance(scale, (int, float)) and not isinstance(scale, bool):
        found["guidance_scale"] = float(scale)
    return found


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


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))
