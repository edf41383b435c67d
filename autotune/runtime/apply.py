"""Apply a plan's optimizations as a transaction: all of them, or none."""

from __future__ import annotations

import logging
from typing import Any

from autotune.decide.plan import Plan
from autotune.decide.rules import PLACEMENTS
from autotune.errors import AutotuneError, OptimizationError, first_line
from autotune.optimizations import CATALOGUE, find
from autotune.optimizations.base import Setting, Undo, insist, undone_on_failure
from autotune.optimizations.file_layers import read_from_files
from autotune.optimizations.modules import modules_of, remember_devices
from autotune.runtime.by_hand import placed
from autotune.runtime.by_hand import set_by_hand as set_by_hand

log = logging.getLogger("autotune")


def apply_plan(pipe: Any, plan: Plan, device: str) -> Undo:
    """Put the pipeline on the device and turn the plan's optimizations on.

    Layers that were left in their files are quantized from there; where they are needed as they
    are, they are read now, and stay so.

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
            handler = find(setting.name)
            if not handler.packs_from_files:
                read_from_files(pipe)
            undos.append(handler.apply(pipe, setting.parameters, device))
        read_from_files(pipe)
        if not PLACEMENTS & {s.name for s in settings}:
            undos.append(_move(pipe, device))
        for setting in (s for s in settings if s not in early):
            undos.append(find(setting.name).apply(pipe, setting.parameters, device))
    except BaseException as error:
        _roll_back(undos, error)
        if isinstance(error, AutotuneError) or not isinstance(error, Exception):
            raise
        raise OptimizationError(
            f"cannot apply the plan: {first_line(error)}", "the pipeline is as it was"
        ) from error
    return lambda: _undo_all(undos)


def _roll_back(undos: list[Undo], error: BaseException) -> None:
    """Undo what was applied before the error.

    Raises:
        OptimizationError: not even that works.
    """
    try:
        _undo_all(undos)
    except Exception as another:
        raise OptimizationError(
            f"cannot apply the plan: {first_line(error)}; nor undo it: {first_line(another)}",
            "the pipeline is half configured: load it again",
        ) from error


def _in_order(settings: tuple[Setting, ...]) -> list[Setting]:
    """What takes a component's place, then what changes components, then what moves them.

    Hooks wrap modules as they are by then, and some patches refuse hooked ones. Else in the order
    of the catalogue, so that a plan that names them in another order is the same.
    """
    order = {name: i for i, name in enumerate(CATALOGUE)}
    return sorted(
        settings,
        key=lambda s: (s.name in PLACEMENTS, not find(s.name).replaces, order[s.name]),
    )


def _move(pipe: Any, device: str) -> Undo:
    """All components but those that something set by hand moves."""
    kept = placed(pipe)
    free = [module for name, module in modules_of(pipe).items() if name not in kept]
    undo = remember_devices(free)
    with undone_on_failure(undo):
        if not kept:
            pipe.to(device)
        for module in free if kept else ():
            module.to(device)
    return undo


def _undo_all(undos: list[Undo]) -> None:
    """Newest first; one that fails does not keep the others from running.

    It stays to be tried again, and so do those before it: it may put back what they changed.
    """
    done = 0
    failed: BaseException | None = None
    for undo in reversed(tuple(undos)):
        try:
            insist(undo)
        except BaseException as error:
            if isinstance(error, Exception):
                log.error("could not undo a step: %s", first_line(error))
            failed = failed or error
        done += failed is None
    del undos[len(undos) - done :]
    if failed is not None:
        raise failed
