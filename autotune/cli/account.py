"""The account of a plan or a run on the screen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from autotune.cli.output import console, table_of
from autotune.decide.breakdown import ComponentPrediction
from autotune.decide.plan import Plan, PredictionReport
from autotune.decide.prediction import Elsewhere, PhasePrediction, Prediction
from autotune.profile.profile import PhaseMeasurement
from autotune.runtime.account import (
    compare,
    describe_bottleneck,
    describe_machine,
    describe_other_gpus,
    describe_prediction,
    describe_start,
    describe_workload,
    left_out,
    shortage,
    ways_out,
)
from autotune.runtime.verification import Verification
from autotune.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def escape(text: str) -> str:
    """Text as it is: error messages and folder names may look like rich's markup."""
    from rich.markup import escape as escaped

    return escaped(text)


Parts = tuple[ComponentPrediction, ...]


def print_plan(plan: Plan, parts: Parts) -> None:
    """The whole plan: facts, phases, reasons, what was left out."""
    print_facts(plan)
    console().print(phase_table(plan.prediction, parts))
    print_reasons(plan)


def print_facts(plan: Plan) -> None:
    """Machine, workload, bottleneck, the set, time and memory."""
    console().print(_facts(plan))


def print_reasons(plan: Plan) -> None:
    """What was chosen and left out, each with its reason; what does not fit, and the ways out."""
    out = console()
    if not plan.fits:
        out.print(f"[bold red]{shortage(plan)}[/]; try {ways_out(plan)}")
    out.print(_reason_table(plan))
    print_notes(plan.notes)


def print_notes(notes: tuple[str, ...]) -> None:
    """What is estimated, kept or of no effect."""
    for note in notes:
        console().print(f"[yellow]note[/] {escape(note)}")


def print_report(report: PredictionReport, parts: Parts) -> None:
    """The prediction of a given set."""
    print_report_facts(report)
    console().print(phase_table(report.prediction, parts))
    print_notes(report.notes)


def print_report_facts(report: PredictionReport) -> None:
    """Machine, workload, the set, time and memory."""
    names = ", ".join(map(str, report.optimizations)) or "nothing"
    grid = _grid()
    grid.add_row("machine", escape(describe_machine(report)))
    grid.add_row("workload", escape(describe_workload(report)))
    grid.add_row("with", names)
    grid.add_row("predicted", describe_prediction(report.prediction))
    grid.add_row("fits", _fit(report))
    _add_start(grid, report)
    console().print(grid)


def print_run(
    plan: Plan, measured: tuple[PhaseMeasurement, ...], verification: Verification | None
) -> None:
    """The account after an image: the plan, and predicted beside measured."""
    out = console()
    out.print(_facts(plan))
    print_reasons(plan)
    out.print(_comparison(plan.prediction, measured))
    if verification is not None:
        out.print(_verification(verification))
    elif all(m.peak_bytes is None for m in measured):
        out.print("memory was not measured in this run: --verify always measures it")


def _verification(verification: Verification) -> Table:
    grid = _grid()
    how, *rest = verification.lines
    grid.add_row("verified", how)
    for line in rest:
        name, _, text = line.partition(": ")
        grid.add_row(f"  {escape(name)}", escape(text))
    return grid


def phase_table(prediction: Prediction, parts: Parts) -> RenderableType:
    """Memory and time per phase, and per component where a phase has several."""
    titles = ("phase", "weights", "active", "needed", "seconds", "bound by")
    table = table_of(titles, left=(0, 5), whole=(0, 4))
    binding = prediction.binding_phase.name
    for phase in prediction.phases:
        within = [p for p in parts if p.prediction.name == phase.name]
        _add_phase(table, phase.name, phase, "▶ " if phase.name == binding else "")
        for other in phase.elsewhere:
            _add_elsewhere(table, other)
        if len(within) > 1:
            # Phases are corrected by verified runs; their parts share that.
            factor = phase.seconds / (sum(p.prediction.seconds for p in within) or 1.0)
            for part in within:
                seconds = part.prediction.seconds * factor
                shown = msgspec.structs.replace(part.prediction, seconds=seconds)
                _add_phase(table, f"  {part.label} ×{part.calls}", shown, style="dim")
    return table


