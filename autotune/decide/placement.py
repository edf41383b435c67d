"""Where weights are while a component runs, and what moving them takes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from autotune.decide.allocator import pinned_bytes, rounding_bytes
from autotune.decide.forward import ForwardCost
from autotune.decide.prediction import PROCESS_BYTES, LoadPrediction
from autotune.errors import OptimizationError
from autotune.optimizations.execution import DeviceMap, Execution, GroupOffload
from autotune.probe.machine import Link, Machine
from autotune.workload.workload import Component, ComponentRun, Role, Workload

GROUP_HOOK_CALLS = {"leaf": 6, "block": 3}
"""What diffusers' hooks take of the host for each layer of a group, in dispatched operators: 67 µs
and 28 µs where an operator took 11 µs (SD-like UNet of 164 layers, on a CPU, nothing to copy)."""

STREAM_CALLS = 2
"""On a stream of their own, copies take about twice the calls: each tensor is recorded, too."""


def group_host_s(machine: Machine, component: Component, group: GroupOffload) -> float:
    """Seconds of the host that moving a component's groups takes in one call."""
    level = "leaf" if _is_by_layer(component, group) else "block"
    calls = GROUP_HOOK_CALLS[level] * (STREAM_CALLS if group.overlaps else 1)
    return calls * component.leaf_count * machine.kernels.dispatch_s.value


UNKNOWN_DISK_BYTES_PER_S = 500e6
"""Of a disk whose speed was not measured: a SATA SSD, whose link carries 600 MB/s at the most."""


def assumptions(machine: Machine, execution: Execution) -> Iterator[str]:
    """What was not measured, and is taken to be slow rather than fast: a sentence each."""
    from_disk = execution.group is not None and execution.group.from_disk
    if from_disk and machine.host.disk_read_bytes_per_s is None:
        rate = UNKNOWN_DISK_BYTES_PER_S / 1e6
        yield f"the disk's speed is not known: it is taken to read {rate:.0f} MB/s, as a SATA SSD"


WHOLE_COMPONENTS = ("model_offload", "encoder_offload")
"""Placements that move components as a whole."""


class Moved(NamedTuple):
    """Calls of a component under model offload.

    Attributes:
        resident_bytes: The most weights on the device during one of them.
        here: What offload moves and is there meanwhile, the component itself included.
        inward_bytes: Weights that come to the device before them.
        outward_bytes: Weights that go back to the host because of them.
    """

    resident_bytes: int = 0
    here: frozenset[str] = frozenset()
    inward_bytes: int = 0
    outward_bytes: int = 0

    def plus(self, other: Moved, times: int = 1) -> Moved:
        """These calls, and others so many times."""
        larger = max(self, other, key=lambda m: m.resident_bytes)
        return Moved(
            larger.resident_bytes,
            larger.here,
            self.inward_bytes + other.inward_bytes * times,
            self.outward_bytes + other.outward_bytes * times,
        )


def stays_narrow(execution: Execution) -> bool:
    """Whether a decode runs in the dtype that its weights are stored in, whatever the pipeline."""
    return bool(execution.decode_dtype or execution.decoder)


def widened_bytes(run: ComponentRun, execution: Execution) -> int:
    """Weight bytes that a run's component has more of while it runs than it is stored in."""
    return 0 if stays_narrow(execution) else run.upcast_bytes


class Visit(NamedTuple):
    """Another GPU while a component runs.

    Attributes:
        gpu: CUDA's index.
        resident_bytes: Weights there.
        rounding_bytes: What PyTorch's allocator counts for them beyond their own bytes.
    """

    gpu: int
    resident_bytes: int
    rounding_bytes: int


_PIXEL_BYTES = 3 * 4
"""Of one pixel: three channels, in float32 at the most. Latents are smaller."""


