"""Verify a plan that is applied: two short passes of what was rehearsed, the first apart.

The first pass loads kernels and chooses algorithms, the second is in steady state. Nothing is left
behind but what any first call leaves: warm kernels and the allocator's cache.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import torch

from autotune.profile.profile import PhaseMeasurement
from autotune.runtime.claims import draws_alone
from autotune.runtime.measure import PhaseMeter, cpu_peaks, device_gauge, with_peaks
from autotune.runtime.memory import bytes_on, resident_bytes
from autotune.runtime.verification import Verification, check_phase, passes_on
from autotune.workload.arguments import call_arguments
from autotune.workload.stage import quiet
from autotune.workload.workload import Phase, Workload

if TYPE_CHECKING:
    from autotune.decide.plan import Plan

QUICK_S = 0.5
"""Small models take more steps than two for as long: those of a few milliseconds scatter."""

Draw = Callable[[dict[str, Any]], Any]


class Configured(NamedTuple):
    """What is verified.

    Attributes:
        pipe: A pipeline with a plan applied.
        plan: The plan.
        workload: What it was made for.
        device: Where it runs, ``"cuda:0"``.
        few_steps: The fewest denoise steps that are typical.
    """

    pipe: Any
    plan: Plan
    workload: Workload
    device: str
    few_steps: int

    @property
    def planned_steps(self) -> int:
        """Denoise steps of a generation."""
        return self.workload.request.steps

    @property
    def short_steps(self) -> int:
        """Denoise steps of each timed pass: about two, or all where what is computed changes."""
        if self.plan.execution.step_cache is not None:
            return self.planned_steps
        slowest = max(p.seconds for p in self.plan.prediction.phases)
        quick = int(self.planned_steps * QUICK_S / slowest)
        return min(max(self.few_steps, quick), self.planned_steps)


DISTURBED = "another pipeline drew meanwhile: this is not remembered"


class _Pass(NamedTuple):
    """One short generation, as it was; scales make seconds those of a whole one."""

    phases: dict[str, PhaseMeasurement]
    scales: dict[str, float]


def verify(applied: Configured, draw: Draw) -> Verification:
    """Run what was rehearsed in few steps, twice, and compare with the plan's prediction.

    On a CPU a third pass measures memory. The random state, schedulers, progress bar and the
    pipeline's own attributes are as before afterwards.

    Args:
        applied: The pipeline and its plan.
        draw: Calls the pipeline with these arguments and as it is: plans nothing anew.

    Raises:
        Exception: whatever the pipeline raises; out of memory among it.
    """
    started = time.perf_counter()
    with _untouched(applied.pipe, applied.device), quiet():
        foreign = _foreign_bytes(applied)
        first, second = (_one_pass(applied, draw, foreign) for _ in range(2))
        if applied.device == "cpu":
            second = _with_peaks(second, _peaks(applied, draw))
    predicted = {p.name: p for p in applied.plan.prediction.phases}
    measured = [_whole(second, first, name) for name in predicted if name in second.phases]
    disturbed = not draws_alone(applied.pipe)
    return Verification(
        phases=tuple(check_phase(predicted[m.name], m) for m in measured),
        steps=applied.short_steps,
        planned_steps=applied.planned_steps,
        passes=passes_on(applied.device),
        seconds=time.perf_counter() - started,
        notes=(*_notes(second, applied), *([DISTURBED] if disturbed else [])),
        disturbed=disturbed,
    )


def _one_pass(applied: Configured, draw: Draw, foreign: int) -> _Pass:
    pipe, workload, device = applied.pipe, applied.workload, applied.device
    meter = PhaseMeter(pipe, workload, device, device_gauge(device))
    arguments = _arguments(applied, applied.short_steps)
    with meter.watch():
        draw(arguments)
    phases = {m.name: _without(m, foreign) for m in meter.measured}
    return _Pass(phases, {p.name: _scale(p, meter) for p in workload.phases})


def _peaks(applied: Configured, draw: Draw) -> dict[str, int]:
    meter = PhaseMeter(applied.pipe, applied.workload, applied.device)
    arguments = _arguments(applied, min(applied.few_steps, applied.planned_steps))

    def watched() -> None:
        with meter.watch():
            draw(arguments)

    is_cast = bool(applied.plan.execution.storage_dtype)
    return cpu_peaks(watched, resident_bytes(applied.pipe), passes=2 if is_cast else 1)


def _with_peaks(one: _Pass, peaks: dict[str, int]) -> _Pass:
    measured = with_peaks(tuple(one.phases.values()), peaks)
    return one._replace(phases={m.name: m for m in measured})


def _arguments(applied: Configured, steps: int) -> dict[str, Any]:
    """Those that were rehearsed, on the pipeline's device."""
    rehearsed = call_arguments(applied.pipe, applied.workload.request)
    arguments = {n: _placed(n, v, applied) for n, v in rehearsed.items()}
    if "num_inference_steps" in arguments:
        arguments["num_inference_steps"] = steps
    return arguments


