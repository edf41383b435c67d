"""Attention kernels: xFormers' memory-efficient one, and diffusers' slicing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from autotune.errors import OptimizationError, first_line
from autotune.optimizations.base import Optimization, Parameters, Undo, undone_on_failure
from autotune.optimizations.execution import Execution
from autotune.optimizations.modules import (
    classes_of,
    denoisers,
    diffusers_modules,
    random_state_kept,
)
from autotune.optimizations.target import Target
from autotune.probe.machine import Machine
from autotune.workload.workload import AttentionShape, Workload

_UNETS = frozenset(
    {
        "UNet2DConditionModel",
        "UNetMotionModel",
        "UNetSpatioTemporalConditionModel",
        "ControlNetModel",
        "MultiControlNetModel",
    }
)
_XFORMERS_SERVES = _UNETS | {
    "SD3Transformer2DModel",  # has a processor of its own for xFormers
    "FluxTransformer2DModel",  # these choose the kernel by name
    "ChromaTransformer2DModel",
    "LTXVideoTransformer3DModel",
    "WanTransformer3DModel",
}
"""Denoisers that draw the same image with xFormers as without (diffusers 0.42, checked with an
emulated kernel)."""

_XFORMERS_SPOILS = frozenset(
    {
        "AuraFlowTransformer2DModel",
        "CogVideoXTransformer3DModel",
        "HunyuanDiT2DModel",
        "HunyuanVideoTransformer3DModel",
        "QwenImageTransformer2DModel",
        "SanaTransformer2DModel",
        "ZImageTransformer2DModel",
    }
)
"""Denoisers whose attention is more than that of a UNet, for which diffusers' switch puts in a
UNet's all the same: rotary positions, text beside the image or linear attention are lost."""

_XFORMERS_REPLACES = (
    "AttnProcessor2_0",
    "AttnProcessor",
    "AttnAddedKVProcessor2_0",
    "AttnAddedKVProcessor",
    "JointAttnProcessor2_0",
)
"""Attention processors that diffusers has a true equivalent of."""

_XFORMERS = ("XFormersAttnProcessor", "XFormersJointAttnProcessor")
"""What diffusers puts in their place."""

_SLICEABLE = frozenset(
    {
        "UNet2DConditionModel",
        "UNet3DConditionModel",
        "ControlNetModel",
        "ControlNetUnionModel",
        "SparseControlNetModel",
    }
)
"""What has ``set_attention_slice``; for other components a pipeline's own switch does nothing."""


class XFormers(Optimization):
    """xFormers' memory-efficient attention in the denoisers.

    The VAE, whose one head of 512 no xFormers kernel takes on the newest GPUs, keeps PyTorch's.
    """

    name = "xformers"
    summary = "memory-efficient attention by xFormers instead of the default kernel"
    relieves = "time and vram of denoise"

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        if machine.device.kind != "cuda":
            return f"xFormers has no {machine.device.kind.upper()} kernels: it needs an NVIDIA GPU"
        reasons = map(_xformers_fails_on, classes_of(workload, "denoiser"))
        reason = next(filter(None, reasons), None)
        if reason is not None:
            return reason
        rates = [r for r in machine.attention if r.implementation == self.name]
        if any(r.flops_per_s for r in rates):
            return None
        error = next((r.error for r in rates if r.error), None)
        return error or "xFormers was not called successfully on this machine"

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        return msgspec.structs.replace(execution, attention="xformers")

    def code(self, parameters: Parameters, target: Target) -> tuple[str, ...]:
        call = "enable_xformers_memory_efficient_attention()"
        return tuple(f"pipe.{name}.{call}" for name in target.denoisers)

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        modules = denoisers(pipe)
        for module in modules:
            _require_equivalent(module)
        undo = remember_attention(modules)
        try:
            with undone_on_failure(undo), _trying_out_on(device):
                for module in modules:
                    module.enable_xformers_memory_efficient_attention()
        except Exception as error:  # diffusers calls it once: a kernel may raise anything
            raise OptimizationError(
                f"xformers cannot run here: {first_line(error)}",
                "run `autotune probe` to see why, or add --without xformers",
            ) from error
        return undo

    def found(self, pipe: Any) -> Parameters | None:
        attentions = attentions_of(denoisers(pipe))
        names = {_class_of(a.processor) for a in attentions}
        is_replaced = any(n.startswith("XFormers") for n in names)
        return {} if is_replaced or "xformers" in set(map(backend_of, attentions)) else None


@contextmanager
def _trying_out_on(device: str) -> Iterator[None]:
    """diffusers tries the kernel on random data of the current GPU: ours."""
    import torch

    where = torch.device(device)
    current = (where.index or 0) if where.type == "cuda" else -1
    with random_state_kept(device), torch.cuda.device(current):
        yield


def _xformers_fails_on(class_name: str) -> str | None:
    if class_name in _XFORMERS_SERVES:
        return None
    if class_name in _XFORMERS_SPOILS:
        return (
            f"diffusers would put a UNet's attention in the place of {class_name}'s own: another "
            "image, or none"
        )
    if class_name == "PixArtTransformer2DModel":  # diffusers issue 9637
        return "the text mask of PixArtTransformer2DModel is not aligned as xFormers demands"
    return f"xFormers has not been tried with the attention of {class_name}"


def _require_equivalent(module: Any) -> None:
    """Refuse a module of whose attention diffusers would make something else.

    Raises:
        OptimizationError: which attention.
    """
    for attention in attentions_of([module]):
        if _chooses_by_name(attention) or _class_of(attention.processor) in _XFORMERS:
            continue
        # XFormersAttnProcessor knows no norms of queries and keys.
        plain = getattr(attention, "norm_q", None) is None
        processor = _class_of(attention.processor)
        if processor not in _XFORMERS_REPLACES or not (plain or processor.startswith("Joint")):
            raise OptimizationError(
                f"xformers cannot run here: it has no equivalent of {processor} in "
                f"{type(module).__name__}",
                "add --without xformers",
            )


