"""One forward of one component: operators to seconds and bytes, weights being in place."""

from __future__ import annotations

from typing import NamedTuple

from autotune.decide import attention, workspace
from autotune.decide.attention import BYTES, Kernel
from autotune.decide.corrections import Corrections
from autotune.decide.merging import MATCHING_LAUNCHES, Matching, matching, merged, merges
from autotune.optimizations.execution import Execution
from autotune.probe.machine import Figure, Machine
from autotune.workload.workload import Operator, Trace, Workload


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

    def scaled(self, factor: float) -> Bound:
        """Both times a factor."""
        return Bound(self.compute_s * factor, self.memory_s * factor)


class _Sees(NamedTuple):
    """What of an execution can change an operator: the kernel, token merging, the memory layout."""

    attention: bool
    merging: bool
    layout: bool


class _Split(NamedTuple):
    """A trace's operators by what they see, and the weights that they read."""

    trace: Trace
    operators: dict[_Sees, list[Operator]]
    weight_reads: int
    weight_reads_bytes: int


class _Part(NamedTuple):
    """Several operators: seconds of all their calls, and the most that is alive at one of them."""

    compute_s: float
    memory_s: float
    host_s: float
    live_bytes: int
    live_bytes_with_workspace: int


class ForwardModel:
    """Costs of forwards on one machine.

    Args:
        machine: Its rates, and the operators that were replayed on it.
        workload: Whose traces are costed.
    """

    def __init__(self, machine: Machine, workload: Workload) -> None:
        self._machine = machine
        self._latent_tokens = workload.latent_tokens
        self._corrections = Corrections(machine.operators, workload, self.rate_seconds)
        self._splits: dict[int, _Split] = {}
        self._parts: dict[tuple[object, ...], _Part] = {}

    def rate_seconds(self, operator: Operator) -> float:
        """One call by rates alone, as diffusers runs it when nothing is set."""
        plain = Kernel(self._machine.default_attention)
        return self._by_rates(operator, plain, channels_last=False).seconds

    def cost(self, trace: Trace, execution: Execution, kernel: Kernel) -> ForwardCost:
        """Cost of one forward.

        Args:
            trace: The component's operators.
            execution: Token merging and memory format.
            kernel: The attention implementation.
        """
        split = self._split(trace)
        parts = [self._part(trace, sees, execution, kernel) for sees in split.operators]
        compute, memory, host = (
            sum(getattr(p, share) for p in parts) for share in ("compute_s", "memory_s", "host_s")
        )
        peak = max(trace.activation_bytes, *(p.live_bytes for p in parts))
        with_workspace = max(p.live_bytes_with_workspace for p in parts)
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
                operators,
                weight_reads=sum(o.count for o in trace.operators if o.weight_bytes),
                weight_reads_bytes=sum(o.count * o.weight_bytes for o in trace.operators),
            )
        return found

    def _part(self, trace: Trace, sees: _Sees, execution: Execution, kernel: Kernel) -> _Part:
        """What the operators that see the same come to; kept for other executions."""
        key = (
            id(trace),
            sees,
            kernel if sees.attention else None,
            execution.merge if sees.merging else None,
            execution.channels_last if sees.layout else False,
        )
        part = self._parts.get(key)
        if part is None:
            operators = self._splits[id(trace)].operators[sees]
            part = self._parts[key] = self._sum(operators, execution, kernel)
        return part

    def _sum(self, operators: list[Operator], execution: Execution, kernel: Kernel) -> _Part:
        compute = memory = host = 0.0
        live = with_workspace = 0
        for operator in operators:
            call, own, launches = self._operator(operator, execution, kernel)
            compute += call.compute_s * operator.count
            memory += call.memory_s * operator.count
            host += launches * operator.count * self._machine.kernels.dispatch_s.value
            live = max(live, operator.live_bytes + own)
            taken = workspace.convolution_bytes(self._machine, operator, execution.channels_last)
            with_workspace = max(with_workspace, operator.live_bytes + taken)
        return _Part(compute, memory, host, live, with_workspace)

    def _launch_s(self, host: float, device: float) -> float:
        """The CPU runs what it dispatches; other devices wait for the host if it is slower."""
        return host if self._machine.device.kind == "cpu" else max(0.0, host - device)

    def with_more(self, cost: ForwardCost, *, memory_s: float, host_s: float) -> ForwardCost:
        """The same forward with more memory traffic, and more work of the host."""
        memory, host = cost.memory_s + memory_s, cost.host_s + host_s
        launch = self._launch_s(host, cost.compute_s + memory)
        return cost._replace(memory_s=memory, host_s=host, launch_s=launch)

    def _operator(
        self, operator: Operator, execution: Execution, kernel: Kernel
    ) -> tuple[Bound, int, int]:
        """Seconds of one call, bytes of its own while it runs, and kernels launched."""
        factor = self._corrections.factor(operator)
        extra, own, launches = Bound(0.0, 0.0), 0, 1
        merge = execution.merge
        if merge is not None and merges(merge, operator, self._latent_tokens):
            if operator.attention is not None:
                element = BYTES.get(operator.dtype, 4)
                work = matching(operator.attention, operator.block_tokens, element)
                extra, own, launches = self._matching(work, operator), work.transient_bytes, 1
                launches += MATCHING_LAUNCHES
            operator = merged(merge, operator)
        if operator.attention is not None:
            own = max(own, attention.transient_bytes(kernel, operator.attention, operator.dtype))
            launches += attention.calls_per_operator(kernel, operator.attention) - 1
        call = self._by_rates(operator, kernel, execution.channels_last).scaled(factor)
        return (
            Bound(call.compute_s + extra.compute_s, call.memory_s + extra.memory_s),
            own,
            launches,
        )

    def _by_rates(self, operator: Operator, kernel: Kernel, channels_last: bool) -> Bound:
        if operator.attention is not None:
            seconds = attention.seconds(self._machine, kernel, operator.attention, operator.dtype)
            return Bound(seconds, 0.0)
        traffic = operator.bytes / self._machine.kernels.memory_bytes_per_s.value
        arithmetic = operator.flops / self._flops_per_s(operator, channels_last)
        return Bound(arithmetic, 0.0) if arithmetic > traffic else Bound(0.0, traffic)

    def _matching(self, work: Matching, operator: Operator) -> Bound:
        kernels = self._machine.kernels
        return Bound(
            work.flops / _rate(kernels.matmul_flops_per_s, operator.dtype),
            work.bytes / kernels.memory_bytes_per_s.value,
        )

    def _flops_per_s(self, operator: Operator, channels_last: bool) -> float:
        kernels = self._machine.kernels
        if operator.kind != "convolution":
            return _rate(kernels.matmul_flops_per_s, operator.dtype)
        if channels_last and operator.dtype in kernels.convolution_channels_last_flops_per_s:
            return kernels.convolution_channels_last_flops_per_s[operator.dtype].value
        return _rate(kernels.convolution_flops_per_s, operator.dtype)


def _seen_by(operator: Operator) -> _Sees:
    return _Sees(
        attention=operator.attention is not None,
        merging=operator.block_tokens > 0,
        layout=operator.kind == "convolution",
    )


def _rate(rates: dict[str, Figure], dtype: str) -> float:
    return (rates.get(dtype) or rates["float32"]).value
