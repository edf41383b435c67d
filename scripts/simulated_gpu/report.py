"""What was recorded on the simulated device, beside what is predicted of it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
from documents import between

from autotune.decide.metrics import expected
from autotune.decide.predict import Predictor
from autotune.decide.search import execution_of
from autotune.optimizations import parse_settings
from autotune.probe.reference import load_machine
from autotune.units import MIB
from autotune.workload.architecture import find_architecture
from autotune.workload.workload import Request, Workload

RECORDING = Path("tests/data/simulated/memory.jsonl")
DOCUMENT = Path("docs/simulation.md")
BEGIN, END = "<!-- memory -->", "<!-- end of memory -->"

COLUMNS = (
    *("model", "set", "allocated, predicted", "simulated", "error"),
    *("reserved, predicted", "simulated", "pinned, predicted", "simulated"),
)

MACHINE = "gtx-1660-6gb"
"""Of its kernels none takes a workspace: nor do the simulated device's, but for cuBLAS's."""


class Measured(msgspec.Struct, frozen=True):
    """A generation with a full-size model and random weights on the simulated device; in bytes.

    Attributes:
        settings: As on the command line; empty for plain diffusers.
        allocated: Phase → peak.
        pinned: The most host RAM that was pinned.
    """

    model: str
    side: int
    steps: int
    dtype: str
    settings: str
    torch: str
    allocated: dict[str, int]
    reserved: int
    pinned: int


class Row(NamedTuple):
    """A generation, predicted and measured; in bytes."""

    measured: Measured
    allocated: dict[str, int]
    reserved: int
    pinned: int

    @property
    def error(self) -> float:
        """Of the whole generation's peak, signed and relative."""
        return max(self.allocated.values()) / max(self.measured.allocated.values()) - 1


def append(path: Path, line: Measured) -> None:
    """Adds a generation to a recording."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(msgspec.json.encode(line) + b"\n")


def read(path: Path) -> Iterator[Measured]:
    """Every generation of a recording."""
    decoder = msgspec.json.Decoder(Measured)
    yield from map(decoder.decode, path.read_bytes().splitlines())


def rows(path: Path) -> Iterator[Row]:
    """Every generation of a recording beside today's prediction."""
    machine = load_machine(MACHINE)
    for measured in read(path):
        workload = _workload(measured.model, measured.side, measured.steps, measured.dtype)
        predictor = Predictor(machine, workload)
        execution = execution_of(parse_settings(measured.settings))
        prediction = predictor.predict(execution)
        weights, group = predictor.weights(execution), execution.group
        yield Row(
            measured,
            {p.name: p.peak_bytes for p in prediction.phases},
            expected(predictor, execution, 1 << 40).reserved_bytes,
            0 if group is None else weights.pinned_bytes(group),
        )


@functools.lru_cache(maxsize=1)
def _workload(model: str, side: int, steps: int, dtype: str) -> Workload:
    from autotune.workload.phases import trace_workload  # torch

    return trace_workload(find_architecture(model), Request(side, side, 1, steps, 5.0, dtype))


def table(path: Path) -> str:
    """Markdown."""
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        f"|{' --- |' * len(COLUMNS)}",
    ]
    for row in rows(path):
        m = row.measured
        pinned = (row.pinned, m.pinned) if m.pinned else None
        cells = (
            f"{m.model} {m.side}²",
            f"`{m.settings}`" if m.settings else "plain",
            *map(_mib, (max(row.allocated.values()), max(m.allocated.values()))),
            f"{row.error:+.1%}",
            *map(_mib, (row.reserved, m.reserved)),
            *(map(_mib, pinned) if pinned else ("", "")),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f} MiB"


def report(root: Path, write: bool) -> None:
    """Prints the table, or puts it into the document."""
    found = table(root / RECORDING)
    if not write:
        sys.stdout.write(found)
        return
    document = root / DOCUMENT
    text = between(document.read_text(encoding="utf-8"), BEGIN, END, found)
    document.write_text(text, encoding="utf-8")
