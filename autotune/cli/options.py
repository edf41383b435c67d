"""Options that several verbs share, so that they read the same everywhere."""

from __future__ import annotations

import contextlib
import math
from typing import Annotated

import typer

from autotune.decide.choose import Limits
from autotune.errors import RequestError
from autotune.units import parse_bytes

Height = Annotated[int | None, typer.Option(help="Pixels; the model's native size by default.")]
Width = Annotated[int | None, typer.Option(help="Pixels; the model's native size by default.")]
Batch = Annotated[int, typer.Option(help="Images or videos per call.")]
Frames = Annotated[int | None, typer.Option(help="Of a video; the model's native number.")]
Steps = Annotated[int | None, typer.Option(help="Denoise steps; the pipeline's default.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; the pipeline's default.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Quality = Annotated[
    str, typer.Option(help="exact, high, balanced or fast: what may change the image.")
]
Only = Annotated[str, typer.Option(help="Consider these optimizations alone (comma-separated).")]
Without = Annotated[str, typer.Option(help="Leave these optimizations out (comma-separated).")]
VramLimit = Annotated[str | None, typer.Option(help="Most device memory to use, such as 5GiB.")]
Device = Annotated[str | None, typer.Option(help="cuda:1, cpu, …; the GPU with most free memory.")]
Call = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="A further argument of the pipeline; repeatable."),
]
MachineName = Annotated[
    str | None, typer.Option("--machine", help="A reference machine or a JSON file; this machine.")
]


def make_limits(quality: str, only: str, without: str, vram_limit: str | None) -> Limits:
    """The options that restrict the choice.

    Raises:
        RequestError: ``vram_limit`` is not a size.
    """
    return Limits(
        quality=quality,
        only=_names(only),
        without=_names(without),
        vram_limit=None if vram_limit is None else _size(vram_limit),
    )


def parse_call(items: list[str] | None) -> dict[str, bool | int | float | str]:
    """``["strength=0.5", "clean_caption=true"]`` → names and plain values.

    Raises:
        RequestError: an item is no ``key=value``, or a key comes twice.
    """
    values: dict[str, bool | int | float | str] = {}
    for item in items or ():
        key, equals, text = item.partition("=")
        if not equals or not key.isidentifier():
            raise RequestError(f"--call {item} is no KEY=VALUE", "write it like strength=0.5")
        if key in values:
            raise RequestError(f"--call {key} is given twice", "give it once")
        values[key] = _plain_value(text)
    return values


def _plain_value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if math.isfinite(value):
                return value
    return text


def _names(text: str) -> tuple[str, ...]:
    return tuple(n.strip() for n in text.split(",") if n.strip())


def _size(text: str) -> int:
    """A size with its unit: a bare 5 would be five bytes, which nobody means."""
    if text.strip().isdigit():
        raise RequestError(f"--vram-limit {text} has no unit", f"write it like {text.strip()}GiB")
    return parse_bytes(text)