def components_elsewhere(machine: Machine, workload: Workload, to: DeviceMap) -> dict[str, int]:
    """Component → index of the GPU, for those on another GPU than the device.

    Raises:
        OptimizationError: the machine has no such GPU.
    """
    known = {machine.device.index, *(gpu.index for gpu in machine.others)}
    missing = {to.encoders, to.autoencoder} - known
    if missing:
        raise OptimizationError(
            f"there is no GPU cuda:{min(missing)} on {machine.name}",
            f"known: {', '.join(f'cuda:{index}' for index in sorted(known))}",
        )
    mapped = dict.fromkeys(text_encoders(workload), to.encoders)
    mapped |= {c.name: to.autoencoder for c in workload.components_as("autoencoder")}
    return {name: gpu for name, gpu in mapped.items() if gpu != machine.device.index}


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
        self._all_moves: dict[tuple[str, bool], _Moves] = {}
        self._rounded: dict[tuple[int, str], int] = {}
        self._all_mapped: dict[DeviceMap, dict[str, int]] = {}
        self._grouped: dict[GroupOffload, int] = {}

    def resident_bytes(self, run: ComponentRun, execution: Execution) -> int:
        """Bytes of weights on the device while this run of the workload computes."""
        if execution.placement == "device":
            return self._workload.weight_bytes + widened_bytes(run, execution)
        if execution.placement == "device_map":
            return self._bytes_on(self.home(execution), run, execution)
        moves = self._moves(execution)
        if execution.placement in WHOLE_COMPONENTS:
            return moves.of_runs[id(run)].resident_bytes
        component = self._components[run.component]
        if run.component not in moves.hooked:
            return moves.staying_bytes
        at_once = component.largest_leaf_bytes
        if execution.placement == "group_offload":
            at_once = _groups_at_once(component, run, _group(execution))
        return int(at_once * _widening(component, run, execution)) + moves.staying_bytes

    def companions(self, run: ComponentRun, execution: Execution) -> frozenset[str]:
        """Other components that are on the device as a whole while this run computes."""
        if execution.placement == "device_map":
            return self.home(execution) - {run.component}
        here = frozenset(self._components)
        if execution.placement != "device":
            here -= self._moves(execution).hooked
        if execution.placement in WHOLE_COMPONENTS:
            here |= self._moves(execution).of_runs[id(run)].here
        return here - {run.component}

    def left_behind(self, run: ComponentRun, execution: Execution) -> dict[str, int]:
        """What is on the device of other components that sequential offload moves: buffers."""
        if execution.placement != "sequential_offload":
            return {}
        hooked = self._moves(execution).hooked - {run.component}
        sizes = {name: self._components[name].unmoved_bytes for name in sorted(hooked)}
        return {name: size for name, size in sizes.items() if size}

    def rounding_bytes(self, run: ComponentRun, execution: Execution) -> int:
        """What PyTorch's allocator counts for resident weights beyond their own bytes."""
        if self._machine.device.kind != "cuda" or execution.placement == "sequential_offload":
            return 0  # one layer at a time is a block or two
        if execution.placement == "group_offload":
            group, component = _group(execution), self._components[run.component]
            if run.role == "autoencoder" or _is_by_layer(component, group):
                return 0
            share = _groups_at_once(component, run, group) / max(component.weight_bytes, 1)
            return int(share * self._rounding[run.component])
        if execution.placement == "device_map":
            return sum(self._rounding[name] for name in self.home(execution))
        key = (id(run), execution.placement)
        if key not in self._rounded:
            here = self.companions(run, execution) | {run.component}
            self._rounded[key] = sum(self._rounding[name] for name in here)
        return self._rounded[key]

    # ---- several GPUs ---------------------------------------------------------------------------

    def gpu_of(self, run: ComponentRun, execution: Execution) -> int | None:
        """CUDA's index of another GPU than the device, where the run computes on one."""
        return self._mapped(execution).get(run.component)

    def home(self, execution: Execution) -> frozenset[str]:
        """Components on the device itself, under a device map."""
        return frozenset(self._components) - self._mapped(execution).keys()

    def visits(self, run: ComponentRun, execution: Execution) -> tuple[Visit, ...]:
        """The other GPUs while this run computes, wherever it does so."""
        if execution.device_map is None:
            return ()
        gpus = self._mapped(execution)
        found = []
        for gpu in sorted(set(gpus.values())):
            names = frozenset(name for name in gpus if gpus[name] == gpu)
            rounding = sum(self._rounding[name] for name in names)
            found.append(Visit(gpu, self._bytes_on(names, run, execution), rounding))
        return tuple(found)

    def _bytes_on(self, names: frozenset[str], run: ComponentRun, execution: Execution) -> int:
        """Weights of these components, as wide as they are while the run computes."""
        wider = widened_bytes(run, execution) if run.component in names else 0
        return sum(self._components[name].weight_bytes for name in names) + wider

    def _mapped(self, execution: Execution) -> dict[str, int]:
        if execution.device_map is None:
            return {}
        if execution.device_map not in self._all_mapped:
            mapped = components_elsewhere(self._machine, self._workload, execution.device_map)
            self._all_mapped[execution.device_map] = mapped
        return self._all_mapped[execution.device_map]

    def _crossing_s(self, run: ComponentRun) -> float:
        """Seconds that inputs and outputs of all calls take between two GPUs, weights staying.

        At half the rate of a copy to the host: GPUs that cannot reach one another copy through it.
        """
        link = self._machine.link
        if link is None:
            return 0.0
        rate = min(link.h2d_pinned_bytes_per_s.value, link.d2h_pinned_bytes_per_s.value) / 2
        return run.calls * self._handed_on_bytes(run) / rate

    def _handed_on_bytes(self, run: ComponentRun) -> int:
        """At most what one call takes and gives: pixels, or the embeddings of every layer."""
        if run.role == "autoencoder":
            r = self._workload.request
            return 2 * r.batch * r.frames * r.height * r.width * _PIXEL_BYTES
        layers = len(self._components[run.component].block_bytes)
        return run.trace.operators[-1].out_bytes * (1 + layers)

    @functools.cached_property
    def _streamed(self) -> tuple[Component, ...]:
        """What group offload may copy on a stream: all that it moves but autoencoders."""
        hooked = hooks_of(self._workload, "group_offload").hooked
        apart = {c.name for c in self._workload.components_as("autoencoder")}
        return tuple(c for c in self._workload.components if c.name in hooked - apart)

    @functools.cached_property
    def _pinned(self) -> dict[str, int]:
        return {c.name: _all_pinned_bytes(tensor_sizes(c)) for c in self._workload.components}

    @functools.cached_property
    def _rounding(self) -> dict[str, int]:
        return {c.name: _rounding_bytes(c.tensor_bytes) for c in self._workload.components}

    def transfer_s(self, run: ComponentRun, execution: Execution, forward: ForwardCost) -> float:
        """Seconds that the run's weights take to cross, in the whole generation.

        Model offload moves a component in when it is called and out when the next one is;
        sequential offload moves in what every layer reads, at every call.

        Raises:
            OptimizationError: the placement needs a link, and this machine has none.
        """
        if execution.placement == "device":
            return 0.0
        if execution.placement == "device_map":
            is_home = self.gpu_of(run, execution) is None
            return 0.0 if is_home else self._crossing_s(run)
        link = self._require_link(execution)
        moves = self._moves(execution)
        if execution.placement in WHOLE_COMPONENTS:
            moved = moves.of_runs[id(run)]
            return (
                moved.inward_bytes / link.module_h2d_bytes_per_s.value
                + moved.outward_bytes / link.module_d2h_bytes_per_s.value
            )
        if run.component not in moves.hooked:
            return 0.0
        if execution.placement == "group_offload":
            return self._group_transfer_s(link, run, _group(execution), forward) * run.calls
        hook = self._machine.kernels.offload_hook_s
        per_call = forward.weight_reads_bytes / link.h2d_pageable_bytes_per_s.value
        per_call += forward.weight_reads * (hook.value if hook else 0.0)
        return per_call * run.calls

    def _group_transfer_s(
        self, link: Link, run: ComponentRun, group: GroupOffload, forward: ForwardCost
    ) -> float:
        """Seconds that one call waits for its weights.

        Overlapped, the next group crosses while this one computes: what remains is the first group,
        and as much of the others as takes longer than computing. What is in no block has no stream.
        It, and every group where nothing overlaps, comes before its turn and is copied back after
        it, since diffusers keeps no second copy then; from a disk it is read anew.
        """
        component = self._components[run.component]
        weights = forward.weight_reads_bytes
        inward = self._inward_bytes_per_s(link, run, group)
        apart = weights
        if _overlaps(run, group):
            apart = int(weights * _share_in_no_group(component, group))
        is_read = group.from_disk and run.role != "autoencoder"
        pageable = min(inward, link.h2d_pageable_bytes_per_s.value)
        waiting = apart / pageable
        waiting += 0.0 if is_read else apart / link.d2h_pageable_bytes_per_s.value
        ahead = weights - apart
        first = min(ahead, _first_group_bytes(component, group)) / inward
        computing = forward.compute_s + forward.memory_s + forward.launch_s
        return waiting + first + max(0.0, ahead / inward - first - computing)

    def _inward_bytes_per_s(self, link: Link, run: ComponentRun, group: GroupOffload) -> float:
        """A group that is pinned when it is its turn is copied once more, inside host RAM."""
        inward = link.h2d_pinned_bytes_per_s if group.pins else link.h2d_pageable_bytes_per_s
        if not group.from_disk or run.role == "autoencoder":  # which stays in RAM
            return inward.value
        disk = self._machine.host.disk_read_bytes_per_s
        return min(disk.value if disk else UNKNOWN_DISK_BYTES_PER_S, inward.value)

    def host_bytes(self, execution: Execution) -> int:
        """Host RAM that this process takes while the pipeline runs.

        Offloaded weights are all there between two generations; on a CPU the device's memory is
        the host's, and is counted as such.
        """
        if execution.placement in ("device", "device_map"):
            return PROCESS_BYTES
        if execution.placement == "group_offload":
            group = _group(execution)
            if group not in self._grouped:
                self._grouped[group] = self._grouped_bytes(group)
            return PROCESS_BYTES + self._grouped[group]
        return PROCESS_BYTES + self._workload.weight_bytes - self._moves(execution).staying_bytes

    def _grouped_bytes(self, group: GroupOffload) -> int:
        """Autoencoders stay in RAM, unpinned: they are read, and widened, without being called."""
        hooked = hooks_of(self._workload, "group_offload").hooked
        streamed = {component.name for component in self._streamed}
        unpinned = sum(self._components[name].weight_bytes for name in hooked - streamed)
        # What a stream copies is pinned first: PyTorch keeps those pages for the next group.
        kept = 0 if group.is_pinned or not group.overlaps else self._largest_pinned(group)
        if group.from_disk:
            return unpinned + kept
        unpinned += kept
        for component in self._streamed:
            pinned = 1 - _share_in_no_group(component, group) if group.is_pinned else 0.0
            unpinned += component.weight_bytes - int(pinned * component.weight_bytes)
        return unpinned + self.pinned_bytes(group)

    def _largest_pinned(self, group: GroupOffload) -> int:
        """What the largest group of all takes while it is pinned."""
        found = 0
        for component in self._streamed:
            if _is_by_layer(component, group):
                found = max(found, pinned_bytes(component.largest_leaf_bytes))
            elif component.block_bytes:
                share = max(component.block_bytes) / max(component.weight_bytes, 1)
                found = max(found, int(share * self._pinned[component.name]))
        return found

    def pinned_bytes(self, group: GroupOffload) -> int:
        """Of host RAM that is pinned for good: all groups that a stream copies."""
        if not group.is_pinned:
            return 0
        shares = ((c, 1 - _share_in_no_group(c, group)) for c in self._streamed)
        return sum(int(self._pinned[c.name] * share) for c, share in shares)

    def load(self, execution: Execution) -> LoadPrediction:
        """All weights are read first, then go where the execution wants them.

        safetensors maps files: the pages read are cache that the system can drop, so that only
        those in another dtype than their file take RAM: they are cast. Of a pipeline that is
        loaded already, nothing is read again: it may be on the device, with no copy in RAM.
        """
        weights = self._workload.weight_bytes
        on_device = self._loaded_bytes(execution)
        if self._workload.is_loaded:
            return LoadPrediction(on_device, self.host_bytes(execution), None)
        is_host = self._machine.device.kind == "cpu" or self._machine.device.unified_memory
        disk, link = self._machine.host.disk_read_bytes_per_s, self._machine.link
        seconds = None
        if disk is not None:
            leaving = weights if execution.placement == "device_map" else on_device
            crossing = leaving / link.module_h2d_bytes_per_s.value if link else 0.0
            seconds = weights / disk.value + crossing
        cast = sum(
            c.weight_bytes for c in self._workload.components if c.name not in self._workload.mapped
        )
        return LoadPrediction(on_device, PROCESS_BYTES + (0 if is_host else cast), seconds)

    def _loaded_bytes(self, execution: Execution) -> int:
        """Weights on the device before the first image."""
        if execution.placement == "device":
            return self._workload.weight_bytes
        if execution.placement == "device_map":
            return sum(self._components[name].weight_bytes for name in self.home(execution))
        return self._moves(execution).staying_bytes

    def _require_link(self, execution: Execution) -> Link:
        if self._machine.link is None:
            raise OptimizationError(
                f"{execution.placement} needs a link between host and device",
                f"{self._machine.name} has none: device and host share their memory",
            )
        return self._machine.link

    def _moves(self, execution: Execution) -> _Moves:
        key = (execution.placement, stays_narrow(execution))
        if key not in self._all_moves:
            self._all_moves[key] = _followed(self._workload, execution)
        return self._all_moves[key]


