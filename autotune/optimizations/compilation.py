"""The denoiser compiled by ``torch.compile``: fewer launches, elementwise operators fused."""

from __future__ import annotations

from typing import Any

import msgspec

from autotune.errors import OptimizationError
from autotune.optimizations.base import Optimization, Parameters, Undo, undone_on_failure
from autotune.optimizations.execution import Execution
from autotune.optimizations.modules import denoisers
from autotune.optimizations.target import Target
from autotune.probe.machine import Machine
from autotune.workload.live import original, parts_of
from autotune.workload.workload import Workload

SCOPES = ("regional", "whole")


class Compile(Optimization):
    """Compile one of the repeated blocks and use it for all, or the whole network.

    In place, so that hooks set later do not hide what was compiled. It pays back after some images
    only: the first one waits for the compiler.
    """

    name = "compile"
    summary = "the denoiser compiled by torch.compile; the first image waits for the compiler"
    relieves = "memory bandwidth and launches of denoise"
    defaults = {"scope": "regional"}

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        kind = machine.device.kind
        if kind not in ("cuda", "cpu"):
            return f"torch.compile is not trusted on {kind.upper()} here: untried"
        if kind == "cpu":
            if machine.has("c++"):
                return None
            return "torch.compile needs a C++ compiler on the CPU: install g++"
        if not _runs_triton(machine.device.compute_capability):
            return "Triton, which torch.compile needs, has no code for GPUs older than Volta (7.0)"
        if not machine.has("triton"):
            return "torch.compile needs the package triton: pip install triton"
        return None

    def worth_trying(self, machine: Machine, workload: Workload) -> tuple[Parameters, ...]:
        named = workload.components_as("denoiser")
        has_blocks = all("repeated_blocks" in c.abilities for c in named)
        return tuple({"scope": s} for s in (SCOPES if has_blocks else ("whole",)))

    def check(self, parameters: Parameters) -> None:
        if parameters["scope"] not in SCOPES:
            raise OptimizationError(
                f"compile:scope={parameters['scope']} is unknown", f"use {' or '.join(SCOPES)}"
            )

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        scope = "whole" if parameters["scope"] == "whole" else "regional"
        return msgspec.structs.replace(execution, compiled=scope)

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        targets = [m for m in denoisers(pipe) if _scope(m) is None]

        def undo() -> None:
            for module in targets:
                for child in module.modules():
                    vars(child).pop("_compiled_call_impl", None)

        with undone_on_failure(undo):
            for module in targets:
                if parameters["scope"] == "regional" and getattr(module, "_repeated_blocks", None):
                    module.compile_repeated_blocks()
                else:
                    module.compile()
        return undo

    def found(self, pipe: Any) -> Parameters | None:
        wrapped = {id(original(p)) for p in parts_of(pipe).values() if original(p) is not p}
        scopes = {_scope(m, id(m) in wrapped) for m in denoisers(pipe)}
        scope = next((s for s in reversed(SCOPES) if s in scopes), None)
        return None if scope is None else {"scope": scope}

    def code(self, parameters: Parameters, target: Target) -> tuple[str, ...]:
        how = "compile" if parameters["scope"] == "whole" else "compile_repeated_blocks"
        return tuple(f"pipe.{name}.{how}()" for name in target.denoisers)


def _scope(module: Any, is_wrapped: bool = False) -> str | None:
    """How much of it is compiled: in place, by its forward, or in a wrapper."""
    forward = vars(module).get("forward")
    if is_wrapped or _has_call(module) or hasattr(forward, "_torchdynamo_orig_callable"):
        return "whole"
    return "regional" if any(map(_has_call, module.modules())) else None


def _has_call(module: Any) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None


def _runs_triton(capability: str | None) -> bool:
    return capability is None or float(capability) >= 7.0
