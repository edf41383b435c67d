"""The account of a plan or a run on the screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autotune.cli.output import console
from autotune.decide.plan import Plan, PredictionReport
from autotune.decide.prediction import Prediction
from autotune.profile.profile import PhaseMeasurement
from autotune.runtime.account import (
    compare,
    describe_bottleneck,
    describe_machine,
    describe_prediction,
    describe_workload,
    shortage,
    ways_out,
)
from autotune.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def escape(text: str) -> str:
    """Text as it is: error messages and folder names may look like rich's markup."""
    from rich.markup import escape as escaped

    return escaped(text)


def print_plan(plan: Plan) -> None:
    """The whole plan: facts, phases, reasons, what was left out."""
    out = console()
    out.print(_facts(plan))
    out.print(phase_table(plan.prediction))
    print_reasons(plan)


def print_reasons(plan: Plan) -> None:
    """What was chosen and left out, each with its reason; what does not fit, and the ways out."""
    out = console()
    if not plan.fits:
        out.print(f"[bold red]{shortage(plan)}[/]; try {ways_out(plan)}")
    out.print(_reason_table(plan))
    for note in plan.notes:
        out.print(f"[yellow]note[/] {escape(note)}")


def print_report(report: PredictionReport) -> None:
    """The prediction of a given set."""
    out = console()
    names = ", ".join(map(str, report.optimizations)) or "nothing"
    grid = _grid()
    grid.add_row("machine", escape(describe_machine(report)))
    grid.add_row("workload", escape(describe_workload(report)))
    grid.add_row("with", names)
    grid.add_row("predicted", describe_prediction(report.prediction))
    grid.add_row("fits", _fit(report.fits, report.prediction, report.budget_bytes))
    out.print(grid)
    out.print(phase_table(report.prediction))
    for note in report.notes:
        out.print(f"[yellow]note[/] {escape(note)}")


def print_run(plan: Plan, measured: tuple[PhaseMeasurement, ...]) -> None:
    """The account after an image: the plan, and predicted beside measured."""
    out = console()
    out.print(_facts(plan))
    print_reasons(plan)
    out.print(_comparison(plan.prediction, measured))
    if all(m.peak_bytes is None for m in measured):
        out.print("memory was checked in an earlier run; --verify always checks it again")


def phase_table(prediction: Prediction) -> RenderableType:
    """Memory and time per phase."""
    table = _table("phase", "weights", "active", "workspace", "needed", "seconds", "bound by")
    binding = prediction.binding_phase.name
    for p in prediction.phases:
        mark = "◀" if p.name == binding else " "
        table.add_row(
            p.name,
            *map(format_bytes, (p.resident_bytes, p.activation_bytes, p.workspace_bytes)),
            format_bytes(p.needed_bytes) + mark,
            format_seconds(p.seconds),
            _bound(p.compute_s, p.memory_s, p.transfer_s, p.launch_s),
        )
    return table


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
    plain_fits = plan.baseline.needed_bytes <= plan.budget_bytes
    plain = describe_prediction(plan.baseline)
    grid.add_row("plain", plain if plain_fits else f"{plain}; does not fit")
    grid.add_row("planned", describe_prediction(plan.prediction))
    grid.add_row("fits", _fit(plan.fits, plan.prediction, plan.budget_bytes))
    return grid


def _fit(fits: bool, prediction: Prediction, budget: int) -> str:
    need = f"needs {format_bytes(prediction.needed_bytes)} of {format_bytes(budget)} available"
    return need if fits else f"[bold red]no[/]: {need}"


def _reason_table(plan: Plan) -> Table:
    grid = _grid()
    for reason in plan.reasons:
        grid.add_row(f"[green]+ {reason.optimization}[/]", escape(reason.text))
    for rejection in plan.rejected:
        text = escape(rejection.text)
        grid.add_row(f"[dim]- {rejection.optimization}[/]", f"[dim]{text}[/]")
    return grid


def _comparison(prediction: Prediction, measured: tuple[PhaseMeasurement, ...]) -> Table:
    table = _table("phase", "predicted", "measured", "predicted peak", "measured peak")
    for row in compare(prediction, measured):
        table.add_row(*row)
    total = sum(m.seconds for m in measured)
    peaks = [m.peak_bytes for m in measured if m.peak_bytes is not None]
    table.add_section()
    table.add_row(
        "all",
        format_seconds(prediction.seconds),
        format_seconds(total),
        format_bytes(prediction.peak_bytes),
        format_bytes(max(peaks)) if peaks else "-",
    )
    return table


def _grid() -> Table:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column()
    return grid


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in (0, 6) else "right")
    return table
