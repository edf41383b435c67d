"""Build a pipeline's modules on the meta device: shapes and dtypes, no memory."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autotune.errors import ModelError, first_line
from autotune.workload.architecture import ComponentConfig
from autotune.workload.live import COMPUTED_IN, RUNS_IN, dtype_of, is_of_a_library, parameters_of
from autotune.workload.workload import Component


def meta_module(
    name: str, component: ComponentConfig, dtype: torch.dtype, live: Mapping[str, nn.Module]
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
    made = None
    if is_of_a_library(type(loaded)):
        with contextlib.suppress(ModelError):
            made = build_on_meta(name, component, dtype)
    if made is None or not _is_like(made, loaded):
        made = like_on_meta(loaded)
    _take_dtypes(made, loaded, dtype)
    return made


def _is_like(made: nn.Module, loaded: nn.Module) -> bool:
    """Whether both have the same parameters; what is packed may have any shape."""
    mine, theirs = dict(made.named_parameters()), dict(loaded.named_parameters())
    return mine.keys() == theirs.keys() and all(
        is_packed(p) or p.shape == mine[n].shape for n, p in theirs.items()
    )


def is_packed(tensor: Tensor) -> bool:
    """Whether it is stored in fewer bits than it is computed in: quantized, in one way or other."""
    is_plain = not hasattr(tensor, "__tensor_flatten__")
    return not (is_plain and str(tensor.dtype).removeprefix("torch.") in COMPUTED_IN)


def like_on_meta(module: nn.Module) -> nn.Module:
    """A copy of a loaded module without its data: for adapters and classes of the user's own.

    Layers that are left in their files have the dtype that they run in. What offloads the original
    is left behind: it would move weights that the copy has not.
    """
    memo: dict[int, Any] = {}
    for _, parameter, dtype in parameters_of(module):
        memo[id(parameter)] = nn.Parameter(_without_data(parameter, dtype), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = _without_data(buffer, buffer.dtype)
    made = copy.deepcopy(module, memo).eval()
    for layer in made.modules():
        vars(layer).pop(RUNS_IN, None)
    if any(hasattr(m, "_hf_hook") for m in made.modules()):
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(made, recurse=True)
    return made


def _without_data(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="meta")


def _take_dtypes(made: nn.Module, loaded: nn.Module, dtype: torch.dtype) -> None:
    """The loaded module's own dtype becomes ``dtype``; what was left wider stays that wide."""
    own = dtype_of(loaded)
    mine = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    buffers = ((name, buffer, buffer.dtype) for name, buffer in loaded.named_buffers())
    for name, theirs, runs_in in (*parameters_of(loaded), *buffers):
        if name in mine and not is_packed(theirs):
            is_usual = str(runs_in) == f"torch.{own}"
            mine[name].data = mine[name].data.to(dtype if is_usual else runs_in)


def build_on_meta(name: str, component: ComponentConfig, dtype: torch.dtype) -> nn.Module:
    """Instantiate a component from its configuration, without weights.

    Raises:
        ModelError: the class does not exist in the installed library, or refuses the configuration.
    """
    return build(name, component, dtype, torch.device("meta"))


def build(
    name: str, component: ComponentConfig, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """Instantiate a component on a device, with the random weights that its class starts from.

    Raises:
        ModelError: the class does not exist in the installed library, or refuses the configuration.
    """
    cls = _find_class(name, component)
    try:
        with device, default_dtype(dtype):
            module = _instantiate(cls, component)
    except Exception as error:  # whatever the third-party constructor raises on odd values
        raise ModelError(
            f"cannot build {name} ({component.class_name}) from its configuration: "
            f"{first_line(error)}",
            "the configuration may be of a newer diffusers or transformers: try upgrading them",
        ) from error
    # nn.Module.to, since ModelMixin.to logs a warning meant for real weights. A few buffers are
    # made on the CPU whatever the default device is (torch.Tensor([...])).
    nn.Module.to(module, device=device)
    _cast_as_loaded(module, dtype)
    return module.eval().requires_grad_(False)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """As ``from_pretrained`` does it: buffers that no file holds keep what they are made in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _cast_as_loaded(module: nn.Module, dtype: torch.dtype) -> None:
    """What a file holds comes in ``dtype``, but for layers that must stay in float32."""
    kept = kept_in_float32(module, dtype)
    for path, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            is_kept = not kept.isdisjoint(path.split("."))
            tensor.data = tensor.data.to(torch.float32 if is_kept else dtype)


def describe(name: str, module: nn.Module, loaded: nn.Module | None = None) -> Component:
    """Sizes of a module's weights.

    Args:
        name: The pipeline's attribute.
        module: On the meta device, in the dtype that it will run in.
        loaded: The module itself, where it is loaded: what is packed there is counted so.
    """
    named = (*module.named_parameters(), *module.named_buffers())
    sizes = {path: tensor_bytes(tensor) for path, tensor in named}
    for path, tensor in () if loaded is None else loaded.named_parameters():
        if is_packed(tensor) and path in sizes:
            sizes[path] = tensor_bytes(tensor)
    owned = [
        sum(sizes.get(f"{path}.{own}".lstrip("."), 0) for own in child._parameters)
        for path, child in module.named_modules()
        if next(child.parameters(recurse=False), None) is not None
    ]
    parameters = list(module.parameters())
    # diffusers has accelerate move buffers only of modules with parameters at the top, and not
    # even there those that are in no file.
    lasting = set(module.state_dict()) if module._parameters else set()
    buffers = [path for path, _ in module.named_buffers() if path not in lasting]
    return Component(
        name=name,
        class_name=type(module).__name__,
        parameters=sum(p.numel() for p in parameters),
        weight_bytes=sum(sizes.values()),
        largest_leaf_bytes=max(owned, default=0),
        leaf_count=len(owned),
        tensor_count=len(parameters),
        tensor_bytes=tuple(sizes.values()),
        unmoved_bytes=sum(sizes[path] for path in buffers),
    )


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers (SD 3's position table is one), in their dtypes."""
    return sum(tensor_bytes(t) for t in (*module.parameters(), *module.buffers()))


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of its data; a tensor that wraps others has theirs."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


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


def kept_in_float32(module: nn.Module, dtype: torch.dtype) -> set[str]:
    """Names on the paths of what ``from_pretrained`` leaves in float32.

    diffusers does so in every dtype (Wan's norms), transformers in float16 alone (T5's output
    projections), unless a class is strict about it.
    """
    import diffusers

    names = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16 or isinstance(module, diffusers.ModelMixin):
        names |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return names
