"""The parts of a machine that are measured apart from one another, and how they go together."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, Literal, get_args

from msgspec.structs import replace

from autotune.probe.machine import Kernels, Link, Machine

Part = Literal[
    "kernels", "attention", "dispatch", "link", "modules", "disk", "context", "operators"
]
"""``dispatch`` is all that the host spends: on launches, operators in models, offload hooks;
``modules`` what ``module.to()`` reaches, which is far from what the link does; ``operators`` the
replayed ones, timed when a model first needs them."""

EVERYTHING: Final[frozenset[Part]] = frozenset(get_args(Part))


def composed(kept: Machine, fresh: Machine, parts: Collection[Part]) -> Machine:
    """``fresh`` with all but some parts as they were.

    What identifies device and host, and what is free, is always the fresh one's.

    Args:
        kept: Measured before, on the same machine.
        fresh: Measured now.
        parts: What to take from ``fresh``.
    """

    def of(part: Part) -> Machine:
        return fresh if part in parts else kept

    disk = of("disk").host.disk_read_bytes_per_s
    return replace(
        fresh,
        host=replace(fresh.host, disk_read_bytes_per_s=disk),
        kernels=_kernels(of("kernels").kernels, of("dispatch").kernels),
        link=_link(of("link").link, of("modules").link),
        attention=of("attention").attention,
        context_bytes=of("context").context_bytes,
        operators=of("operators").operators,
    )


def _kernels(rates: Kernels, costs: Kernels) -> Kernels:
    return replace(
        rates,
        dispatch_s=costs.dispatch_s,
        launch_s=costs.launch_s,
        offload_hook_s=costs.offload_hook_s,
    )


def _link(copies: Link | None, modules: Link | None) -> Link | None:
    if copies is None or modules is None:
        return copies or modules
    return replace(
        copies,
        module_h2d_bytes_per_s=modules.module_h2d_bytes_per_s,
        module_d2h_bytes_per_s=modules.module_d2h_bytes_per_s,
    )