class Hooks(NamedTuple):
    """Which components accelerate's hooks move, and when.

    Attributes:
        chain: Each that is called sends the one before it here back to the host, wherever in the
            generation that was called.
        apart: Come when they are called.
        leave_before: With the first call of a component of that role, all leave; ``None`` where
            they leave after the image.
    """

    chain: tuple[str, ...]
    apart: tuple[str, ...]
    leave_before: Role | None

    @property
    def hooked(self) -> frozenset[str]:
        """All that are moved."""
        return frozenset((*self.chain, *self.apart))

    @property
    def before(self) -> dict[str, str]:
        """Component → the one before it in the chain."""
        return dict(zip(self.chain[1:], self.chain, strict=False))


def hooks_of(workload: Workload, placement: str) -> Hooks:
    """The hooks of diffusers' model offload, or of text encoders alone."""
    if placement != "encoder_offload":
        return Hooks(workload.offload_order, workload.offload_apart, None)
    return Hooks(text_encoders(workload), (), "denoiser")


def text_encoders(workload: Workload) -> tuple[str, ...]:
    """What reads the prompt, and pictures beside it: called before the first step only."""
    reading = {r.component for r in workload.runs_as("encoder") if "encoder" in r.component}
    return tuple(c.name for c in workload.components if c.name in reading)


