"""A pipeline configured: planned for this process, checked and applied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from autotune.decide.plan import Plan
from autotune.errors import RequestError
from autotune.runtime.account import shortage, ways_out
from autotune.tuner.ask import Ask
from autotune.tuner.here import Measured, Progress, device_name, machine_here
from autotune.tuner.planning import Planned, loadable, plan_here
from autotune.tuner.verifying import (
    check_verify,
    is_verified_now,
    remember_verified,
    verified,
    with_note,
)
from autotune.workload.architecture import Architecture
from autotune.workload.live import pipeline_dtype

if TYPE_CHECKING:
    from autotune.runtime.by_hand import Foreign


def configure_pipeline(
    pipe: Any, ask: Ask, device: str | None = None, verify: str = "never"
) -> Any:
    """Plan for a loaded pipeline and configure it in place; see ``autotune.configure``."""
    from autotune.optimizations.attention import foreign_processors
    from autotune.runtime.by_hand import foreign_to, set_by_hand
    from autotune.workload.architecture import describe_pipeline

    check_verify(verify)
    architecture = describe_pipeline(pipe)
    measured = machine_here(device or _device_of(pipe))
    limits = msgspec.structs.replace(ask.limits, keep=(*ask.limits.keep, *set_by_hand(pipe)))
    dtype = pipeline_dtype(pipe) if ask.dtype == "auto" else ask.dtype
    asked = msgspec.structs.replace(ask, limits=limits, dtype=dtype)
    foreign = foreign_to(pipe)
    if foreign_processors(pipe) == ("AttnProcessor",):
        vanilla = msgspec.structs.replace(measured.machine, default_attention="vanilla")
        measured = measured._replace(machine=vanilla)
    planned = plan_loaded(architecture, measured, _keeping(asked, foreign), pipe)
    return tuned(pipe, _saying_what_is_kept(planned, asked, foreign), measured, verify)


def load_tuned(model: str, ask: Ask, device: str | None = None, verify: str = "never") -> Any:
    """Plan, then read the weights the way the plan wants; see ``autotune.load``."""
    from autotune.runtime.load import load_pipeline

    check_verify(verify)
    measured = machine_here(device)
    planned = plan_loaded(loadable(model), measured, ask)
    require_fit(planned.plan)
    pipe = load_pipeline(planned.architecture, planned.plan)
    return tuned(pipe, planned, measured, verify)


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


def tuned(pipe: Any, planned: Planned, measured: Measured, verify: str = "never") -> Any:
    """Apply the plan, and verify it: the ``Tuned`` pipeline.

    Raises:
        RequestError: the plan does not fit; the pipeline is as it was.
        OptimizationError: it cannot be applied, or fails when it is verified; likewise.
    """
    from autotune.runtime.tuned import Tuned

    require_fit(planned.plan)
    now, note = is_verified_now(verify, measured, planned)
    plan = with_note(planned.plan, note)
    made = Tuned(pipe, plan, planned.workload, device_name(measured.machine))
    verification = verified(made, verify) if now else None
    if verification is not None:
        remember_verified(made, measured, planned, verification.measured)
    return made


def require_fit(plan: Plan) -> None:
    """Refuse to load or run what would run out of memory.

    Raises:
        RequestError: with the numbers and what would help.
    """
    if not plan.fits:
        raise RequestError(shortage(plan), ways_out(plan))


def _device_of(pipe: Any) -> str | None:
    """Where the pipeline is, or is offloaded to; ``None`` while it waits in host RAM."""
    where = str(getattr(pipe, "_execution_device", "cpu"))
    return None if where.startswith(("cpu", "meta")) else where


def _keeping(ask: Ask, foreign: tuple[Foreign, ...]) -> Ask:
    """What the user has set, and no optimization stands for, stays."""
    without = dict.fromkeys((*ask.limits.without, *(n for f in foreign for n in f.without)))
    limits = msgspec.structs.replace(ask.limits, without=tuple(without))
    return msgspec.structs.replace(ask, limits=limits)


def _saying_what_is_kept(planned: Planned, ask: Ask, foreign: tuple[Foreign, ...]) -> Planned:
    """It was not the user who left these out."""
    texts = {n: f.text for f in foreign for n in f.without if n not in ask.limits.without}
    rejected = tuple(
        msgspec.structs.replace(r, text=texts.get(r.optimization, r.text))
        for r in planned.plan.rejected
    )
    notes = (*planned.plan.notes, *(f.text for f in foreign))
    plan = msgspec.structs.replace(planned.plan, rejected=rejected, notes=notes)
    return planned._replace(plan=plan)
