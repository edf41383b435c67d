"""Weights that rest in eight bits (layerwise casting): what they weigh, and what widening takes."""

from __future__ import annotations

import msgspec

from autotune.probe.machine import Machine
from autotune.workload.workload import Component, Workload

HOST_CALLS_PER_LAYER = 4
"""A layer's hook converts its weight and its bias before the call, and both back after it."""


def stored_in(workload: Workload, storage_dtype: str) -> Workload:
    """The workload with its denoisers' weights in a narrower dtype; as it is for an empty one."""
    if not storage_dtype:
        return workload
    names = denoisers(workload)
    components = tuple(_narrowed(c) if c.name in names else c for c in workload.components)
    return msgspec.structs.replace(workload, components=components)


def denoisers(workload: Workload) -> set[str]:
    """Components that run at every step."""
    return {r.component for p in workload.phases for r in p.runs if r.role == "denoiser"}


def _narrowed(component: Component) -> Component:
    left = 1 - component.casting_saves_bytes / max(component.weight_bytes, 1)
    return msgspec.structs.replace(
        component,
        weight_bytes=component.weight_bytes - component.casting_saves_bytes,
        block_bytes=tuple(int(b * left) for b in component.block_bytes),
    )


def memory_s(machine: Machine, component: Component, dtype: str) -> float:
    """Seconds of memory traffic in one call.

    A layer's weights are read narrow and written wide before it computes, and the other way round
    after it.
    """
    narrow = component.casting_saves_bytes // (_BYTES.get(dtype, 2) - 1)
    wide = component.casting_saves_bytes + narrow
    return 2 * (narrow + wide) / machine.kernels.memory_bytes_per_s.value


_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def host_s(machine: Machine, component: Component) -> float:
    """Seconds of the host in one call: the hooks of every layer."""
    return HOST_CALLS_PER_LAYER * component.leaf_count * machine.kernels.dispatch_s.value
