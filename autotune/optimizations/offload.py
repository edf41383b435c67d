"""Weights kept in host RAM and moved to the device when needed, by accelerate's hooks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from autotune.errors import OptimizationError
from autotune.optimizations.base import Optimization, Parameters, Undo, undone_on_failure
from autotune.optimizations.execution import READS_PAST_HOOKS, Execution
from autotune.optimizations.modules import (
    denoisers,
    device_of,
    encoders,
    modules_of,
    remember_devices,
    remember_hooks,
)
from autotune.optimizations.target import Target, listed
from autotune.probe.machine import Machine
from autotune.workload.workload import Workload

_NOTES = ("_all_hooks", "_offload_device", "_offload_gpu_id")
"""What diffusers remembers on the pipeline about offloading."""

_PASSED_BY = ("HunyuanDiTAttentionPool", "MultiheadAttention")
"""Layers that hand their children's weights to one function instead of calling the children: the
hooks that would bring those weights to the device never run."""


class _Offload(Optimization):
    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        if machine.device.kind == "cpu":
            return "the CPU computes in host RAM: there is no device memory to offload from"
        if machine.link is None or machine.device.unified_memory:
            return "device and host share their memory: moving weights frees nothing"
        return self._unsuited(workload)

    @abstractmethod
    def _unsuited(self, workload: Workload) -> str | None:
        """Why the pipeline itself does not allow it."""

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        from accelerate.hooks import remove_hook_from_module

        modules = modules_of(pipe).values()
        move_back = remember_devices(modules)
        tensors = [place for m in modules for place in _tensors(m)]
        notes = {n: pipe.__dict__[n] for n in _NOTES if n in pipe.__dict__}
        put_hooks_back = remember_hooks(modules)

        def undo() -> None:
            for module in modules:  # pipe.remove_all_hooks() passes those half put on
                remove_hook_from_module(module, recurse=True)
            put_hooks_back()
            for name in _NOTES:
                pipe.__dict__.pop(name, None)
            pipe.__dict__.update(notes)
            for table, name, tensor in tensors:
                table[name] = tensor
            move_back()

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

    def _unsuited(self, workload: Workload) -> str | None:
        if workload.offload_order:
            return None
        return f"{workload.pipeline} names no order in which to offload its components"

    def code(self, parameters: Parameters, target: Target) -> tuple[str, ...]:
        return ("pipe.enable_model_cpu_offload()",)

    def _enable(self, pipe: Any, device: str) -> None:
        pipe.enable_model_cpu_offload(device=device)

    def found(self, pipe: Any) -> Parameters | None:
        moves = any(type(h).__name__ == _WHOLE for h in _hooks(modules_of(pipe).values()))
        return {} if moves and getattr(pipe, "_all_hooks", None) else None


class TextEncoderOffload(_Offload):
    """Only while they read the prompt are the text encoders on the device; all else stays there."""

    name = "text_encoder_offload"
    summary = "text encoders are on the device only while they read the prompt"
    relieves = "vram of denoise and decode"

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        return msgspec.structs.replace(execution, placement="encoder_offload")

    def _unsuited(self, workload: Workload) -> str | None:
        if workload.components_as("encoder"):
            return None
        return f"{workload.pipeline} has no encoder that could leave the device"

    def code(self, parameters: Parameters, target: Target) -> tuple[str, ...]:
        return (
            "from accelerate import cpu_offload_with_hook",
            f"encoders = [{listed(target.encoders)}]",
            "for module in pipe.components.values():",
            "    if isinstance(module, torch.nn.Module) and module not in encoders:",
            '        module.to("cuda")',
            'hooks = [cpu_offload_with_hook(encoder, "cuda")[1] for encoder in encoders]',
            f"for denoiser in [{listed(target.denoisers)}]:",
            "    denoiser.register_forward_pre_hook(",
            "        lambda *_: [hook.offload() for hook in hooks] and None",
            "    )",
        )

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        handles: list[Any] = []
        undo_offload = super().apply(pipe, parameters, device)

        def undo() -> None:
            for handle in handles:
                handle.remove()
            undo_offload()

        with undone_on_failure(undo):
            readers = encoders(pipe)
            for module in denoisers(pipe):
                handles.append(module.register_forward_pre_hook(lambda *_: _send_home(readers)))
        return undo

    def _enable(self, pipe: Any, device: str) -> None:
        from accelerate import cpu_offload_with_hook

        readers, before = encoders(pipe), None
        for module in modules_of(pipe).values():
            if not any(module is reader for reader in readers):
                module.to(device)
        for reader in readers:
            _, before = cpu_offload_with_hook(reader, device, prev_module_hook=before)

    def found(self, pipe: Any) -> Parameters | None:
        hooked = [
            m for m in encoders(pipe) if type(getattr(m, "_hf_hook", None)).__name__ == _WHOLE
        ]
        return {} if hooked and not getattr(pipe, "_all_hooks", None) else None


_WHOLE = "CpuOffload"
"""accelerate's hook that moves a whole component."""


