"""Components on different GPUs: nothing is offloaded, and no weight crosses a link per image."""

from __future__ import annotations

import functools
from typing import Any

import msgspec

from autotune.errors import OptimizationError
from autotune.optimizations.base import Optimization, Parameters, Undo, undone_on_failure
from autotune.optimizations.execution import DeviceMap, Execution
from autotune.optimizations.modules import (
    autoencoders,
    encoders,
    modules_of,
    registries_of,
    remember_devices,
    remember_hooks,
)
from autotune.optimizations.target import Target, listed
from autotune.probe.machine import Machine
from autotune.workload.workload import Workload


class ComponentsOnGpus(Optimization):
    """Text encoders and VAE on other GPUs than the denoiser, each with its own weights.

    diffusers' ``device_map="balanced"`` does the like while it loads, on every GPU that there is
    and with the denoiser anywhere; this works on a loaded pipeline, and can be undone.
    """

    name = "device_map"
    summary = "text encoders and VAE stay on other GPUs, and compute there"
    relieves = "vram of every phase, where there are several GPUs"
    defaults = {"encoders": 1, "autoencoder": 1}

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        if not machine.others:
            return f"it needs a second GPU, and {machine.name} shows no other"
        if not machine.twins:
            gpu = machine.others[0]
            return f"cuda:{gpu.index} is another model ({gpu.name}): its speed was not measured"
        if machine.link is None or machine.device.unified_memory:
            return "device and host share their memory: there is nothing to gain elsewhere"
        if not (workload.components_as("encoder") or workload.components_as("autoencoder")):
            return f"{workload.pipeline} has nothing but its denoiser to place"
        return None

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        to = DeviceMap(int(parameters["encoders"]), int(parameters["autoencoder"]))
        return msgspec.structs.replace(execution, placement="device_map", device_map=to)

    def check(self, parameters: Parameters) -> None:
        for name, value in parameters.items():
            if int(value) < 0:
                raise OptimizationError(
                    f"{self.name}:{name}={value} is no GPU", "give CUDA's index, 0 for cuda:0"
                )

    def worth_trying(self, machine: Machine, workload: Workload) -> tuple[Parameters, ...]:
        """On the freest of the others; apart, on the two freest.

        More GPUs than components to place bring nothing.
        """
        home, twins = machine.device.index, [gpu.index for gpu in machine.twins[:2]]
        if not twins:
            return ()
        first = twins[0]
        pairs = [(first, first), (first, home), (home, first)]
        if len(twins) > 1:
            pairs += [(first, twins[1]), (twins[1], first)]
        return tuple({"encoders": one, "autoencoder": other} for one, other in pairs)

    def code(self, parameters: Parameters, target: Target) -> tuple[str, ...]:
        home = f"cuda:{target.device_index}"
        encoders_on, autoencoder_on = (f"cuda:{index}" for index in parameters.values())
        return (
            "from accelerate.hooks import ModelHook, add_hook_to_module",
            "from accelerate.utils import send_to_device",
            "class Visiting(ModelHook):  # takes inputs to where a part is, and outputs back",
            "    def __init__(self, there):",
            "        self.there = torch.device(there)",
            f'        self.execution_device = torch.device("{home}")',
            "    def brought(self, value):",
            "        return value.to(self.there) if isinstance(value, torch.Tensor) else value",
            "    def pre_forward(self, module, *args, **kwargs):",
            "        moved = tuple(self.brought(a) for a in args)",
            "        return moved, {name: self.brought(a) for name, a in kwargs.items()}",
            "    def post_forward(self, module, output):",
            "        return send_to_device(output, self.execution_device)",
            "modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]",
            f'there = dict.fromkeys([{listed(target.encoders)}], "{encoders_on}")',
            f'there |= dict.fromkeys([{listed(target.autoencoders)}], "{autoencoder_on}")',
            "for module in modules:",
            f'    module.to(there.get(module, "{home}"))',
            "for module, gpu in there.items():  # pipelines call decode, not the VAE itself",
            '    for part in module.children() if hasattr(module, "decode") else [module]:',
            "        add_hook_to_module(part, Visiting(gpu))",
            'if not hasattr(modules[0], "_hf_hook"):  # it tells where the pipeline computes',
            f'    add_hook_to_module(modules[0], Visiting("{home}"))',
        )

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        import torch

        home = torch.device(device)
        _require_unhooked(pipe)
        there = {role: _gpu(home, int(index)) for role, index in parameters.items()}
        modules = list(modules_of(pipe).values())
        move_back = remember_devices(modules)
        put_hooks_back = remember_hooks(modules)

        def undo() -> None:
            put_hooks_back()  # ours hold nothing that would have to be let go
            move_back()

        with undone_on_failure(undo):
            moved = {id(m): there["encoders"] for m in encoders(pipe)}
            moved |= {id(m): there["autoencoder"] for m in autoencoders(pipe)}
            for module in modules:
                module.to(moved.get(id(module), home))
            _hook(pipe, there["encoders"], there["autoencoder"], home)
        return undo

    def found(self, pipe: Any) -> Parameters | None:
        parts = [part for vae in autoencoders(pipe) for part in vae.children()]
        named = {"encoders": encoders(pipe), "autoencoder": parts}
        hooks = {role: [m._hf_hook for m in of if _is_ours(m)] for role, of in named.items()}
        known = next((h for found in hooks.values() for h in found), None)
        if known is None:
            return None
        there = {role: h[0].there if h else known.execution_device for role, h in hooks.items()}
        return {role: device.index or 0 for role, device in there.items()}


