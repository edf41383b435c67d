"""Weights that rest in fewer bits than they compute in: their size, and what widening takes."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from autotune.decide import quantized
from autotune.decide.attention import BYTES
from autotune.optimizations.execution import Effect, Execution
from autotune.probe.machine import Machine
from autotune.workload.workload import Component, Role, Trace, Workload

HOST_CALLS_PER_LAYER = 3
"""What a layer's hooks take of the host, in dispatched operators: weight and bias are converted
before the call and back after it. 34 µs a layer, where an operator took 8 µs of Python and 2 to 3
of dispatch (UNet of 280 such layers, so narrow that there is nothing to convert, on one thread of
a CPU)."""


CPU_FLOPS_PER_ELEMENT = 350
"""What a CPU computes of float32 products while it widens an eight-bit number and narrows it again,
for which it has no instructions: 3.1 and 0.5 ns, where it did 95 GFLOP/s (one core of an AMD EPYC,
PyTorch 2.13)."""


class Storage(NamedTuple):
    """What of an execution decides the weight of weights."""

    dtype: str = ""
    quantization: str = ""
    fused_projections: bool = False
    effects: tuple[Effect, ...] = ()


def storage_of(execution: Execution) -> Storage:
    """How an execution stores the weights."""
    return Storage(
        execution.storage_dtype,
        execution.quantization,
        execution.fused_projections,
        tuple([e for e in execution.effects if e.weights != 1]),
    )


def stored_in(workload: Workload, storage: Storage) -> Workload:
    """The workload with its weights as they are stored then."""
    if storage == Storage():
        return workload
    roles = roles_of(workload)
    element = BYTES.get(workload.request.dtype, 4)
    components = tuple(
        _stored(c, storage, roles.get(c.name, ()), element) for c in workload.components
    )
    return msgspec.structs.replace(workload, components=components)


def roles_of(workload: Workload) -> dict[str, tuple[Role, ...]]:
    """Component → what it is for."""
    found: dict[str, tuple[Role, ...]] = {}
    for run in workload.runs:
        found[run.component] = (*found.get(run.component, ()), run.role)
    return found


def _stored(
    component: Component, storage: Storage, roles: tuple[Role, ...], element: int
) -> Component:
    weight = component.weight_bytes
    if "denoiser" in roles:
        weight -= component.casting_saves_bytes if storage.dtype else 0
        # Fused projections are linear layers beside those that they replace, quantized like them.
        fused = component.fusable_bytes if storage.fused_projections else 0
        linear = component.linear_bytes + fused
        weight += fused - quantized.saved_bytes(storage.quantization, linear, element)
    for effect in storage.effects:
        weight = int(weight * effect.weights) if effect.role in roles else weight
    left = weight / max(component.weight_bytes, 1)
    return msgspec.structs.replace(
        component,
        weight_bytes=weight,
        block_bytes=tuple(int(b * left) for b in component.block_bytes),
    )


def copied_bytes(workload: Workload, storage: Storage) -> int:
    """What of the denoisers' weights is kept in RAM as it was before it was narrowed.

    Quantizing keeps the layers themselves: those that are left in their file take no RAM.
    """
    named = workload.components_as("denoiser")
    if storage.dtype:
        return sum(c.weight_bytes for c in named)
    if not storage.quantization:
        return 0
    return sum(c.linear_bytes for c in named if c.name not in workload.mappable)


def narrowing_bytes(workload: Workload, storage: Storage) -> int:
    """RAM that narrowing the denoisers' weights takes beside all weights as they would be read.

    Casting copies a denoiser, then narrows one tensor after the other in its place; of mapped ones
    nothing is freed by that. Quantization makes packed layers beside the others; those that it
    leaves in their file are not cast, and are less than would be read.
    """
    named = workload.components_as("denoiser")
    if storage.dtype:
        narrow = sum(
            c.weight_bytes - c.casting_saves_bytes for c in named if c.name in workload.mapped
        )
        return copied_bytes(workload, storage) + narrow
    if not storage.quantization:
        return 0
    element = BYTES.get(workload.request.dtype, 4)
    linear = sum(c.linear_bytes for c in named)
    uncast = set(workload.mappable) - set(workload.mapped)
    return (
        linear
        - quantized.saved_bytes(storage.quantization, linear, element)
        - sum(c.linear_bytes for c in named if c.name in uncast)
    )


def reading_bytes(workload: Workload, storage: Storage) -> int:
    """RAM that a loaded denoiser takes whose layers were left in their files, and are needed."""
    if storage.quantization:
        return 0
    named = workload.components_as("denoiser")
    return sum(c.linear_bytes for c in named if c.name in workload.mappable)


def memory_s(machine: Machine, component: Component, dtype: str) -> float:
    """Seconds of memory traffic in one call.

    A layer's weights are read narrow and written wide before it computes, and the other way round
    after it.
    """
    narrow = component.casting_saves_bytes // (BYTES.get(dtype, 2) - 1)
    wide = component.casting_saves_bytes + narrow
    traffic = 2 * (narrow + wide) / machine.kernels.memory_bytes_per_s.value
    if machine.device.kind != "cpu":
        return traffic
    rate = machine.kernels.matmul_flops_per_s["float32"].value
    return traffic + narrow * CPU_FLOPS_PER_ELEMENT / rate


def host_s(machine: Machine, trace: Trace) -> float:
    """Seconds of the host in one call: the hooks of linear layers and convolutions.

    Norms and embeddings keep their dtype, and have no hooks.
    """
    layers = sum(
        o.count for o in trace.operators if o.kind in ("matmul", "convolution") and o.weight_bytes
    )
    return HOST_CALLS_PER_LAYER * layers * machine.kernels.dispatch_s.value
