"""Pictures that a pipeline starts from: read, and fitted to what is drawn, before any loading."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from autotune.errors import RequestError, first_line
from autotune.workload.architecture import Architecture
from autotune.workload.arguments import UPSCALED, call_parameters
from autotune.workload.request import native_size, size_factor

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_ARGUMENTS = ("image", "control_image")
MASK_ARGUMENTS = ("mask_image", "control_mask", "mask")

_GRAIN = 32
"""Pixels that a side is rounded to where it follows from a picture: most models take any multiple
of their own factor, some of twice or four times that."""

_STARTS_FROM_A_PICTURE = re.compile(
    "Img2Img|Inpaint|ControlNet|Control(?=Pipeline)|Upscale|Edit|ImageToVideo|I2V|Pix2Pix|Depth2Img"
    "|Fill|Adapter|Variation"
)
"""In a pipeline's name: its picture is needed, although the argument's default is ``None``."""


class Size(NamedTuple):
    """Of what is drawn, in pixels; ``None`` leaves it to the model."""

    height: int | None
    width: int | None


def read_picture(path: Path, mode: str = "RGB") -> Image:
    """A picture, upright, in ``"RGB"`` or ``"L"``.

    Raises:
        RequestError: there is no such file, or it is no picture.
    """
    from PIL import Image, ImageOps

    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise RequestError(f"{path} {what}", "give an image file")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert(mode)
    except Exception as error:  # a broken file raises whatever its format's reader stumbles over
        raise RequestError(
            f"cannot read {path}: {first_line(error)}", "give a PNG, JPEG or WebP image"
        ) from error


def pipeline_for(pipeline: str, has_image: bool, has_mask: bool) -> str:
    """The pipeline that draws from the pictures given, of the same model.

    diffusers names them alike: ``StableDiffusionXLPipeline``, ``StableDiffusionXLImg2ImgPipeline``,
    ``StableDiffusionXLInpaintPipeline``.
    """
    import diffusers

    parameters = parameters_of(pipeline)
    if parameters is None or not has_image:
        return pipeline
    taken = MASK_ARGUMENTS if has_mask else IMAGE_ARGUMENTS
    if any(name in parameters for name in taken):
        return pipeline
    stem = pipeline.removesuffix("Pipeline").removesuffix("Img2Img")
    other = f"{stem}{'Inpaint' if has_mask else 'Img2Img'}Pipeline"
    return other if hasattr(diffusers, other) else pipeline


def parameters_of(pipeline: str) -> dict[str, inspect.Parameter] | None:
    """The arguments that a pipeline of diffusers takes, ``None`` for a class of somebody else's."""
    import diffusers

    cls = getattr(diffusers, pipeline, None)
    return None if cls is None else call_parameters(cls)


def picture_arguments(
    pipeline: str, image: Image | None, mask: Image | None, size: Size
) -> dict[str, Image]:
    """What the pipeline is given besides the prompt, scaled to what is drawn.

    Raises:
        RequestError: it takes no such picture, or needs one that is not given.
    """
    known = parameters_of(pipeline)
    parameters = ("image", "mask_image") if known is None else tuple(known)
    arguments: dict[str, Image] = {}
    for option, picture, names in (
        ("--image", image, IMAGE_ARGUMENTS),
        ("--mask", mask, MASK_ARGUMENTS),
    ):
        name = next((n for n in names if n in parameters), None)
        if picture is None:
            if name is not None and needs_picture(pipeline, name):
                what = "an image to start from" if option == "--image" else "a mask"
                raise RequestError(f"{pipeline} needs {what}", f"give one with {option} FILE")
            continue
        if name is None:
            raise RequestError(f"{pipeline} has no use for {option}", "leave it out")
        arguments[name] = _fitted(picture, pipeline, size)
    return arguments


def needs_picture(pipeline: str, argument: str) -> bool:
    """Whether the pipeline cannot draw without it."""
    parameter = (parameters_of(pipeline) or {}).get(argument)
    if parameter is None:
        return False
    if parameter.default is parameter.empty:
        return True
    if argument in MASK_ARGUMENTS:
        return "Inpaint" in pipeline or "Fill" in pipeline
    return _STARTS_FROM_A_PICTURE.search(pipeline) is not None


def size_for(architecture: Architecture, image: Image | None, asked: Size) -> Size:
    """What to draw: as asked, else in the picture's proportions.

    Upscalers draw a multiple of the picture; all others about as many pixels as the model was made
    for, whatever the picture's resolution.
    """
    if image is None or (asked.height and asked.width):
        return asked
    if asked.height:
        scale = asked.height / image.height
    elif asked.width:
        scale = asked.width / image.width
    elif architecture.pipeline in UPSCALED:
        scale = UPSCALED[architecture.pipeline]
    else:
        height, width = native_size(architecture)
        scale = math.sqrt(height * width / (image.height * image.width))
    grain = math.lcm(size_factor(architecture), _GRAIN)

    def rounded(pixels: float) -> int:
        return max(grain, round(pixels / grain) * grain)

    return Size(
        asked.height or rounded(image.height * scale), asked.width or rounded(image.width * scale)
    )


def _fitted(picture: Image, pipeline: str, size: Size) -> Image:
    upscaled = UPSCALED.get(pipeline, 1)
    if size.height is None or size.width is None:
        return picture
    fitted = (size.width // upscaled, size.height // upscaled)
    return picture if picture.size == fitted else picture.resize(fitted)
