"""Options that several verbs share, so that they read the same everywhere."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple, get_type_hints

import typer

from autotune.decide.limits import Limits, parse_keep
from autotune.errors import RequestError
from autotune.tuner import Ask
from autotune.units import parse_bytes

Height = Annotated[int | None, typer.Option(help="Pixels; the model's native size by default.")]
Width = Annotated[int | None, typer.Option(help="Pixels; the model's native size by default.")]
Batch = Annotated[int, typer.Option(help="Images or videos per call.")]
Frames = Annotated[int | None, typer.Option(help="Of a video; the model's native number.")]
Steps = Annotated[int | None, typer.Option(help="Denoise steps; the pipeline's default.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; the pipeline's default.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Quality = Annotated[
    str,
    typer.Option(
        help="What may change the image: exact, high, balanced or fast, or optimizations by name."
    ),
]
Only = Annotated[str, typer.Option(help="Consider these optimizations alone (comma-separated).")]
Without = Annotated[str, typer.Option(help="Leave these optimizations out (comma-separated).")]
Priority = Annotated[str, typer.Option(help="speed, balanced or memory: what comes first.")]
Images = Annotated[
    int, typer.Option(help="How many you will draw: what costs time once may pay for many.")
]
VramLimit = Annotated[str | None, typer.Option(help="Most device memory to use, such as 5GiB.")]
RamLimit = Annotated[str | None, typer.Option(help="Most host RAM to use, such as 16GiB.")]
Reserve = Annotated[str | None, typer.Option(help="Device memory to leave free, such as 1GiB.")]
MachineName = Annotated[
    str | None,
    typer.Option(
        "--machine", help="One that `autotune machines` lists, or a JSON file; this machine."
    ),
]
Device = Annotated[str | None, typer.Option(help="cuda:1, cpu, …; the GPU with most free memory.")]
Call = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="A further argument of the pipeline; repeatable."),
]


class RequestOptions(NamedTuple):
    """What is drawn."""

    height: Height = None
    width: Width = None
    batch: Batch = 1
    frames: Frames = None
    steps: Steps = None
    guidance: Guidance = None
    call: Call = None
    dtype: Dtype = "auto"


class ChoiceOptions(NamedTuple):
    """What there is to choose from, and by what."""

    quality: Quality = "exact"
    priority: Priority = "speed"
    only: Only = ""
    without: Without = ""
    images: Images = 1


class MemoryOptions(NamedTuple):
    """What it may take."""

    vram_limit: VramLimit = None
    ram_limit: RamLimit = None
    reserve: Reserve = None


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """A command with parameters that are groups of options, as typer takes it: option by option."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if hasattr(hint, "_fields")}

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field: given.pop(field) for field in group._fields})
        command(**given)

    parameters = (
        option
        for parameter in inspect.signature(command).parameters.values()
        for option in _options(parameter, hints[parameter.name])
    )
    run.__signature__ = inspect.Signature(list(parameters))  # type: ignore[attr-defined]
    return run


def _options(parameter: inspect.Parameter, hint: Any) -> Iterator[inspect.Parameter]:
    if not hasattr(hint, "_fields"):
        yield parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY)
        return
    for name, kind in get_type_hints(hint, include_extras=True).items():
        default = hint._field_defaults[name]
        yield inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
        )


def make_ask(
    request: RequestOptions,
    memory: MemoryOptions,
    choice: ChoiceOptions | None = None,
    keep: str = "",
) -> Ask:
    """What the options ask for.

    Raises:
        RequestError: a limit is not a size, or ``call`` cannot be read.
        OptimizationError: ``keep`` cannot be read.
    """
    return Ask(
        height=request.height,
        width=request.width,
        batch=request.batch,
        steps=request.steps,
        guidance_scale=request.guidance,
        dtype=request.dtype,
        limits=make_limits(choice or ChoiceOptions(), memory, keep),
        frames=request.frames,
        options=parse_call(request.call),
    )


def make_limits(choice: ChoiceOptions, memory: MemoryOptions, keep: str = "") -> Limits:
    """The options that restrict the choice.

    Raises:
        RequestError: a limit is not a size.
        OptimizationError: ``keep`` cannot be read.
    """
    without = names_of(choice.without)
    return Limits(
        quality=choice.quality,
        priority=choice.priority,
        only=names_of(choice.only),
        without=without,
        keep=parse_keep(keep, without),
        vram_limit=_size("--vram-limit", memory.vram_limit),
        ram_limit=_size("--ram-limit", memory.ram_limit),
        reserve=_size("--reserve", memory.reserve) or 0,
        images=choice.images,
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


def names_of(text: str) -> tuple[str, ...]:
    """``"a, b"`` → ``("a", "b")``."""
    return tuple(n.strip() for n in text.split(",") if n.strip())


def _size(option: str, text: str | None) -> int | None:
    """A size with its unit: a bare 5 would be five bytes, which nobody means."""
    if text is None:
        return None
    if text.strip().isdigit():
        raise RequestError(f"{option} {text} has no unit", f"write it like {text.strip()}GiB")
    return parse_bytes(text)
