"""How diffusers takes a network apart: what group offload moves, and what casting narrows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import torch
from torch import nn

from autotune.workload.components import weight_bytes
from autotune.workload.workload import Ability, Component


def block_bytes(module: nn.Module) -> tuple[int, ...]:
    """Bytes of each group that block-level offload moves, in their order.

    As ``diffusers.hooks.group_offloading``: every element of a list of layers among the direct
    children, and the children that a model names itself. The rest of the network is one group more,
    which is on the device throughout a call; a network without lists is that group alone.
    """
    named = set(getattr(module, "_group_offload_block_modules", None) or ())
    found: list[int] = []
    for name, child in module.named_children():
        if name in named:
            inner = block_bytes(child)
            found += [*inner, weight_bytes(child) - sum(inner)]
        elif isinstance(child, (nn.ModuleList, nn.Sequential)):
            found += [weight_bytes(block) for block in child]
    return tuple(size for size in found if size)


class Copy(NamedTuple):
    """A layer that has just the weights of an earlier one of its class: T5's second embedding."""

    path: str
    of: nn.Module


def copies(module: nn.Module) -> tuple[Copy, ...]:
    """Layers that an earlier one can stand for."""
    seen: dict[tuple[Any, ...], nn.Module] = {}
    found = []
    for path, layer in module.named_modules():
        key = (type(layer), *_own_weights(layer))
        if len(key) == 1 or layer._buffers or layer._modules:
            continue
        if key in seen:
            found.append(Copy(path, seen[key]))
        seen.setdefault(key, layer)
    return tuple(found)


def has_tied_layers(module: nn.Module) -> bool:
    """Whether two layers have the same weights that are not each other's copies."""
    left_out = {copy.path for copy in copies(module)}
    layers = (layer for path, layer in module.named_modules() if path not in left_out)
    owned = [key for layer in layers for key in _own_weights(layer)]
    return len(owned) > len(set(owned))


def _own_weights(layer: nn.Module) -> tuple[int, ...]:
    return tuple(id(p) for p in layer._parameters.values() if p is not None)


STORAGE = torch.float8_e4m3fn
"""What layerwise casting stores weights in."""


def take_apart(component: Component, module: nn.Module, *, casts: bool) -> Component:
    """The component with its groups, and what casting saves where it is of use.

    Args:
        component: As described.
        module: On the meta device; of no use afterwards if it ``casts``.
        casts: Whether it is one whose weights may be stored in eight bits.
    """
    fused = tuple(_fusable(module))
    return msgspec.structs.replace(
        component,
        block_bytes=block_bytes(module),
        linear_bytes=sum(weight_bytes(m) for m in module.modules() if type(m) is nn.Linear),
        fusable_bytes=sum(map(weight_bytes, itertools.chain(*fused))),
        fusable_products=sum(len(layers) - 1 for layers in fused),
        abilities=tuple(_abilities(module)),
        casting_saves_bytes=_bytes_saved(module) if casts else 0,
    )


def _abilities(module: Any) -> Iterator[Ability]:
    if getattr(module, "_repeated_blocks", None):
        yield "repeated_blocks"
    processors = [m.processor for m in module.modules() if hasattr(m, "processor")]
    if processors and all(hasattr(p, "_attention_backend") for p in processors):
        yield "attention_backend"
    if hasattr(module, "enable_cache"):
        yield "step_caches"
    if has_tied_layers(module):
        yield "tied_layers"


_PRODUCTS = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))


def _fusable(module: Any) -> Iterator[list[nn.Module]]:
    """The projections that ``fuse_qkv_projections`` computes as one, set by set.

    Where attention looks at something else, its queries are computed apart.
    """
    if not hasattr(module, "fuse_qkv_projections"):
        return
    for layer in module.modules():
        if not (
            hasattr(layer, "fuse_projections") and getattr(layer, "_supports_qkv_fusion", True)
        ):
            continue
        for names in _PRODUCTS:
            across = names[0] == "to_q" and getattr(layer, "is_cross_attention", False)
            found = [getattr(layer, n, None) for n in names[1 if across else 0 :]]
            if all(projection is not None for projection in found):
                yield [p for p in found if p is not None]


def _bytes_saved(module: Any) -> int:
    """What layerwise casting takes off a network's weights.

    diffusers itself decides which layers it leaves alone (norms, embeddings), so it is asked.
    """
    if not hasattr(module, "enable_layerwise_casting"):
        return 0
    before = weight_bytes(module)
    try:
        module.enable_layerwise_casting(storage_dtype=STORAGE)
    except Exception:  # packed weights, and classes of the user's own
        return 0
    return max(0, before - weight_bytes(module))
