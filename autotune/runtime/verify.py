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
from autotune.runtime.measure import PhaseMeter, cpu_peaks, device_gauge
from autotune.runtime.verification import Verification, check_phase, passes_on
from autotune.workload.arguments import call_arguments
from autotune.workload.stage import quiet
from autotune.workload.workload import Phase, Workload

if TYPE_CHECKING:
    from autotune.decide.plan import Plan
    from autotune.runtime.tuned import Tuned

MOST_PLANS = 4
"""A plan that runs out of memory gives way to another, which must then be verified in its place."""


class _Pass(NamedTuple):
    """One short generation, as it was."""

    phases: dict[str, PhaseMeasurement]
    scales: dict[str, float]


def verify(tuned: Tuned, workload: Workload) -> Verification:
    """Run what was rehearsed in few steps, twice, and compare with the plan's prediction.

    On a CPU a third pass measures memory. The random state, schedulers, progress bar and the
    pipeline's own attributes are as before afterwards.

    Args:
        tuned: A pipeline with its plan applied.
        workload: What was planned for.

    Raises:
        Exception: whatever the pipeline raises; out of memory among it.
    """
    started = time.perf_counter()
    with _untouched(tuned.pipe, tuned.device), quiet():
        passes, plan = _passes(tuned, workload)
    first, second = passes[0], passes[1]
    predicted = {p.name: p for p in plan.prediction.phases}
    measured = [_whole(second, first, name) for name in predicted if name in second.phases]
    steps, planned = short_steps(tuned, workload), workload.request.steps
    return Verification(
        phases=tuple(check_phase(predicted[m.name], m) for m in measured),
        steps=steps,
        planned_steps=planned,
        passes=passes_on(tuned.device),
        seconds=time.perf_counter() - started,
        notes=tuple(_notes(second, steps, planned)),
    )


QUICK_S = 0.5
"""Small models take more steps than two for as long: those of a few milliseconds scatter."""


def short_steps(tuned: Tuned, workload: Workload) -> int:
    """Denoise steps of each timed pass: about two, or all where what is computed changes."""
    planned = workload.request.steps
    if tuned.plan.execution.step_cache is not None:
        return planned
    slowest = max(p.seconds for p in tuned.plan.prediction.phases)
    return min(max(tuned.few_steps({}), int(planned * QUICK_S / slowest)), planned)


def _passes(tuned: Tuned, workload: Workload) -> tuple[list[_Pass], Plan]:
    """Two passes with one plan, and that plan."""
    for _ in range(MOST_PLANS):
        plan, foreign = tuned.plan, _foreign_bytes(tuned)
        passes = [_one_pass(tuned, workload, foreign) for _ in range(2)]
        peaks = _peaks(tuned, workload) if tuned.device == "cpu" else {}
        if tuned.plan is plan:
            break
    return [_with_peaks(p, peaks) for p in passes], tuned.plan


def _one_pass(tuned: Tuned, workload: Workload, foreign: int) -> _Pass:
    meter = PhaseMeter(tuned.pipe, workload, tuned.device, device_gauge(tuned.device))
    call = _call(tuned, workload, short_steps(tuned, workload))
    with meter.watch():
        call()
    phases = {m.name: _without(m, foreign) for m in meter.measured}
    return _Pass(phases, {p.name: _scale(p, meter) for p in workload.phases})


def _peaks(tuned: Tuned, workload: Workload) -> dict[str, int]:
    meter = PhaseMeter(tuned.pipe, workload, tuned.device)
    call = _call(tuned, workload, min(tuned.few_steps({}), workload.request.steps))

    def watched() -> None:
        with meter.watch():
            call()

    return cpu_peaks(watched, workload.weight_bytes)


def _with_peaks(one: _Pass, peaks: dict[str, int]) -> _Pass:
    if not peaks:
        return one
    phases = {
        name: msgspec.structs.replace(m, peak_bytes=peaks.get(name))
        for name, m in one.phases.items()
    }
    return one._replace(phases=phases)


def _call(tuned: Tuned, workload: Workload, steps: int) -> Callable[[], Any]:
    """A short call with the arguments that were rehearsed, on the pipeline's device."""
    rehearsed = call_arguments(tuned.pipe, workload.request)
    arguments = {n: _placed(n, v, tuned) for n, v in rehearsed.items()}
    if "num_inference_steps" in arguments:
        arguments["num_inference_steps"] = steps
    return lambda: tuned(**arguments)


def _placed(name: str, value: Any, tuned: Tuned) -> Any:
    """Embeddings are expected where, and in the dtype in which, encoders leave them."""
    if not isinstance(value, torch.Tensor) or "embeds" not in name:
        return value
    return value.to(tuned.device, getattr(tuned.pipe, "dtype", value.dtype))


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


def _notes(steady: _Pass, steps: int, planned: int) -> Iterator[str]:
    scaled = [name for name, scale in steady.scales.items() if scale != 1]
    if scaled and steps < planned:
        yield f"{', '.join(scaled)}: seconds of {steps} of {planned} steps, scaled to all"


def _without(measured: PhaseMeasurement, foreign: int) -> PhaseMeasurement:
    """What else this process holds on the device is none of this pipeline's."""
    levels = ("peak_bytes", "reserved_bytes", "device_bytes")
    known = {n: getattr(measured, n) for n in levels if getattr(measured, n) is not None}
    return msgspec.structs.replace(measured, **{n: max(0, b - foreign) for n, b in known.items()})


def _foreign_bytes(tuned: Tuned) -> int:
    """Allocated on a GPU by this process, but for other pipelines and tensors."""
    device = torch.device(tuned.device)
    if device.type != "cuda":
        return 0
    fixed = max(
        p.needed_bytes - p.resident_bytes - p.activation_bytes - p.margin_bytes
        for p in tuned.plan.prediction.phases
    )
    own = sum(t.nbytes for t in _tensors(tuned.pipe) if t.device == device)
    return max(0, torch.cuda.memory_allocated(device) - own - fixed)


def _tensors(pipe: Any) -> Iterator[torch.Tensor]:
    for module in (m for m in pipe.components.values() if isinstance(m, torch.nn.Module)):
        yield from module.parameters()
        yield from module.buffers()


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
