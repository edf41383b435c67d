"""Options that several verbs share, so that they read the same everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

from autotune.decide.choose import Limits
from autotune.errors import RequestError
from autotune.units import parse_bytes

Height = Annotated[int | None, typer.Option(help="Pixels; the model's native size by default.")]
Width = Annotated[int | None, typer.Option(help="Pixels; the model's native size by default.")]
Batch = Annotated[int, typer.Option(help="Images per call.")]
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


def _names(text: str) -> tuple[str, ...]:
    return tuple(n.strip() for n in text.split(",") if n.strip())


def _size(text: str) -> int:
    """A size with its unit: a bare 5 would be five bytes, which nobody means."""
    if text.strip().isdigit():
        raise RequestError(f"--vram-limit {text} has no unit", f"write it like {text.strip()}GiB")
    return parse_bytes(text)