def _chooses_by_name(attention: Any) -> bool:
    """Newer models ask for a kernel by name: setting one leaves their processors in place."""
    is_new = any(cls.__name__ == "AttentionModuleMixin" for cls in type(attention).__mro__)
    return is_new and hasattr(attention.processor, "_attention_backend")


class AttentionSlicing(Optimization):
    """Vanilla attention over a part of the heads at a time."""

    name = "attention_slicing"
    summary = "vanilla attention, a part of the heads at a time; replaces the fast kernel"
    relieves = "vram of denoise, where no memory-efficient kernel runs"
    defaults = {"slices": "auto"}

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        classes = classes_of(workload, "denoiser")
        whole = next((c for c in classes if c not in _SLICEABLE), None)
        return whole and f"diffusers has no sliced attention for {whole}: the switch does nothing"

    def worth_trying(self, machine: Machine, workload: Workload) -> tuple[Parameters, ...]:
        # "auto" is half of the heads: of one head that is none, on which diffusers divides by zero.
        heads = [a.heads for a in denoise_attention(workload)]
        sizes = ("auto", "max") if min(heads, default=0) > 1 else ("max",)
        return tuple({"slices": size} for size in sizes)

    def check(self, parameters: Parameters) -> None:
        if parameters["slices"] not in ("auto", "max"):
            raise OptimizationError(
                f"attention_slicing:slices={parameters['slices']} is unknown", "use auto or max"
            )

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        return msgspec.structs.replace(execution, attention_slices=str(parameters["slices"]))

    def code(self, parameters: Parameters, target: Target) -> tuple[str, ...]:
        return (f'pipe.enable_attention_slicing("{parameters["slices"]}")',)

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        undo = remember_attention(diffusers_modules(pipe))
        with undone_on_failure(undo):
            pipe.enable_attention_slicing(parameters["slices"])
        return undo

    def found(self, pipe: Any) -> Parameters | None:
        processors = [a.processor for a in attentions_of(diffusers_modules(pipe))]
        sliced = [p for p in processors if _class_of(p).startswith("Sliced")]
        if not sliced:
            return None
        return {"slices": "max" if all(p.slice_size == 1 for p in sliced) else "auto"}


def denoise_attention(workload: Workload) -> list[AttentionShape]:
    """Every shape of attention in the denoisers."""
    runs = workload.runs_as("denoiser")
    return [o.attention for r in runs for o in r.trace.operators if o.attention is not None]


# ---- what computes a module's attention ---------------------------------------------------------


KERNELS = {"flash": "_native_flash", "efficient": "_native_efficient", "cudnn": "_native_cudnn"}
"""Kernel → diffusers' name of it. The probe times each as ``sdpa_`` and its name."""

_KNOWN_BACKENDS = ("xformers", "sage", *KERNELS.values())
"""Kernels by name that an optimization here stands for."""


def foreign_processors(pipe: Any) -> tuple[str, ...]:
    """Names of what the user has set in the denoisers' attention, unless it is known here.

    Vanilla processors, fused projections, adapters, kernels chosen by name: setting another kernel
    would silently drop them.
    """
    names = set()
    for attention in attentions_of(denoisers(pipe)):
        name, backend = _class_of(attention.processor), backend_of(attention)
        if _is_by_hand(attention.processor) or getattr(attention, "fused_projections", False):
            names.add(name)
        if backend not in (None, *_KNOWN_BACKENDS):
            names.add(f"attention backend {backend}")
    return tuple(sorted(names))


_BY_HAND = ("Fused", "IPAdapter", "CustomDiffusion", "PAG")
"""Words in the names of processors that no model starts with."""


def _is_by_hand(processor: Any) -> bool:
    name = _class_of(processor)
    is_diffusers = type(processor).__module__.startswith("diffusers.")
    return not is_diffusers or name == "AttnProcessor" or any(word in name for word in _BY_HAND)


_UNSET = object()


def remember_attention(modules: list[Any]) -> Undo:
    """Undo through the processors themselves: ``disable_*`` would drop what the user had set."""
    before = [
        (a, a.processor, vars(a.processor).get("_attention_backend", _UNSET))
        for a in attentions_of(modules)
    ]

    def undo() -> None:
        for attention, processor, backend in before:
            if attention.processor is not processor:
                attention.set_processor(processor)
            if backend is not _UNSET:
                processor._attention_backend = backend
            else:
                vars(processor).pop("_attention_backend", None)

    return undo


def attentions_of(modules: list[Any]) -> list[Any]:
    """The layers that leave their attention to a processor."""
    layers = (layer for module in modules for layer in module.modules())
    return [a for a in layers if hasattr(a, "set_processor") and hasattr(a, "processor")]


def _class_of(processor: Any) -> str:
    return type(processor).__name__


def backend_of(attention: Any) -> str | None:
    """The kernel that is chosen by name, if one is: for this layer, or for all of the process."""
    backend = getattr(attention.processor, "_attention_backend", None)
    if backend is None and hasattr(attention.processor, "_attention_backend"):
        backend = _of_the_process()
    return None if backend is None else str(getattr(backend, "value", backend))


def _of_the_process() -> Any:
    """Set by a model's switch, a ``with`` block or the environment."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    active = _AttentionBackendRegistry.get_active_backend()[0]
    return None if active is AttentionBackendName.NATIVE else active
