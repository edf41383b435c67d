"""Which machine a verb works for: this one, a reference machine, or a file."""

from __future__ import annotations

import typer

from autotune.cli.output import progress
from autotune.decide.history import History
from autotune.probe.machine import Machine
from autotune.tuner import (
    REPLAY_S,
    Ask,
    Measured,
    Planned,
    check_ask,
    completed,
    machine_here,
    make_plan,
    plan_here,
    plan_loaded,
    replayed,
    work_out,
)
from autotune.tuner.history import history_here
from autotune.workload.architecture import Architecture, find_architecture
from autotune.workload.workload import Workload

HERE = "here"
"""What this machine is called where machines are named."""

ANY_MACHINE = "a100-80gb"
"""A reference machine that computes every dtype, where it does not matter which it is."""


def this_machine(device: str | None = None) -> Measured:
    """This machine from its profile, measured first where that is needed, with a display of it."""
    with progress("Measuring this machine") as say:
        measured = machine_here(device, progress=say)
    for reason in measured.reasons:
        typer.echo(f"measured this machine: {reason}", err=True)
    return measured


def plan_on_this(model: Architecture, measured: Measured, ask: Ask) -> Planned:
    """Plan for this process; timing a new model's operators shows on a terminal."""
    with progress("Planning: tracing and timing") as say:
        return plan_loaded(model, measured, ask, progress=say)


def plan_on(name: str | None, model: str, ask: Ask) -> Planned:
    """Plan for a named reference machine or a file, else for this machine.

    Raises:
        MachineError: the name is unknown or the file cannot be read.
    """
    named = _named(name)
    if named is not None:
        with progress("Tracing"):
            return make_plan(model, named, ask)
    check_request(find_architecture(model), ask)
    measured = this_machine()
    with progress("Planning: tracing and timing") as say:
        return plan_here(model, measured, ask, say)


def work_out_on(name: str | None, model: str, ask: Ask) -> tuple[Machine, Workload, History]:
    """The machine as in ``plan_on``, and the workload; if it is here, operators are timed.

    Raises:
        MachineError: the name is unknown or the file cannot be read.
    """
    named = _named(name)
    if named is not None:
        with progress("Tracing"):
            return named, work_out(model, named, ask)[1], History()
    check_request(find_architecture(model), ask)
    measured = this_machine()
    with progress("Tracing and timing"):
        workload = work_out(model, measured.machine, ask)[1]
        machine = replayed(measured, workload, REPLAY_S).machine
        return machine, workload, history_here(measured.key, workload, machine, ask.limits)


def check_request(architecture: Architecture, ask: Ask) -> None:
    """Refuse what the model cannot draw on any machine, before this one is measured.

    Raises:
        RequestError, OptimizationError: see ``autotune.tuner``.
    """
    from autotune.probe.reference import load_machine

    check_ask(ask)
    completed(architecture, load_machine(ANY_MACHINE), ask)


def is_machine(name: str) -> bool:
    """Whether a name, of a machine or of a model, is a machine's."""
    from autotune.probe.reference import reference_machines

    return name == HERE or name.endswith(".json") or name in reference_machines()


def _named(name: str | None) -> Machine | None:
    if name in (None, HERE):
        return None
    from autotune.probe.reference import load_machine

    return load_machine(name)