def _hook(pipe: Any, encoders_on: Any, autoencoder_on: Any, home: Any) -> None:
    """Each component's inputs come from the pipeline's GPU, and its outputs go back there.

    Pipelines call a VAE's ``encode`` and ``decode``, which no hook of the VAE itself moves inputs
    for: its parts, which those call, have the hooks. The first component tells diffusers where the
    pipeline computes.
    """
    from accelerate.hooks import add_hook_to_module

    visiting = _visiting_hook()
    for encoder in encoders(pipe):
        add_hook_to_module(encoder, visiting(encoders_on, home))
    for vae in autoencoders(pipe):
        for part in vae.children():
            add_hook_to_module(part, visiting(autoencoder_on, home))
    first = next(m for n, m in modules_of(pipe).items() if n not in pipe._exclude_from_cpu_offload)
    if not hasattr(first, "_hf_hook"):
        add_hook_to_module(first, visiting(home, home))


@functools.cache
def _visiting_hook() -> Any:
    """The class of the hooks; made here, because plans are made without accelerate."""
    import torch
    from accelerate.hooks import ModelHook
    from accelerate.utils import send_to_device

    class VisitingHook(ModelHook):  # type: ignore[misc]
        """Takes inputs to where a component is, and outputs back to where the pipeline computes.

        diffusers asks the first component's hook for its ``execution_device``, and puts latents and
        random numbers there.
        """

        def __init__(self, there: Any, pipeline: Any) -> None:
            super().__init__()
            self.there = there
            self.execution_device = pipeline

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            # Containers are left as they are: video autoencoders keep what they cache in them.
            moved = tuple(self._brought(a) for a in args)
            return moved, {name: self._brought(a) for name, a in kwargs.items()}

        def _brought(self, value: Any) -> Any:
            return value.to(self.there) if isinstance(value, torch.Tensor) else value

        def post_forward(self, module: Any, output: Any) -> Any:
            return send_to_device(output, self.execution_device)

    return VisitingHook


def _gpu(home: Any, index: int) -> Any:
    """The device of that index.

    Raises:
        OptimizationError: CUDA knows no such GPU.
    """
    import torch

    if home.type == "cuda" and index >= torch.cuda.device_count():
        known = torch.cuda.device_count()
        raise OptimizationError(f"there is no GPU cuda:{index}", f"CUDA knows {known} here")
    return torch.device(home.type, index)


def _is_ours(module: Any) -> bool:
    return type(getattr(module, "_hf_hook", None)).__name__ == "VisitingHook"


def _require_unhooked(pipe: Any) -> None:
    """Refuse to move what hooks move.

    Raises:
        OptimizationError: it is offloaded, or on a device map of diffusers' own.
    """
    layers = [layer for module in modules_of(pipe).values() for layer in module.modules()]
    hooked = any(hasattr(layer, "_hf_hook") and not _is_ours(layer) for layer in layers)
    registries = (r for module in modules_of(pipe).values() for r in registries_of(module))
    grouped = any("group_offloading" in r.hooks for r in registries)
    if hooked or grouped or getattr(pipe, "hf_device_map", None) is not None:
        raise OptimizationError(
            "device_map cannot place what other hooks move", "undo the offload first"
        )
