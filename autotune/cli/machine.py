"""Which machine a verb works for: this one, a reference machine, or a file."""

from __future__ import annotations

import typer

from autotune.cli.output import progress
from autotune.probe.machine import Machine
from autotune.tuner import Measured, machine_here


def choose_machine(name: str | None, device: str | None = None) -> Machine:
    """The named reference machine or file, else this machine.

    Raises:
        MachineError: the name is unknown or the file cannot be read.
    """
    if name is not None:
        from autotune.probe.reference import load_machine

        return load_machine(name)
    return this_machine(device).machine


def this_machine(device: str | None = None) -> Measured:
    """This machine from its profile, measured first where that is needed, with a display of it."""
    with progress("Measuring this machine") as say:
        measured = machine_here(device, progress=say)
    if measured.reasons:
        typer.echo(f"measured this machine: {'; '.join(measured.reasons)}", err=True)
    return measured
