"""Whether a plan is verified once it is applied, and what becomes of it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec

from autotune.decide.plan import Plan
from autotune.errors import AutotuneError, OptimizationError, ProfileError, RequestError, first_line
from autotune.profile.profile import PhaseMeasurement
from autotune.runtime.out_of_memory import is_out_of_memory
from autotune.runtime.verification import Verification, passes_on
from autotune.tuner.here import Measured
from autotune.tuner.planning import Planned
from autotune.tuner.remember import remember_run, was_verified
from autotune.units import format_seconds

if TYPE_CHECKING:
    from autotune.runtime.tuned import Tuned

log = logging.getLogger("autotune")

MODES = ("auto", "always", "never")

BUDGET_S = 60.0
"""What short passes may take, by the prediction, where nobody asked for them. Compiling is not
counted: the first image would wait for it as long."""


def check_verify(mode: str) -> None:
    """Refuse what is no mode.

    Raises:
        RequestError: naming those there are.
    """
    if mode not in MODES:
        raise RequestError(f"unknown verify {mode!r}", f"use {', '.join(MODES)}")


def is_verified_now(mode: str, measured: Measured, planned: Planned) -> tuple[bool, str]:
    """Whether to verify a plan that is about to be applied, and what to say where not."""
    if mode == "never" or (mode == "auto" and was_verified(measured, planned)):
        return False, ""
    seconds = _short_seconds(planned)
    if mode == "auto" and seconds > BUDGET_S:
        return False, (
            f"not verified: short passes are predicted to take {format_seconds(seconds)}, more "
            f'than {format_seconds(BUDGET_S)}; verify "always" makes them'
        )
    return True, ""


def _short_seconds(planned: Planned) -> float:
    """Of all passes as predicted; about two denoise steps in each."""
    prediction, request = planned.plan.prediction, planned.workload.request
    whole = planned.plan.execution.step_cache is not None
    share = 1.0 if whole else min(1.0, 2 / request.steps)
    denoised = {
        p.name for p in planned.workload.phases if any(r.role == "denoiser" for r in p.runs)
    }
    short = sum(p.seconds * (share if p.name in denoised else 1) for p in prediction.phases)
    return short * passes_on(planned.machine.device.kind) + (prediction.first_image_extra_s or 0.0)


def with_note(plan: Plan, text: str) -> Plan:
    """The plan with one more note, if there is any."""
    return msgspec.structs.replace(plan, notes=(*plan.notes, text)) if text else plan


def verified(tuned: Tuned, mode: str) -> Verification | None:
    """Verify a pipeline that is configured; ``tuned.verification`` then holds what was measured.

    Where nobody asked for it, a pipeline that cannot be called in the way that was planned for
    stays configured, with a note.

    Returns:
        What was measured; ``None`` where that failed and nobody asked for it.

    Raises:
        OptimizationError: it ran out of memory, or verification was asked for and the pipeline
            raises; the pipeline is as it was before it was configured.
    """
    try:
        return tuned.verify()
    except Exception as error:
        is_ours = isinstance(error, AutotuneError)
        if mode == "auto" and not is_ours and not is_out_of_memory(error):
            tuned.plan = with_note(tuned.plan, f"not verified: {first_line(error)}")
            return None
        tuned.undo()
        if is_ours:
            raise
        raise OptimizationError(
            f"the plan fails when it is verified: {first_line(error)}",
            "the pipeline is as it was; ask for a smaller image, or set a lower vram_limit",
        ) from error
    except BaseException:
        tuned.undo()
        raise


def remember_verified(
    tuned: Tuned, measured: Measured, planned: Planned, phases: tuple[PhaseMeasurement, ...]
) -> None:
    """Keep it in the profile; one that cannot be written costs a warning."""
    try:
        remember_run(measured, planned._replace(plan=tuned.plan), phases)
    except ProfileError as error:
        log.warning("the run is not remembered: %s", error)
