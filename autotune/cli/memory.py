"""``--explain memory``: what fills the device's memory, phase by phase, against what there is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from autotune.cli.output import console, table_of
from autotune.decide.breakdown import (
    ComponentPrediction,
    PeakOperator,
    Resident,
    break_down,
    most_demanding,
)
from autotune.decide.prediction import PhasePrediction, Prediction
from autotune.optimizations.execution import Execution
from autotune.probe.machine import Machine
from autotune.units import format_bytes
from autotune.workload.workload import Workload

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_PARTS = (
    ("weights", "resident_bytes", "█", "blue"),
    ("activations", "activation_bytes", "▓", "magenta"),
    ("margin", "margin_bytes", "▒", "yellow"),
    ("workspace", "workspace_bytes", "░", "dim"),
)
"""Title, field, mark and style: told apart without colour too."""

_LIMIT = "┃"
_WIDEST_BAR = 72


class PhaseMemory(msgspec.Struct, frozen=True):
    """What a phase's memory is: the bytes of its prediction, and what they belong to.

    Attributes:
        phase: Its name.
        component: Whose calls need the most in this phase.
        entry: The method called.
        resident: What the resident bytes are.
        peak: Where the activation bytes are.
    """

    phase: str
    component: str
    entry: str
    resident_bytes: int
    activation_bytes: int
    workspace_bytes: int
    margin_bytes: int
    peak_bytes: int
    needed_bytes: int
    resident: tuple[Resident, ...]
    peak: PeakOperator


class MemoryAccount(msgspec.Struct, frozen=True):
    """The ``memory`` of ``plan`` and ``predict`` with ``--explain memory``.

    Attributes:
        budget_bytes: What is available.
        binding_phase: The phase that needs the most.
        prediction: By phase, as ``prediction.phases`` has it.
        baseline: The same with no optimization; only in a plan that has some.
    """

    budget_bytes: int
    binding_phase: str
    prediction: tuple[PhaseMemory, ...]
    baseline: tuple[PhaseMemory, ...] = ()


def memory_of(
    machine: Machine, workload: Workload, execution: Execution, prediction: Prediction
) -> tuple[PhaseMemory, ...]:
    """A prediction's memory, phase by phase, with what it belongs to."""
    parts = break_down(machine, workload, execution)
    return tuple(_phase_memory(phase, parts) for phase in prediction.phases)


def _phase_memory(phase: PhasePrediction, parts: tuple[ComponentPrediction, ...]) -> PhaseMemory:
    most = most_demanding(parts, phase.name)
    return PhaseMemory(
        phase=phase.name,
        component=most.component,
        entry=most.entry,
        resident_bytes=phase.resident_bytes,
        activation_bytes=phase.activation_bytes,
        workspace_bytes=phase.workspace_bytes,
        margin_bytes=phase.margin_bytes,
        peak_bytes=phase.peak_bytes,
        needed_bytes=phase.needed_bytes,
        resident=most.resident,
        peak=most.peak,
    )


def print_memory(account: MemoryAccount, chosen: str) -> None:
    """Bars, a legend, and the same in words.

    Args:
        account: Of a plan or of a prediction.
        chosen: The set, as people read it.
    """
    out = console()
    both = (*account.prediction, *account.baseline)
    scale = max(account.budget_bytes, *(sum(_bytes(p)) for p in both))
    width = min(_WIDEST_BAR, out.width - 24)
    if account.baseline:
        out.print("\n[bold]with nothing set[/]")
        out.print(_bars(account.baseline, account.budget_bytes, scale, width))
        out.print(f"\n[bold]with {chosen}[/]")
    else:
        out.print(f"\n[bold]with {chosen or 'nothing set'}[/]")
    out.print(_bars(account.prediction, account.budget_bytes, scale, width))
    out.print(_legend(account.budget_bytes))
    out.print(_figures(account.prediction))
    out.print(_words(account))


def _bytes(phase: PhaseMemory) -> tuple[int, ...]:
    return tuple(getattr(phase, field) for _, field, _, _ in _PARTS)


def _bars(phases: Iterable[PhaseMemory], budget: int, scale: int, width: int) -> Table:
    from rich.table import Table

    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True, min_width=8)
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, justify="right")
    phases = tuple(phases)
    binding = max(phases, key=lambda p: p.needed_bytes)
    for phase in phases:
        mark = "▶ " if phase is binding else ""
        bar = _bar(phase, budget, scale, width)
        grid.add_row(phase.phase, bar, mark + format_bytes(phase.needed_bytes))
    return grid


def _bar(phase: PhaseMemory, budget: int, scale: int, width: int) -> Text:
    """Parts end where their sum ends, so that rounding does not add up."""
    from rich.text import Text

    cells: list[tuple[str, str]] = []
    total = 0
    for part, (_, _, mark, style) in zip(_bytes(phase), _PARTS, strict=True):
        total += part
        cells += [(mark, style)] * (round(total / scale * width) - len(cells))
    cells += [(" ", "")] * (width + 1 - len(cells))
    cells[round(budget / scale * width)] = (_LIMIT, "bold red")
    return Text.assemble(*cells)


def _legend(budget: int) -> Text:
    from rich.text import Text

    names = {"workspace": "workspace if room"}
    parts: list[Any] = []
    for title, _, mark, style in _PARTS:
        parts += [(mark, style), f" {names.get(title, title)}  "]
    return Text.assemble("\n", *parts, (_LIMIT, "bold red"), f" {format_bytes(budget)} available")


def _figures(phases: tuple[PhaseMemory, ...]) -> Table:
    table = table_of(("phase", *(title for title, *_ in _PARTS), "needed"))
    for phase in phases:
        figures = (*_bytes(phase), phase.needed_bytes)
        table.add_row(phase.phase, *map(format_bytes, figures))
    return table


# ---- in words -----------------------------------------------------------------------------------


def _words(account: MemoryAccount) -> Table:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column()
    for name, text in _sentences(account):
        grid.add_row(name, text)
    return grid


def _sentences(account: MemoryAccount) -> Iterator[tuple[str, str]]:
    binding = next(p for p in account.prediction if p.phase == account.binding_phase)
    yield "binding", _binding(binding, account.budget_bytes)
    stays = len({p.resident for p in account.prediction}) == 1
    if stays:
        yield "weights", f"stay on the device: {_resident(binding.resident)}"
    for phase in account.prediction:
        name = phase.phase
        if not stays:
            yield name, f"holds {_resident(phase.resident)}"
            name = ""
        computes = f"peaks at {_peak(phase)}" if phase.activation_bytes else "is on another GPU"
        yield name, computes


def _binding(phase: PhaseMemory, budget: int) -> str:
    spare = budget - phase.needed_bytes
    rest = f"{format_bytes(spare)} to spare" if spare >= 0 else f"{format_bytes(-spare)} too much"
    return (
        f"{phase.phase} needs the most, {format_bytes(phase.needed_bytes)} of "
        f"{format_bytes(budget)}: {rest}"
    )


def _resident(resident: tuple[Resident, ...]) -> str:
    if not resident:
        return "no weights"
    return ", ".join(
        f"{'' if r.is_whole else 'a part of '}{r.component} {format_bytes(r.bytes)}"
        for r in resident
    )


def _peak(phase: PhaseMemory) -> str:
    component = phase.component if phase.entry == "forward" else f"{phase.component}.{phase.entry}"
    operator = phase.peak
    name = operator.name.removeprefix("aten.").split(".")[0]
    shape = "×".join(map(str, operator.shape))
    return f"{name} on {shape} {operator.dtype} in {component}"
