"""Load a pipeline as a plan wants it: dtype, and no full copy on a device that offloads."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from packaging.version import Version

from autotune.decide.plan import Plan
from autotune.errors import ModelError, first_line
from autotune.workload.architecture import Architecture


def load_pipeline(architecture: Architecture, plan: Plan) -> Any:
    """Read the weights into host RAM, in the plan's dtype.

    Raises:
        ModelError: there are no weights, or they cannot be read.
    """
    import torch
    from diffusers import DiffusionPipeline

    if architecture.weights is None:
        raise ModelError(f"{architecture.name} has no weights to load", "give a folder or a hub id")
    options: dict[str, Any] = {_dtype_keyword(): getattr(torch, plan.workload.dtype)}
    if architecture.variant and plan.workload.dtype != "float32":
        options["variant"] = architecture.variant
    try:
        pipe = _read(DiffusionPipeline, architecture.weights, options)
    except Exception as error:  # diffusers, transformers, safetensors and the hub raise all sorts
        raise ModelError(
            f"cannot load the weights of {architecture.weights}: {first_line(error)}",
            "download the model again, or check that the folder is complete",
        ) from error
    _require_vocabularies(pipe, architecture.weights)
    return pipe


def _require_vocabularies(pipe: Any, weights: str) -> None:
    """transformers 5 silently makes an empty tokenizer where the files of one are missing."""
    for name, part in pipe.components.items():
        special = getattr(part, "all_special_tokens", None)
        if special is not None and len(part) <= len(special):
            raise ModelError(
                f"{weights} has no vocabulary for its {name}",
                "download the model again, or check that the folder is complete",
            )


def _dtype_keyword() -> str:
    """``torch_dtype`` was renamed; older versions silently ignore the new name."""
    return "dtype" if Version(version("diffusers")) >= Version("0.42") else "torch_dtype"


def _read(cls: Any, weights: str, options: dict[str, Any]) -> Any:
    try:
        return cls.from_pretrained(weights, **options)
    except (OSError, ValueError) as error:
        if "variant" not in options or options["variant"] not in str(error):
            raise
        # Not every repository has the 16-bit variant: the full one is cast while loading.
        rest = {k: v for k, v in options.items() if k != "variant"}
        return cls.from_pretrained(weights, **rest)
