"""Predict memory and time of an execution from the one trace.

Every constant here has a physical meaning. Phases are predicted per component run, and those
results are kept, since most candidate sets share them.
"""

from __future__ import annotations

from typing import NamedTuple

from autotune.decide import attention
from autotune.decide.attention import BYTES, Kernel
from autotune.decide.merging import MATCHING_LAUNCHES, Matching, matching, merged, merges
from autotune.decide.prediction import PhasePrediction, Prediction
from autotune.errors import OptimizationError
from autotune.optimizations.execution import Execution
from autotune.probe.machine import Figure, Machine
from autotune.units import MIB
from autotune.workload.workload import ComponentRun, Operator, Phase, Trace, Workload

CUBLAS_BYTES = int(8.125 * MIB)
"""cuBLAS's workspace per handle and stream in PyTorch (4096 KiB × 2 + 16 KiB × 8)."""

FRAGMENTATION = 0.10
"""Share of the activations that the caching allocator may lose in blocks it cannot reuse.
Published runs reserve 1.02 to 1.75 times what they allocate, but under pressure the allocator gives
unused blocks back before it fails, so only a part of that must be free."""

SEGMENT_BYTES = 20 * MIB
"""The allocator's segment for tensors of 1 to 10 MiB: the last one is half empty on average."""


class ForwardCost(NamedTuple):
    """One forward of one component on the device, weights in place."""

    compute_s: float
    memory_s: float
    launch_s: float
    activation_bytes: int
    workspace_bytes: int


