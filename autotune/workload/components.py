"""Build a pipeline's modules on the meta device: shapes and dtypes, no memory."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from autotune.errors import ModelError, first_line
from autotune.workload.architecture import ComponentConfig
from autotune.workload.workload import Component


def meta_module(
    name: str, component: ComponentConfig, dtype: torch.dtype, live: Mapping[str, Any]
) -> nn.Module:
    """A component on the meta device: from its configuration, else like the loaded one.

    Args:
        name: The pipeline's attribute.
        component: Its class and configuration.
        dtype: That it will run in.
        live: Loaded modules by attribute; empty where nothing is loaded.

    Raises:
        ModelError: it cannot be built, and is not loaded either.
    """
    loaded = live.get(name)
    if loaded is None:
        return build_on_meta(name, component, dtype)
    try:
        built = build_on_meta(name, component, dtype)
    except ModelError:
        return like_on_meta(loaded)
    return built if _shapes(built) == _shapes(loaded) else like_on_meta(loaded)


def _shapes(module: nn.Module) -> list[torch.Size]:
    return [p.shape for p in module.parameters()]


def like_on_meta(module: nn.Module) -> nn.Module:
    """A copy of a loaded module without its data: for adapters and classes of the user's own."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(module, memo).eval()


def build_on_meta(name: str, component: ComponentConfig, dtype: torch.dtype) -> nn.Module:
    """Instantiate a component from its configuration, without weights.

    Raises:
        ModelError: the class does not exist in the installed library, or refuses the configuration.
    """
    cls = _find_class(name, component)
    try:
        with torch.device("meta"):
            module = _instantiate(cls, component)
    except Exception as error:  # whatever the third-party constructor raises on odd values
        raise ModelError(
            f"cannot build {name} ({component.class_name}) from its configuration: "
            f"{first_line(error)}",
            "the configuration may be of a newer diffusers or transformers: try upgrading them",
        ) from error
    # nn.Module.to, since ModelMixin.to logs a warning meant for real weights.
    nn.Module.to(module, dtype)
    for kept in _kept_in_float32(module, dtype):
        kept.float()
    return module.eval().requires_grad_(False)


def describe(name: str, module: nn.Module) -> Component:
    """Sizes of a module's weights, in bytes of the dtypes they have."""
    leaves = [
        _own_bytes(m)
        for m in module.modules()
        if next(m.parameters(recurse=False), None) is not None
    ]
    parameters = list(module.parameters())
    return Component(
        name=name,
        class_name=type(module).__name__,
        parameters=sum(p.numel() for p in parameters),
        weight_bytes=weight_bytes(module),
        largest_leaf_bytes=max(leaves, default=0),
        leaf_count=len(leaves),
        tensor_count=len(parameters),
        tensor_bytes=tuple(_tensor_bytes(module)),
    )


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers (SD 3's position table is one), in their dtypes."""
    return sum(_tensor_bytes(module))


def _tensor_bytes(module: nn.Module) -> Iterator[int]:
    for tensor in (*module.parameters(), *module.buffers()):
        yield tensor.numel() * tensor.element_size()


def _own_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))


def _find_class(name: str, component: ComponentConfig) -> Any:
    for library in (component.library, f"diffusers.pipelines.{component.library}"):
        try:
            return getattr(importlib.import_module(library), component.class_name)
        except (ImportError, AttributeError):
            continue
    raise ModelError(
        f"{name} needs {component.class_name} of {component.library}, which is not installed here",
        "upgrade diffusers and transformers, or install the package that defines it",
    )


def _instantiate(cls: Any, component: ComponentConfig) -> nn.Module:
    config = {k: v for k, v in component.config.items() if not k.startswith("_")}
    if hasattr(cls, "config_class") and cls.config_class is not None:  # transformers
        return cls(cls.config_class(**config))  # type: ignore[no-any-return]
    return cls.from_config(config)  # type: ignore[no-any-return]


def _kept_in_float32(module: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    """Submodules that from_pretrained leaves in float32 (T5's output projections in float16)."""
    names = list(getattr(module, "_keep_in_fp32_modules_strict", None) or [])
    if dtype == torch.float16:
        names += list(getattr(module, "_keep_in_fp32_modules", None) or [])
    for path, child in module.named_modules():
        if path and path.split(".")[-1] in names:
            yield child
