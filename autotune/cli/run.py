"""``autotune run``: the main job, from measuring the machine to the image and the account."""

from __future__ import annotations

import contextlib
import io
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import typer

from autotune.cli.machine import check_request, plan_on_this, this_machine
from autotune.cli.options import (
    ChoiceOptions,
    Device,
    MemoryOptions,
    RequestOptions,
    make_ask,
    spread,
)
from autotune.cli.output import JsonFlag, print_json, progress
from autotune.cli.outputs import check_suffix, files_for, save
from autotune.cli.pictures import (
    Size,
    parameters_of,
    picture_arguments,
    pipeline_for,
    read_picture,
    size_for,
)
from autotune.decide.plan import Plan
from autotune.errors import ProfileError, RequestError
from autotune.profile.profile import PhaseMeasurement
from autotune.runtime.verification import Verification, joined
from autotune.tuner import (
    Ask,
    Measured,
    Planned,
    loadable,
    remember_run,
    require_fit,
)
from autotune.tuner import tuned as apply_plan
from autotune.tuner.verifying import check_verify, is_verified_now, verified, with_note
from autotune.workload.architecture import Architecture, find_architecture
from autotune.workload.request import native_request

DEMO_PROMPT = "a handwritten seven"
MAX_FPS = 240


class RunReport(Plan, frozen=True, kw_only=True):
    """The ``--json`` contract of ``run``: the plan, and what came of it.

    Attributes:
        measured: Of this image, by phase; with peaks where it was verified, and on a GPU always.
        verification: What short passes before it showed; ``None`` where none were made.
        images: Files written.
        videos: The same for videos: files, or folders of frames.
        seed: Draws the same again.
    """

    measured: tuple[PhaseMeasurement, ...]
    images: tuple[str, ...]
    videos: tuple[str, ...]
    seed: int
    verification: Verification | None = None


class Job(NamedTuple):
    """What to draw, checked as far as that goes without weights.

    Attributes:
        architecture: With the pipeline that takes what is given.
        size: Of what is drawn; ``None`` leaves a side to the model.
        arguments: Of the pipeline, besides what is planned.
        files: To write.
        is_video: What is drawn.
    """

    architecture: Architecture
    size: Size
    arguments: dict[str, Any]
    files: list[Path]
    is_video: bool


@spread
def run(
    model: Annotated[str, typer.Argument(help="A hub id, a folder, or a built-in name.")] = "demo",
    prompt: Annotated[str | None, typer.Option(help="What to draw.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid.")] = None,
    image: Annotated[
        Path | None, typer.Option(help="Picture to start from; it is scaled to what is drawn.")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="White where the picture is to be drawn anew.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="An image, .mp4, .webm or .gif; a folder for a video's frames."
        ),
    ] = None,
    fps: Annotated[int, typer.Option(help="Frames per second of the video file.")] = 16,
    seed: Annotated[int | None, typer.Option(help="Makes the image repeatable.")] = None,
    *,
    request: RequestOptions,
    choice: ChoiceOptions,
    memory: MemoryOptions,
    device: Device = None,
    verify: Annotated[
        str,
        typer.Option(
            help="Compare time and memory with the prediction in short passes first: auto (once "
            "for each plan), always or never."
        ),
    ] = "auto",
    json: JsonFlag = False,
) -> None:
    """Plan for this machine, load MODEL that way, draw.

    MODEL is a hub id, a folder, or a name that `autotune models` lists.
    """
    ask = make_ask(request, memory, choice)
    _check_choice(verify, fps)
    seed = secrets.randbits(32) if seed is None else _checked_seed(seed)
    check_suffix(output)
    pictures = _read_pictures(image, mask)
    architecture = find_architecture(model)
    with progress("Reading the pipeline"):
        job = _job(architecture, prompt, negative_prompt, pictures, Size(ask.height, ask.width))
        job = job._replace(files=files_for(output, job.is_video, ask.batch))
    ask = msgspec.structs.replace(ask, height=job.size.height, width=job.size.width)
    check_request(job.architecture, ask)
    measured = this_machine(device)
    planned = plan_on_this(job.architecture, measured, ask)
    require_fit(planned.plan)
    now, note = is_verified_now(verify, measured, planned)
    planned = planned._replace(plan=with_note(planned.plan, note))
    tuned = _load(planned, measured, ask)
    arguments = {"seed": seed, **job.arguments, **_repeated(tuned.pipe, planned, job.arguments)}
    if now:
        _verify(tuned, verify)
    result, phases = tuned.measure(**arguments)
    job = job._replace(files=save(result[0], job.files, fps))
    if len(job.files) < ask.batch:
        typer.echo(f"warning: the pipeline drew {len(job.files)} of {ask.batch}", err=True)
    planned = planned._replace(plan=tuned.plan)
    verification = tuned.verification  # of the plan that has drawn
    if verification is not None:
        phases = joined(phases, verification)
    _remember(measured, planned, phases)
    _report(planned, phases, verification, job, seed, json)


def _verify(tuned: Any, mode: str) -> None:
    with progress("Verifying in short passes"):
        verified(tuned, mode)