class Predictor:
    """Predicts executions of one workload on one machine.

    Args:
        machine: Measured or from a datasheet.
        workload: Traced.
    """

    def __init__(self, machine: Machine, workload: Workload) -> None:
        self.machine = machine
        self.workload = workload
        self._components = {c.name: c for c in workload.components}
        self._forwards: dict[tuple[object, ...], ForwardCost] = {}

    def predict(self, execution: Execution) -> Prediction:
        """Memory and time of one generation run in this way.

        Raises:
            OptimizationError: the execution needs a code path that was not traced.
        """
        phases = tuple(self._phase(phase, execution) for phase in self.workload.phases)
        return Prediction(
            peak_bytes=max(p.peak_bytes for p in phases),
            needed_bytes=max(p.needed_bytes for p in phases),
            seconds=sum(p.seconds for p in phases),
            phases=phases,
        )

    def _phase(self, phase: Phase, execution: Execution) -> PhasePrediction:
        runs = [self._run(phase.name, run, execution) for run in phase.runs]
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
        )

    def _run(self, phase: str, run: ComponentRun, execution: Execution) -> PhasePrediction:
        forward = self._forward(phase, run, execution)
        resident = self._resident_bytes(run, execution) + run.upcast_bytes
        shares = [forward.compute_s, forward.memory_s, 0.0, forward.launch_s]
        compute, memory, _, launch = (s * run.calls for s in shares)
        transfer = self._transfer_s(run, execution)
        activation = forward.activation_bytes
        workspace = forward.workspace_bytes + self._fixed_bytes()
        margin = self._margin_bytes(activation)
        return PhasePrediction(
            name=phase,
            resident_bytes=resident,
            activation_bytes=activation,
            workspace_bytes=workspace,
            margin_bytes=margin,
            peak_bytes=resident + activation + workspace,
            needed_bytes=resident + activation + self._fixed_bytes() + margin,
            seconds=compute + memory + transfer + launch,
            compute_s=compute,
            memory_s=memory,
            transfer_s=transfer,
            launch_s=launch,
        )

    def _margin_bytes(self, activation_bytes: int) -> int:
        if self.machine.device.kind == "cpu":
            return 0  # malloc returns large blocks to the system
        return int(FRAGMENTATION * activation_bytes) + SEGMENT_BYTES

    def _fixed_bytes(self) -> int:
        return CUBLAS_BYTES if self.machine.device.kind == "cuda" else 0

    # ---- weights: where they are, and what moving them takes ------------------------------------

    def _resident_bytes(self, run: ComponentRun, execution: Execution) -> int:
        component = self._components[run.component]
        if execution.placement == "device":
            return self.workload.weight_bytes
        moved = set(self.workload.offload_order)
        staying = sum(c.weight_bytes for c in self.workload.components if c.name not in moved)
        if execution.placement == "model_offload":
            return component.weight_bytes + staying
        return component.largest_leaf_bytes + staying

    def _transfer_s(self, run: ComponentRun, execution: Execution) -> float:
        """Model offload moves a component in and out once; sequential every leaf at every call."""
        link = self.machine.link
        if execution.placement == "device" or run.component not in self.workload.offload_order:
            return 0.0
        if link is None:
            raise OptimizationError(
                f"{execution.placement} needs a link between host and device",
                f"{self.machine.name} has none: device and host share their memory",
            )
        component = self._components[run.component]
        if execution.placement == "model_offload":
            return (
                component.weight_bytes / link.module_h2d_bytes_per_s.value
                + component.weight_bytes / link.module_d2h_bytes_per_s.value
            )
        hook = self.machine.kernels.offload_hook_s
        per_call = component.weight_bytes / link.h2d_pageable_bytes_per_s.value
        per_call += component.leaf_count * (hook.value if hook else 0.0)
        return per_call * run.calls

    # ---- one forward ----------------------------------------------------------------------------

    def _forward(self, phase: str, run: ComponentRun, execution: Execution) -> ForwardCost:
        if phase == "encode":
            execution = Execution()  # transformers' encoders bring their own attention
        elif phase == "decode":
            execution = _decoding(execution)
        key = (
            phase,
            run.component,
            self._kernel(execution),
            execution.merge,
            execution.channels_last,
            execution.decode_variant,
        )
        cost = self._forwards.get(key)
        if cost is None:
            trace = self._trace(run, execution) if phase == "decode" else run.trace
            cost = self._forwards[key] = self._cost(trace, execution, phase)
        return cost

    def _trace(self, run: ComponentRun, execution: Execution) -> Trace:
        variant = execution.decode_variant
        if not variant or variant in run.variants:
            return run.variants.get(variant, run.trace)
        request = self.workload.request
        if execution.decode_tile >= max(request.height, request.width):
            sliced = "sliced" if execution.decode_sliced else ""
            return run.variants.get(sliced, run.trace)  # a tile larger than the image cuts nothing
        if not execution.decode_tile:
            return run.trace  # slicing one image
        known = ", ".join(v for v in run.variants if v.startswith("tiled")) or "none"
        raise OptimizationError(
            f"tiles of {execution.decode_tile} pixels are not traced at "
            f"{request.width}x{request.height}",
            f"traced: {known}",
        )

    def _kernel(self, execution: Execution) -> Kernel:
        if execution.attention_slices:
            return Kernel("sliced", execution.attention_slices)
        return Kernel(execution.attention or self.machine.default_attention)

    def _cost(self, trace: Trace, execution: Execution, phase: str) -> ForwardCost:
        kernel = Kernel("sdpa") if phase == "encode" else self._kernel(execution)
        total = _Sum(self.machine, execution.channels_last)
        peak = trace.activation_bytes
        for operator in trace.operators:
            merging: Matching | None = None
            if merges(execution.merge, operator, self.workload.latent_tokens):
                assert execution.merge is not None
                if operator.attention is not None:
                    element = BYTES.get(operator.dtype, 4)
                    merging = matching(operator.attention, operator.block_tokens, element)
                operator = merged(execution.merge, operator)
            peak = max(peak, operator.live_bytes + total.add(operator, kernel, merging))
        return total.cost(peak, trace)


