"""The layout of convolution weights."""

from __future__ import annotations

from typing import Any

import msgspec

from autotune.optimizations.base import Optimization, Parameters, Undo, undone_on_failure
from autotune.optimizations.execution import Execution
from autotune.optimizations.modules import diffusers_modules
from autotune.optimizations.target import Target
from autotune.probe.machine import Machine
from autotune.workload.workload import Workload


class ChannelsLast(Optimization):
    """NHWC weights, as tensor cores take them: cuDNN need not convert, nor oneDNN copy.

    Two-dimensional convolutions only: the layout exists for no other.
    """

    name = "channels_last"
    summary = "convolution weights in NHWC, the layout that tensor cores and CPUs compute in"
    relieves = "compute of denoise and decode, workspace of decode"

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        flops = _convolution_flops(workload)
        if not flops[True]:
            return "no component of this pipeline has two-dimensional convolutions"
        if flops[True] < flops[False]:
            return "most of its convolutions run over frames, and this layout is one of images"
        rates = machine.kernels.convolution_channels_last_flops_per_s
        if workload.request.dtype not in rates:
            return f"channels-last convolution was not measured in {workload.request.dtype} here"
        return None

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        return msgspec.structs.replace(execution, channels_last=True)

    def code(self, parameters: Parameters, target: Target) -> tuple[str, ...]:
        networks = (*target.denoisers, *target.autoencoders)
        return tuple(f"pipe.{n}.to(memory_format=torch.channels_last)" for n in networks)

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        import torch

        layers = [c for m in diffusers_modules(pipe) for c in _convolutions(m)]
        changed = [c for c in layers if not _is_channels_last(c)]

        def undo() -> None:
            for layer in changed:
                layer.to(memory_format=torch.contiguous_format)

        with undone_on_failure(undo):
            for layer in changed:
                layer.to(memory_format=torch.channels_last)
        return undo

    def found(self, pipe: Any) -> Parameters | None:
        return {} if any(map(_is_set, diffusers_modules(pipe))) else None


def _convolution_flops(workload: Workload) -> dict[bool, float]:
    """Work of the convolutions over images, and of others, in the networks that are diffusers'."""
    flops = {True: 0.0, False: 0.0}
    runs = [r for r in workload.runs if r.role != "encoder"]
    for run in runs:
        for operator in run.trace.operators:
            if operator.kind == "convolution":
                work = operator.flops * operator.count * run.calls
                flops[operator.is_over_images] += work
    return flops


def _convolutions(module: Any) -> list[Any]:
    import torch

    flat = (torch.nn.Conv2d, torch.nn.ConvTranspose2d)
    return [layer for layer in module.modules() if isinstance(layer, flat)]


def _is_set(module: Any) -> bool:
    # 1x1 kernels and single channels are both layouts at once: they say nothing.
    shapes = ((c, c.weight.shape) for c in _convolutions(module))
    telling = [c for c, shape in shapes if shape[1] > 1 and shape[2] > 1]
    return bool(telling) and all(map(_is_channels_last, telling))


def _is_channels_last(layer: Any) -> bool:
    import torch

    return bool(layer.weight.is_contiguous(memory_format=torch.channels_last))
