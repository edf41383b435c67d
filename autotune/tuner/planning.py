"""From what is asked to a plan: model → workload → decision."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from autotune.decide.history import Applied, History
from autotune.decide.limits import Limits
from autotune.decide.plan import Plan
from autotune.errors import ModelError
from autotune.probe.machine import Machine
from autotune.tuner.ask import Ask, check_ask
from autotune.tuner.here import REPLAY_S, Measured, Progress, replayed
from autotune.tuner.history import history_here
from autotune.tuner.plans import basis_of, keep, recall
from autotune.workload.architecture import (
    DEMO,
    Architecture,
    builtin_names,
    find_architecture,
)
from autotune.workload.cache import is_lasting, origin_of, traced_before, workload_of
from autotune.workload.request import complete_request
from autotune.workload.workload import Request, Workload


class Planned(NamedTuple):
    """A plan with what it was made from."""

    architecture: Architecture
    machine: Machine
    workload: Workload
    plan: Plan
    history: History = History()


def make_plan(model: str | Architecture, machine: Machine, ask: Ask) -> Planned:
    """Work out what the request needs and decide how a machine, here or elsewhere, should run it.

    Raises:
        ModelError, RequestError, OptimizationError: see the stages.
    """
    architecture, workload = work_out(model, machine, ask)
    return decided(architecture, machine, workload, ask.limits)


def plan_here(
    model: str | Architecture,
    measured: Measured,
    ask: Ask,
    progress: Progress | None = None,
    pipe: Any = None,
) -> Planned:
    """The same for this machine, whose kernels are timed on the workload's own operators first.

    What was decided before from the same is not decided again.

    Raises:
        ModelError, RequestError, OptimizationError: see the stages.
    """
    architecture, workload = work_out(model, measured.machine, ask, pipe)
    if progress is not None:
        progress("the model's operators")
    machine = replayed(measured, workload, REPLAY_S).machine
    history = history_here(measured.key, workload, machine, ask.limits)
    if history.misfits or not is_lasting(pipe):
        return decided(architecture, machine, workload, ask.limits, pipe, history)
    origin = origin_of(architecture, workload.request)
    basis = basis_of(machine, workload, origin, ask.limits, history)
    plan = recall(measured.key, machine, ask.limits, basis)
    if plan is not None:
        return Planned(architecture, machine, workload, plan, history)
    planned = decided(architecture, machine, workload, ask.limits, pipe, history)
    keep(measured, workload, planned.plan, basis)
    return planned


def decided(
    architecture: Architecture,
    machine: Machine,
    workload: Workload,
    limits: Limits,
    pipe: Any = None,
    history: History | None = None,
    applied: Applied | None = None,
    traces: bool = True,
    retries: bool = True,
) -> Planned:
    """Where nothing fits, other requests of the same model are traced as ways out.

    Args:
        architecture: The model.
        machine: With the memory that is free now.
        workload: What is asked.
        limits: What the user allows.
        pipe: The loaded pipeline, where there is one.
        history: What the machine taught about the workload.
        applied: What is on: kept where changing it does not pay yet.
        traces: Whether the pipeline may be traced; else what was traced before must do.
        retries: Whether what ran out of memory before may be tried again, where all else is out.
    """
    from autotune.decide.choose import choose  # a start with a remembered plan does without

    def rework(request: Request) -> Workload:
        if traces:
            return workload_of(architecture, request, pipe)
        known = traced_before(architecture, request, pipe)
        if known is None:
            raise ModelError("it cannot be traced while optimizations are applied")
        return known

    plan = choose(
        machine, workload, limits, rework=rework, history=history, applied=applied, retries=retries
    )
    return Planned(architecture, machine, workload, plan, history or History())


def work_out(
    model: str | Architecture, machine: Machine, ask: Ask, pipe: Any = None
) -> tuple[Architecture, Workload]:
    """The model's architecture, and the traced workload of the completed request.

    Args:
        model: A name, or an architecture found before.
        machine: Decides the dtype where the user leaves it open.
        ask: What the user asks for.
        pipe: The loaded pipeline, where there is one.

    Raises:
        ModelError, RequestError: see the stages.
    """
    check_ask(ask)
    architecture = find_architecture(model) if isinstance(model, str) else model
    return architecture, workload_of(architecture, completed(architecture, machine, ask), pipe)


def completed(architecture: Architecture, machine: Machine, ask: Ask) -> Request:
    """The request with the model's own values where the user leaves them open.

    Raises:
        RequestError: the model cannot draw it.
    """
    return complete_request(
        architecture,
        machine,
        height=ask.height,
        width=ask.width,
        batch=ask.batch,
        steps=ask.steps,
        guidance_scale=ask.guidance_scale,
        dtype=ask.dtype,
        frames=ask.frames,
        options=ask.options,
    )


def loadable(model: str | Architecture) -> Architecture:
    """The architecture of loadable weights: a built-in name stands for its hub repository.

    The repository may hold more than the built-in file (a safety checker, say), and a plan must be
    made for what is really loaded.

    Raises:
        ModelError: unknown, unreadable, or not to be had without a connection.
    """
    architecture = find_architecture(model) if isinstance(model, str) else model
    if architecture.name not in builtin_names() or architecture.name == DEMO:
        return architecture
    if architecture.weights is None:
        raise ModelError(
            f"{architecture.name} has no weights of its own: its parts are in several repositories",
            "load the pipeline in Python and give it to autotune.configure",
        )
    told = (
        *("name", "variant", "stored", "half_dtype"),
        *("steps", "guidance_scale", "height", "width", "frames"),
    )
    return msgspec.structs.replace(
        find_architecture(architecture.weights), **{t: getattr(architecture, t) for t in told}
    )
