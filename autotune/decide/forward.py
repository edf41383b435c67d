"""One forward of one component: operators to seconds and bytes, weights being in place."""

from __future__ import annotations

import functools
from typing import NamedTuple

import msgspec

from autotune.decide import attention, compiled, quantized, workspace
from autotune.decide.attention import BYTES, Kernel
from autotune.decide.corrections import Corrections, plain_operators
from autotune.decide.merging import (
    CPU_FLOPS_PER_VALUE,
    MATCHING_LAUNCHES,
    Matching,
    matching,
    merged,
    merges,
)
from autotune.decide.quantized import Scheme
from autotune.decide.step_caches import ALL_COMPUTED, Share
from autotune.optimizations.execution import Execution
from autotune.probe.machine import Figure, Machine
from autotune.workload.workload import GROUP_NORM, Operator, Region, Trace, Workload


class ForwardCost(NamedTuple):
    """One call.

    Attributes:
        compute_s: Operators bound by arithmetic.
        memory_s: Operators bound by memory bandwidth.
        launch_s: What the device waits for the host.
        host_s: What the host takes to dispatch it all.
        activation_bytes: At the peak.
        workspace_bytes: What libraries take on top of it.
        weight_reads: Operators that read weights: about one for each layer called.
        weight_reads_bytes: Weights that they read; tiles read them again.
    """

    compute_s: float
    memory_s: float
    launch_s: float
    host_s: float
    activation_bytes: int
    workspace_bytes: int
    weight_reads: int
    weight_reads_bytes: int


class Bound(NamedTuple):
    """Seconds of one operator call: bound by arithmetic, or by memory bandwidth."""

    compute_s: float
    memory_s: float

    @property
    def seconds(self) -> float:
        """One of the two is zero."""
        return self.compute_s + self.memory_s


_NO_TIME = Bound(0.0, 0.0)


class _Sees(NamedTuple):
    """What of an execution can change an operator: the kernel, token merging, the memory layout,
    a compiler, quantized weights; and the region, of which a part may be computed only."""

    attention: bool
    merging: bool
    layout: bool
    compiler: bool
    quantization: bool
    region: Region


class _Part(NamedTuple):
    """Several operators: seconds of all their calls, and the most that is alive at one of them."""

    compute_s: float
    memory_s: float
    host_s: float
    live_bytes: int
    live_bytes_with_workspace: int


class _Group(NamedTuple):
    """Operators that see the same, and what they come to, by what that was."""

    sees: _Sees
    operators: list[Operator]
    parts: dict[tuple[object, ...], _Part]


class _Split(NamedTuple):
    """A trace's operators by what they see, and the weights that they read."""

    trace: Trace
    groups: list[_Group]
    weight_reads: int
    weight_reads_bytes: int


