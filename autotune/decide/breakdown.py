"""A prediction taken apart: what each component takes, what is resident, what is at the peak."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec

from autotune.decide.attention import Kernel, transient_bytes
from autotune.decide.casting import storage_of, stored_in
from autotune.decide.placement import widened_bytes
from autotune.decide.predict import Predictor
from autotune.decide.prediction import PhasePrediction
from autotune.optimizations.execution import Execution
from autotune.probe.machine import Machine
from autotune.workload.workload import ComponentRun, Operator, Workload


class Resident(msgspec.Struct, frozen=True):
    """Weights on the device: of a whole component, or of a part of it, such as a layer."""

    component: str
    bytes: int
    is_whole: bool = True


class PeakOperator(msgspec.Struct, frozen=True):
    """The operator at which most activations are alive.

    Attributes:
        name: PyTorch's, ``"aten.silu.default"``; ``"attention"`` for any implementation of it.
        shape: Of its first input; empty where it has none.
        dtype: Of its output.
        live_bytes: Activations alive on the device while it runs, its own memory included; 0 where
            it runs on another GPU.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    live_bytes: int


class ComponentPrediction(msgspec.Struct, frozen=True):
    """One component's part in a phase.

    Attributes:
        component: Its name in the pipeline.
        entry: The method called: ``"forward"``, or an autoencoder's ``"encode"`` or ``"decode"``.
        calls: Calls per generation.
        prediction: As of a phase, of these calls alone; ``name`` is the phase's.
        resident: What the resident bytes are.
        peak: Where the activation bytes are.
    """

    component: str
    entry: str
    calls: int
    prediction: PhasePrediction
    resident: tuple[Resident, ...]
    peak: PeakOperator

    @property
    def label(self) -> str:
        """``"unet"``, ``"vae.decode"``."""
        return self.component if self.entry == "forward" else f"{self.component}.{self.entry}"


def break_down(
    machine: Machine, workload: Workload, execution: Execution
) -> tuple[ComponentPrediction, ...]:
    """Predict every component of every phase, in the order of their first calls.

    A component called on several shapes in a phase is one entry: its time is their sum, its memory
    that of the shape which needs the most.
    """
    predictor = Predictor(machine, workload)
    weights = predictor.weights(execution)
    stored = stored_in(workload, storage_of(execution))
    found: dict[tuple[str, str, str], ComponentPrediction] = {}
    for name, run in ((phase.name, run) for phase in workload.phases for run in phase.runs):
        prediction = predictor.run(name, run, execution)
        others = [
            Resident(n, stored.component(n).weight_bytes)
            for n in weights.companions(run, execution)
        ]
        others += [Resident(n, b, False) for n, b in weights.left_behind(run, execution).items()]
        peak = _peak(machine, run, execution)
        if weights.gpu_of(run, execution) is not None:
            peak = msgspec.structs.replace(peak, live_bytes=0)
        part = ComponentPrediction(
            component=run.component,
            entry=run.entry,
            calls=run.calls,
            prediction=prediction,
            resident=_resident(
                stored, run, others, prediction.resident_bytes, widened_bytes(run, execution)
            ),
            peak=peak,
        )
        key = (name, run.component, run.entry)
        found[key] = _joined(found[key], part) if key in found else part
    return tuple(found.values())


def most_demanding(parts: tuple[ComponentPrediction, ...], phase: str) -> ComponentPrediction:
    """The component that needs the most memory in a phase."""
    return max(
        (p for p in parts if p.prediction.name == phase), key=lambda p: p.prediction.needed_bytes
    )


_ADDED = ("seconds", "compute_s", "memory_s", "transfer_s", "launch_s")


def _joined(first: ComponentPrediction, second: ComponentPrediction) -> ComponentPrediction:
    larger = max(first, second, key=lambda p: p.prediction.needed_bytes)
    one, other = first.prediction, second.prediction
    sums = {name: getattr(one, name) + getattr(other, name) for name in _ADDED}
    return msgspec.structs.replace(
        larger,
        calls=first.calls + second.calls,
        prediction=msgspec.structs.replace(
            larger.prediction, peak_bytes=max(one.peak_bytes, other.peak_bytes), **sums
        ),
    )


# ---- what is resident ---------------------------------------------------------------------------


def _resident(
    workload: Workload, run: ComponentRun, others: list[Resident], total: int, wider: int
) -> tuple[Resident, ...]:
    """The component that runs holds what the others leave of the predicted bytes."""
    own = total - sum(r.bytes for r in others)
    whole = workload.component(run.component).weight_bytes + wider
    resident = [*others, Resident(run.component, own, is_whole=own >= whole)]
    return tuple(sorted((r for r in resident if r.bytes), key=lambda r: (-r.bytes, r.component)))


# ---- what is at the peak ------------------------------------------------------------------------


def _peak(machine: Machine, run: ComponentRun, execution: Execution) -> PeakOperator:
    trace = run.switched(execution.decode_variant)
    kernel = _kernel(machine, run, execution)

    def alive(operator: Operator) -> int:
        shape = operator.attention
        own = transient_bytes(kernel, shape, operator.dtype) if shape is not None else 0
        return operator.live_bytes + own

    operator = max(trace.operators, key=alive)
    return PeakOperator(operator.name, _shape(operator), operator.dtype, alive(operator))


def _kernel(machine: Machine, run: ComponentRun, execution: Execution) -> Kernel:
    if run.role == "encoder":
        return Kernel("sdpa")
    if execution.attention_slices and run.role == "denoiser":
        return Kernel("sliced", execution.attention_slices)
    return Kernel(execution.attention or machine.default_attention)


def _shape(operator: Operator) -> tuple[int, ...]:
    if operator.attention is not None:
        a = operator.attention
        return (a.batch, a.heads, a.q_tokens, a.head_dim)
    try:
        arguments = json.loads(operator.signature)
    except ValueError:
        return ()
    return next(_shapes(arguments), ())


def _shapes(value: Any) -> Iterator[tuple[int, ...]]:
    """Shapes of the tensors in a signature, depth first."""
    if isinstance(value, dict):
        if isinstance(value.get("s"), list):
            yield tuple(value["s"])
        else:
            yield from _shapes(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from _shapes(item)
