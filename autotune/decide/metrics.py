"""What each tool will show of an execution: allocated, reserved, and on the device.

The three differ by gigabytes, so that a published figure says little without its metric:
``torch.cuda.max_memory_allocated`` counts tensors and workspaces, ``max_memory_reserved`` the
segments they were cut from, and ``nvidia-smi`` adds the CUDA context. The latter two come from
replaying a trace's requests through a model of PyTorch's allocator.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

from autotune.decide import attention, workspace
from autotune.decide.allocator import Block, CachingAllocator, DeviceMemoryError
from autotune.decide.attention import Kernel
from autotune.decide.casting import storage_of, stored_in
from autotune.decide.placement import (
    WHOLE_COMPONENTS,
    Weights,
    hooks_of,
    tensor_sizes,
    widened_bytes,
)
from autotune.decide.predict import Path, Predictor
from autotune.decide.prediction import budget_of
from autotune.optimizations.execution import Execution
from autotune.probe.machine import Machine
from autotune.workload.workload import AttentionShape, Component, ComponentRun, Operator

GENERATIONS, STEPS = 2, 2
"""What is replayed: by then the allocator has every segment that it will ever ask for."""


_FOLLOWED: tuple[str, ...] = ("device", "device_map", "sequential_offload", *WHOLE_COMPONENTS)
"""Placements whose every tensor is followed."""


class Expected(NamedTuple):
    """Peaks in bytes: ``max_memory_allocated``, ``max_memory_reserved``, and of the whole device.

    ``device_bytes`` leaves out what other processes hold.
    """

    allocated_bytes: int
    reserved_bytes: int
    device_bytes: int


def expected(
    predictor: Predictor, execution: Execution, capacity_bytes: int | None = None
) -> Expected:
    """The peaks of a few generations run in this way.

    Args:
        predictor: Of a CUDA machine.
        execution: How the pipeline runs.
        capacity_bytes: What PyTorch may reserve; by default what is free now, less the context.
            Where it is scarce, unused segments are given back and workspaces done without.

    Raises:
        DeviceMemoryError: it does not fit in the capacity, however little the predictor says that
            it needs: free memory lies in pieces, none of them large enough.
        OptimizationError: the execution needs a code path that was not traced.
    """
    if capacity_bytes is None:
        capacity_bytes = budget_of(predictor.machine).device_bytes
    pipeline = _Pipeline(predictor, execution, capacity_bytes)
    pipeline.load()
    for _ in range(GENERATIONS):
        pipeline.generate()
    allocator = pipeline.allocator
    reserved = allocator.peak_reserved_bytes
    return Expected(
        allocator.peak_allocated_bytes, reserved, reserved + predictor.machine.context_bytes
    )


def fits(predictor: Predictor, execution: Execution, capacity_bytes: int | None = None) -> bool:
    """Whether the allocator finds room for every request; takes a fraction of a second.

    Raises:
        OptimizationError: the execution needs a code path that was not traced.
    """
    try:
        expected(predictor, execution, capacity_bytes)
    except DeviceMemoryError:
        return False
    return True


class _Pipeline:
    """Sends an allocator what a pipeline would. Token merging is left out: it takes little."""

    def __init__(self, predictor: Predictor, execution: Execution, capacity_bytes: int) -> None:
        self.machine = predictor.machine
        self.workload = stored_in(predictor.workload, storage_of(execution))
        self.allocator = CachingAllocator(capacity_bytes)
        self._predictor, self._execution = predictor, execution
        self._components = {c.name: c for c in self.workload.components}
        self._moves = hooks_of(self.workload, execution.placement)
        self._moves_whole = execution.placement in WHOLE_COMPONENTS
        self._weights = Weights(self.machine, self.workload)
        self._here: dict[str, list[Block]] = {}

    def load(self) -> None:
        """Weights that stay, then cuBLAS's workspace."""
        for component in self.workload.components:
            if self._stays(component):
                self._bring(component)
            elif self._execution.placement == "sequential_offload" and component.unmoved_bytes:
                self.allocator.allocate(component.unmoved_bytes)
        self.allocator.allocate(workspace.library_bytes(self.machine))

    def generate(self) -> None:
        """One generation, of as many steps as matter."""
        for phase in self.workload.phases:
            for repeat in phase.sequence:
                for _ in range(min(repeat.times, STEPS)):
                    for index in repeat.runs:
                        self._run(phase.runs[index])
        if self._execution.placement == "model_offload":  # diffusers takes everything off
            self._take_all_away()

    def _run(self, run: ComponentRun) -> None:
        if self._weights.gpu_of(run, self._execution) is not None:
            return  # another GPU computes
        component = self._components[run.component]
        if self._moves_whole and run.role == self._moves.leave_before:
            self._take_all_away()
        if self._moves_whole and self._hooks(component):
            if run.component in self._moves.before:
                self._take_away(self._moves.before[run.component])
            if run.component not in self._here:
                self._bring(component)
        wider = widened_bytes(run, self._execution)
        if wider and run.component in self._here:
            self._cast(component, 1 + wider / component.weight_bytes)
        path = self._predictor.path(run, self._execution)
        streamed = self._streamed(run)
        replay(self.allocator, self.machine, path, self._leaf_bytes(component))
        if streamed is not None:
            self.allocator.free(streamed)
        if wider and run.component in self._here:
            self._cast(component, 1.0)

    # ---- weights --------------------------------------------------------------------------------

    def _bring(self, component: Component) -> None:
        self._here[component.name] = [self.allocator.allocate(s) for s in tensor_sizes(component)]

    def _take_all_away(self) -> None:
        for name in self._moves.hooked & self._here.keys():
            self._take_away(name)

    def _take_away(self, name: str) -> None:
        for block in self._here.pop(name, ()):
            self.allocator.free(block)
        self.allocator.release_cached()  # accelerate's CpuOffload empties the cache

    def _cast(self, component: Component, wider: float) -> None:
        """``module.to(dtype)``: each tensor is made anew before the old one goes."""
        blocks = self._here[component.name]
        for index, size in enumerate(tensor_sizes(component)):
            new = self.allocator.allocate(int(size * wider))
            self.allocator.free(blocks[index])
            blocks[index] = new

    def _leaf_bytes(self, component: Component) -> int:
        is_sequential = self._execution.placement == "sequential_offload"
        return component.largest_leaf_bytes if is_sequential and self._hooks(component) else 0

    def _streamed(self, run: ComponentRun) -> Block | None:
        """Under group offload: the groups that are here at once, in one piece."""
        if self._execution.placement in _FOLLOWED:
            return None
        return self.allocator.allocate(self._weights.resident_bytes(run, self._execution))

    def _stays(self, component: Component) -> bool:
        """Whether it is on the device from the start to the end."""
        if self._execution.placement == "device_map":
            return component.name in self._weights.home(self._execution)
        return self._execution.placement == "device" or not self._hooks(component)

    def _hooks(self, component: Component) -> bool:
        return component.name in self._moves.hooked