class ForwardModel:
    """Costs of forwards on one machine.

    Args:
        machine: Its rates, and the operators that were replayed on it.
        workload: Whose traces are costed.
        alike: Operators of another request of the same model (``corrections.py``).
    """

    def __init__(
        self, machine: Machine, workload: Workload, alike: tuple[Operator, ...] = ()
    ) -> None:
        self._machine = machine
        self._latent_tokens = workload.latent_tokens
        self._known = (*plain_operators(workload), *alike)
        self._corrections = Corrections(
            machine.operators, ((o, self.rate_seconds(o)) for o in self._known)
        )
        self._splits: dict[int, _Split] = {}

    def rate_seconds(self, operator: Operator, *, channels_last: bool = False) -> float:
        """One call by rates alone, as diffusers runs it when nothing else is set."""
        plain = Kernel(self._machine.default_attention)
        return self._by_rates(operator, plain, channels_last).seconds

    def cost(
        self,
        trace: Trace,
        execution: Execution,
        kernel: Kernel,
        computed: Share = ALL_COMPUTED,
    ) -> ForwardCost:
        """Cost of one forward.

        Args:
            trace: The component's operators.
            execution: Token merging, memory format, compiler, quantization.
            kernel: The attention implementation.
            computed: How much of its blocks is computed, on average.
        """
        split = self._split(trace)
        compute = memory = host = 0.0
        peak, with_workspace = trace.activation_bytes, 0
        shares = {"": 1.0, "block": computed.blocks, "attention": computed.attention}
        for group in split.groups:
            part, left = self._part(group, execution, kernel), shares[group.sees.region]
            compute += part.compute_s * left
            memory += part.memory_s * left
            host += part.host_s * left
            peak = max(peak, part.live_bytes)
            with_workspace = max(with_workspace, part.live_bytes_with_workspace)
        return ForwardCost(
            compute,
            memory,
            self._launch_s(host, compute + memory),
            host,
            peak,
            max(0, with_workspace - peak),
            split.weight_reads,
            split.weight_reads_bytes,
        )

    def _split(self, trace: Trace) -> _Split:
        """The trace's operators by what they see of an execution: most see nothing of it."""
        found = self._splits.get(id(trace))
        if found is None:
            operators: dict[_Sees, list[Operator]] = {}
            for operator in trace.operators:
                operators.setdefault(_seen_by(operator), []).append(operator)
            found = self._splits[id(trace)] = _Split(
                trace,
                [_Group(sees, alike, {}) for sees, alike in operators.items()],
                weight_reads=sum(o.count for o in trace.operators if o.weight_bytes),
                weight_reads_bytes=sum(o.count * o.weight_bytes for o in trace.operators),
            )
        return found

    def _part(self, group: _Group, execution: Execution, kernel: Kernel) -> _Part:
        """What the operators of a group come to; kept for other executions."""
        sees = group.sees
        is_quantized = sees.quantization and execution.quantization
        seen = (
            kernel if sees.attention else None,
            execution.merge if sees.merging else None,
            execution.channels_last and sees.layout,
            execution.compiled if sees.compiler else "",
            (execution.quantization, bool(execution.compiled)) if is_quantized else None,
        )
        part = group.parts.get(seen)
        if part is None:
            part = group.parts[seen] = self._sum(group.operators, execution, kernel)
        return part

    def _sum(self, operators: list[Operator], execution: Execution, kernel: Kernel) -> _Part:
        compute = memory = host = 0.0
        live = with_workspace = 0
        dispatch_s = self._machine.kernels.dispatch_s.value
        for operator in operators:
            call, own, launches = self._operator(operator, execution, kernel)
            compute += call.compute_s * operator.count
            memory += call.memory_s * operator.count
            host += launches * operator.count * dispatch_s
            live = max(live, operator.live_bytes + own)
            taken = workspace.convolution_bytes(self._machine, operator, execution.channels_last)
            with_workspace = max(with_workspace, operator.live_bytes + taken)
        return _Part(compute, memory, host, live, with_workspace)

    def _launch_s(self, host: float, device: float) -> float:
        """The CPU runs what it dispatches; other devices wait for the host if it is slower."""
        return host if self._machine.device.kind == "cpu" else max(0.0, host - device)

    def with_more(self, cost: ForwardCost, *, memory_s: float, host_s: float) -> ForwardCost:
        """The same forward with more memory traffic and work of the host, or less, but not none."""
        memory, host = max(0.0, cost.memory_s + memory_s), max(0.0, cost.host_s + host_s)
        launch = self._launch_s(host, cost.compute_s + memory)
        return cost._replace(memory_s=memory, host_s=host, launch_s=launch)

    def scaled(
        self, cost: ForwardCost, time: float, launch: float, activations: float
    ) -> ForwardCost:
        """The same forward with factors on what device and host take, and on its activations."""
        compute, memory, host = cost.compute_s * time, cost.memory_s * time, cost.host_s * launch
        return cost._replace(
            compute_s=compute,
            memory_s=memory,
            host_s=host,
            launch_s=self._launch_s(host, compute + memory),
            activation_bytes=int(cost.activation_bytes * activations),
        )

    def _operator(
        self, operator: Operator, execution: Execution, kernel: Kernel
    ) -> tuple[Bound, int, float]:
        """Seconds of one call, bytes of its own while it runs, and kernels launched."""
        factor = self._factor(operator, execution.channels_last)
        operator, launches = compiled.fused(operator, execution)
        extra, own = _NO_TIME, 0
        merge = execution.merge
        if merge is not None and merges(merge, operator, self._latent_tokens):
            if operator.attention is not None:
                element = BYTES.get(operator.dtype, 4)
                work = matching(operator.attention, operator.block_tokens, element)
                extra, own = self._matching(work, operator), work.transient_bytes
                launches += MATCHING_LAUNCHES
            operator = merged(merge, operator)
        if operator.attention is not None:
            own = max(own, attention.transient_bytes(kernel, operator.attention, operator.dtype))
            launches += attention.calls_per_operator(kernel, operator.attention) - 1
        scheme = quantized.scheme_of(execution, operator)
        if scheme is not None:
            operator, unpacking = self._quantized(operator, scheme, bool(execution.compiled))
            extra = Bound(extra.compute_s, extra.memory_s + unpacking)
            launches += 0 if execution.compiled else scheme.launches
        call = self._by_rates(operator, kernel, execution.channels_last)
        compute = call.compute_s * factor + extra.compute_s
        memory = call.memory_s * factor + extra.memory_s
        return Bound(compute, memory), own, launches

    def _factor(self, operator: Operator, channels_last: bool) -> float:
        """From rates to what it takes."""
        factor = self._corrections.factor(operator)
        if channels_last and operator.depends_on_layout:
            factor *= self._in_channels_last.factor(operator.in_channels_last())
        return factor

    @functools.cached_property
    def _in_channels_last(self) -> Corrections:
        """Of that layout, beside those of the other one."""
        estimates = (
            (
                operator.in_channels_last(),
                self.rate_seconds(operator, channels_last=True)
                * self._corrections.factor(operator),
            )
            for operator in self._known
            if operator.depends_on_layout
        )
        return Corrections(self._machine.operators, estimates)

    def _by_rates(self, operator: Operator, kernel: Kernel, channels_last: bool) -> Bound:
        if operator.attention is not None:
            seconds = attention.seconds(self._machine, kernel, operator.attention, operator.dtype)
            return Bound(seconds, 0.0)
        traffic = operator.bytes / self._machine.kernels.memory_bytes_per_s.value
        arithmetic = operator.flops / self._flops_per_s(operator, channels_last)
        return Bound(arithmetic, 0.0) if arithmetic > traffic else Bound(0.0, traffic)

    def _quantized(
        self, operator: Operator, scheme: Scheme, is_compiled: bool
    ) -> tuple[Operator, float]:
        """The product as it is then computed, and seconds to unpack what it reads."""
        element = BYTES.get(operator.dtype, 4)
        rates = self._machine.kernels.matmul_flops_per_s
        product = msgspec.structs.replace(
            operator,
            bytes=operator.bytes
            - quantized.saved_bytes(scheme.name, operator.weight_bytes, element),
            dtype=scheme.dtype if scheme.dtype in rates else operator.dtype,
        )
        if is_compiled:
            return product, 0.0
        traffic = quantized.added_bytes(scheme, operator, element)
        return product, traffic / self._machine.kernels.memory_bytes_per_s.value

    def _matching(self, work: Matching, operator: Operator) -> Bound:
        kernels, kin = self._machine.kernels, self._corrections
        product = work.flops / _rate(kernels.matmul_flops_per_s, operator.dtype)
        traffic = work.bytes / kernels.memory_bytes_per_s.value
        moving = 0.0
        if self._machine.device.kind == "cpu":
            moving = (
                work.values * CPU_FLOPS_PER_VALUE / _rate(kernels.matmul_flops_per_s, "float32")
            )
        return Bound(
            product * kin.of_kind("matmul", operator.dtype) + moving,
            traffic * kin.of_kind("memory", operator.dtype),
        )

    def _flops_per_s(self, operator: Operator, channels_last: bool) -> float:
        kernels = self._machine.kernels
        if operator.kind != "convolution":
            return _rate(kernels.matmul_flops_per_s, operator.dtype)
        in_layout = kernels.convolution_channels_last_flops_per_s
        if channels_last and operator.dtype in in_layout and operator.is_over_images:
            return in_layout[operator.dtype].value
        return _rate(kernels.convolution_flops_per_s, operator.dtype)


def _seen_by(operator: Operator) -> _Sees:
    return _Sees(
        attention=operator.attention is not None,
        merging=operator.block_tokens > 0,
        layout=operator.kind == "convolution" or operator.name == GROUP_NORM,
        compiler=operator.kind == "memory",
        quantization=operator.kind == "matmul" and operator.weight_bytes > 0,
        region=operator.region,
    )


def _rate(rates: dict[str, Figure], dtype: str) -> float:
    return (rates.get(dtype) or rates["float32"]).value
