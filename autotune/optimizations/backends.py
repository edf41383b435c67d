"""One of the kernels that PyTorch chooses from, named instead."""

from __future__ import annotations

from typing import Any

import msgspec

from autotune.errors import OptimizationError
from autotune.optimizations.attention import (
    KERNELS,
    attentions_of,
    backend_of,
    remember_attention,
)
from autotune.optimizations.base import Optimization, Parameters, Undo, undone_on_failure
from autotune.optimizations.execution import Execution
from autotune.optimizations.modules import denoisers
from autotune.probe.machine import Machine
from autotune.workload.workload import Workload


class AttentionBackend(Optimization):
    """A certain kernel for the denoiser's attention, where PyTorch's own choice is a slower one.

    Set on each layer: diffusers' switch for a whole model changes all models of the process.
    """

    name = "attention_backend"
    summary = "one of PyTorch's attention kernels by name, where its own choice is slower"
    relieves = "time of denoise"
    defaults = {"kernel": "cudnn"}

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        named = workload.components_as("denoiser")
        fixed = next((c for c in named if "attention_backend" not in c.abilities), None)
        if fixed is not None:
            return f"the attention of {fixed.class_name} takes no kernel by name"
        if not self._timed(machine):
            return "no kernel but PyTorch's own choice was timed on this machine"
        return None

    def _timed(self, machine: Machine) -> list[str]:
        working = {r.implementation for r in machine.attention if r.flops_per_s is not None}
        return [kernel for kernel in KERNELS if f"sdpa_{kernel}" in working]

    def worth_trying(self, machine: Machine, workload: Workload) -> tuple[Parameters, ...]:
        return tuple({"kernel": kernel} for kernel in self._timed(machine))

    def check(self, parameters: Parameters) -> None:
        if parameters["kernel"] not in KERNELS:
            raise OptimizationError(
                f"attention_backend:kernel={parameters['kernel']} is unknown",
                f"use {', '.join(KERNELS)}",
            )

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        return msgspec.structs.replace(execution, attention=f"sdpa_{parameters['kernel']}")

    def code(self, parameters: Parameters) -> tuple[str, ...]:
        return (f'pipe.{{denoiser}}.set_attention_backend("{KERNELS[str(parameters["kernel"])]}")',)

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        modules = denoisers(pipe)
        undo = remember_attention(modules)
        with undone_on_failure(undo):
            for attention in attentions_of(modules):
                if not hasattr(attention, "set_attention_backend"):
                    raise OptimizationError(
                        f"{type(attention).__name__} takes no kernel by name",
                        f"add --without {self.name}",
                    )
                attention.set_attention_backend(KERNELS[str(parameters["kernel"])])
        return undo

    def found(self, pipe: Any) -> Parameters | None:
        backends = {backend_of(a) for a in attentions_of(denoisers(pipe))}
        kernel = next((k for k, backend in KERNELS.items() if backend in backends), None)
        return None if kernel is None else {"kernel": kernel}