class _Moves(NamedTuple):
    """What a placement moves.

    Attributes:
        hooked: Components.
        staying_bytes: Weights of the others, and what is not moved of these.
        of_runs: Each run's moves, its calls together, by its identity.
    """

    hooked: frozenset[str]
    staying_bytes: int
    of_runs: dict[int, Moved]


def _followed(workload: Workload, execution: Execution) -> _Moves:
    hooks = hooks_of(workload, execution.placement)
    hooked = hooks.hooked
    staying = sum(c.weight_bytes for c in workload.components if c.name not in hooked)
    if execution.placement == "sequential_offload":
        staying += sum(workload.component(name).unmoved_bytes for name in hooked)
    followed = _Followed(workload, hooks, staying, execution)
    runs = workload.runs
    total = {id(run): Moved() for run in runs}
    last = runs[-1]
    for phase in workload.phases:
        for repeat in phase.sequence:
            # After a pattern has come once, it finds the same there every time it comes back.
            for times in (1, repeat.times - 1)[: repeat.times]:
                for index in repeat.runs:
                    last = phase.runs[index]
                    total[id(last)] = total[id(last)].plus(followed.call(last), times)
    total[id(last)] = total[id(last)].plus(followed.after_image())
    return _Moves(hooked, staying, total)


class _Followed:
    """The hooks through one generation."""

    def __init__(
        self, workload: Workload, hooks: Hooks, staying_bytes: int, execution: Execution
    ) -> None:
        self._hooks = hooks
        self._before = hooks.before
        self._sizes = {name: workload.component(name).weight_bytes for name in hooks.hooked}
        self._staying = staying_bytes
        self._execution = execution
        self._here: dict[str, int] = {}

    def call(self, run: ComponentRun) -> Moved:
        """One call of a component."""
        name = run.component
        outward = self._here.pop(self._before.get(name, ""), 0)
        if run.role == self._hooks.leave_before:
            outward += self._all_leave()
        inward = 0
        wider = widened_bytes(run, self._execution)
        if name in self._sizes and name not in self._here:
            self._here[name] = self._sizes[name]
            inward = self._sizes[name] + wider
        resident = sum(self._here.values()) + self._staying + wider
        return Moved(resident, frozenset(self._here), inward, outward)

    def after_image(self) -> Moved:
        """diffusers takes everything off."""
        return Moved(outward_bytes=self._all_leave())

    def _all_leave(self) -> int:
        outward = sum(self._here.values())
        self._here.clear()
        return outward


