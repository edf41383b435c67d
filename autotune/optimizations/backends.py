"""A kernel by name in the place of PyTorch's own choice."""

from __future__ import annotations

from typing import Any

import msgspec

from autotune.errors import OptimizationError
from autotune.optimizations.attention import (
    KERNELS,
    attentions_of,
    backend_of,
    denoise_attention,
    remember_attention,
)
from autotune.optimizations.base import Optimization, Parameters, Undo, undone_on_failure
from autotune.optimizations.execution import Execution
from autotune.optimizations.modules import denoisers
from autotune.optimizations.target import Target
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

    def code(self, parameters: Parameters, target: Target) -> tuple[str, ...]:
        call = f'set_attention_backend("{self._backend(parameters)}")'
        return tuple(f"pipe.{name}.{call}" for name in target.denoisers)

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
                attention.set_attention_backend(self._backend(parameters))
        return undo

    def _backend(self, parameters: Parameters) -> str:
        """diffusers' name."""
        return KERNELS[str(parameters["kernel"])]

    def found(self, pipe: Any) -> Parameters | None:
        backends = {backend_of(a) for a in attentions_of(denoisers(pipe))}
        kernel = next((k for k, backend in KERNELS.items() if backend in backends), None)
        return None if kernel is None else {"kernel": kernel}


_SAGE_HEADS = frozenset({64, 96, 128})
"""Head sizes that SageAttention 2 has kernels for."""

_UNMASKED = frozenset({"FluxTransformer2DModel", "WanTransformer3DModel"})
"""Denoisers that take a kernel by name and mask nothing (diffusers 0.42): SageAttention takes no
mask."""


class SageAttention(AttentionBackend):
    """SageAttention 2 in the denoiser: its products are of 8 bits, which changes the image."""

    name = "sage_attention"
    summary = "attention in 8 bits by SageAttention"
    exactness = "lossy"
    defaults = {}

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        rates = [r for r in machine.attention if r.implementation == "sage"]
        if not rates:
            return "SageAttention was not timed on this machine: it needs sageattention 2.1.1"
        if not any(r.flops_per_s for r in rates):
            return next((r.error for r in rates if r.error), "SageAttention does not work here")
        classes = {c.class_name for c in workload.components_as("denoiser")}
        if not classes <= _UNMASKED:
            return f"it has not been tried with {', '.join(sorted(classes - _UNMASKED))}"
        sizes = {s.head_dim for s in denoise_attention(workload)}
        if not sizes <= _SAGE_HEADS:
            return f"it has no kernel for heads of {max(sizes - _SAGE_HEADS)}"
        return None

    def worth_trying(self, machine: Machine, workload: Workload) -> tuple[Parameters, ...]:
        return ({},)

    def quality(self, parameters: Parameters) -> str:
        return "balanced"

    def check(self, parameters: Parameters) -> None:
        return

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        return msgspec.structs.replace(execution, attention="sage")

    def found(self, pipe: Any) -> Parameters | None:
        backends = {backend_of(a) for a in attentions_of(denoisers(pipe))}
        return {} if "sage" in backends else None

    def _backend(self, parameters: Parameters) -> str:
        return "sage"
