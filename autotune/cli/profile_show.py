"""A profile for people: what was measured, what of it still holds, what came of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from autotune.cli.output import console
from autotune.probe.machine import Machine
from autotune.profile.profile import (
    MisfitRecord,
    PhaseMeasurement,
    PlanRecord,
    Profile,
    RunRecord,
    is_before,
    moment,
)
from autotune.profile.staleness import Change
from autotune.profile.staleness import reasons as stale_reasons
from autotune.profile.store import StoredProfile
from autotune.units import format_bytes, format_seconds, printable

if TYPE_CHECKING:
    from rich.table import Table

_LABEL = 9  # characters


def print_profile(profile: Profile, path: Path, changes: Sequence[Change] | None) -> None:
    """Print a profile.

    Args:
        profile: What to print.
        path: Its file.
        changes: What has changed since it was measured; ``None`` for another machine's.
    """
    for label, text in _lines(profile, path, changes):
        typer.echo(typer.style(f"{label:<{_LABEL}}", bold=True) + printable(text))
    for title, table in (
        ("Plans", _plan_table(profile)),
        ("What did not fit", _misfit_table(profile)),
        ("Runs", _run_table(profile)),
    ):
        if table is not None:
            print_table(title, table)
    if not (profile.plans or profile.misfits or profile.runs):
        typer.echo("No plans and no runs remembered yet.")


def print_list(profiles: Sequence[StoredProfile]) -> None:
    """Print one line for each profile, also for those that cannot be read."""
    table = table_of("device", "key", "measured", "runs", wrapped=("device", "key", "measured"))
    for stored in profiles:
        if stored.profile is None:
            add_row(table, "cannot be read", stored.path.name, stored.problem or "", "")
        else:
            add_row(table, *_list_cells(stored.profile))
    console().print(table)


def machine_line(machine: Machine) -> str:
    """Device, driver and host in one line."""
    device, host = machine.device, machine.host
    parts = [f"{device.name}, {format_bytes(device.total_bytes)}"]
    if device.driver:
        parts.append(f"driver {device.driver}")
    if device.kind != "cpu":
        parts.append(f"{host.cpu} with {format_bytes(host.ram_total_bytes)} RAM")
    return ", ".join((*parts, f"{host.cores} cores, {host.os}"))


def measured_at(profile: Profile) -> str:
    """When the figures, or some of them, were last measured."""
    return profile.machine.measured_at or profile.created_at


def age(timestamp: str) -> str:
    """``"2026-05-01T10:00:00Z"`` → ``"3 days ago"``; what is no such timestamp stays as it is."""
    then = moment(timestamp)
    if then is None:
        return timestamp
    return _span((datetime.now(timezone.utc) - then).total_seconds()) + " ago"


def table_of(*columns: str, wrapped: Sequence[str], right: Sequence[str] = ()) -> Table:
    """A table whose ``wrapped`` columns give way on a narrow terminal; figures stay whole."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in columns:
        justify: Literal["right", "left"] = "right" if name in right else "left"
        table.add_column(name, no_wrap=name not in wrapped, overflow="fold", justify=justify)
    return table


def print_table(title: str, table: Table) -> None:
    """Print a table below its title."""
    typer.echo(typer.style(f"\n{title}", bold=True))
    console().print(table)


def add_row(table: Table, *cells: str) -> None:
    """Names come from files: they are shown as they are, neither as markup nor as controls."""
    from rich.text import Text

    table.add_row(*(Text("\n".join(map(printable, cell.split("\n")))) for cell in cells))


def chosen(optimizations: Sequence[str]) -> str:
    """Names as on the command line, or that there are none."""
    return ", ".join(optimizations) or "none"