def tensor_sizes(component: Component) -> tuple[int, ...]:
    """Bytes of its tensors, in the dtype that they rest in."""
    whole = sum(component.tensor_bytes)
    if not whole:
        return (component.weight_bytes,)
    return tuple(s * component.weight_bytes // whole for s in component.tensor_bytes)


@functools.lru_cache(maxsize=64)
def _all_pinned_bytes(sizes: tuple[int, ...]) -> int:
    """Kept, too."""
    return sum(map(pinned_bytes, sizes))


@functools.lru_cache(maxsize=64)
def _rounding_bytes(sizes: tuple[int, ...]) -> int:
    """Kept, because the same model is asked about again: on another machine, in another dtype."""
    return rounding_bytes(sizes)


def _group(execution: Execution) -> GroupOffload:
    return execution.group or GroupOffload()


def _groups_at_once(component: Component, run: ComponentRun, group: GroupOffload) -> int:
    """Weights on the device while one group computes: the next one too where it comes early.

    Blocks do not wait for an autoencoder's ``decode``: it is moved layer by layer at either level.
    """
    if run.role == "autoencoder" or _is_by_layer(component, group):
        layers = (run.trace.adjacent_layers or 2.0) if _overlaps(run, group) else 1.0
        return int(layers * component.largest_leaf_bytes)
    blocks = component.block_bytes
    rest = component.weight_bytes - sum(blocks)
    pairs = map(sum, itertools.pairwise(blocks)) if _overlaps(run, group) else ()
    return rest + max((*pairs, *blocks), default=0)


def _is_by_layer(component: Component, group: GroupOffload) -> bool:
    tied = "tied_layers" in component.abilities
    return group.by_layer(component.class_name, bool(component.block_bytes), tied)


def _first_group_bytes(component: Component, group: GroupOffload) -> int:
    """What the first group on a stream weighs."""
    if _is_by_layer(component, group):
        return component.largest_leaf_bytes
    return component.block_bytes[0] if component.block_bytes else 0


def _share_in_no_group(component: Component, group: GroupOffload) -> float:
    """What is in no block, of a component's weights: a group of its own that no stream copies."""
    if _is_by_layer(component, group):
        return 0.0
    return 1 - sum(component.block_bytes) / max(component.weight_bytes, 1)


def _overlaps(run: ComponentRun, group: GroupOffload) -> bool:
    """Pipelines change an autoencoder's dtype, of which a stream's copies know nothing."""
    return group.overlaps and run.role != "autoencoder"


def _widening(component: Component, run: ComponentRun, execution: Execution) -> float:
    return 1 + widened_bytes(run, execution) / max(component.weight_bytes, 1)
