"""``autotune plan`` and ``autotune predict``: decide, or predict a given set, with no weights."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from autotune.cli.account import (
    print_facts,
    print_notes,
    print_plan,
    print_report,
    print_report_facts,
)
from autotune.cli.machine import plan_on, work_out_on
from autotune.cli.memory import MemoryAccount, memory_of, print_memory
from autotune.cli.options import (
    ChoiceOptions,
    Images,
    MachineName,
    MemoryOptions,
    RequestOptions,
    make_ask,
    spread,
)
from autotune.cli.output import JsonFlag, print_json
from autotune.cli.whatif import (
    Comparison,
    cases_of,
    plan_all,
    print_comparison,
    print_frontier,
)
from autotune.decide.breakdown import break_down
from autotune.decide.choose import execution_of
from autotune.decide.choose import predict as predict_set
from autotune.decide.limits import Limits
from autotune.decide.plan import Plan, PredictionReport
from autotune.decide.whatif import compare as compare_plans
from autotune.decide.whatif import frontier as frontier_of
from autotune.errors import RequestError
from autotune.optimizations import parse_settings
from autotune.optimizations.execution import Execution
from autotune.probe.machine import Machine
from autotune.runtime.account import shortage
from autotune.tuner import Planned
from autotune.workload.workload import Workload

Model = Annotated[str, typer.Argument(help="A hub id, a folder, or a built-in name such as sdxl.")]
Explain = Annotated[
    str | None, typer.Option(metavar="memory", help="What fills the memory, phase by phase.")
]
Compare = Annotated[
    str | None,
    typer.Option(
        metavar="A,B", help="Machines or models beside these, in one table; `here` is this machine."
    ),
]
Keep = Annotated[
    str,
    typer.Option(
        metavar="A,B", help="Set by hand already, with parameters as in --with: stays as it is."
    ),
]
CodeFlag = Annotated[bool, typer.Option("--code", help="Print plain diffusers lines to paste.")]
FrontierFlag = Annotated[
    bool, typer.Option("--frontier", help="What less memory costs in time, set by set.")
]


@spread
def plan(
    model: Model,
    machine: MachineName = None,
    compare: Compare = None,
    *,
    request: RequestOptions,
    choice: ChoiceOptions,
    memory: MemoryOptions,
    keep: Keep = "",
    explain: Explain = None,
    frontier: FrontierFlag = False,
    code: CodeFlag = False,
    json: JsonFlag = False,
) -> None:
    """Decide how to run MODEL here or elsewhere, and say why.

    MODEL is a hub id, a folder, or a name that `autotune models` lists. Several models or machines
    are compared in one table: `autotune plan sdxl,sd15 --machine t4-16gb,rtx-4060-8gb`, or
    `autotune plan sdxl --compare t4-16gb,rtx-4060-8gb`.
    """
    view = _view(explain, frontier, code)
    ask = make_ask(request, memory, choice, keep)
    cases = cases_of(model, machine, compare)
    if len(cases) > 1:
        _print_comparison(plan_all(cases, ask), view, json)
        return
    planned = plan_on(cases[0].machine, cases[0].model, ask)
    shown = _shown(view, planned, ask.limits)
    if json:
        print_json(planned.plan.to_dict() | shown)
    else:
        _print_plan(planned, shown)


@spread
def predict(
    model: Model,
    with_: Annotated[
        str, typer.Option("--with", help="The set: A,B,tome:ratio=0.3 (empty: none).")
    ] = "",
    machine: MachineName = None,
    *,
    request: RequestOptions,
    memory: MemoryOptions,
    images: Images = 1,
    explain: Explain = None,
    json: JsonFlag = False,
) -> None:
    """Predict a given set of optimizations, without choosing.

    MODEL is a hub id, a folder, or a name that `autotune models` lists.
    """
    view = _view(explain)
    settings = parse_settings(with_)
    ask = make_ask(request, memory, ChoiceOptions(images=images))
    here, workload, history = work_out_on(machine, model, ask)
    report = predict_set(here, workload, settings, ask.limits, history)
    execution = execution_of(settings)
    account = None if view is None else _report_memory(here, workload, execution, report)
    if json:
        print_json(report.to_dict() | ({} if account is None else {"memory": account}))
        return
    if account is None:
        print_report(report, break_down(here, workload, execution))
        return
    print_report_facts(report)
    print_memory(account, ", ".join(map(str, settings)))
    print_notes(report.notes)


# ---- what of a plan is shown --------------------------------------------------------------------


def _view(explain: str | None, frontier: bool = False, code: bool = False) -> str | None:
    """The one thing that is shown in place of the reasons; its name in ``--json`` too.

    Raises:
        RequestError: there are two, or it is unknown.
    """
    if explain not in (None, "memory"):
        raise RequestError(f"--explain knows no {explain!r}", "use --explain memory")
    asked = {"memory": explain is not None, "frontier": frontier, "code": code}
    views = [name for name, is_asked in asked.items() if is_asked]
    if len(views) > 1:
        raise RequestError(f"{' and '.join(views)} are shown one at a time", "ask for one of them")
    return views[0] if views else None


def _shown(view: str | None, planned: Planned, limits: Limits) -> dict[str, Any]:
    if view == "memory":
        return {view: _plan_memory(planned)}
    if view == "frontier":
        points = frontier_of(planned.machine, planned.workload, limits, history=planned.history)
        return {view: points}
    if view == "code":
        return {view: planned.plan.code(planned.architecture)}
    return {}


def _print_plan(planned: Planned, shown: dict[str, Any]) -> None:
    plan = planned.plan
    if "code" in shown:
        if not plan.fits:
            typer.echo(f"warning: {shortage(plan)}", err=True)
        typer.echo(shown["code"], nl=False)
        return
    if not shown:
        print_plan(plan, break_down(planned.machine, planned.workload, plan.execution))
        return
    print_facts(plan)
    if "memory" in shown:
        print_memory(shown["memory"], ", ".join(map(str, plan.optimizations)))
    else:
        print_frontier(shown["frontier"], plan)
    print_notes(plan.notes)


def _print_comparison(plans: tuple[Plan, ...], view: str | None, json: bool) -> None:
    if view is not None:
        raise RequestError(f"{view} is shown for one plan, not {len(plans)}", "name one of each")
    comparison = Comparison(compare_plans(plans))
    print_json(comparison) if json else print_comparison(comparison)


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
