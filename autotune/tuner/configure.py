"""A pipeline configured: planned for this process, checked and applied."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from autotune.decide.plan import Plan
from autotune.errors import MemoryShortageError
from autotune.optimizations.file_layers import left_in_files, read_from_files
from autotune.runtime.account import shortage, ways_out
from autotune.runtime.claims import are_configured, configuring, owner_of, owners_beside, turn_of
from autotune.tuner.ask import Ask
from autotune.tuner.here import Measured, Progress, device_name, machine_here
from autotune.tuner.planning import Planned, loadable, plan_here
from autotune.tuner.replan import Replanner
from autotune.tuner.verifying import (
    check_verify,
    is_verified_now,
    remember_verified,
    verified,
    with_note,
)
from autotune.units import format_bytes
from autotune.workload.architecture import Architecture
from autotune.workload.live import pipeline_dtype

if TYPE_CHECKING:
    from autotune.runtime.by_hand import Foreign

log = logging.getLogger("autotune")


def configure_pipeline(
    pipe: Any, ask: Ask, device: str | None = None, verify: str = "never"
) -> Any:
    """Plan for a loaded pipeline and configure it in place; see ``autotune.configure``.

    Where it is configured already, the first configuration is undone, and back should this fail.
    """
    check_verify(verify)
    with turn_of(pipe), configuring():
        if are_configured():
            gc.collect()  # pipelines hold themselves: until then, what was dropped takes memory
        for other in owners_beside(pipe):
            log.info("a pipeline with some of the same modules is taken off until its next call")
            other.set_aside()
        before = owner_of(pipe)
        with before.replaced() if before is not None else nullcontext():
            return _configure(pipe, ask, device, verify)


def _configure(pipe: Any, ask: Ask, device: str | None, verify: str) -> Any:
    from autotune.optimizations.attention import foreign_processors
    from autotune.runtime.by_hand import foreign_to, set_by_hand
    from autotune.workload.architecture import describe_pipeline

    read_from_files(pipe)  # of a load that nothing undid: what its user goes back to must run
    architecture = describe_pipeline(pipe)
    measured = machine_here(device or _device_of(pipe))
    limits = msgspec.structs.replace(ask.limits, keep=(*ask.limits.keep, *set_by_hand(pipe)))
    dtype = pipeline_dtype(pipe) if ask.dtype == "auto" else ask.dtype
    asked = msgspec.structs.replace(ask, limits=limits, dtype=dtype)
    foreign = foreign_to(pipe)
    if foreign_processors(pipe) == ("AttnProcessor",):
        vanilla = msgspec.structs.replace(measured.machine, default_attention="vanilla")
        measured = measured._replace(machine=vanilla)
    keeping = _keeping(asked, foreign)
    planned = plan_loaded(architecture, measured, keeping, pipe)
    say = partial(_saying_what_is_kept, ask=asked, foreign=foreign)
    said = planned._replace(plan=say(planned.plan))
    return tuned(pipe, said, measured, keeping, verify, say)


def load_tuned(model: str, ask: Ask, device: str | None = None, verify: str = "never") -> Any:
    """Plan, then read the weights the way the plan wants; see ``autotune.load``."""
    from autotune.runtime.load import load_pipeline

    check_verify(verify)
    with configuring():
        measured = machine_here(device)
        planned = plan_loaded(loadable(model), measured, ask)
        require_fit(planned.plan)
        pipe = load_pipeline(planned.architecture, planned.plan, planned.machine.maps_files)
    with turn_of(pipe), configuring():
        return tuned(pipe, planned, measured, ask, verify)


def plan_loaded(
    model: Architecture,
    measured: Measured,
    ask: Ask,
    pipe: Any = None,
    progress: Progress | None = None,
) -> Planned:
    """Plan for this process, which may hold the pipeline or a context already."""
    from autotune.runtime.memory import with_own_memory

    machine = with_own_memory(measured.machine, device_name(measured.machine), pipe)
    return plan_here(model, measured._replace(machine=machine), ask, progress, pipe)


def tuned(
    pipe: Any,
    planned: Planned,
    measured: Measured,
    ask: Ask,
    verify: str = "never",
    say: Callable[[Plan], Plan] | None = None,
) -> Any:
    """Apply the plan, and verify it: the ``Tuned`` pipeline.

    Args:
        pipe: The loaded pipeline.
        planned: What to apply, if what is free has not changed since.
        measured: Of which machine.
        ask: What was asked; its limits hold for every request.
        verify: ``"auto"``, ``"always"`` or ``"never"``.
        say: Adds to a plan what it cannot know itself.

    Raises:
        MemoryShortageError: the plan does not fit, or memory ran out and nothing smaller is left;
            the pipeline is as it was.
        OptimizationError: it cannot be applied, or fails when it is verified; likewise.
    """
    from autotune.runtime.tuned import Tuned

    planned = _as_loaded(planned, ask, left_in_files(pipe))
    planner = Replanner(pipe, planned, measured, ask, say)
    planned = _as_memory_is_now(planner, planned)
    require_fit(planned.plan)
    now, note = is_verified_now(verify, measured, planned)
    plan = with_note(planned.plan, note)
    made = Tuned(pipe, plan, planned.workload, device_name(measured.machine), planner)
    verification = verified(made, verify) if now else None
    if verification is not None and not verification.disturbed:
        remember_verified(made, measured, planned, verification.measured)
    return made


def _as_loaded(planned: Planned, ask: Ask, left: tuple[str, ...] = ()) -> Planned:
    """Reading the weights took host RAM that is no longer needed once they are on the device.

    Args:
        planned: Before anything was read.
        ask: What was asked.
        left: Denoisers whose layers were left in their files.
    """
    if planned.workload.is_loaded:
        return planned
    from autotune.decide.predict import Predictor

    workload = msgspec.structs.replace(planned.workload, is_loaded=True, mappable=left)
    predictor = Predictor(planned.machine, workload, ask.limits.images, planned.history)
    running = predictor.predict(planned.plan.execution)
    prediction = msgspec.structs.replace(planned.plan.prediction, host_bytes=running.host_bytes)
    plan = msgspec.structs.replace(planned.plan, prediction=prediction)
    # Once weights have been on the device and have come back, they are no pages of files any more.
    private = msgspec.structs.replace(workload, mapped=())
    return planned._replace(workload=private, plan=plan)


REPLANS = 2
"""Times that memory may change between planning and applying."""


def _as_memory_is_now(planner: Replanner, planned: Planned) -> Planned:
    """The plan, or another one where others have taken memory since it was made."""
    for _ in range(REPLANS):
        if not planned.plan.fits or planner.holds(planned.plan):
            break
        again = planner.plan(planned.workload.request)
        before, now = planned.plan.budget_bytes, again.plan.budget_bytes
        text = (
            f"{format_bytes(before)} were available when this was planned and {format_bytes(now)} "
            "when it was to be applied: planned again"
        )
        log.warning("%s", text)
        planned = again._replace(plan=with_note(again.plan, text))
    return planned


def require_fit(plan: Plan) -> None:
    """Refuse to load or run what would run out of memory.

    Raises:
        MemoryShortageError: with the numbers and what would help.
    """
    if not plan.fits:
        raise MemoryShortageError(shortage(plan), ways_out(plan))


def _device_of(pipe: Any) -> str | None:
    """Where the pipeline is, or is offloaded to; ``None`` while it waits in host RAM."""
    where = str(getattr(pipe, "_execution_device", "cpu"))
    return None if where.startswith(("cpu", "meta")) else where


def _keeping(ask: Ask, foreign: tuple[Foreign, ...]) -> Ask:
    """What the user has set, and no optimization stands for, stays."""
    without = dict.fromkeys((*ask.limits.without, *(n for f in foreign for n in f.without)))
    limits = msgspec.structs.replace(ask.limits, without=tuple(without))
    return msgspec.structs.replace(ask, limits=limits)


def _saying_what_is_kept(plan: Plan, ask: Ask, foreign: tuple[Foreign, ...]) -> Plan:
    """It was not the user who left these out."""
    texts = {n: f.text for f in foreign for n in f.without if n not in ask.limits.without}
    rejected = tuple(
        msgspec.structs.replace(r, text=texts.get(r.optimization, r.text)) for r in plan.rejected
    )
    notes = (*plan.notes, *(f.text for f in foreign))
    return msgspec.structs.replace(plan, rejected=rejected, notes=notes)
