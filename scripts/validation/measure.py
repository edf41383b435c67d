"""Real generations: seconds and peaks of every phase, with one set of optimizations or another."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import torch

from autotune.decide.plan import Plan
from autotune.decide.search import execution_of
from autotune.errors import AutotuneError, first_line
from autotune.optimizations import find
from autotune.optimizations.base import Setting, Undo
from autotune.runtime.apply import apply_plan
from autotune.runtime.measure import PhaseMeter, cpu_peaks, with_peaks
from autotune.runtime.memory import resident_bytes
from autotune.workload.arguments import call_arguments, call_parameters
from autotune.workload.workload import Workload
from validation.device import Device
from validation.recording import Phases

Draw = Callable[..., Any]
"""Runs the pipeline once; keywords go to it."""


class DeviceLostError(Exception):
    """The process must be started again."""


class Drawn(NamedTuple):
    """Generations, or why there are none."""

    first: Phases = ()
    runs: tuple[Phases, ...] = ()
    wall_s: tuple[float, ...] = ()
    error: str = ""
    ran_out: bool = False


class Subject(NamedTuple):
    """What is run: a pipeline with the workload that it was planned for."""

    pipe: Any
    workload: Workload
    plan: Plan
    device: Device

    def drawn_with(self, settings: Sequence[Setting], times: int, peaks: bool) -> Drawn:
        """Turn a set on, draw, and turn it off again.

        Args:
            settings: Coherent.
            times: Generations after the first.
            peaks: Whether the CPU's peaks are wanted, in a run of their own.

        Raises:
            DeviceLostError: nothing can be run in this process any more.
        """
        undos: list[Undo] = []

        def apply() -> Draw:
            plan = msgspec.structs.replace(self.plan, optimizations=tuple(settings))
            undos.append(apply_plan(self.pipe, plan, str(self.device.device)))
            call = called_with(self.pipe, self.workload)

            def draw(**options: Any) -> Any:
                for setting in settings:
                    find(setting.name).before_image(self.pipe, setting.parameters, 0)
                return call(**options)

            return draw

        casts = bool(execution_of(settings).storage_dtype)
        drawn = self.drawn(apply, times, peaks, casts)
        if drawn.error:
            self.device.clean()  # frames of the error held tensors: undoing may need their room
        try:
            for undo in undos:
                undo()
        except Exception as error:  # of any pipeline: what is measured next would be another one
            raise DeviceLostError(f"it cannot be undone: {described(error)}") from error
        if any(setting.name == "compile" for setting in settings):
            torch.compiler.reset()  # or else the ninth set that compiles a block runs uncompiled
        return drawn

    def drawn(
        self, apply: Callable[[], Draw], times: int, peaks: bool, casts: bool = False
    ) -> Drawn:
        """Draw with whatever ``apply`` does; ``casts`` where weights are made anew on the way."""
        try:
            draw = apply()
            self.device.empty()  # weights may have been moved away: what they left is not held
            first, first_s = self._once(draw)
            runs = [self._once(draw) for _ in range(times)]
            found = tuple(phases for phases, _ in runs)
            if peaks and self.device.kind == "cpu":
                held = self._cpu_peaks(draw, casts)
                found = tuple(with_peaks(phases, held) for phases in found)
            return Drawn(first, found, (first_s, *(s for _, s in runs)))
        except Exception as error:  # the code of any pipeline, kernel or tool
            if self.device.is_lost(error):
                raise DeviceLostError(first_line(error)) from error
            return Drawn(error=described(error), ran_out=self.device.ran_out(error))

    def _once(self, draw: Draw) -> tuple[Phases, float]:
        device = self.device
        meter = PhaseMeter(self.pipe, self.workload, str(device.device), device.gauge())
        start = time.monotonic()
        with meter.watch(), torch.no_grad():
            draw()
        return meter.measured, time.monotonic() - start

    def _cpu_peaks(self, draw: Draw, casts: bool) -> dict[str, int]:
        meter = PhaseMeter(self.pipe, self.workload, "cpu")

        def short() -> None:
            with meter.watch(), torch.no_grad():
                draw(num_inference_steps=min(2, self.workload.request.steps))

        return cpu_peaks(short, resident_bytes(self.pipe), passes=2 if casts else 1)


def described(error: BaseException) -> str:
    """Kind and first line; of an ``AutotuneError``, what it comes from."""
    cause = error.__cause__ if isinstance(error, AutotuneError) and error.__cause__ else error
    return f"{type(cause).__name__}: {first_line(cause)}"


def called_with(pipe: Any, workload: Workload) -> Draw:
    """The pipeline itself, called as a user would call it for this request."""
    arguments = call_arguments(pipe, workload.request)
    taken = call_parameters(type(pipe))  # of a class that a tool has wrapped, too

    def draw(**options: Any) -> Any:
        generator = {"generator": torch.Generator("cpu").manual_seed(0)}
        given = {k: v for k, v in (arguments | generator | options).items() if k in taken}
        return pipe(**given)

    return draw
