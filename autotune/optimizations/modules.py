"""Finding the modules that an optimization works on."""

from __future__ import annotations

from typing import Any

from autotune.workload.workload import Workload


def diffusers_modules(pipe: Any) -> list[Any]:
    """The pipeline's own networks (denoiser, VAE), not its transformers encoders."""
    return [m for m in pipe.components.values() if hasattr(m, "modules") and _is_diffusers(m)]


def _is_diffusers(module: Any) -> bool:
    return any(cls.__name__ == "ModelMixin" for cls in type(module).__mro__)


def drop_bound_forwards(module: Any) -> None:
    """Removing accelerate's hooks leaves each layer's own forward on the instance: a residue.

    It would hide the forward of a class that is swapped in later; a forward set by hand stays.
    """
    for child in module.modules():
        forward = child.__dict__.get("forward")
        if forward is not None and getattr(forward, "__func__", None) is type(child).forward:
            del child.__dict__["forward"]


def has_class(workload: Workload, class_name: str) -> bool:
    """Whether a component of the workload is of that class."""
    return any(c.class_name == class_name for c in workload.components)


def denoiser(pipe: Any) -> Any:
    """The pipeline's UNet or transformer, ``None`` when it has neither."""
    return getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
