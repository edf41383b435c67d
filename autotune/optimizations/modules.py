"""Finding the modules that an optimization works on."""

from __future__ import annotations

from typing import Any

from autotune.workload.workload import Workload


def diffusers_modules(pipe: Any) -> list[Any]:
    """The pipeline's own networks (denoiser, VAE), not its transformers encoders."""
    return [m for m in pipe.components.values() if hasattr(m, "modules") and _is_diffusers(m)]


def _is_diffusers(module: Any) -> bool:
    return any(cls.__name__ == "ModelMixin" for cls in type(module).__mro__)


def has_class(workload: Workload, class_name: str) -> bool:
    """Whether a component of the workload is of that class."""
    return any(c.class_name == class_name for c in workload.components)
