"""``autotune plan`` for several machines and models in one table, and the frontier of one plan."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from autotune.cli.machine import HERE, is_machine, plan_on
from autotune.cli.options import names_of
from autotune.cli.output import console, table_of
from autotune.decide.plan import Plan
from autotune.decide.whatif import ComparisonRow, FrontierPoint
from autotune.errors import RequestError
from autotune.optimizations import find
from autotune.optimizations.base import Setting
from autotune.runtime.account import describe_bottleneck
from autotune.tuner import Ask
from autotune.units import GIB, format_seconds
from autotune.workload.architecture import builtin_names

if TYPE_CHECKING:
    from rich.table import Table


class Case(NamedTuple):
    """A model on a machine, by their names."""

    model: str
    machine: str


class Comparison(msgspec.Struct, frozen=True):
    """The ``--json`` contract of ``plan`` where several machines or models are compared."""

    comparison: tuple[ComparisonRow, ...]


# ---- which plans --------------------------------------------------------------------------------


def cases_of(model: str, machine: str | None, beside: str | None) -> tuple[Case, ...]:
    """Every model on every machine, in the order named.

    Args:
        model: One, or several with commas between them.
        machine: The same for machines; this one by default.
        beside: Further machines or models. A single machine is compared with this one.

    Raises:
        RequestError: a name is neither a machine nor a model.
    """
    models = [*_listed(model)]
    machines = [] if machine is None else [*_listed(machine)]
    for name in names_of(beside or ""):
        (machines if _is_machine(name) else models).append(name)
    machines = machines or [HERE]
    if beside and len(models) == len(machines) == 1:
        machines.insert(0, HERE)
    pairs = dict.fromkeys(itertools.product(models, machines))
    return tuple(itertools.starmap(Case, pairs))


def _listed(text: str) -> tuple[str, ...]:
    """A file or folder may have a comma in its name."""
    return (text,) if os.path.exists(text) else names_of(text) or (text,)


def _is_machine(name: str) -> bool:
    """Which of the two a name is.

    Raises:
        RequestError: neither.
    """
    if is_machine(name):
        return True
    if name in builtin_names() or "/" in name or os.path.exists(name):
        return False
    raise RequestError(
        f"--compare knows no machine or model {name!r}",
        "`autotune machines` and `autotune models` list them",
    )


def plan_all(cases: Iterable[Case], ask: Ask) -> tuple[Plan, ...]:
    """One plan for each.

    Raises:
        AutotuneError: one cannot be made.
    """
    return tuple(plan_on(case.machine, case.model, ask).plan for case in cases)


# ---- side by side -------------------------------------------------------------------------------


def print_comparison(comparison: Comparison) -> None:
    """A line or two for each plan."""
    console().print(_comparison_table(comparison.comparison))


def _comparison_table(rows: tuple[ComparisonRow, ...]) -> Table:
    table = table_of(
        (
            "machine",
            "model",
            "time",
            "needs\nGiB",
            "of\nGiB",
            "fits",
            "chosen set, and its bottleneck",
        ),
        left=(0, 1, 5, 6),
    )
    for row in rows:
        table.add_row(
            row.machine,
            f"{row.model}\n{_size(row)}",
            format_seconds(row.seconds),
            _gib(row.needed_bytes),
            _gib(row.budget_bytes),
            _yes_or_no(row.fits),
            f"{short_names(row.optimizations)}\n[dim]{describe_bottleneck(row.bottleneck)}[/]",
        )
    return table


def _size(row: ComparisonRow) -> str:
    frames = f"x{row.frames}" if row.frames > 1 else ""
    batch = f"\nbatch {row.batch}" if row.batch > 1 else ""
    return f"{row.width}x{row.height}{frames}{batch}"


# ---- the price of memory ------------------------------------------------------------------------


def print_frontier(points: tuple[FrontierPoint, ...], plan: Plan) -> None:
    """From the fastest set to the smallest; the chosen one has a mark."""
    out = console()
    out.print(_frontier_table(tuple(_with_chosen(points, plan)), plan))
    out.print(
        "▶ chosen; a set that is not listed is slower or larger than one that is", style="dim"
    )


def _with_chosen(points: tuple[FrontierPoint, ...], plan: Plan) -> Iterator[FrontierPoint]:
    """Fewer optimizations are worth 3 % of the time: the choice may lie a little inside."""
    p = plan.prediction
    chosen = FrontierPoint(
        plan.optimizations, p.mean_seconds, p.needed_bytes, p.host_bytes, plan.fits
    )
    others = [point for point in points if point.optimizations != plan.optimizations]
    yield from sorted((chosen, *others), key=lambda point: point.seconds)


def _frontier_table(points: tuple[FrontierPoint, ...], plan: Plan) -> Table:
    has_host = plan.host_budget_bytes is not None
    host = ("host RAM\nGiB",) if has_host else ()
    titles = ("", "time", "needs\nGiB", *host, "fits", "set")
    table = table_of(titles, left=(0, len(titles) - 2, len(titles) - 1))
    for point in points:
        is_chosen = point.optimizations == plan.optimizations
        table.add_row(
            "▶" if is_chosen else "",
            format_seconds(point.seconds),
            _gib(point.needed_bytes),
            *((_gib(point.host_bytes),) if has_host else ()),
            _yes_or_no(point.fits),
            short_names(point.optimizations),
            style="bold" if is_chosen else None,
        )
    return table


def short_names(settings: tuple[Setting, ...]) -> str:
    """The set with parameters only where they are not the usual ones."""
    return ", ".join(map(str, map(_without_defaults, settings))) or "no optimization"


def _without_defaults(setting: Setting) -> Setting:
    usual = find(setting.name).defaults
    return Setting(setting.name, {k: v for k, v in setting.parameters.items() if usual[k] != v})


def _yes_or_no(fits: bool) -> str:
    return "yes" if fits else "[red]no[/]"


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}"
