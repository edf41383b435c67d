"""``autotune plan`` and ``autotune predict``: decide, or predict a given set, with no weights."""

from __future__ import annotations

from typing import Annotated

import typer

from autotune.cli.machine import plan_on, work_out_on
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
    make_limits,
)
from autotune.cli.output import JsonFlag, print_json
from autotune.decide.choose import predict as predict_set
from autotune.optimizations import parse_settings
from autotune.tuner import Ask

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
    ask = Ask(height, width, batch, steps, guidance, dtype, limits)
    planned = plan_on(machine, model, ask).plan
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
    ask = Ask(height, width, batch, steps, guidance, dtype, limits, frames)
    here, workload = work_out_on(machine, model, ask)
    report = predict_set(here, workload, settings, limits)
    if json:
        print_json(report.to_dict())
        return
    from autotune.cli.account import print_report

    print_report(report)
