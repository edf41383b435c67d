"""``autotune models``: the models that can be planned for without a download, or one in detail."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from autotune.cli.machine import ANY_MACHINE
from autotune.cli.model import Needs, account_of, native_workload, needs_of, print_account
from autotune.cli.output import JsonFlag, console, print_json, progress
from autotune.demo import model_path
from autotune.errors import AutotuneError
from autotune.probe.reference import load_machine
from autotune.units import GIB
from autotune.workload.architecture import DEMO, Architecture, builtin_names, find_architecture
from autotune.workload.request import native_size

_SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


class ModelSummary(msgspec.Struct, frozen=True):
    """One line of ``autotune models``.

    Attributes:
        name: For ``plan`` and ``run``.
        pipeline: Its class in diffusers.
        parameters: Of all components.
        weight_bytes: By dtype, float32 and the 16-bit one it is published for.
        half_dtype: That one.
        width: Pixels of the native size.
        height: Pixels of the native size.
        frames: Of the native video; 1 for images.
        steps: Denoise steps; ``None`` for the pipeline's own default.
        needs: With ``--needs``; ``None`` where the model could not be traced.
    """

    name: str
    pipeline: str
    parameters: int
    weight_bytes: dict[str, int]
    half_dtype: str
    width: int
    height: int
    frames: int
    steps: int | None
    needs: Needs | None = None


class ModelList(msgspec.Struct, frozen=True):
    """``autotune models``."""

    models: tuple[ModelSummary, ...]


def models(
    name: Annotated[
        str | None, typer.Argument(help="One in detail: a name, a folder or a hub id.")
    ] = None,
    needs: Annotated[
        bool, typer.Option("--needs", help="Trace each to say what memory it needs (cached).")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """List the models known without a download, or show one.

    NAME is one of them, a hub id, or a folder.
    """
    if name is not None:
        account = account_of(find_architecture(name))
        print_json(account) if json else print_account(account)
        return
    listed = [summarize(find_architecture(name)) for name in builtin_names()]
    if needs:
        listed = _with_needs(listed)
    if json:
        print_json(ModelList(tuple(listed)))
    else:
        _print_list(listed, needs)


def summarize(architecture: Architecture) -> ModelSummary:
    """From the architecture's file alone: nothing is traced, and torch not imported."""
    height, width = native_size(architecture)
    parameters = sum(architecture.parameters.values())
    if architecture.name == DEMO:
        parameters = _demo_parameters()
    return ModelSummary(
        name=architecture.name,
        pipeline=architecture.pipeline,
        parameters=parameters,
        weight_bytes={"float32": 4 * parameters, architecture.half_dtype: 2 * parameters},
        half_dtype=architecture.half_dtype,
        width=width,
        height=height,
        frames=architecture.frames or 1,
        steps=architecture.steps,
    )


def _demo_parameters() -> int:
    """Its weights are here, in float32."""
    return sum(f.stat().st_size for f in model_path().glob("*/*.safetensors")) // 4


def _with_needs(listed: list[ModelSummary]) -> list[ModelSummary]:
    machine = load_machine(ANY_MACHINE)
    found = []
    with progress("Tracing") as say:
        for index, model in enumerate(listed):
            if say is not None:
                say(f"{model.name} ({index + 1} of {len(listed)})")
            try:
                architecture = find_architecture(model.name)
                needed = needs_of(machine, native_workload(architecture, machine))
            except AutotuneError as error:
                typer.echo(f"{model.name}: {error}", err=True)
                needed = None
            found.append(msgspec.structs.replace(model, needs=needed))
    return found


def _print_list(listed: list[ModelSummary], needs: bool) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    table.add_column("name", no_wrap=True, style="bold")
    for title in ("params\n10⁹", "fp32\nGiB", "16 bit\nGiB"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, style="dim")
    for title in ("native size", "steps"):
        table.add_column(title, justify="right", no_wrap=True)
    if needs:
        table.add_column("needs\nGiB", justify="right", no_wrap=True)
        table.add_column("\nin", no_wrap=True)
    for model in listed:
        table.add_row(*_row(model), *(_needs_row(model.needs) if needs else ()))
    console().print(table)
    if needs:
        console().print(
            f"needs: device memory that must be free at the native size in 16 bit with nothing "
            f"set, as on {ANY_MACHINE}; the phase that needs it",
            style="dim",
        )
    else:
        console().print(
            "autotune models NAME shows one; --needs what memory each needs", style="dim"
        )


def _row(model: ModelSummary) -> tuple[str, ...]:
    half = model.weight_bytes[model.half_dtype]
    return (
        model.name,
        _billions(model.parameters),
        _gib(model.weight_bytes["float32"]),
        _gib(half),
        _SHORT[model.half_dtype],
        _size(model.width, model.height, model.frames),
        "" if model.steps is None else str(model.steps),
    )


def _needs_row(needs: Needs | None) -> tuple[str, ...]:
    return ("—", "") if needs is None else (_gib(needs.needed_bytes), needs.phase)


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}" if count >= GIB / 10 else f"{count / GIB:.3f}"


def _billions(parameters: int) -> str:
    return f"{parameters / 1e9:.3f}" if parameters < 1e9 else f"{parameters / 1e9:.2f}"


def _size(width: int, height: int, frames: int) -> str:
    return f"{width}x{height}" + (f"x{frames}" if frames > 1 else "")
