"""``autotune run``: the main job, from measuring the machine to the image and the account."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from autotune.cli.machine import plan_on_this, this_machine
from autotune.cli.options import (
    Batch,
    Device,
    Dtype,
    Guidance,
    Height,
    Only,
    Quality,
    Steps,
    VramLimit,
    Width,
    Without,
    make_limits,
)
from autotune.cli.output import JsonFlag, print_json
from autotune.errors import ProfileError, RequestError
from autotune.profile.profile import PhaseMeasurement
from autotune.tuner import (
    Ask,
    Measured,
    Planned,
    loadable,
    remember_run,
    require_fit,
    was_verified,
)
from autotune.tuner import tuned as apply_plan

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff")
DEMO_PROMPT = "a handwritten seven"


def run(
    model: Annotated[str, typer.Argument(help="A hub id, a folder, or a built-in name.")] = "demo",
    prompt: Annotated[str | None, typer.Option(help="What to draw.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid.")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Image file; a batch is numbered.")
    ] = Path("autotune.png"),
    height: Height = None,
    width: Width = None,
    batch: Batch = 1,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Annotated[int | None, typer.Option(help="Makes the image repeatable.")] = None,
    dtype: Dtype = "auto",
    quality: Quality = "exact",
    only: Only = "",
    without: Without = "",
    vram_limit: VramLimit = None,
    device: Device = None,
    verify: Annotated[
        str,
        typer.Option(help="Memory check on the CPU by a short extra pass: auto, always or never."),
    ] = "auto",
    json: JsonFlag = False,
) -> None:
    """Plan for this machine, load MODEL that way, draw an image."""
    limits = make_limits(quality, only, without, vram_limit)
    ask = Ask(height, width, batch, steps, guidance, dtype, limits)
    if verify not in ("auto", "always", "never"):
        raise RequestError(f"unknown --verify {verify!r}", "use auto, always or never")
    files = _image_files(output, batch)
    text = _prompt(model, prompt)
    seed = secrets.randbits(32) if seed is None else _checked_seed(seed)
    measured = this_machine(device)
    planned = plan_on_this(loadable(model), measured, ask)
    require_fit(planned.plan)
    tuned = _load(planned, measured)
    options = {"seed": seed, "negative_prompt": negative_prompt}
    result, phases = tuned.measure(text, **options)
    _save(result.images, files)
    check = verify == "always" or (verify == "auto" and not was_verified(measured, planned))
    if check and measured.machine.device.kind == "cpu":
        phases = _add_peaks(tuned, phases, text, options)
    _remember(measured, planned, phases)
    _report(planned, phases, files, seed, json)


def _remember(measured: Measured, planned: Planned, phases: tuple[PhaseMeasurement, ...]) -> None:
    """The image is drawn: a profile that cannot be written costs a warning, not the account."""
    try:
        remember_run(measured, planned, phases)
    except ProfileError as error:
        typer.echo(f"warning: the run is not remembered: {error}", err=True)


def _load(planned: Planned, measured: Measured) -> Any:
    from autotune.runtime.load import load_pipeline

    with _quiet_libraries():
        pipe = load_pipeline(planned.architecture, planned.plan)
    shown = sys.stderr.isatty()
    pipe.set_progress_bar_config(disable=not shown, desc="denoise", leave=False)
    return apply_plan(pipe, planned, measured)


def _add_peaks(
    tuned: Any, phases: tuple[PhaseMeasurement, ...], text: str, options: dict[str, Any]
) -> tuple[PhaseMeasurement, ...]:
    from autotune.runtime.tuned import with_peaks

    tuned.pipe.set_progress_bar_config(disable=True)
    return with_peaks(phases, tuned.measure_peaks(text, **options))


def _report(
    planned: Planned,
    phases: tuple[PhaseMeasurement, ...],
    files: list[Path],
    seed: int,
    json: bool,
) -> None:
    if json:
        measured = [msgspec.to_builtins(m) for m in phases]
        print_json({**planned.plan.to_dict(), "measured": measured, "images": files, "seed": seed})
        return
    from autotune.cli.account import escape, print_run
    from autotune.cli.output import console

    print_run(planned.plan, phases)
    saved = ", ".join(map(str, files))
    console().print(f"[bold]image[/] {escape(saved)} (seed {seed})", soft_wrap=True)


# ---- what is checked before anything is measured or loaded ---------------------------------------


def _prompt(model: str, prompt: str | None) -> str:
    if prompt is not None:
        return prompt
    if model == "demo":
        return DEMO_PROMPT
    raise RequestError("there is no prompt", 'say what to draw: --prompt "a lighthouse at dusk"')


def _checked_seed(seed: int) -> int:
    if not 0 <= seed < 2**63:
        raise RequestError(f"seed {seed} is out of range", "use 0 to 2**63 - 1")
    return seed


def _image_files(output: Path, batch: int) -> list[Path]:
    """The files to write, after making sure that they can be written.

    Raises:
        RequestError: the folder is missing or not writable, or the suffix is no image format.
    """
    if output.suffix.lower() not in IMAGE_SUFFIXES:
        raise RequestError(
            f"{output} is no image file name", f"end it in {', '.join(IMAGE_SUFFIXES)}"
        )
    folder = output.parent
    if not folder.is_dir():
        raise RequestError(f"there is no folder {folder}", f"mkdir -p {folder}")
    if output.is_dir():
        raise RequestError(f"{output} is a folder", "give a file name with -o")
    _require_writable(folder)
    if batch == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{i + 1}") for i in range(batch)]


def _require_writable(folder: Path) -> None:
    """Find out before the work, not after it."""
    try:
        handle, probe = tempfile.mkstemp(dir=folder)
        os.close(handle)
        Path(probe).unlink()
    except OSError as error:
        raise RequestError(
            f"cannot write to {folder}: {error.strerror}", "choose another folder with -o"
        ) from error


def _save(images: list[Any], files: list[Path]) -> None:
    """Write each image whole or not at all."""
    for image, file in zip(images, files, strict=True):
        try:
            _save_one(image, file)
        except OSError as error:
            raise RequestError(
                f"cannot write {file}: {error.strerror or error}",
                "make room, or choose another folder with -o; the same --seed draws it again",
            ) from error


def _save_one(image: Any, file: Path) -> None:
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=file.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        image.save(temporary)
        temporary.chmod(0o644)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Loading prints progress bars of its own for every component; errors still raise."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
