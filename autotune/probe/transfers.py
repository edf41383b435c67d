"""How fast bytes cross between host and device, copied and by ``module.to()``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from autotune.probe import nvml
from autotune.probe.machine import Figure, Link
from autotune.probe.timing import rate, synchronize, time_call
from autotune.units import MIB

_BUFFER_BYTES = 256 * MIB  # large enough that neither latency nor a waking link shows
_MODULE_ROUNDS = 4
_LINK_POLLS = 5

# The widths of a UNet's linear layers (SD 1.5: 320 … 1280, feed-forward 8 times that): module.to()
# moves one tensor at a time, so their sizes are what its rate depends on.
_LAYERS = (
    (1280, 1280),
    (1280, 10240),
    (5120, 1280),
    (640, 640),
    (640, 5120),
    (2560, 640),
    (320, 320),
)


def measure_link(
    device: torch.device, *, memory_bytes: int, uuid: str | None = None, budget_s: float = 0.12
) -> Link | None:
    """Copies both ways, pinned, pageable and by ``module.to()``.

    Args:
        device: A discrete CUDA device; others have no link of their own.
        memory_bytes: Device memory that the buffers may take.
        uuid: NVML's name of the device, to read the link's state while it is busy.
        budget_s: About how long each of the four copies is measured.

    Returns:
        ``None`` on anything but CUDA.
    """
    if device.type != "cuda":
        return None
    size = max(MIB, min(_BUFFER_BYTES, memory_bytes // 2))
    on_device = torch.empty(size, dtype=torch.uint8, device=device)
    pageable = torch.zeros(size, dtype=torch.uint8)
    pinned = pageable.pin_memory()

    def copies(target: torch.Tensor, source: torch.Tensor) -> Figure:
        return copy_rate(target, source, device, budget_s)

    h2d, d2h = copies(on_device, pinned), copies(pinned, on_device)
    generation, width = _link_in_copy(on_device, pinned, uuid)
    facts = nvml.gpu(uuid)
    module_h2d, module_d2h = module_rates(device, size)
    return Link(
        pcie_generation_max=facts.pcie_generation_max if facts else None,
        pcie_width_max=facts.pcie_width_max if facts else None,
        pcie_generation_in_copy=generation,
        pcie_width_in_copy=width,
        h2d_pinned_bytes_per_s=h2d,
        d2h_pinned_bytes_per_s=d2h,
        h2d_pageable_bytes_per_s=copies(on_device, pageable),
        d2h_pageable_bytes_per_s=copies(pageable, on_device),
        module_h2d_bytes_per_s=module_h2d,
        module_d2h_bytes_per_s=module_d2h,
    )


def copy_rate(
    target: torch.Tensor, source: torch.Tensor, device: torch.device, budget_s: float
) -> Figure:
    """Bytes per second of copying one tensor onto another."""

    def copy() -> torch.Tensor:
        return target.copy_(source, non_blocking=True)

    return rate(time_call(copy, device, budget_s=budget_s), source.nbytes)


def module_rates(device: torch.device, memory_bytes: int) -> tuple[Figure, Figure]:
    """Bytes per second of ``module.to(device)`` and of ``module.to("cpu")``, in turn.

    Pageable memory both ways, and a fresh host allocation for every tensor that returns: what
    makes model offload so much slower than the link.
    """
    module = offloadable_module(memory_bytes)
    size = sum(parameter.nbytes for parameter in module.parameters())
    out, back = [], []
    for _ in range(_MODULE_ROUNDS + 1):
        out.append(_seconds(lambda: module.to(device), device))
        back.append(_seconds(lambda: module.to("cpu"), device))
    return _rate_without_first(size, out), _rate_without_first(size, back)


def offloadable_module(memory_bytes: int) -> nn.Module:
    """Half-precision layers as wide as a UNet's, in host memory, ``memory_bytes`` large at most."""
    layers = nn.ModuleList()
    size, at = 0, 0
    while True:
        inputs, outputs = _LAYERS[at % len(_LAYERS)]
        size += 2 * (inputs * outputs + outputs)
        if size > memory_bytes and at:
            return layers
        # Made without initialization, which would draw from the global random state.
        layer = nn.Linear(inputs, outputs, device="meta", dtype=torch.float16).to_empty(
            device="cpu"
        )
        layers.append(layer.requires_grad_(False))
        layer.weight.zero_()
        at += 1


def _rate_without_first(size: int, seconds: list[float]) -> Figure:
    samples = tuple(size / second for second in seconds[1:])
    return Figure(value=statistics.median(samples), samples=samples)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def _link_in_copy(
    on_device: torch.Tensor, pinned: torch.Tensor, uuid: str | None
) -> tuple[int | None, int | None]:
    """The best link state seen while copies are queued: between copies the link may step down."""
    if uuid is None:
        return None, None
    states = []
    for _ in range(_LINK_POLLS):
        for _ in range(4):
            on_device.copy_(pinned, non_blocking=True)
        states.append(nvml.link_state(uuid))
    synchronize(on_device.device)
    return max((state for state in states if None not in state), default=(None, None), key=_order)


def _order(state: tuple[int | None, int | None]) -> tuple[int, int]:
    return state[0] or 0, state[1] or 0