def _send_home(readers: list[Any]) -> None:
    """Whatever order they were called in, none is needed any more."""
    import torch

    there = [r for r in readers if device_of(r).type != "cpu"]
    for reader in there:
        reader.to("cpu")
    if there:
        torch.accelerator.empty_cache()


class SequentialCpuOffload(_Offload):
    """One layer on the device at a time."""

    name = "sequential_cpu_offload"
    summary = "only the layer at work is on the device; every weight crosses at every step"
    relieves = "vram of every phase, at the price of transfer"

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        return msgspec.structs.replace(execution, placement="sequential_offload")

    def _unsuited(self, workload: Workload) -> str | None:
        names = (c.class_name for c in workload.components)
        return next((_passed_by(n) for n in names if n in READS_PAST_HOOKS), None)

    def code(self, parameters: Parameters, target: Target) -> tuple[str, ...]:
        return ("pipe.enable_sequential_cpu_offload()",)

    def _enable(self, pipe: Any, device: str) -> None:
        for module in modules_of(pipe).values():
            if any(type(layer).__name__ in _PASSED_BY for layer in module.modules()):
                raise OptimizationError(
                    _passed_by(type(module).__name__), "add --without sequential_cpu_offload"
                )
        pipe.enable_sequential_cpu_offload(device=device)

    def found(self, pipe: Any) -> Parameters | None:
        # A device map attaches the same hook, but leaves the weights where they are.
        # Without the denoiser, it is something else.
        hooks = _hooks(denoisers(pipe) or modules_of(pipe).values())
        return {} if any(getattr(h, "offload", False) for h in hooks) else None


def _passed_by(class_name: str) -> str:
    return f"{class_name} reads weights of its layers without calling them: they would not be moved"


def _hooks(components: Iterable[Any]) -> list[Any]:
    """The accelerate hooks on components and their layers."""
    layers = (layer for component in components for layer in component.modules())
    hooks = [vars(layer)["_hf_hook"] for layer in layers if "_hf_hook" in vars(layer)]
    return [single for h in hooks for single in getattr(h, "hooks", (h,))]


_Place = tuple[dict[str, Any], str, Any]
"""A layer's table of parameters or buffers, a name in it, and the tensor."""


def _tensors(module: Any) -> Iterator[_Place]:
    """What sequential offload puts placeholders for.

    It gives back copies: two where two layers shared one, as T5's embeddings do, and none where it
    was interrupted. A parameter moves in place, but a buffer of the device would stay there.
    """
    for layer in module.modules():
        for table in (layer._parameters, layer._buffers):
            for name, tensor in table.items():
                moves = table is layer._parameters or (tensor is not None and tensor.is_cpu)
                if tensor is not None and moves and not tensor.is_meta:
                    yield table, name, tensor