def _add_phase(
    table: Table, title: str, phase: PhasePrediction, mark: str = "", style: str = ""
) -> None:
    table.add_row(
        title,
        format_bytes(phase.resident_bytes),
        format_bytes(phase.activation_bytes),
        mark + format_bytes(phase.needed_bytes),
        format_seconds(phase.seconds),
        _bound(phase.compute_s, phase.memory_s, phase.transfer_s, phase.launch_s),
        style=style,
    )


def _add_elsewhere(table: Table, other: Elsewhere) -> None:
    sizes = (other.resident_bytes, other.activation_bytes, other.needed_bytes)
    table.add_row(f"  cuda:{other.gpu}", *map(format_bytes, sizes), "", "", style="dim")


def _bound(*shares: float) -> str:
    names = ("compute", "memory", "transfer", "launch")
    name, share = max(zip(names, shares, strict=True), key=lambda item: item[1])
    return f"{name} {share / (sum(shares) or 1.0):.0%}"


def _facts(plan: Plan) -> Table:
    grid = _grid()
    nothing = "no optimization: none is worth having here" if plan.fits else "nothing makes it fit"
    chosen = ", ".join(map(str, plan.optimizations)) or nothing
    grid.add_row("machine", escape(describe_machine(plan)))
    grid.add_row("workload", escape(describe_workload(plan)))
    before, after = plan.bottleneck.before, plan.bottleneck.after
    grid.add_row("bottleneck", describe_bottleneck(before))
    if before != after:
        grid.add_row("afterwards", describe_bottleneck(after))
    grid.add_row("chosen", f"[bold green]{chosen}[/]")
    if plan.kept:
        grid.add_row("kept", ", ".join(map(str, plan.kept)))
    plain_fits = plan.budget.holds(plan.baseline)
    plain = describe_prediction(plan.baseline, plan.prediction)
    grid.add_row("plain", plain if plain_fits else f"{plain}; does not fit")
    grid.add_row("planned", describe_prediction(plan.prediction, plan.baseline))
    grid.add_row("fits", _fit(plan))
    _add_start(grid, plan)
    return grid


def _fit(plan: Plan | PredictionReport) -> str:
    needed, budget = plan.prediction.needed_bytes, plan.budget_bytes
    need = f"needs {format_bytes(needed)} of {format_bytes(budget)} available"
    need += "".join(f", {text}" for text in describe_other_gpus(plan))
    host, available = plan.prediction.host_bytes, plan.host_budget_bytes
    if available is not None and host > available:
        need += f", {format_bytes(host)} of {format_bytes(available)} of host RAM"
    return need if plan.fits else f"[bold red]no[/]: {need}"


def _add_start(grid: Table, plan: Plan | PredictionReport) -> None:
    start = describe_start(plan)
    if start:
        grid.add_row("start", start)


def _reason_table(plan: Plan) -> Table:
    grid = _grid()
    for reason in plan.reasons:
        grid.add_row(f"[green]+ {reason.optimization}[/]", escape(reason.text))
    for text, names in left_out(plan).items():
        grid.add_row("- " + "\n  ".join(names), escape(text), style="dim")
    return grid


def _comparison(prediction: Prediction, measured: tuple[PhaseMeasurement, ...]) -> Table:
    """Two columns more where the other levels of memory were measured."""
    levels = {"reserved": "reserved_bytes", "device": "device_bytes"}
    known = {n: f for n, f in levels.items() if any(getattr(m, f) is not None for m in measured)}
    columns = ("phase", "predicted", "measured", "predicted peak", "measured peak")
    table = table_of((*columns, *known), whole=(0,))
    found = {m.name: m for m in measured}
    for row in compare(prediction, measured):
        phase = [found[row[0]]] if row[0] in found else []
        table.add_row(*row, *(_most(phase, f) for f in known.values()))
    table.add_section()
    whole = sum(m.seconds for m in measured)
    table.add_row(
        "all",
        format_seconds(prediction.seconds, whole),
        format_seconds(whole, prediction.seconds),
        format_bytes(prediction.peak_bytes),
        *(_most(measured, f) for f in ("peak_bytes", *known.values())),
    )
    return table


def _most(measured: Iterable[PhaseMeasurement], field: str) -> str:
    """The largest of a level of memory, as far as it was measured."""
    found = [b for m in measured if (b := getattr(m, field)) is not None]
    return format_bytes(max(found)) if found else "-"


def _grid() -> Table:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column()
    return grid
