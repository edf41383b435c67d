"""Finding the modules that an optimization works on, by what they are for: see ``Role``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from autotune.workload.live import is_denoiser
from autotune.workload.live import modules_of as modules_of
from autotune.workload.workload import Role, Workload


def diffusers_modules(pipe: Any) -> list[Any]:
    """The pipeline's own networks (denoisers, autoencoders), not its transformers encoders."""
    modules = modules_of(pipe).values()
    return [m for m in modules if any(c.__name__ == "ModelMixin" for c in type(m).__mro__)]


def denoisers(pipe: Any) -> list[Any]:
    """What runs at every step: UNets, transformers, ControlNets."""
    modules = modules_of(pipe).items()
    return [m for n, m in modules if is_denoiser(n, m) and not hasattr(m, "decode")]


def autoencoders(pipe: Any) -> list[Any]:
    """What makes pixels of latents."""
    return [m for m in modules_of(pipe).values() if hasattr(m, "decode")]


def encoders(pipe: Any) -> list[Any]:
    """What reads the prompt, and pictures beside it: called before the first step only."""
    others = [*denoisers(pipe), *autoencoders(pipe)]
    modules = [m for n, m in modules_of(pipe).items() if "encoder" in n]
    return [m for m in modules if not any(m is other for other in others)]


@contextmanager
def random_state_kept(device: str) -> Iterator[None]:
    """What is drawn inside, on the CPU and on that device, is not missed afterwards.

    New layers start with random weights, and diffusers tries kernels on random data.
    """
    import torch

    where = torch.device(device)
    gpus = [where.index or 0] if where.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        yield


def device_of(module: Any) -> Any:
    """Where its weights are; the CPU's for a module that has none."""
    import torch

    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def drop_bound_forwards(module: Any) -> None:
    """Removing hooks leaves each layer's own forward on the instance: a residue.

    It would hide the forward of a class that is swapped in later; a forward set by hand stays.
    """
    for child in module.modules():
        forward = child.__dict__.get("forward")
        if forward is not None and getattr(forward, "__func__", None) is type(child).forward:
            del child.__dict__["forward"]


def remember_devices(modules: Iterable[Any]) -> Callable[[], None]:
    """Undo of moving weights, also of a component that is spread over devices.

    What is on the meta device has its weights elsewhere: it stays.
    """
    whole, apart = [], []
    for module in modules:
        places = list(_places(module))
        devices = {where for *_, where in places}
        if len(devices) == 1:
            whole.append((module, devices.pop()))
        else:
            apart += places

    def undo() -> None:
        for module, where in whole:
            module.to(where)
        for table, name, where in apart:
            table[name].data = table[name].data.to(where)

    return undo


def _places(module: Any) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """A layer's table of parameters or buffers, a name in it, and where that tensor is."""
    for layer in module.modules():
        for table in (layer._parameters, layer._buffers):
            for name, tensor in table.items():
                if tensor is not None and not tensor.is_meta:
                    yield table, name, tensor.device


_HOOKED = ("_hf_hook", "_old_forward", "forward")
"""What accelerate and diffusers set on a layer that they put a hook on."""


def remember_hooks(modules: Iterable[Any]) -> Callable[[], None]:
    """Undo of putting hooks on layers, and of taking them off half-way."""
    layers = [layer for module in modules for layer in module.modules()]
    before = [(layer, {n: vars(layer)[n] for n in _HOOKED if n in vars(layer)}) for layer in layers]

    def undo() -> None:
        for layer, attributes in before:
            for name in _HOOKED:
                vars(layer).pop(name, None)
            vars(layer).update(attributes)

    return undo


def registries_of(module: Any) -> list[Any]:
    """What diffusers keeps its hooks in, on the layers that have any."""
    found = (vars(child).get("_diffusers_hook") for child in module.modules())
    return [registry for registry in found if registry is not None]


def remove_hooks(module: Any, names: Iterable[str]) -> None:
    """Take diffusers' hooks of these names off all layers."""
    for registry in registries_of(module):
        for name in names:
            registry.remove_hook(name, recurse=False)
    drop_bound_forwards(module)


def classes_of(workload: Workload, role: Role) -> tuple[str, ...]:
    """Class names of the components that run in that role, in the order in which they first do."""
    return tuple(dict.fromkeys(c.class_name for c in workload.components_as(role)))
