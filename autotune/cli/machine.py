"""Which machine a verb works for: this one, a reference machine, or a file."""

from __future__ import annotations

import sys

import typer

from autotune.probe.machine import Machine
from autotune.tuner import Measured, Progress, machine_here


def choose_machine(name: str | None, device: str | None = None) -> Machine:
    """The named reference machine or file, else this machine.

    Raises:
        MachineError: the name is unknown or the file cannot be read.
    """
    if name is not None:
        from autotune.probe.reference import load_machine

        return load_machine(name)
    return this_machine(device).machine


def this_machine(device: str | None = None, *, remeasure: bool = False) -> Measured:
    """This machine from its profile; a measurement shows its progress on a terminal."""
    measured = machine_here(device, remeasure=remeasure, progress=_progress())
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
    if measured.reasons and not remeasure:
        typer.echo(f"measured this machine: {'; '.join(measured.reasons)}", err=True)
    return measured


def _progress() -> Progress | None:
    if not sys.stderr.isatty():
        return None

    def show(text: str) -> None:
        sys.stderr.write(f"\r\x1b[Kmeasuring {text} …")
        sys.stderr.flush()

    return show
