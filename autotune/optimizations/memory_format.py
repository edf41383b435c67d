"""The layout of convolution weights."""

from __future__ import annotations

from typing import Any

import msgspec

from autotune.optimizations.base import Optimization, Parameters, Undo, undone_on_failure
from autotune.optimizations.execution import Execution
from autotune.optimizations.modules import diffusers_modules
from autotune.probe.machine import Machine
from autotune.workload.workload import Workload


class ChannelsLast(Optimization):
    """NHWC weights, as tensor cores take them: cuDNN need not convert."""

    name = "channels_last"
    summary = "convolution weights in NHWC, the layout that tensor cores take"
    relieves = "compute of denoise and decode, workspace of decode"

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        if machine.device.kind == "cpu":
            return "on the CPU, oneDNN packs convolution weights in a layout of its own anyway"
        rates = machine.kernels.convolution_channels_last_flops_per_s
        if workload.request.dtype not in rates:
            return f"channels-last convolution was not measured in {workload.request.dtype} here"
        return None

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        return msgspec.structs.replace(execution, channels_last=True)

    def code(self, parameters: Parameters) -> tuple[str, ...]:
        return ("pipe.{network}.to(memory_format=torch.channels_last)",)

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        import torch

        modules = [m for m in diffusers_modules(pipe) if not _is_channels_last(m)]

        def undo() -> None:
            for module in modules:
                module.to(memory_format=torch.contiguous_format)

        with undone_on_failure(undo):
            for module in modules:
                module.to(memory_format=torch.channels_last)
        return undo

    def found(self, pipe: Any) -> Parameters | None:
        return {} if any(_is_channels_last(m) for m in diffusers_modules(pipe)) else None


def _is_channels_last(module: Any) -> bool:
    import torch

    # 1x1 kernels and single channels are both layouts at once: they say nothing.
    weights = [p for p in module.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    return bool(weights) and all(
        p.is_contiguous(memory_format=torch.channels_last) for p in weights
    )
