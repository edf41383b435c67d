"""How diffusers takes a network apart: what group offload moves, and what casting narrows."""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from torch import nn

from autotune.workload.components import weight_bytes
from autotune.workload.workload import Component


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


STORAGE = torch.float8_e4m3fn
"""What layerwise casting stores weights in."""


def take_apart(component: Component, module: nn.Module, *, casts: bool) -> Component:
    """The component with its groups, and what casting saves where it is of use.

    Args:
        component: As described.
        module: On the meta device; of no use afterwards if it ``casts``.
        casts: Whether it is one whose weights may be stored in eight bits.
    """
    return msgspec.structs.replace(
        component,
        block_bytes=block_bytes(module),
        casting_saves_bytes=_bytes_saved(module) if casts else 0,
    )


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
