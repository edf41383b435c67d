"""What each tool will show of an execution: allocated, reserved, and on the device.

The three differ by gigabytes, so that a published figure says little without its metric:
``torch.cuda.max_memory_allocated`` counts tensors and workspaces, ``max_memory_reserved`` the
segments they were cut from, and ``nvidia-smi`` adds the CUDA context. The latter two come from
replaying a trace's requests through a model of PyTorch's allocator.
"""

from __future__ import annotations

from typing import NamedTuple

from autotune.decide import attention, workspace
from autotune.decide.allocator import Block, CachingAllocator, DeviceMemoryError
from autotune.decide.attention import Kernel
from autotune.decide.predict import Path, Predictor
from autotune.optimizations.execution import Execution
from autotune.probe.machine import Machine
from autotune.workload.workload import Component, ComponentRun, Operator

GENERATIONS, STEPS = 2, 2
"""What is replayed: by then the allocator has every segment that it will ever ask for."""


class Expected(NamedTuple):
    """Peaks in bytes: ``max_memory_allocated``, ``max_memory_reserved``, and of the whole device.

    ``device_bytes`` leaves out what other processes hold.
    """

    allocated_bytes: int
    reserved_bytes: int
    device_bytes: int


def expected(predictor: Predictor, execution: Execution, *, searches: bool = False) -> Expected:
    """The peaks of generations run in this way, after the first.

    Args:
        predictor: Of a CUDA machine.
        execution: How the pipeline runs.
        searches: ``torch.backends.cudnn.benchmark`` is set, which PyTorch 1 lets take workspaces
            that it would not take by itself.

    Raises:
        OptimizationError: the execution needs a code path that was not traced.
    """
    replay = _Replay(predictor, execution, searches)
    replay.load()
    for _ in range(GENERATIONS):
        replay.generate()
    allocator = replay.allocator
    reserved = allocator.peak_reserved_bytes
    return Expected(
        allocator.peak_allocated_bytes, reserved, reserved + predictor.machine.context_bytes
    )


class _Replay:
    """Sends an allocator what a pipeline would."""

    def __init__(self, predictor: Predictor, execution: Execution, searches: bool) -> None:
        self.machine, self.workload = predictor.machine, predictor.workload
        self.allocator = CachingAllocator(_capacity(self.machine))
        self._predictor, self._execution = predictor, execution
        self._searches = searches and _is_torch_1(self.machine)
        self._components = {c.name: c for c in self.workload.components}
        self._before = dict(
            zip(self.workload.offload_order[1:], self.workload.offload_order, strict=False)
        )
        self._hooked = {*self.workload.offload_order, *self.workload.offload_apart}
        self._here: dict[str, list[Block]] = {}

    def load(self) -> None:
        """Weights that stay, then cuBLAS's workspace."""
        is_whole = self._execution.placement == "device"
        for component in self.workload.components:
            if is_whole or component.name not in self._hooked:
                self._bring(component)
        self.allocator.allocate(workspace.library_bytes(self.machine))

    def generate(self) -> None:
        """One generation, of as many steps as matter."""
        for phase in self.workload.phases:
            for run in phase.runs:
                self._run(run)
        if self._execution.placement == "model_offload":  # diffusers takes everything off
            for name in list(self._here):
                if name in self._hooked:
                    self._take_away(name)

    def _run(self, run: ComponentRun) -> None:
        component = self._components[run.component]
        if self._execution.placement == "model_offload" and run.component in self._hooked:
            if run.component in self._before:
                self._take_away(self._before[run.component])
            if run.component not in self._here:
                self._bring(component)
        if run.upcast_bytes and run.component in self._here:
            self._cast(component, 1 + run.upcast_bytes / component.weight_bytes)
        path = self._predictor.path(run, self._execution)
        for _ in range(min(run.calls, STEPS)):
            self._forward(path, component)
        if run.upcast_bytes and run.component in self._here:
            self._cast(component, 1.0)

    # ---- weights --------------------------------------------------------------------------------

    def _bring(self, component: Component, wider: float = 1.0) -> None:
        sizes = component.tensor_bytes or (component.weight_bytes,)
        self._here[component.name] = [self.allocator.allocate(int(s * wider)) for s in sizes]

    def _take_away(self, name: str) -> None:
        for block in self._here.pop(name, ()):
            self.allocator.free(block)
        self.allocator.release_cached()  # accelerate's CpuOffload empties the cache

    def _cast(self, component: Component, wider: float) -> None:
        """``module.to(dtype)``: each tensor is made anew before the old one goes."""
        blocks = self._here[component.name]
        sizes = component.tensor_bytes or (component.weight_bytes,)
        for index, size in enumerate(sizes):
            new = self.allocator.allocate(int(size * wider))
            self.allocator.free(blocks[index])
            blocks[index] = new

    # ---- one forward ----------------------------------------------------------------------------

    def _forward(self, path: Path, component: Component) -> None:
        if not path.trace.timeline:  # not traced: a guess in one piece
            self.allocator.use(path.trace.activation_bytes)
            return
        numbered: dict[int, Block] = {}
        timed = iter(path.trace.timed)
        count = 0
        for event in path.trace.timeline:
            if event > 0:
                count += 1
                numbered[count] = self.allocator.allocate(event)
            elif event < 0:
                self.allocator.free(numbered.pop(-event))
            else:
                self._call(path.trace.operators[next(timed)], path, component)
        for block in numbered.values():
            self.allocator.free(block)

    def _call(self, operator: Operator, path: Path, component: Component) -> None:
        leaf = self._sequential_leaf(component)
        if operator.attention is not None:
            _use_scores(self.allocator, path.kernel, operator)
        else:
            self._convolve(operator, path.channels_last)
        if leaf is not None:
            self.allocator.free(leaf)

    def _convolve(self, operator: Operator, channels_last: bool) -> None:
        """The first workspace in cuDNN's list that can be had."""
        wanted = [workspace.convolution_bytes(self.machine, operator, channels_last)]
        if self._searches:
            wanted.insert(0, workspace.searched_bytes(operator))
        for size in wanted:
            try:
                self.allocator.use(size)
            except DeviceMemoryError:
                continue
            if size:
                return

    def _sequential_leaf(self, component: Component) -> Block | None:
        """A layer's weights; accelerate empties the cache for every tensor that it places."""
        is_sequential = self._execution.placement == "sequential_offload"
        if not is_sequential or component.name not in self._hooked:
            return None
        self.allocator.release_cached()
        return self.allocator.allocate(component.largest_leaf_bytes)


def _use_scores(allocator: CachingAllocator, kernel: Kernel, operator: Operator) -> None:
    assert operator.attention is not None
    own = attention.transient_bytes(kernel, operator.attention, operator.dtype)
    if not kernel.writes_scores:
        allocator.use(own)
        return
    scores = allocator.allocate(own // 2)  # the product, then the probabilities beside it
    allocator.use(own // 2)
    allocator.free(scores)


def _capacity(machine: Machine) -> int:
    return max(0, machine.device.free_bytes - machine.context_bytes)


def _is_torch_1(machine: Machine) -> bool:
    return machine.software.get("torch", "").startswith("1.")