def replay(allocator: CachingAllocator, machine: Machine, path: Path, leaf_bytes: int = 0) -> None:
    """Send an allocator what one forward requests, and take everything back at its end.

    Args:
        allocator: In whatever state.
        machine: Whose libraries take workspaces.
        path: The forward, weights being in place.
        leaf_bytes: Of one layer's weights, where accelerate brings each when it is called; it
            empties the cache for every tensor that it places.
    """
    trace = path.trace
    if not trace.timeline:  # not traced: a guess in one piece
        allocator.use(trace.activation_bytes)
        return
    blocks: dict[int, Block] = {}
    timed, count = iter(trace.timed), 0
    for event in trace.timeline:
        if event > 0:
            count += 1
            blocks[count] = allocator.allocate(event)
        elif event < 0:
            allocator.free(blocks.pop(-event))
        else:
            _call(allocator, machine, trace.operators[next(timed)], path, leaf_bytes)
    for block in blocks.values():
        allocator.free(block)


def _call(
    allocator: CachingAllocator, machine: Machine, operator: Operator, path: Path, leaf_bytes: int
) -> None:
    leaf = None
    if leaf_bytes:
        allocator.release_cached()
        leaf = allocator.allocate(leaf_bytes)
    if operator.attention is not None:
        _attend(allocator, path.kernel, operator.attention, operator.dtype)
    else:
        # Where a workspace cannot be had, PyTorch tries the next of cuDNN's plans.
        with contextlib.suppress(DeviceMemoryError):
            allocator.use(workspace.convolution_bytes(machine, operator, path.channels_last))
    if leaf is not None:
        allocator.free(leaf)


def _attend(allocator: CachingAllocator, kernel: Kernel, shape: AttentionShape, dtype: str) -> None:
    own = attention.transient_bytes(kernel, shape, dtype)
    if not kernel.writes_scores:
        allocator.use(own)
        return
    scores = allocator.allocate(own // 2)  # the product, then the probabilities beside it
    allocator.use(own // 2)
    allocator.free(scores)
