"""Predict memory and time of an execution from the one trace.

Every constant here has a physical meaning. A phase is predicted once for all executions that look
the same from there (``scope.py``), since most candidate sets share them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from autotune.decide import casting, compiled, placement, quantized, recast, step_caches
from autotune.decide.attention import Kernel
from autotune.decide.casting import Storage, storage_of, stored_in
from autotune.decide.forward import ForwardCost, ForwardModel
from autotune.decide.history import History
from autotune.decide.placement import Weights
from autotune.decide.prediction import (
    PROCESS_BYTES,
    Elsewhere,
    LoadPrediction,
    PhasePrediction,
    Prediction,
)
from autotune.decide.residuals import Correction, Look, OfAPhase, residuals_of
from autotune.decide.scope import WHERE, work_reader
from autotune.decide.step_caches import ALL_COMPUTED, Share
from autotune.decide.workspace import library_bytes
from autotune.errors import OptimizationError
from autotune.optimizations.execution import Execution, StepCache
from autotune.optimizations.step_caches import GUIDED_IN_BATCH
from autotune.probe.machine import Machine
from autotune.units import MIB
from autotune.workload.workload import ComponentRun, Phase, Trace, Workload


class Fragmentation(NamedTuple):
    """What the caching allocator may lose: a share of the activations, and bytes besides."""

    share: float
    bytes: int


FRAGMENTATION = {
    "device": Fragmentation(0.55, 64 * MIB),
    "device_map": Fragmentation(0.55, 64 * MIB),
    "encoder_offload": Fragmentation(0.55, 256 * MIB),
    "model_offload": Fragmentation(0.30, 224 * MIB),
    "sequential_offload": Fragmentation(0.30, 224 * MIB),
    "group_offload": Fragmentation(0.30, 224 * MIB),
}
"""Memory that is free, but in pieces too small, though PyTorch gives unused segments back before it
fails. Most of it where the cache is kept from call to call, with what is left of the last phase
between what the next one needs; offload hooks empty it, but leave half-empty segments of 2 and 20
MiB. ``scripts/simulate_fragmentation.py`` replays whole generations: no less suffices for any."""

HELD_ON_CPU = Fragmentation(0.02, 2 * MIB)
"""What a pipeline holds between its modules is in no trace: embeddings, latents, pictures. 2 to 3
MiB in small pipelines whose decodes take 100; on a GPU the margin for fragmentation covers it."""

ESTIMATE_MARGIN = 1.0
"""Share of the activations to keep free on top, where they are a guess from the weights."""


class Path(NamedTuple):
    """One forward as an execution runs it."""

    trace: Trace
    kernel: Kernel
    channels_last: bool


class _Memory(NamedTuple):
    """Bytes on one GPU while a component runs; ``fixed`` is the workspace not done without."""

    resident: int
    activation: int
    workspace: int
    margin: int
    fixed: int

    @property
    def needed(self) -> int:
        """What must be free."""
        return self.resident + self.activation + self.fixed + self.margin


def _most_elsewhere(runs: list[PhasePrediction]) -> tuple[Elsewhere, ...]:
    """Of each other GPU, the run that needs most of it; all runs know the same GPUs."""
    return tuple(
        max(of_gpu, key=lambda e: e.needed_bytes)
        for of_gpu in zip(*(r.elsewhere for r in runs), strict=True)
    )


class Predictor:
    """Predicts executions of one workload on one machine.

    Args:
        machine: Measured or from a datasheet.
        workload: Traced.
        images: Generations over which is spread what is done once.
        history: What the machine taught about the workload.
    """

    def __init__(
        self,
        machine: Machine,
        workload: Workload,
        images: int = 1,
        history: History | None = None,
    ) -> None:
        if not machine.maps_files:
            workload = msgspec.structs.replace(workload, mapped=(), mappable=())
        self.machine = machine
        self.workload = workload
        self.images = images
        self.history = history or History()
        self._components = {c.name: c for c in workload.components}
        self._library_bytes = library_bytes(machine)
        self._hosts: dict[tuple[object, ...], tuple[LoadPrediction, int]] = {}
        self._extra_s: dict[tuple[int, str], float] = {}
        self._cached: dict[tuple[int, StepCache], int] = {}
        self._stored: dict[Storage, Weights] = {}
        self._model = ForwardModel(machine, workload, self.history.alike)
        self._recast: dict[tuple[int, str], Trace] = {}
        self._forwards: dict[tuple[object, ...], ForwardCost] = {}
        roles = {id(p): frozenset(r.role for r in p.runs) for p in workload.phases}
        attention = machine.default_attention
        self._works = {p: work_reader(roles[p], attention) for p in roles}
        self._own_works = {p: work_reader(roles[p], attention, weightless=True) for p in roles}
        self._raw_phases: dict[tuple[int, Look], PhasePrediction] = {}
        self._phases: dict[tuple[int, Look], PhasePrediction] = {}

    def predict(self, execution: Execution) -> Prediction:
        """Memory and time of one generation run in this way.

        Raises:
            OptimizationError: the execution needs a code path that was not traced.
        """
        phases = self.phases(execution)
        load, running = self._host(execution)
        return Prediction(
            peak_bytes=max(p.peak_bytes for p in phases),
            needed_bytes=max(load.peak_bytes, *(p.needed_bytes for p in phases)),
            seconds=sum(p.seconds for p in phases),
            phases=phases,
            load=load,
            host_bytes=max(load.host_bytes, running),
            first_image_extra_s=self._first_image_extra_s,
            images=self.images,
        )

    def around(self, execution: Execution) -> tuple[int, int]:
        """Of what ``predict`` gives: device memory to load it, and host RAM at any time."""
        load, running = self._host(execution)
        return load.peak_bytes, max(load.host_bytes, running)

    def _host(self, execution: Execution) -> tuple[LoadPrediction, int]:
        """Loading, and host RAM while it runs: a matter of where weights are, and how stored."""
        key = (storage_of(execution), WHERE(execution))
        if key not in self._hosts:
            weights = self.weights(execution)
            running = weights.host_bytes(execution) + self._copies(execution)
            peak = self._loading_bytes(execution)
            load = msgspec.structs.replace(weights.load(execution), host_bytes=peak)
            self._hosts[key] = (load, running)
        return self._hosts[key]

    @property
    def _is_host(self) -> bool:
        return self.machine.device.kind == "cpu" or self.machine.device.unified_memory

    def _loading_bytes(self, execution: Execution) -> int:
        """Host RAM until the weights are where they are to be.

        They are read as they are on the disk, and all are there when some are narrowed.
        """
        as_read = self.weights(Execution()).load(execution).host_bytes
        if self._is_host:
            return as_read
        storage = storage_of(execution)
        if self.workload.is_loaded:
            return max(as_read, PROCESS_BYTES + casting.reading_bytes(self.workload, storage))
        return as_read + casting.narrowing_bytes(self.workload, storage)

    def _copies(self, execution: Execution) -> int:
        """Host RAM for the weights as they were, without which there would be no way back."""
        if self._is_host:
            return 0
        return casting.copied_bytes(self.workload, storage_of(execution))

    def weights(self, execution: Execution) -> Weights:
        """The weights as this execution stores them."""
        storage = storage_of(execution)
        weights = self._stored.get(storage)
        if weights is None:
            weights = Weights(self.machine, stored_in(self.workload, storage))
            self._stored[storage] = weights
        return weights

    @functools.cached_property
    def _first_image_extra_s(self) -> float | None:
        """Each distinct operator's first call, as replayed; ``None`` where none was."""
        keys = {o.key for r in self.workload.runs for o in r.trace.operators}
        replayed = (self.machine.operators.get(key) for key in keys)
        extras = [t.first_extra_s for t in replayed if t and t.first_extra_s is not None]
        return sum(extras) if extras else None

    def phases(self, execution: Execution) -> tuple[PhasePrediction, ...]:
        """Of what ``predict`` gives."""
        return tuple([self._phase(phase, execution) for phase in self.workload.phases])

    def phase(self, index: int, execution: Execution) -> PhasePrediction:
        """One phase of what ``predict`` gives."""
        return self._phase(self.workload.phases[index], execution)

    def _phase(self, phase: Phase, execution: Execution) -> PhasePrediction:
        look = Look(self._works[id(phase)](execution), WHERE(execution))
        seen = self.residuals.get(phase.name)
        if seen is None:
            return self._raw_phase(phase, look, execution)
        key = (id(phase), look)
        found = self._phases.get(key)
        if found is None:
            raw = self._raw_phase(phase, look, execution)
            found = self._phases[key] = seen.correction(look, raw).of(raw)
        return found

    def _raw_phase(self, phase: Phase, look: Look, execution: Execution) -> PhasePrediction:
        """As it is predicted whatever runs have shown."""
        key = (id(phase), look)
        raw = self._raw_phases.get(key)
        if raw is None:
            raw = self._raw_phases[key] = self._predict_phase(phase, execution)
        return raw

    @functools.cached_property
    def residuals(self) -> dict[str, OfAPhase]:
        """What verified runs have shown, by phase; empty where there were none."""
        if not self.history.observations:
            return {}
        return residuals_of(self.history, self._raw)

    def _raw(self, execution: Execution) -> Iterator[tuple[Look, PhasePrediction]]:
        for phase in self.workload.phases:
            look = Look(self._works[id(phase)](execution), WHERE(execution))
            yield look, self._raw_phase(phase, look, execution)

    def corrections(self, execution: Execution) -> dict[str, Correction]:
        """What verified runs change in the prediction of each phase, where there were any."""
        return {
            raw.name: self.residuals[raw.name].correction(look, raw)
            for look, raw in self._raw(execution)
            if raw.name in self.residuals
        }

    def _predict_phase(self, phase: Phase, execution: Execution) -> PhasePrediction:
        runs = [self.run(phase.name, run, execution) for run in phase.runs]
        if len(runs) == 1:
            return runs[0]
        largest = max(runs, key=lambda r: r.needed_bytes)
        compute, memory, transfer, launch = (
            sum(getattr(r, share) for r in runs)
            for share in ("compute_s", "memory_s", "transfer_s", "launch_s")
        )
        return PhasePrediction(
            name=phase.name,
            resident_bytes=largest.resident_bytes,
            activation_bytes=largest.activation_bytes,
            workspace_bytes=largest.workspace_bytes,
            margin_bytes=largest.margin_bytes,
            peak_bytes=max(r.peak_bytes for r in runs),
            needed_bytes=largest.needed_bytes,
            seconds=compute + memory + transfer + launch,
            compute_s=compute,
            memory_s=memory,
            transfer_s=transfer,
            launch_s=launch,
            once_s=sum(r.once_s for r in runs),
            elsewhere=_most_elsewhere(runs),
        )

    def costed(self, index: int, execution: Execution) -> object:
        """What of an execution ``costs`` depends on: where it is the same, so are they.

        Where runs were verified that is all of the work, by which they are known again.
        """
        phase = self.workload.phases[index]
        works = self._works if phase.name in self.residuals else self._own_works
        return works[id(phase)](execution)

    def costs(self, index: int, execution: Execution) -> tuple[float, ...]:
        """What a phase costs wherever its weights are: where none is higher, the phase is no worse.

        Not in a unit: for each run, seconds of device and host, bytes, and what is done once. What
        was run before has a correction of its own, and is no worse than nothing but itself.
        """
        phase = self.workload.phases[index]
        seen = self.residuals.get(phase.name)
        rank = seen.rank(self._works[id(phase)](execution)) if seen else 0
        found: list[float] = [rank, -rank]
        for run in phase.runs:
            forward = self._with_effects(self._forward(run, execution), run, execution)
            found += (
                forward.compute_s + forward.memory_s,
                forward.host_s,
                forward.activation_bytes,
                forward.workspace_bytes if self._takes_workspace else 0,
                forward.weight_reads,
                forward.weight_reads_bytes,
                placement.widened_bytes(run, execution),
                self._kept_bytes(run, execution),
                self._once_s(run, execution),
            )
        return tuple(found)

    def run(self, phase: str, run: ComponentRun, execution: Execution) -> PhasePrediction:
        """All calls of one run of the workload, as if they were the whole of their phase."""
        forward = self._forward(run, execution)
        weights = self.weights(execution)
        forward = self._with_hooks(forward, run, execution)
        forward = self._with_effects(forward, run, execution)
        compute, memory = forward.compute_s * run.calls, forward.memory_s * run.calls
        launch = forward.launch_s * run.calls
        transfer = weights.transfer_s(run, execution, forward)
        resident = weights.resident_bytes(run, execution)
        rounding = weights.rounding_bytes(run, execution)
        gpu = weights.gpu_of(run, execution)
        device = self._memory(run, execution, forward if gpu is None else None, resident, rounding)
        elsewhere = []
        for visit in weights.visits(run, execution):
            computed = forward if gpu == visit.gpu else None
            there = self._memory(run, execution, computed, *visit[1:])
            elsewhere.append(Elsewhere(visit.gpu, there.resident, there.activation, there.needed))
        return PhasePrediction(
            name=phase,
            resident_bytes=device.resident,
            activation_bytes=device.activation,
            workspace_bytes=device.workspace,
            margin_bytes=device.margin,
            peak_bytes=device.resident + device.activation + device.workspace,
            needed_bytes=device.needed,
            seconds=compute + memory + transfer + launch,
            compute_s=compute,
            memory_s=memory,
            transfer_s=transfer,
            launch_s=launch,
            once_s=self._once_s(run, execution),
            elsewhere=tuple(elsewhere),
        )

    def _memory(
        self,
        run: ComponentRun,
        execution: Execution,
        forward: ForwardCost | None,
        resident: int,
        rounding: int,
    ) -> _Memory:
        """Of one GPU, on which the run computes or, without ``forward``, waits."""
        fixed = self._library_bytes + rounding
        if forward is None:
            return _Memory(resident, 0, fixed, self._margin_bytes(resident, 0, execution), fixed)
        activation = forward.activation_bytes
        margin = self._margin_bytes(resident, activation, execution)
        if run.is_estimated:
            margin += int(ESTIMATE_MARGIN * activation)
        resident += self._kept_bytes(run, execution)
        workspace = forward.workspace_bytes + fixed
        if self._takes_workspace:
            fixed = workspace
        return _Memory(resident, activation, workspace, margin, fixed)

    @property
    def _takes_workspace(self) -> bool:
        """Whether libraries cannot do without their workspace: oneDNN has no other way."""
        return self.machine.device.kind == "cpu"

    def _once_s(self, run: ComponentRun, execution: Execution) -> float:
        """What is done before the first image, for this run of the workload."""
        once = sum([e.once_s for e in execution.effects if e.role == run.role])
        if run.role == "denoiser":
            once += compiled.compile_s(self.machine, run.trace, execution)
        return once

    def _kept_bytes(self, run: ComponentRun, execution: Execution) -> int:
        """What stays on the device from call to call, besides weights."""
        kept = sum([e.extra_bytes for e in execution.effects if e.role == run.role])
        if execution.step_cache is not None:
            kept += self._cached_bytes(run, execution.step_cache)
        return kept

    def _cached_bytes(self, run: ComponentRun, cache: StepCache) -> int:
        """What a step cache keeps: pipelines let go of it when the image is done, not before."""
        key = (id(run), cache)
        if key not in self._cached:
            runs = self.workload.runs_as("denoiser") if run.entry == "decode" else (run,)
            passes = self.workload.guided_passes
            self._cached[key] = sum(
                step_caches.kept_bytes(cache, r.trace, passes, self._guided_in_batch)
                for r in runs
                if r.role == "denoiser"
            )
        return self._cached[key]

    def _with_effects(
        self, forward: ForwardCost, run: ComponentRun, execution: Execution
    ) -> ForwardCost:
        """The same call as optimizations of other packages say that they change it."""
        for effect in [e for e in execution.effects if e.role == run.role]:
            forward = self._model.scaled(forward, effect.time, effect.launch, effect.activations)
        return forward

    def _with_hooks(
        self, forward: ForwardCost, run: ComponentRun, execution: Execution
    ) -> ForwardCost:
        """The same call with what hooks add that move or widen each layer's weights."""
        memory = host = 0.0
        fuses = execution.fused_projections and run.role == "denoiser"
        if not (execution.storage_dtype or execution.group or fuses):
            return forward
        component = self._components[run.component]
        if execution.storage_dtype and run.role == "denoiser":
            dtype = self.workload.request.dtype
            memory += casting.memory_s(self.machine, component, dtype)
            host += self._casting_host_s(run)
        if fuses:
            host -= component.fusable_products * self._fused_product_s
            if not execution.compiled:
                memory -= self._shared_s(run, execution.quantization)
        if execution.group is not None:
            host += placement.group_host_s(self.machine, component, execution.group)
        return self._model.with_more(forward, memory_s=memory, host_s=host)

    @property
    def _fused_product_s(self) -> float:
        """What the host saves with each product that is none of its own any more: its launch.

        Not its module's Python: taking the one result apart takes as long (an attention layer took
        93.1 µs with three products and 92.3 µs with one, where a bare operator took 2.5 µs).
        """
        launch = self.machine.kernels.launch_s
        return launch.value if launch and self.machine.device.kind != "cpu" else 0.0

    def _casting_host_s(self, run: ComponentRun) -> float:
        key = (id(run), "")
        if key not in self._extra_s:
            self._extra_s[key] = casting.host_s(self.machine, run.trace)
        return self._extra_s[key]

    def _shared_s(self, run: ComponentRun, quantization: str) -> float:
        """What fused projections narrow once instead of three times, in seconds of one call."""
        key = (id(run), quantization or "none")
        if key not in self._extra_s:
            shared = quantized.shared_bytes(quantization, run.trace)
            self._extra_s[key] = shared / self.machine.kernels.memory_bytes_per_s.value
        return self._extra_s[key]

    def _margin_bytes(self, resident: int, activation: int, execution: Execution) -> int:
        if self.machine.device.kind == "cpu":  # malloc returns large blocks to the system
            return int(HELD_ON_CPU.share * activation) + HELD_ON_CPU.bytes
        lost = FRAGMENTATION[execution.placement]
        # Segments are no emptier than half: no more is lost in them than is held.
        return int(lost.share * activation) + min(lost.bytes, resident + activation)

    # ---- one forward ----------------------------------------------------------------------------

    def _forward(self, run: ComponentRun, execution: Execution) -> ForwardCost:
        execution, kernel = self._as_run(run, execution)
        key = (
            id(run),
            kernel,
            execution.merge,
            execution.channels_last,
            execution.decode_variant,
            execution.compiled,
            execution.quantization,
            execution.step_cache,
            execution.decode_dtype,
            execution.decoder,
        )
        cost = self._forwards.get(key)
        if cost is None:
            trace = self._trace(run, execution)
            share = self._computed(run, execution)
            cost = self._forwards[key] = self._model.cost(trace, execution, kernel, share)
        return cost

    def _computed(self, run: ComponentRun, execution: Execution) -> Share:
        """How much of a denoiser's blocks is computed."""
        if execution.step_cache is None or run.role != "denoiser":
            return ALL_COMPUTED
        component = self._components[run.component]
        steps = self.workload.request.steps
        return step_caches.share_computed(
            execution.step_cache, steps, component, self._guided_in_batch
        )

    @property
    def _guided_in_batch(self) -> bool:
        return self.workload.pipeline in GUIDED_IN_BATCH

    def path(self, run: ComponentRun, execution: Execution) -> Path:
        """What this run of the workload executes.

        Raises:
            OptimizationError: the execution needs a code path that was not traced.
        """
        execution, kernel = self._as_run(run, execution)
        return Path(self._trace(run, execution), kernel, execution.channels_last)

    def _as_run(self, run: ComponentRun, execution: Execution) -> tuple[Execution, Kernel]:
        """What of an execution reaches this run, and its attention."""
        if run.role == "encoder":  # transformers' encoders bring their own attention
            return Execution(), Kernel("sdpa")
        if run.role == "autoencoder":
            execution = self._decoding(execution)
        elif execution.channels_last and execution.group and execution.group.from_disk:
            # Files have no layout. Autoencoders are not written to any.
            execution = msgspec.structs.replace(execution, channels_last=False)
        return execution, self._kernel(execution)

    def _decoding(self, execution: Execution) -> Execution:
        """What of an execution reaches the VAE: not slicing, whose setter it lacks, nor merging.

        Its one wide head stays with PyTorch's kernel where there is one.
        """
        has_sdpa = self.machine.default_attention == "sdpa"
        return Execution(
            attention="" if has_sdpa else execution.attention,
            channels_last=execution.channels_last,
            decode_sliced=execution.decode_sliced,
            decode_tile=execution.decode_tile,
            decode_dtype=execution.decode_dtype,
            decoder=execution.decoder,
            placement=execution.placement,
        )

    def _trace(self, run: ComponentRun, execution: Execution) -> Trace:
        trace = self._variant(run, execution)
        if run.role != "autoencoder" or not (execution.decode_dtype and run.upcast_bytes):
            return trace
        key = (id(trace), execution.decode_dtype)
        if key not in self._recast:
            self._recast[key] = recast.recast(trace, execution.decode_dtype)
        return self._recast[key]

    def _variant(self, run: ComponentRun, execution: Execution) -> Trace:
        if run.role != "autoencoder":
            return run.trace
        if execution.decode_tile:
            self._require_tiles(execution.decode_tile)
        return run.switched(execution.decode_variant)

    def _require_tiles(self, tile: int) -> None:
        """Tiles larger than the image cut nothing; the others must have been traced."""
        request = self.workload.request
        variant = f"tiled:{tile}"
        if tile >= max(request.height, request.width):
            return
        runs = self.workload.runs
        refused = next((r.refused[variant] for r in runs if variant in r.refused), "")
        known = {v for r in runs for v in r.variants if v.startswith("tiled")}
        if refused or variant not in known:
            size = f"{request.width}x{request.height}"
            raise OptimizationError(
                refused or f"tiles of {tile} pixels are not traced at {size}",
                f"traced: {', '.join(sorted(known)) or 'none'}",
            )

    def _kernel(self, execution: Execution) -> Kernel:
        if execution.attention_slices:
            return Kernel("sliced", execution.attention_slices)
        return Kernel(execution.attention or self.machine.default_attention)
