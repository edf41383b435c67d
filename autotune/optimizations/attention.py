"""Attention kernels: xFormers' memory-efficient one, and diffusers' slicing."""

from __future__ import annotations

from typing import Any

import msgspec

from autotune.errors import OptimizationError, first_line
from autotune.optimizations.base import Optimization, Parameters, Undo, undone_on_failure
from autotune.optimizations.execution import Execution
from autotune.optimizations.modules import denoiser, diffusers_modules, has_class
from autotune.probe.machine import Machine
from autotune.workload.workload import AttentionShape, Workload


class XFormers(Optimization):
    """xFormers' memory-efficient attention in the denoiser.

    The VAE, whose one head of 512 no xFormers kernel takes on the newest GPUs, keeps PyTorch's
    kernel where there is one.
    """

    name = "xformers"
    summary = "memory-efficient attention by xFormers instead of the default kernel"
    relieves = "time and vram of denoise"

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        if machine.device.kind != "cuda":
            return f"xFormers has no {machine.device.kind.upper()} kernels: it needs an NVIDIA GPU"
        rates = [r for r in machine.attention if r.implementation == self.name]
        if any(r.flops_per_s for r in rates):
            return None
        error = next((r.error for r in rates if r.error), None)
        return error or "xFormers was not called successfully on this machine"

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        return msgspec.structs.replace(execution, attention="xformers")

    def code(self, parameters: Parameters) -> tuple[str, ...]:
        return ("pipe.{denoiser}.enable_xformers_memory_efficient_attention()",)

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        undo = _remember_processors(pipe)
        try:
            with undone_on_failure(undo):
                target = denoiser(pipe) if _has_sdpa() else pipe
                target.enable_xformers_memory_efficient_attention()
        except Exception as error:  # diffusers calls it once: a kernel may raise anything
            raise OptimizationError(
                f"xformers cannot run here: {first_line(error)}",
                "run `autotune probe` to see why, or add --without xformers",
            ) from error
        return undo

    def found(self, pipe: Any) -> Parameters | None:
        return {} if _processors(pipe, "XFormers") else None


class AttentionSlicing(Optimization):
    """Vanilla attention over a part of the heads at a time."""

    name = "attention_slicing"
    summary = "vanilla attention, a part of the heads at a time; replaces the fast kernel"
    relieves = "vram of denoise, where no memory-efficient kernel runs"
    defaults = {"slices": "auto"}

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        if not has_class(workload, "UNet2DConditionModel"):
            return "transformer denoisers have no sliced attention"
        return None

    def worth_trying(self, machine: Machine, workload: Workload) -> tuple[Parameters, ...]:
        # "auto" is half of the heads: of one head that is none, on which diffusers divides by zero.
        heads = [a.heads for a in _denoise_attention(workload)]
        sizes = ("auto", "max") if min(heads, default=0) > 1 else ("max",)
        return tuple({"slices": size} for size in sizes)

    def check(self, parameters: Parameters) -> None:
        if parameters["slices"] not in ("auto", "max"):
            raise OptimizationError(
                f"attention_slicing:slices={parameters['slices']} is unknown", "use auto or max"
            )

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        return msgspec.structs.replace(execution, attention_slices=str(parameters["slices"]))

    def code(self, parameters: Parameters) -> tuple[str, ...]:
        return (f'pipe.enable_attention_slicing("{parameters["slices"]}")',)

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        undo = _remember_processors(pipe)
        with undone_on_failure(undo):
            pipe.enable_attention_slicing(parameters["slices"])
        return undo

    def found(self, pipe: Any) -> Parameters | None:
        sliced = _processors(pipe, "Sliced")
        if not sliced:
            return None
        return {"slices": "max" if all(p.slice_size == 1 for p in sliced) else "auto"}


def _remember_processors(pipe: Any) -> Undo:
    """Undo through the processors themselves: ``disable_*`` would drop what the user had set."""
    before = [(m, dict(m.attn_processors)) for m in _attending(pipe)]

    def undo() -> None:
        for module, processors in before:
            module.set_attn_processor(dict(processors))

    return undo


def _attending(pipe: Any) -> list[Any]:
    return [m for m in diffusers_modules(pipe) if hasattr(m, "attn_processors")]


def _processors(pipe: Any, word: str) -> list[Any]:
    processors = [p for m in _attending(pipe) for p in m.attn_processors.values()]
    return [p for p in processors if type(p).__name__.startswith(word)]


def foreign_processors(pipe: Any) -> tuple[str, ...]:
    """Class names of the denoiser's attention processors that are neither default nor known here.

    Vanilla ones, fused projections, adapters: setting another kernel would silently drop them.
    """
    known = ("AttnProcessor2_0", "XFormers", "Sliced", "JointAttnProcessor2_0", "FluxAttnProcessor")
    processors = getattr(denoiser(pipe), "attn_processors", {}).values()
    names = {type(p).__name__ for p in processors}
    return tuple(sorted(n for n in names if not n.startswith(known)))


def _denoise_attention(workload: Workload) -> list[AttentionShape]:
    runs = [r for p in workload.phases if p.name == "denoise" for r in p.runs]
    return [o.attention for r in runs for o in r.trace.operators if o.attention is not None]


def _has_sdpa() -> bool:
    import torch

    return hasattr(torch.nn.functional, "scaled_dot_product_attention")
