"""The recording: one JSON object a line, each written when it is known, read by both scripts."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec

from autotune.probe.machine import AttentionRate, Machine, OperatorTime
from autotune.profile.profile import PhaseMeasurement
from autotune.workload.workload import Workload

Phases = tuple[PhaseMeasurement, ...]


class Header(msgspec.Struct, frozen=True, tag="machine"):
    """Where and how everything else was measured.

    Attributes:
        machine: As probed.
        clock: ``"wall"``, or ``"cpu"`` for the CPU time of the one thread that computes.
        threads: PyTorch's.
        at: ISO 8601.
        load: The system's load average over a minute.
    """

    machine: Machine
    clock: str
    threads: int
    at: str
    load: float


class Prepared(msgspec.Struct, frozen=True, tag="case"):
    """A case's workload, and the limits on memory that it is judged under.

    Attributes:
        case: Its name.
        workload: Traced.
        operators: Replayed for it.
        cards: Bytes; on the CPU limits that are only reckoned with.
        load: As in the header.
        offered: Settings that were tried here, as on the command line: of nothing else is the
            planner judged. Empty in recordings from before: there it is of everything.
    """

    case: str
    workload: Workload
    operators: dict[str, OperatorTime]
    cards: tuple[int, ...]
    load: float
    offered: tuple[str, ...] = ()


class Started(msgspec.Struct, frozen=True, tag="started"):
    """A job that has begun: where nothing of the same name follows, the process died in it."""

    job: str


class Interrupted(msgspec.Struct, frozen=True, tag="interrupted"):
    """A job that the user has ended: it has not begun."""

    job: str


class LeftOut(msgspec.Struct, frozen=True, tag="left out"):
    """A case that could not be prepared."""

    job: str
    case: str
    error: str = ""


class SetRun(msgspec.Struct, frozen=True, tag="set"):
    """Generations with one set of optimizations.

    Attributes:
        job: Its name.
        case: Of which case.
        settings: As on the command line.
        card_bytes: The card it ran on, where a smaller one was made of the real one.
        first: The first generation after the set was turned on; it waits for a compiler.
        runs: Those after it. Peaks are those of the device; on the CPU, of a run of its own.
        wall_s: Seconds by the clock on the wall, of the first and of the others.
        error: Its first line, where it failed.
        ran_out: Whether it failed for want of memory.
        load: As in the header, before it began.
    """

    job: str
    case: str
    settings: tuple[str, ...]
    card_bytes: int | None
    first: Phases = ()
    runs: tuple[Phases, ...] = ()
    wall_s: tuple[float, ...] = ()
    error: str = ""
    ran_out: bool = False
    load: float = 0.0


class Pick(msgspec.Struct, frozen=True, tag="pick"):
    """What the planner answered then; the report asks again."""

    job: str
    case: str
    card_bytes: int
    quality: str
    images: int
    settings: tuple[str, ...]
    fits: bool
    seconds: float
    needed_bytes: int


class PeerRun(msgspec.Struct, frozen=True, tag="peer"):
    """Generations as another tool sets the pipeline up.

    Attributes:
        peer: Its name.
        chose: What it did, as far as it says so.
    """

    job: str
    case: str
    peer: str
    card_bytes: int | None
    chose: str = ""
    first: Phases = ()
    runs: tuple[Phases, ...] = ()
    error: str = ""
    ran_out: bool = False
    load: float = 0.0


class KernelRun(msgspec.Struct, frozen=True, tag="kernels"):
    """Attention implementations at a shape of the case."""

    job: str
    case: str
    rates: tuple[AttentionRate, ...] = ()
    error: str = ""
    load: float = 0.0


Line = Header | Prepared | Started | Interrupted | LeftOut | SetRun | Pick | PeerRun | KernelRun


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def read(path: Path) -> Iterator[Line]:
    """Every whole line; one cut off in the middle of a write is left out."""
    decoder = msgspec.json.Decoder(Line)
    with _open(path) as file:
        for line in file:
            if line.endswith(b"\n"):
                yield decoder.decode(line)


class Recording:
    """What has been recorded so far, and where the rest goes.

    Args:
        path: Of the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[Line] = list(read(path)) if path.exists() else []
        if path.exists() and not path.read_bytes().endswith(b"\n") and self.lines:
            path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in self.lines))

    def add(self, line: Line) -> None:
        """Write a line, to the disk."""
        self.lines.append(line)
        with self.path.open("ab") as file:
            file.write(msgspec.json.encode(line) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    @property
    def header(self) -> Header | None:
        """The machine, once it is probed."""
        return next((line for line in self.lines if isinstance(line, Header)), None)

    @property
    def prepared(self) -> dict[str, Prepared]:
        """Case → its workload."""
        return {line.case: line for line in self.lines if isinstance(line, Prepared)}

    @property
    def done(self) -> set[str]:
        """Names of the jobs that have a result."""
        begun = (Started, Interrupted)
        named = (getattr(line, "job", "") for line in self.lines if not isinstance(line, begun))
        return set(filter(None, named))

    def deaths(self, job: str) -> int:
        """How often the process died in a job that has no result."""
        of_job = [line for line in self.lines if getattr(line, "job", "") == job]
        ends = sum(isinstance(line, Interrupted) for line in of_job)
        return sum(isinstance(line, Started) for line in of_job) - ends

    def ran(self, job: str) -> bool:
        """Whether a job has a result that is no error."""
        return any(
            isinstance(line, SetRun) and line.job == job and not line.error for line in self.lines
        )
