"""Weights stored in eight bits and widened layer by layer, just before they are used."""

from __future__ import annotations

from typing import Any

import msgspec

from autotune.optimizations.base import Optimization, Parameters, Undo, undone_on_failure
from autotune.optimizations.execution import Execution
from autotune.optimizations.modules import (
    denoisers,
    registries_of,
    remember_hooks,
    remove_hooks,
)
from autotune.optimizations.target import Target
from autotune.probe.machine import Machine
from autotune.workload.workload import Workload

STORAGE = "float8_e4m3fn"
_HOOK = "layerwise_casting"


class LayerwiseCasting(Optimization):
    """The denoiser's weights in float8; computed in what they were in."""

    name = "layerwise_casting"
    summary = "the denoiser's weights rest in eight bits and are widened as they are used"
    relieves = "vram of denoise"
    exactness = "lossy"
    before_moving = True

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        if not any(c.casting_saves_bytes for c in workload.components_as("denoiser")):
            return "diffusers stores no layer of this denoiser in eight bits"
        return None

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        return msgspec.structs.replace(execution, storage_dtype=STORAGE)

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        import torch

        targets = [m for m in denoisers(pipe) if not _hooks(m)]
        # Eight bits do not remember sixteen: without a copy there would be no way back.
        before = [
            {n: p.detach().to("cpu", copy=True) for n, p in m.named_parameters()} for m in targets
        ]

        put_forwards_back = remember_hooks(targets)

        def undo() -> None:
            for module in targets:
                _take_off(module)
            put_forwards_back()
            for module, weights in zip(targets, before, strict=True):
                for name, parameter in module.named_parameters():
                    parameter.data = weights[name].to(parameter.device)

        with undone_on_failure(undo):
            for module in targets:
                dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
                module.enable_layerwise_casting(
                    storage_dtype=getattr(torch, STORAGE), compute_dtype=dtype
                )
        return undo

    def found(self, pipe: Any) -> Parameters | None:
        return {} if any(_hooks(m) for m in denoisers(pipe)) else None

    def code(self, parameters: Parameters, target: Target) -> tuple[str, ...]:
        call = f"enable_layerwise_casting(storage_dtype=torch.{STORAGE})"
        return tuple(f"pipe.{name}.{call}" for name in target.denoisers)


def _hooks(module: Any) -> list[Any]:
    hooks = (r.get_hook(_HOOK) for r in registries_of(module))
    return [h for h in hooks if h is not None]


def _take_off(module: Any) -> None:
    """diffusers' hook refuses to be removed: what it rounded off is gone. We have a copy."""
    for registry in registries_of(module):
        hook = registry.get_hook(_HOOK)
        if hook is not None:
            hook.deinitalize_hook = lambda module: module
    remove_hooks(module, (_HOOK, "peft_autocast_disable"))
