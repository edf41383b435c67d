"""What each field of an execution can reach: everything else is the same with and without it.

Seconds add up over phases and the memory needed is that of the largest, so what reaches a single
phase can be decided for that phase alone, and what was predicted for a part holds for every
execution that looks the same from there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import attrgetter
from typing import Literal

import msgspec

from autotune.optimizations.execution import Execution

Part = Literal["encoder", "denoiser", "autoencoder", "load"]
"""A component's role, or ``"load"``: reading the weights, and the host RAM that they take."""

EVERYWHERE: frozenset[Part] = frozenset({"encoder", "denoiser", "autoencoder", "load"})

REACH: dict[str, frozenset[Part]] = {
    "attention": frozenset({"denoiser", "autoencoder"}),
    "attention_slices": frozenset({"denoiser"}),
    "merge": frozenset({"denoiser"}),
    "decode_sliced": frozenset({"autoencoder"}),
    "decode_tile": frozenset({"autoencoder"}),
    "channels_last": frozenset({"denoiser", "autoencoder"}),
    "compiled": frozenset({"denoiser"}),
    "step_cache": frozenset({"denoiser", "autoencoder"}),
    "decode_dtype": frozenset({"autoencoder"}),
    "decoder": frozenset({"autoencoder"}),
}
"""Field of ``Execution`` → what it can reach. A field that is not here reaches everything: a new
one is slower to search until it is listed, but never wrong."""

FIELDS = tuple(f.name for f in msgspec.structs.fields(Execution))


_PLACE = ("placement", "group", "device_map")

WHERE = attrgetter(*_PLACE)
"""Reads those fields of an execution that say where weights wait."""

_STORAGE = {"storage_dtype", "fused_projections", "quantization"}
"""How a denoiser's weights are stored: of that, other components see only how much they weigh."""


def reach_of(execution: Execution, default_attention: str = "") -> frozenset[Part]:
    """What an execution can change compared with the default one.

    Args:
        execution: To compare.
        default_attention: Of the machine: an autoencoder keeps PyTorch's kernel where that is SDPA.
    """
    plain = Execution()
    changed = [f for f in FIELDS if getattr(execution, f) != getattr(plain, f)]
    if changed == ["attention"] and default_attention == "sdpa":
        return frozenset({"denoiser"})
    return frozenset().union(*(REACH.get(f, EVERYWHERE) for f in changed))


@functools.cache
def work_reader(
    parts: frozenset[Part], default_attention: str = "", weightless: bool = False
) -> Callable[[Execution], object]:
    """Reads those fields of an execution that change what is computed in any of these parts.

    Args:
        parts: Roles of the components that run.
        default_attention: Of the machine, as for ``reach_of``.
        weightless: Without what only changes how much the weights of other parts weigh.
    """
    kernel_stays = default_attention == "sdpa" and "denoiser" not in parts
    left_out = {*_PLACE, *(("attention",) if kernel_stays else ())}
    if weightless and "denoiser" not in parts:
        left_out |= _STORAGE
    return attrgetter(
        *(f for f in FIELDS if f not in left_out and parts & REACH.get(f, EVERYWHERE))
    )
