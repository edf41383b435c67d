"""``autotune plan`` and ``autotune predict``: decide, or predict a given set, with no weights."""

from __future__ import annotations

from typing import Annotated

import typer

from autotune.cli.machine import choose_machine
from autotune.cli.options import (
    Batch,
    Dtype,
    Guidance,
    Height,
    MachineName,
    Only,
    Quality,
    Steps,
    VramLimit,
    Width,
    Without,
    make_ask,
    make_limits,
)
from autotune.cli.output import JsonFlag, print_json
from autotune.decide.choose import Limits
from autotune.decide.choose import predict as predict_set
from autotune.optimizations import parse_settings
from autotune.tuner import make_plan
from autotune.workload.architecture import find_architecture
from autotune.workload.cache import workload_of
from autotune.workload.request import complete_request

Model = Annotated[str, typer.Argument(help="A hub id, a folder, or a built-in name such as sdxl.")]


def plan(
    model: Model,
    machine: MachineName = None,
    height: Height = None,
    width: Width = None,
    batch: Batch = 1,
    steps: Steps = None,
    guidance: Guidance = None,
    dtype: Dtype = "auto",
    quality: Quality = "exact",
    only: Only = "",
    without: Without = "",
    vram_limit: VramLimit = None,
    json: JsonFlag = False,
) -> None:
    """Decide how to run MODEL here or elsewhere, and say why."""
    limits = make_limits(quality, only, without, vram_limit)
    ask = make_ask(height, width, batch, steps, guidance, dtype, limits)
    planned = make_plan(model, choose_machine(machine), ask).plan
    if json:
        print_json(planned.to_dict())
        return
    from autotune.cli.account import print_plan

    print_plan(planned)


def predict(
    model: Model,
    with_: Annotated[
        str, typer.Option("--with", help="The set: A,B,tome:ratio=0.3 (empty: none).")
    ] = "",
    machine: MachineName = None,
    height: Height = None,
    width: Width = None,
    batch: Batch = 1,
    frames: Annotated[int | None, typer.Option(help="Video frames; image models draw one.")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    dtype: Dtype = "auto",
    vram_limit: VramLimit = None,
    json: JsonFlag = False,
) -> None:
    """Predict a given set of optimizations, without choosing."""
    settings = parse_settings(with_)
    limits = make_limits("exact", "", "", vram_limit)
    here = choose_machine(machine)
    architecture = find_architecture(model)
    request = complete_request(
        architecture,
        here,
        height=height,
        width=width,
        batch=batch,
        steps=steps,
        guidance_scale=guidance,
        dtype=dtype,
        frames=frames,
    )
    workload = workload_of(architecture, request)
    report = predict_set(here, workload, settings, Limits(vram_limit=limits.vram_limit))
    if json:
        print_json(report.to_dict())
        return
    from autotune.cli.account import print_report

    print_report(report)
