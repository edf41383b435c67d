"""Weights kept in host RAM and moved to the device when needed, by accelerate's hooks."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import msgspec

from autotune.optimizations.base import Optimization, Parameters, Undo, undone_on_failure
from autotune.optimizations.execution import Execution
from autotune.optimizations.modules import drop_bound_forwards
from autotune.probe.machine import Machine
from autotune.workload.workload import Workload

_NOTES = ("_all_hooks", "_offload_device", "_offload_gpu_id")
"""What diffusers remembers on the pipeline about offloading."""


class _Offload(Optimization):
    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        if machine.device.kind == "cpu":
            return "the CPU computes in host RAM: there is no device memory to offload from"
        if machine.link is None or machine.device.unified_memory:
            return "device and host share their memory: moving weights frees nothing"
        return None

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        modules = [m for m in pipe.components.values() if hasattr(m, "parameters")]
        before = [(m, m.device) for m in modules]
        notes = {n: pipe.__dict__[n] for n in _NOTES if n in pipe.__dict__}

        def undo() -> None:
            pipe.remove_all_hooks()
            for name in _NOTES:
                pipe.__dict__.pop(name, None)
            pipe.__dict__.update(notes)
            for module, where in before:
                drop_bound_forwards(module)
                module.to(where)

        with undone_on_failure(undo):
            # diffusers prefers a number remembered from before to the index 0 that we give.
            pipe.__dict__.pop("_offload_gpu_id", None)
            self._enable(pipe, device)
        return undo

    @abstractmethod
    def _enable(self, pipe: Any, device: str) -> None: ...


class ModelCpuOffload(_Offload):
    """One component on the device at a time."""

    name = "model_cpu_offload"
    summary = "only the component at work is on the device; the others wait in host RAM"
    relieves = "vram of every phase"

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        return msgspec.structs.replace(execution, placement="model_offload")

    def code(self, parameters: Parameters) -> tuple[str, ...]:
        return ("pipe.enable_model_cpu_offload()",)

    def _enable(self, pipe: Any, device: str) -> None:
        pipe.enable_model_cpu_offload(device=device)

    def found(self, pipe: Any) -> Parameters | None:
        return {} if any(type(h).__name__ == "CpuOffload" for h in _hooks(pipe)) else None


class SequentialCpuOffload(_Offload):
    """One layer on the device at a time."""

    name = "sequential_cpu_offload"
    summary = "only the layer at work is on the device; every weight crosses at every step"
    relieves = "vram of every phase, at the price of transfer"

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        return msgspec.structs.replace(execution, placement="sequential_offload")

    def code(self, parameters: Parameters) -> tuple[str, ...]:
        return ("pipe.enable_sequential_cpu_offload()",)

    def _enable(self, pipe: Any, device: str) -> None:
        pipe.enable_sequential_cpu_offload(device=device)

    def found(self, pipe: Any) -> Parameters | None:
        # A device map attaches the same hook, but leaves the weights where they are.
        return {} if any(getattr(h, "offload", False) for h in _hooks(pipe)) else None


def _hooks(pipe: Any) -> list[Any]:
    """The accelerate hooks on the pipeline's components and their layers."""
    modules = [m for c in pipe.components.values() if hasattr(c, "modules") for m in c.modules()]
    hooks = [m._hf_hook for m in modules if hasattr(m, "_hf_hook")]
    return [single for h in hooks for single in getattr(h, "hooks", (h,))]
