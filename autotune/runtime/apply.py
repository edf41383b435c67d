"""Apply a plan's optimizations as a transaction: all of them, or none."""

from __future__ import annotations

import logging
from typing import Any

from autotune.decide.plan import Plan
from autotune.decide.rules import PLACEMENTS
from autotune.errors import AutotuneError, OptimizationError, first_line
from autotune.optimizations import CATALOGUE, find
from autotune.optimizations.base import Setting, Undo, undone_on_failure
from autotune.optimizations.modules import device_of, modules_of

log = logging.getLogger("autotune")


def set_by_hand(pipe: Any) -> tuple[Setting, ...]:
    """The optimizations that the pipeline already has, with the parameters they have."""
    found = ((name, optimization.found(pipe)) for name, optimization in CATALOGUE.items())
    return tuple(Setting(name, parameters) for name, parameters in found if parameters is not None)


def apply_plan(pipe: Any, plan: Plan, device: str) -> Undo:
    """Put the pipeline on the device and turn the plan's optimizations on.

    Args:
        pipe: A loaded pipeline; its weights may be anywhere.
        plan: What to do.
        device: Where to run, ``"cuda:0"``.

    Returns:
        A function that puts everything back, weights' devices included.

    Raises:
        OptimizationError: one could not be applied; the pipeline is as it was.
    """
    undos: list[Undo] = []
    settings = _in_order(plan.optimizations)
    early = [s for s in settings if find(s.name).before_moving]
    try:
        for setting in early:
            undos.append(find(setting.name).apply(pipe, setting.parameters, device))
        if not _places(plan) and not _has_device_map(pipe):
            undos.append(_move(pipe, device))
        for setting in (s for s in settings if s not in early):
            undos.append(find(setting.name).apply(pipe, setting.parameters, device))
    except BaseException as error:
        _undo_all(undos)
        if isinstance(error, AutotuneError) or not isinstance(error, Exception):
            raise
        raise OptimizationError(
            f"cannot apply the plan: {first_line(error)}", "the pipeline is as it was"
        ) from error
    return lambda: _undo_all(undos)


def _places(plan: Plan) -> bool:
    """Whether an optimization, chosen or set by hand, decides where weights are."""
    return bool(PLACEMENTS & {s.name for s in (*plan.optimizations, *plan.kept)})


def _has_device_map(pipe: Any) -> bool:
    return getattr(pipe, "hf_device_map", None) is not None


def _in_order(settings: tuple[Setting, ...]) -> list[Setting]:
    """Offload last: its hooks wrap modules as they are by then; some patches refuse hooked ones."""
    return sorted(settings, key=lambda s: s.name in PLACEMENTS)


def _move(pipe: Any, device: str) -> Undo:
    before = [(m, device_of(m)) for m in modules_of(pipe).values()]

    def undo() -> None:
        for module, where in before:
            module.to(where)

    with undone_on_failure(undo):
        pipe.to(device)
    return undo


def _undo_all(undos: list[Undo]) -> None:
    """Newest first; one that fails does not keep the others from running."""
    failed: Exception | None = None
    while undos:
        try:
            undos.pop()()
        except Exception as error:
            log.error("could not undo a step: %s", error)
            failed = error
    if failed is not None:
        raise failed
