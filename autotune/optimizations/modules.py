"""Finding the modules that an optimization works on, by what they are for: see ``Role``."""

from __future__ import annotations

import inspect
from typing import Any

from autotune.workload.workload import Role, Workload


def modules_of(pipe: Any) -> dict[str, Any]:
    """Pipeline attribute → module, of the components that have weights."""
    return {n: m for n, m in pipe.components.items() if hasattr(m, "named_parameters")}


def diffusers_modules(pipe: Any) -> list[Any]:
    """The pipeline's own networks (denoisers, autoencoders), not its transformers encoders."""
    return [m for m in modules_of(pipe).values() if "ModelMixin" in _ancestry(m)]


def denoisers(pipe: Any) -> list[Any]:
    """What runs at every step: UNets, transformers and ControlNets are told the timestep."""
    modules = modules_of(pipe).values()
    return [m for m in modules if _takes_timestep(m) and not hasattr(m, "decode")]


def autoencoders(pipe: Any) -> list[Any]:
    """What makes pixels of latents."""
    return [m for m in modules_of(pipe).values() if hasattr(m, "decode")]


def _takes_timestep(module: Any) -> bool:
    parameters = inspect.signature(type(_original(module)).forward).parameters
    return any(p == "t" or p.startswith("timestep") for p in parameters)


def _ancestry(module: Any) -> list[str]:
    return [cls.__name__ for cls in type(_original(module)).__mro__]


def _original(module: Any) -> Any:
    """What ``torch.compile`` has wrapped."""
    return getattr(module, "_orig_mod", module)


def device_of(module: Any) -> Any:
    """Where its weights are; the CPU's for a module that has none."""
    import torch

    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def dtype_of(module: Any) -> str:
    """What most of its weights are in: a few may be kept wider. Empty for a module without any."""
    sizes: dict[Any, int] = {}
    for parameter in module.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    most = max(sizes, key=lambda d: sizes[d], default=None)
    return str(most).removeprefix("torch.") if most is not None else ""


def drop_bound_forwards(module: Any) -> None:
    """Removing accelerate's hooks leaves each layer's own forward on the instance: a residue.

    It would hide the forward of a class that is swapped in later; a forward set by hand stays.
    """
    for child in module.modules():
        forward = child.__dict__.get("forward")
        if forward is not None and getattr(forward, "__func__", None) is type(child).forward:
            del child.__dict__["forward"]


def classes_of(workload: Workload, role: Role) -> tuple[str, ...]:
    """Class names of the components that run in that role, in the order in which they first do."""
    named = {c.name: c.class_name for c in workload.components}
    runs = [r for p in workload.phases for r in p.runs if r.role == role]
    return tuple(dict.fromkeys(named[r.component] for r in runs))
