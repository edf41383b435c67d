"""What a loaded pipeline is made of: read off its objects, without importing torch."""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

COMPUTED_IN = ("float32", "float16", "bfloat16", "float64")
"""Dtypes of arithmetic; weights may be stored in others and are converted layer by layer."""

RUNS_IN = "_autotune_runs_in"
"""Attribute of a layer that is left as its file holds it: the dtype that it runs in."""


def is_of_a_library(cls: type) -> bool:
    """Whether diffusers or transformers defines the class, and not the user or a repository."""
    return cls.__module__.partition(".")[0] in ("diffusers", "transformers")


def has_own_code(pipe: Any) -> bool:
    """Whether the pipeline or a component is of a class whose version nothing tells."""
    return not all(is_of_a_library(type(part)) for part in (pipe, *modules_of(pipe).values()))


def parts_of(pipe: Any) -> dict[str, Any]:
    """Attribute → module, scheduler or tokenizer.

    A pipeline of the user's own may hold parts that it never registered: ``components`` raises.
    """
    try:
        return dict(pipe.components)
    except Exception:  # a ValueError of diffusers', or whatever a class of another kind raises
        return {n: v for n, v in getattr(pipe, "__dict__", {}).items() if not n.startswith("_")}


def modules_of(pipe: Any) -> dict[str, Any]:
    """Attribute → module, as it was before ``torch.compile`` wrapped it."""
    return {n: original(part) for n, part in parts_of(pipe).items() if _is_module(part)}


def original(module: Any) -> Any:
    """What ``torch.compile`` has wrapped."""
    return getattr(module, "_orig_mod", module)


def config_of(part: Any) -> dict[str, Any]:
    """The configuration of a module, scheduler or pipeline; empty where there is none."""
    config: Any = getattr(part, "config", None) or {}
    try:
        return dict(config.to_dict() if hasattr(config, "to_dict") else config)
    except (TypeError, ValueError):  # anything can be called a configuration
        return {}


def _is_module(part: Any) -> bool:
    return hasattr(part, "named_parameters") and hasattr(part, "forward")


def is_denoiser(name: str, module: Any) -> bool:
    """UNets, transformers and ControlNets are told the timestep, or named as what they are."""
    if name.startswith(("unet", "transformer")):
        return True
    try:
        parameters = inspect.signature(type(module).forward).parameters
    except (TypeError, ValueError):  # of a compiled script
        return False
    return any(p == "t" or p.startswith("timestep") for p in parameters)


def pipeline_dtype(pipe: Any) -> str:
    """The dtype of the largest denoiser; empty where nothing has weights."""
    modules = modules_of(pipe)
    denoisers = [m for n, m in modules.items() if is_denoiser(n, m)]
    return dtype_of(max(denoisers or modules.values(), key=_size, default=None))


def _size(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def dtype_of(module: Any) -> str:
    """What most of its weights are computed in: a few may be kept wider. Empty without any."""
    sizes: Counter[str] = Counter()
    for _, parameter, dtype in () if module is None else parameters_of(module):
        sizes[str(dtype).removeprefix("torch.")] += parameter.numel()
    known = [d for d in COMPUTED_IN if d in sizes]
    return max(known, key=lambda d: sizes[d], default="")


def digest_of(module: Any) -> str:
    """Names, shapes and dtypes of all parameters, in short."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter, dtype in parameters_of(module):
        digest.update(f"{name} {tuple(parameter.shape)} {dtype};".encode())
    return digest.hexdigest()


def runs_in(layer: Any) -> Any:
    """The dtype that it is cast to before it runs; ``None`` for any layer that is loaded whole."""
    return vars(layer).get(RUNS_IN)


def parameters_of(module: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, parameter and the dtype that it runs in, where a layer may be left in its file."""
    left = {
        id(parameter): runs_in(layer)
        for layer in module.modules()
        if runs_in(layer) is not None
        for parameter in layer.parameters(recurse=False)
    }
    for name, parameter in module.named_parameters():
        yield name, parameter, left.get(id(parameter), parameter.dtype)