def _remember(measured: Measured, planned: Planned, phases: tuple[PhaseMeasurement, ...]) -> None:
    """The image is drawn: a profile that cannot be written costs a warning, not the account."""
    try:
        remember_run(measured, planned, phases)
    except ProfileError as error:
        typer.echo(f"warning: the run is not remembered: {error}", err=True)


def _load(planned: Planned, measured: Measured, ask: Ask) -> Any:
    from autotune.runtime.load import load_pipeline

    with _quiet_libraries():
        pipe = load_pipeline(planned.architecture, planned.plan, planned.machine.maps_files)
        pipe = _as_planned(pipe, planned.architecture.pipeline)
    shown = sys.stderr.isatty()
    pipe.set_progress_bar_config(disable=not shown, desc="denoise", leave=False)
    return apply_plan(pipe, planned, measured, ask)


def _as_planned(pipe: Any, pipeline: str) -> Any:
    """The same modules as the pipeline that starts from a picture, where that was planned."""
    if type(pipe).__name__ == pipeline:
        return pipe
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    auto = AutoPipelineForInpainting if "Inpaint" in pipeline else AutoPipelineForImage2Image
    return auto.from_pipe(pipe)


def _repeated(pipe: Any, planned: Planned, arguments: dict[str, Any]) -> dict[str, list[str]]:
    """Prompts once for each image of a batch, where the pipeline draws one for each prompt."""
    from autotune.workload.arguments import call_arguments

    request = planned.workload.request
    if not isinstance(call_arguments(pipe, request).get("prompt"), list):
        return {}
    return {n: [text] * request.batch for n, text in arguments.items() if isinstance(text, str)}


def _report(
    planned: Planned,
    phases: tuple[PhaseMeasurement, ...],
    verification: Verification | None,
    job: Job,
    seed: int,
    json: bool,
) -> None:
    if json:
        files = tuple(map(str, job.files))
        report = RunReport(
            **{name: getattr(planned.plan, name) for name in planned.plan.__struct_fields__},
            measured=phases,
            verification=verification,
            images=() if job.is_video else files,
            videos=files if job.is_video else (),
            seed=seed,
        )
        print_json(report.to_dict())
        return
    from autotune.cli.account import escape, print_run
    from autotune.cli.output import console

    print_run(planned.plan, phases, verification)
    saved = ", ".join(map(str, job.files))
    what = "video" if job.is_video else "image"
    console().print(f"[bold]{what}[/] {escape(saved)} (seed {seed})", soft_wrap=True)


# ---- what is checked before anything is measured or loaded ---------------------------------------


def _job(
    architecture: Architecture,
    prompt: str | None,
    negative_prompt: str | None,
    pictures: tuple[Any, Any],
    asked: Size,
) -> Job:
    """What to draw and with which pipeline; its class is looked at, its weights are not.

    Raises:
        ModelError: there are no weights to load.
        RequestError: the pipeline does not take what is given, or needs more.
    """
    image, mask = pictures
    pipeline = pipeline_for(architecture.pipeline, image is not None, mask is not None)
    texts = _texts(architecture.name, pipeline, prompt, negative_prompt)
    picture_arguments(pipeline, image, mask, Size(None, None))  # refuses before the hub is asked
    is_video = native_request(architecture).frames > 1
    found = msgspec.structs.replace(loadable(architecture), pipeline=pipeline)
    size = size_for(found, image, asked)
    scaled = picture_arguments(pipeline, image, mask, size)
    return Job(found, size, {**texts, **scaled}, [], is_video)


def _texts(
    model: str, pipeline: str, prompt: str | None, negative_prompt: str | None
) -> dict[str, str]:
    """Prompts, as far as the pipeline takes them."""
    given = {"prompt": prompt, "negative_prompt": negative_prompt}
    if prompt is None and model == "demo":
        given["prompt"] = DEMO_PROMPT
    parameters = parameters_of(pipeline)
    if given["prompt"] is None and (parameters is None or "prompt" in parameters):
        raise RequestError(
            "there is no prompt", 'say what to draw: --prompt "a lighthouse at dusk"'
        )
    texts = {name: text for name, text in given.items() if text is not None}
    for name in texts:
        if parameters is not None and name not in parameters:
            option = f"--{name.replace('_', '-')}"
            raise RequestError(f"{pipeline} has no use for {option}", "leave it out")
    return texts


def _read_pictures(image: Path | None, mask: Path | None) -> tuple[Any, Any]:
    if mask is not None and image is None:
        raise RequestError("--mask says where to redraw a picture", "give the picture with --image")
    return (
        None if image is None else read_picture(image),
        None if mask is None else read_picture(mask, "L"),
    )


def _check_choice(verify: str, fps: int) -> None:
    check_verify(verify)
    if not 1 <= fps <= MAX_FPS:
        raise RequestError(f"fps {fps} is out of range", f"use 1 to {MAX_FPS}")


def _checked_seed(seed: int) -> int:
    if not 0 <= seed < 2**63:
        raise RequestError(f"seed {seed} is out of range", "use 0 to 2**63 - 1")
    return seed


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Loading prints progress bars of its own for every component; errors still raise."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
