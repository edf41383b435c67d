"""Where weights are while a component runs, and what moving them takes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

from autotune.decide.allocator import rounding_bytes
from autotune.decide.forward import ForwardCost
from autotune.decide.prediction import LoadPrediction
from autotune.errors import OptimizationError
from autotune.optimizations.execution import Execution
from autotune.probe.machine import Link, Machine
from autotune.units import GIB
from autotune.workload.workload import Component, ComponentRun, Workload

PROCESS_BYTES = int(0.41 * GIB)
"""Resident size of a Python process that has imported torch, diffusers and transformers, without
any weights (``scripts/benchmark_overhead.py``, PyTorch 2.13 for the CPU). CUDA's libraries come on
top, as pages of their files, which the system can drop."""


class Moved(NamedTuple):
    """A component run under model offload.

    Attributes:
        resident_bytes: Weights on the device while it runs.
        inward_bytes: Weights that come to the device before it runs.
        outward_bytes: Weights that go back to the host because of it.
    """

    resident_bytes: int
    inward_bytes: int
    outward_bytes: int


class Weights:
    """The weights of one workload on one machine, under each placement.

    Args:
        machine: Whose link is crossed.
        workload: Whose components are placed.
    """

    def __init__(self, machine: Machine, workload: Workload) -> None:
        self._machine = machine
        self._workload = workload
        self._components = {c.name: c for c in workload.components}
        self._hooked = {*workload.offload_order, *workload.offload_apart}
        self._staying = sum(
            c.weight_bytes for c in workload.components if c.name not in self._hooked
        )
        self._moved = dict(self._follow())  # by the identity of the run, which may call twice

    def resident_bytes(self, run: ComponentRun, execution: Execution) -> int:
        """Bytes of weights on the device while this run of the workload computes."""
        if execution.placement == "device":
            return self._workload.weight_bytes + run.upcast_bytes
        if execution.placement == "model_offload":
            return self._moved[id(run)].resident_bytes
        component = self._components[run.component]
        if run.component not in self._hooked:
            return self._staying
        return int(component.largest_leaf_bytes * _widening(component, run)) + self._staying

    def rounding_bytes(self, run: ComponentRun, execution: Execution) -> int:
        """What PyTorch's allocator counts for resident weights beyond their own bytes."""
        if self._machine.device.kind != "cuda" or execution.placement == "sequential_offload":
            return 0  # one leaf at a time is a block or two
        if execution.placement == "device":
            return sum(self._rounding.values())
        return self._rounding[run.component]

    @functools.cached_property
    def _rounding(self) -> dict[str, int]:
        return {c.name: rounding_bytes(c.tensor_bytes) for c in self._workload.components}

    def transfer_s(self, run: ComponentRun, execution: Execution, forward: ForwardCost) -> float:
        """Seconds that the run's weights take to cross, in the whole generation.

        Model offload moves a component in when it is called and out when the next one is;
        sequential offload moves in what every layer reads, at every call.

        Raises:
            OptimizationError: the placement needs a link, and this machine has none.
        """
        if execution.placement == "device":
            return 0.0
        link = self._require_link(execution)
        if execution.placement == "model_offload":
            moved = self._moved[id(run)]
            return (
                moved.inward_bytes / link.module_h2d_bytes_per_s.value
                + moved.outward_bytes / link.module_d2h_bytes_per_s.value
            )
        if run.component not in self._hooked:
            return 0.0
        hook = self._machine.kernels.offload_hook_s
        per_call = forward.weight_reads_bytes / link.h2d_pageable_bytes_per_s.value
        per_call += forward.weight_reads * (hook.value if hook else 0.0)
        return per_call * run.calls

    def host_bytes(self, execution: Execution) -> int:
        """Host RAM that this process takes while the pipeline runs.

        Offloaded weights are all there between two generations; on a CPU the device's memory is
        the host's, and is counted as such.
        """
        if execution.placement == "device":
            return PROCESS_BYTES
        return PROCESS_BYTES + self._workload.weight_bytes - self._staying

    def load(self, execution: Execution) -> LoadPrediction:
        """All weights are read into host RAM first, then go where the execution wants them.

        safetensors maps files: the pages read are cache that the system can drop, so that only the
        tensors made from them count.
        """
        weights = self._workload.weight_bytes
        on_device = weights if execution.placement == "device" else self._staying
        is_host = self._machine.device.kind == "cpu" or self._machine.device.unified_memory
        disk, link = self._machine.host.disk_read_bytes_per_s, self._machine.link
        seconds = None
        if disk is not None:
            crossing = on_device / link.module_h2d_bytes_per_s.value if link else 0.0
            seconds = weights / disk.value + crossing
        return LoadPrediction(on_device, PROCESS_BYTES + (0 if is_host else weights), seconds)

    def _require_link(self, execution: Execution) -> Link:
        if self._machine.link is None:
            raise OptimizationError(
                f"{execution.placement} needs a link between host and device",
                f"{self._machine.name} has none: device and host share their memory",
            )
        return self._machine.link

    def _follow(self) -> Iterator[tuple[int, Moved]]:
        """Follow accelerate's hooks through a generation, as diffusers chains them.

        A component that is called sends the one before it *in the pipeline's offload order* back to
        the host, wherever that was called. What is hooked apart stays until the end.
        """
        order = self._workload.offload_order
        before = dict(zip(order[1:], order, strict=False))
        here: dict[str, int] = {}
        runs = [run for phase in self._workload.phases for run in phase.runs]
        for index, run in enumerate(runs):
            name = run.component
            outward = here.pop(before[name], 0) if name in before else 0
            inward = 0
            if name in self._hooked and name not in here:
                here[name] = self._components[name].weight_bytes
                inward = here[name] + run.upcast_bytes
            resident = sum(here.values()) + self._staying + run.upcast_bytes
            if index == len(runs) - 1:  # diffusers takes everything off after the image
                outward += sum(here.values())
            yield id(run), Moved(resident, inward, outward)


def _widening(component: Component, run: ComponentRun) -> float:
    return 1 + run.upcast_bytes / max(component.weight_bytes, 1)