class _Sum:
    """Adds up the operators of one forward."""

    def __init__(self, machine: Machine, channels_last: bool) -> None:
        self.machine = machine
        self.channels_last = channels_last
        self.compute_s = self.memory_s = 0.0
        self.launches = 0
        self.with_workspace = 0

    def add(self, operator: Operator, kernel: Kernel, merging: Matching | None) -> int:
        """Count one distinct operator.

        Returns:
            Bytes of its own that it needs while it runs.
        """
        self.launches += operator.count
        if operator.attention is not None:
            return self._add_attention(operator, kernel, merging)
        arithmetic = operator.flops / self._flops_per_s(operator) if operator.flops else 0.0
        traffic = operator.bytes / self.machine.kernels.memory_bytes_per_s.value
        if arithmetic > traffic:
            self.compute_s += arithmetic * operator.count
        else:
            self.memory_s += traffic * operator.count
        self.with_workspace = max(
            self.with_workspace, operator.live_bytes + self._workspace(operator)
        )
        return 0

    def _add_attention(self, operator: Operator, kernel: Kernel, merging: Matching | None) -> int:
        shape = operator.attention
        assert shape is not None
        own = attention.transient_bytes(kernel, shape, operator.dtype)
        self.compute_s += (
            attention.seconds(self.machine, kernel, shape, operator.dtype) * operator.count
        )
        self.launches += (attention.calls_per_operator(kernel, shape) - 1) * operator.count
        if merging is None:
            return own
        rate = self._rate(self.machine.kernels.matmul_flops_per_s, operator.dtype)
        self.compute_s += merging.flops / rate * operator.count
        self.memory_s += (
            merging.bytes / self.machine.kernels.memory_bytes_per_s.value * operator.count
        )
        self.launches += MATCHING_LAUNCHES * operator.count
        return max(own, merging.transient_bytes)

    def _flops_per_s(self, operator: Operator) -> float:
        kernels = self.machine.kernels
        if operator.kind != "convolution":
            return self._rate(kernels.matmul_flops_per_s, operator.dtype)
        if self.channels_last and operator.dtype in kernels.convolution_channels_last_flops_per_s:
            return kernels.convolution_channels_last_flops_per_s[operator.dtype].value
        return self._rate(kernels.convolution_flops_per_s, operator.dtype)

    @staticmethod
    def _rate(rates: dict[str, Figure], dtype: str) -> float:
        return (rates.get(dtype) or rates["float32"]).value

    def _workspace(self, operator: Operator) -> int:
        """What a convolution takes besides its tensors while memory is free.

        Tensor cores take NHWC: given NCHW, cuDNN converts input and output in its workspace. It is
        no condition: where the workspace cannot be had, PyTorch tries cuDNN's next plan.
        """
        is_convolution = operator.kind == "convolution" and self.machine.device.kind == "cuda"
        if not is_convolution or self.channels_last or not self._has_tensor_cores(operator.dtype):
            return 0
        return operator.in_bytes + operator.out_bytes

    def _has_tensor_cores(self, dtype: str) -> bool:
        capability = float(self.machine.device.compute_capability or 0)
        return capability >= (8.0 if dtype == "float32" else 7.0)

    def cost(self, activation_bytes: int, trace: Trace) -> ForwardCost:
        workspace = max(0, self.with_workspace - activation_bytes)
        return ForwardCost(
            self.compute_s, self.memory_s, self._launch_s(), activation_bytes, workspace
        )

    def _launch_s(self) -> float:
        """The CPU runs what it dispatches; other devices wait for the host only if it is slower."""
        host = self.launches * self.machine.kernels.dispatch_s.value
        if self.machine.device.kind == "cpu":
            return host
        return max(0.0, host - self.compute_s - self.memory_s)


def _decoding(execution: Execution) -> Execution:
    """What of an execution reaches the VAE: not slicing, whose setter it lacks, nor merging."""
    return Execution(
        attention=execution.attention,
        channels_last=execution.channels_last,
        decode_sliced=execution.decode_sliced,
        decode_tile=execution.decode_tile,
        placement=execution.placement,
    )


def budget_bytes(machine: Machine, vram_limit: int | None = None, reserve: int = 0) -> int:
    """Bytes that a pipeline may take: what is free now, less context and reserve."""
    free = machine.device.free_bytes
    if vram_limit is not None:
        free = min(free, vram_limit)
    return max(0, free - machine.context_bytes - reserve)