def _lines(
    profile: Profile, path: Path, changes: Sequence[Change] | None
) -> Iterator[tuple[str, str]]:
    yield "Machine", machine_line(profile.machine)
    yield "Profile", f"{profile.key}, {path}"
    yield "Measured", f"{age(measured_at(profile))} ({measured_at(profile)})"
    if profile.changed_at:
        when = f"{age(profile.changed_at)} ({profile.changed_at})"
        yield "Changed", f"{when}: what is older is of the machine as it was"
    if changes is None:
        yield "Stale", "unknown: this is another machine's"
        return
    yield from _stale_lines(profile, changes)


def _stale_lines(profile: Profile, changes: Sequence[Change]) -> Iterator[tuple[str, str]]:
    why = stale_reasons(changes, profile.machine)
    yield "Stale", "yes; at the next start:" if why else "no"
    yield from (("", reason) for reason in why)
    for change in changes:
        if not change.parts:
            yield "", f"{change}: read at every start, nothing to measure"


def _plan_table(profile: Profile) -> Table | None:
    """Predicted against measured where such a plan has been run, newest first."""
    if not profile.plans:
        return None
    columns = ("when", "workload", "chosen", "predicted", "measured")
    table = table_of(*columns, wrapped=("when", "workload", "chosen"))
    for plan in reversed(profile.plans):
        run = _last_run(profile, plan)
        add_row(
            table,
            _when(profile, plan),
            plan.workload,
            chosen(plan.optimizations),
            _total(plan.predicted),
            _total(run.measured) if run else "not run",
        )
    return table


def _last_run(profile: Profile, plan: PlanRecord) -> RunRecord | None:
    """The last run of a plan: of its set, before the same was planned anew."""
    plans = (p for p in profile.plans if _is_same(p, plan) and is_before(plan.at, p.at))
    anew = next(plans, None)
    runs = [r for r in profile.runs if _is_same(r, plan) and not is_before(r.at, plan.at)]
    if anew is not None:
        runs = [r for r in runs if is_before(r.at, anew.at)]
    return runs[-1] if runs else None


def _is_same(record: RunRecord | PlanRecord, plan: PlanRecord) -> bool:
    return (record.workload, record.optimizations) == (plan.workload, plan.optimizations)


def _misfit_table(profile: Profile) -> Table | None:
    if not profile.misfits:
        return None
    columns = ("when", "workload", "set", "predicted", "had", "ran out in")
    table = table_of(*columns, wrapped=("when", "workload", "set"))
    for misfit in reversed(profile.misfits):
        add_row(
            table,
            _when(profile, misfit),
            misfit.workload,
            chosen(misfit.optimizations),
            format_bytes(misfit.predicted_bytes),
            f"{format_bytes(misfit.available_bytes)}{' RAM' if misfit.of_host else ''}",
            misfit.phase or "-",
        )
    return table


def _run_table(profile: Profile) -> Table | None:
    """Predicted against measured, newest first."""
    if not profile.runs:
        return None
    columns = ("when", "workload", "chosen", "predicted", "measured")
    table = table_of(*columns, wrapped=("when", "workload", "chosen"))
    for run in reversed(profile.runs):
        what = (run.workload, chosen(run.optimizations))
        add_row(table, _when(profile, run), *what, _total(run.predicted), _total(run.measured))
    return table


def _when(profile: Profile, record: RunRecord | PlanRecord | MisfitRecord) -> str:
    """Its age, and whether the machine has changed since."""
    return age(record.at) + ("\nbefore the change" if profile.is_outdated(record) else "")


def _total(phases: Sequence[PhaseMeasurement]) -> str:
    """Seconds add up over the phases; the largest peak is the run's."""
    if not phases:
        return "-"
    seconds = format_seconds(sum(phase.seconds for phase in phases))
    peaks = [phase.peak_bytes for phase in phases if phase.peak_bytes is not None]
    return f"{seconds}\n{format_bytes(max(peaks))}" if peaks else seconds


def _list_cells(profile: Profile) -> Iterable[str]:
    when = age(measured_at(profile))
    return profile.machine.device.name, profile.key, when, str(len(profile.runs))


def _span(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(0, seconds):.0f} seconds"
