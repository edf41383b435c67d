"""What the user has set on a pipeline before: optimizations, and what must be worked around."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

from autotune.decide.rules import LAYER_OFFLOADS, PLACEMENTS, STEP_CACHES
from autotune.optimizations import CATALOGUE
from autotune.optimizations.attention import foreign_processors
from autotune.optimizations.base import Optimization, Parameters, Setting
from autotune.optimizations.modules import denoisers, modules_of, registries_of
from autotune.optimizations.plugins import failure_of
from autotune.optimizations.step_caches import foreign_caches

log = logging.getLogger("autotune")

_REPLACES_ATTENTION = (
    "xformers",
    "attention_slicing",
    "attention_backend",
    "sage_attention",
    "fuse_qkv",
)
_NARROWS = ("quantization", "layerwise_casting", "fuse_qkv")


class Foreign(NamedTuple):
    """Something set by hand that no optimization stands for.

    Attributes:
        text: What it is, and that it is kept.
        without: Optimizations that would undo it, or that it would break.
    """

    text: str
    without: tuple[str, ...]


def set_by_hand(pipe: Any) -> tuple[Setting, ...]:
    """The optimizations that the pipeline already has, with the parameters they have."""
    found = ((name, _found(optimization, pipe)) for name, optimization in CATALOGUE.items())
    return tuple(Setting(name, parameters) for name, parameters in found if parameters is not None)


def _found(optimization: Optimization, pipe: Any) -> Parameters | None:
    try:
        return optimization.found(pipe)
    except Exception as error:
        reason = failure_of(optimization, error)
        log.warning("optimization %s is not looked for: %s", optimization.name, reason)
        return None


def foreign_to(pipe: Any) -> tuple[Foreign, ...]:
    """What else is set by hand: attention, caches, packed weights, components placed one by one."""
    return tuple(
        Foreign(f"{what} set by hand ({', '.join(names)}) is kept", tuple(without))
        for what, names, without in (
            ("attention", foreign_processors(pipe), _REPLACES_ATTENTION),
            ("a step cache", foreign_caches(pipe), sorted(STEP_CACHES)),
            ("quantization", _packed(pipe), _without_packed(pipe)),
            ("the device of components", _placed_apart(pipe), sorted(PLACEMENTS)),
        )
        if names
    )


# ---- where weights are ---------------------------------------------------------------------------


def placed(pipe: Any) -> tuple[str, ...]:
    """Names of the components whose weights hooks or a device map move."""
    if getattr(pipe, "hf_device_map", None) is not None:
        return tuple(modules_of(pipe))
    return tuple(name for name, module in modules_of(pipe).items() if _is_placed(module))


def _is_placed(module: Any) -> bool:
    by_accelerate = any("_hf_hook" in vars(layer) for layer in module.modules())
    return by_accelerate or any("group_offloading" in r.hooks for r in registries_of(module))


def _placed_apart(pipe: Any) -> tuple[str, ...]:
    """Components that are placed, where it is no placement of the catalogue."""
    known = any(CATALOGUE[name].is_set(pipe) for name in PLACEMENTS)
    return () if known else placed(pipe)


# ---- packed weights ------------------------------------------------------------------------------


def _packed(pipe: Any) -> tuple[str, ...]:
    """Components whose weights are packed, where it is no scheme that is known."""
    names = tuple(name for name, module in modules_of(pipe).items() if _is_packed(module))
    if CATALOGUE["quantization"].is_set(pipe):
        return tuple(n for n in names if not _is_any(modules_of(pipe)[n], denoisers(pipe)))
    return names


def _without_packed(pipe: Any) -> tuple[str, ...]:
    """Layers of packed weights cannot be moved alone, nor those of the denoiser packed again."""
    modules = modules_of(pipe)
    of_denoiser = any(_is_any(modules[n], denoisers(pipe)) for n in _packed(pipe))
    return (*(_NARROWS if of_denoiser else ()), *sorted(LAYER_OFFLOADS))


def _is_packed(module: Any) -> bool:
    """Packages for this have layers, or classes of parameters and tensors, of their own."""
    import torch

    plain = (type(None), torch.Tensor, torch.nn.Parameter)
    return any(
        type(layer).__module__.startswith("torch.ao.nn.quantized")
        or any(type(weight) not in plain for weight in layer._parameters.values())
        for layer in module.modules()
    )


def _is_any(module: Any, others: Iterable[Any]) -> bool:
    return any(module is other for other in others)
