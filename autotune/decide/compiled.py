"""What ``torch.compile`` makes of a denoiser: elementwise operators fused, at a price paid once."""

from __future__ import annotations

import msgspec

from autotune.optimizations.execution import Execution
from autotune.probe.machine import Machine
from autotune.workload.workload import Operator, Trace

START_S = 8.6
"""Seconds to start the compiler and its worker processes, whatever it compiles."""

PER_OPERATOR_S = 0.0157
"""Seconds to compile one operator. With ``START_S`` from the two published latencies of one model:
Flux on an H100 takes 67.4 s as a whole, 3,738 operators, and 9.6 s for its two kinds of blocks, 64
different ones (PyTorch, "torch.compile and Diffusers", 2026)."""

PER_CPU_OPERATOR_S = 0.05
"""The same where each kernel goes through a C++ compiler: 19.3 and 25.4 s of one core for UNets of
228 and 350 operators (PyTorch 2.13, two cores of an AMD EPYC)."""


def fused(operator: Operator, execution: Execution) -> tuple[Operator, float]:
    """An operator with the traffic that is left of it, and how many of its calls are kernels."""
    if not execution.compiled or operator.kind != "memory":
        return operator, 1.0
    if execution.compiled == "regional" and not operator.region:
        return operator, 1.0
    left = msgspec.structs.replace(operator, bytes=operator.fused_bytes // operator.count)
    return left, operator.fused_calls / operator.count


def compile_s(machine: Machine, trace: Trace, execution: Execution) -> float:
    """Seconds that the compiler takes for one component, before its first call returns.

    Blocks that are alike are compiled once: each of their distinct operators counts once.
    """
    if not execution.compiled:
        return 0.0
    each = PER_CPU_OPERATOR_S if machine.device.kind == "cpu" else PER_OPERATOR_S
    if execution.compiled == "whole":
        return START_S + each * trace.dispatches
    return START_S + each * sum(1 for o in trace.operators if o.region)