def _placed(name: str, value: Any, applied: Configured) -> Any:
    """Embeddings are expected where, and in the dtype in which, encoders leave them."""
    if not isinstance(value, torch.Tensor) or "embeds" not in name:
        return value
    return value.to(applied.device, getattr(applied.pipe, "dtype", value.dtype))


# ---- from a short pass to a whole generation -----------------------------------------------------


def _scale(phase: Phase, meter: PhaseMeter) -> float:
    """Calls of the denoiser in a generation, over those in the pass; 1 for other phases."""
    denoisers = [r for r in phase.runs if r.role == "denoiser"]
    made = sum(meter.calls[phase.name, name] for name in {r.component for r in denoisers})
    return sum(r.calls for r in denoisers) / made if made else 1.0


def _whole(steady: _Pass, first: _Pass, name: str) -> PhaseMeasurement:
    """Seconds scaled; what the first pass took longer is taken once, whatever the steps."""
    phase = steady.phases[name]
    seconds = phase.seconds * steady.scales[name]
    longer = first.phases[name].seconds - phase.seconds if name in first.phases else 0.0
    return msgspec.structs.replace(phase, seconds=seconds, first_seconds=max(0.0, seconds + longer))


def _notes(steady: _Pass, applied: Configured) -> Iterator[str]:
    steps, planned = applied.short_steps, applied.planned_steps
    scaled = [name for name, scale in steady.scales.items() if scale != 1]
    if scaled and steps < planned:
        yield f"{', '.join(scaled)}: seconds of {steps} of {planned} steps, scaled to all"


def _without(measured: PhaseMeasurement, foreign: int) -> PhaseMeasurement:
    """What else this process holds on the device is none of this pipeline's."""
    levels = ("peak_bytes", "reserved_bytes", "device_bytes")
    known = {n: getattr(measured, n) for n in levels if getattr(measured, n) is not None}
    return msgspec.structs.replace(measured, **{n: max(0, b - foreign) for n, b in known.items()})


def _foreign_bytes(applied: Configured) -> int:
    """Allocated on a GPU by this process, but for other pipelines and tensors."""
    device = torch.device(applied.device)
    if device.type != "cuda":
        return 0
    fixed = max(
        p.needed_bytes - p.resident_bytes - p.activation_bytes - p.margin_bytes
        for p in applied.plan.prediction.phases
    )
    own = bytes_on(device, applied.pipe)
    return max(0, torch.cuda.memory_allocated(device) - own - fixed)


# ---- nothing is left behind ----------------------------------------------------------------------


@contextmanager
def _untouched(pipe: Any, device: str) -> Iterator[None]:
    """The random state, the pipeline's attributes and its schedulers are as before afterwards."""
    with ExitStack() as stack:
        stack.enter_context(_own_random_state(torch.device(device)))
        stack.enter_context(_own_attributes(pipe))
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(disable=True)
        yield


@contextmanager
def _own_attributes(pipe: Any) -> Iterator[None]:
    """What a call leaves on the pipeline is taken off; calls turn the wheels of other schedulers.

    Hooks and modules stay as the call leaves them: offloading replaces its hooks after each.
    """
    before = dict(vars(pipe))
    schedulers = {n: v for n, v in before.items() if hasattr(v, "set_timesteps")}
    # Not by ``setattr``, which would register them in the pipeline's configuration.
    vars(pipe).update({name: copy.deepcopy(value) for name, value in schedulers.items()})
    try:
        yield
    finally:
        data = {n: v for n, v in before.items() if _is_data(v) or n in schedulers}
        for name in [n for n, v in vars(pipe).items() if n not in before and _is_data(v)]:
            del vars(pipe)[name]
        vars(pipe).update(data)


def _is_data(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, dict, tuple, torch.Tensor))


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """Random numbers go on as if nothing had been drawn."""
    import numpy

    python, arrays = random.getstate(), numpy.random.get_state()
    gpus = [device.index or 0] if device.type in ("cuda", "xpu") else []
    kind = device.type if gpus else "cuda"
    try:
        with torch.random.fork_rng(devices=gpus, device_type=kind):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
