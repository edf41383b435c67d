"""Queries, keys and values computed by one matrix product instead of three."""

from __future__ import annotations

from typing import Any

import msgspec

from autotune.optimizations.base import Optimization, Parameters, Undo, undone_on_failure
from autotune.optimizations.execution import Execution
from autotune.optimizations.modules import denoisers, random_state_kept
from autotune.optimizations.target import Target
from autotune.probe.machine import Machine
from autotune.workload.workload import Workload


class FuseQkv(Optimization):
    """One product where there were three: fewer launches, larger matrices."""

    name = "fuse_qkv"
    summary = "one matrix product for queries, keys and values instead of three"
    relieves = "launches of denoise"

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        named = workload.components_as("denoiser")
        if any(c.fusable_bytes for c in named):
            return None
        return "the denoiser has no projections that diffusers can fuse"

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        return msgspec.structs.replace(execution, fused_projections=True)

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        modules = [m for m in denoisers(pipe) if hasattr(m, "fuse_qkv_projections")]
        modules = [m for m in modules if not _is_fused(m)]
        before = [(layer, _own(layer), dict(layer._modules)) for layer in _touched(modules)]

        def undo() -> None:
            # diffusers' own way back leaves the fused weights behind, and drops other processors.
            for layer, attributes, children in before:
                for name in set(_own(layer)) - set(attributes):
                    delattr(layer, name)
                layer._modules.clear()
                layer._modules.update(children)
                vars(layer).update(attributes)

        with undone_on_failure(undo), random_state_kept(device):
            for module in modules:
                module.fuse_qkv_projections()
        return undo

    def found(self, pipe: Any) -> Parameters | None:
        return {} if any(map(_is_fused, denoisers(pipe))) else None

    def code(self, parameters: Parameters, target: Target) -> tuple[str, ...]:
        return tuple(f"pipe.{name}.fuse_qkv_projections()" for name in target.denoisers)


_CHANGED = ("fused_projections", "processor", "original_attn_processors")
"""Attributes that fusing sets, on attention layers and on the network itself."""


def _own(layer: Any) -> dict[str, Any]:
    return {name: vars(layer)[name] for name in _CHANGED if name in vars(layer)}


def _attention(module: Any) -> list[Any]:
    return [layer for layer in module.modules() if hasattr(layer, "fuse_projections")]


def _touched(modules: list[Any]) -> list[Any]:
    return [*modules, *(layer for module in modules for layer in _attention(module))]


def _is_fused(module: Any) -> bool:
    return any(getattr(layer, "fused_projections", False) for layer in _attention(module))
