"""``autotune plan`` and ``autotune predict``: decide, or predict a given set, with no weights."""

from __future__ import annotations

from typing import Annotated

import typer

from autotune.cli.machine import plan_on, work_out_on
from autotune.cli.memory import MemoryAccount, memory_of, print_memory
from autotune.cli.options import (
    Batch,
    Call,
    Dtype,
    Frames,
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
    parse_call,
)
from autotune.cli.output import JsonFlag, print_json
from autotune.decide.breakdown import break_down
from autotune.decide.choose import execution_of
from autotune.decide.choose import predict as predict_set
from autotune.decide.plan import Plan, PredictionReport
from autotune.errors import RequestError
from autotune.optimizations import parse_settings
from autotune.optimizations.execution import Execution
from autotune.probe.machine import Machine
from autotune.tuner import Ask, Planned
from autotune.workload.workload import Workload

Model = Annotated[str, typer.Argument(help="A hub id, a folder, or a built-in name such as sdxl.")]
Explain = Annotated[
    str | None, typer.Option(metavar="memory", help="What fills the memory, phase by phase.")
]


def plan(
    model: Model,
    machine: MachineName = None,
    height: Height = None,
    width: Width = None,
    batch: Batch = 1,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
    call: Call = None,
    dtype: Dtype = "auto",
    quality: Quality = "exact",
    only: Only = "",
    without: Without = "",
    vram_limit: VramLimit = None,
    explain: Explain = None,
    json: JsonFlag = False,
) -> None:
    """Decide how to run MODEL here or elsewhere, and say why.

    MODEL is a hub id, a folder, or a name that `autotune models` lists.
    """
    _check_explain(explain)
    limits = make_limits(quality, only, without, vram_limit)
    options = parse_call(call)
    ask = Ask(height, width, batch, steps, guidance, dtype, limits, frames, options)
    planned = plan_on(machine, model, ask)
    memory = None if explain is None else _plan_memory(planned)
    if json:
        _print(planned.plan, memory)
        return
    from autotune.cli import account

    if memory is None:
        parts = break_down(planned.machine, planned.workload, planned.plan.execution)
        account.print_plan(planned.plan, parts)
        return
    account.print_facts(planned.plan)
    print_memory(memory, ", ".join(map(str, planned.plan.optimizations)))
    account.print_notes(planned.plan.notes)


def predict(
    model: Model,
    with_: Annotated[
        str, typer.Option("--with", help="The set: A,B,tome:ratio=0.3 (empty: none).")
    ] = "",
    machine: MachineName = None,
    height: Height = None,
    width: Width = None,
    batch: Batch = 1,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
    call: Call = None,
    dtype: Dtype = "auto",
    vram_limit: VramLimit = None,
    explain: Explain = None,
    json: JsonFlag = False,
) -> None:
    """Predict a given set of optimizations, without choosing.

    MODEL is a hub id, a folder, or a name that `autotune models` lists.
    """
    _check_explain(explain)
    settings = parse_settings(with_)
    limits = make_limits("exact", "", "", vram_limit)
    options = parse_call(call)
    ask = Ask(height, width, batch, steps, guidance, dtype, limits, frames, options)
    here, workload = work_out_on(machine, model, ask)
    report = predict_set(here, workload, settings, limits)
    execution = execution_of(settings)
    memory = None if explain is None else _report_memory(here, workload, execution, report)
    if json:
        _print(report, memory)
        return
    from autotune.cli import account

    if memory is None:
        account.print_report(report, break_down(here, workload, execution))
        return
    account.print_report_facts(report)
    print_memory(memory, ", ".join(map(str, settings)))
    account.print_notes(report.notes)


def _check_explain(explain: str | None) -> None:
    if explain not in (None, "memory"):
        raise RequestError(f"--explain knows no {explain!r}", "use --explain memory")


def _plan_memory(planned: Planned) -> MemoryAccount:
    machine, workload, plan = planned.machine, planned.workload, planned.plan
    chosen = memory_of(machine, workload, plan.execution, plan.prediction)
    plain = memory_of(machine, workload, Execution(), plan.baseline) if plan.optimizations else ()
    return MemoryAccount(
        plan.budget_bytes, plan.prediction.binding_phase.name, prediction=chosen, baseline=plain
    )


def _report_memory(
    machine: Machine, workload: Workload, execution: Execution, report: PredictionReport
) -> MemoryAccount:
    prediction = report.prediction
    return MemoryAccount(
        report.budget_bytes,
        prediction.binding_phase.name,
        prediction=memory_of(machine, workload, execution, prediction),
    )


def _print(report: Plan | PredictionReport, memory: MemoryAccount | None) -> None:
    print_json(report.to_dict() | ({} if memory is None else {"memory": memory}))
