"""How fast bytes cross between host and device, copied and by ``module.to()``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from msgspec.structs import replace
from torch import nn

from autotune.probe import nvml
from autotune.probe.machine import Figure, Link, TransferPoint
from autotune.probe.samples import figure_of, rate
from autotune.probe.timing import COLD, Timer, synchronize, wall_seconds
from autotune.units import GIB, MIB

Direction = Literal["h2d", "d2h"]

_SWEEP_BYTES = (MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB)
_LARGE_BYTES = 256 * MIB  # large enough that neither latency nor a waking link shows
_QUICK_SWEEP_BYTES = (16 * MIB, _LARGE_BYTES)
_LONGEST_COPY_S = 0.15  # what would take longer is left out: some links are a hundredth of others
_PINNED_SHARE, _PAGEABLE_SHARE = 0.4, 0.5  # of the time then left
_MODULE_S = 0.05  # of pageable copies; module.to() takes up to five times as long
_MODULE_ROUNDS = 3
_LINK_POLLS = 5
_POLLED_COPY_S = 0.02  # longer than NVML takes to answer
_OVERLAPPED_BYTES = 64 * MIB
_OVERLAPPED_SIDE = 2048

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
    timer: Timer,
    *,
    memory_bytes: int,
    uuid: str | None = None,
    quick: bool = False,
) -> Link | None:
    """Copies both ways, pinned, pageable and by ``module.to()``; copies beside a kernel.

    Args:
        timer: For a discrete CUDA device; others have no link of their own. Large copies take its
            budget, other sizes a quarter of it. When its deadline passes, the sizes not reached
            are left out.
        memory_bytes: Memory that the buffers may take on the device, and each of them on the host.
        uuid: NVML's name of the device, to read the link's state while it is busy.
        quick: Measure the large size alone, and nothing beside a kernel.

    Returns:
        ``None`` on anything but CUDA.
    """
    if timer.device.type != "cuda":
        return None
    sizes = _sizes(memory_bytes, quick)
    # Each kind of copy has a part of the time to itself, so that none eats up another's.
    pinned = timer.within(timer.deadline.left_s * _PINNED_SHARE)
    sweep = tuple(sweep_of(pinned, sizes, pinned=True))
    h2d = headline(sweep, "h2d", pinned=True)
    generation, width = _link_in_copy(timer, h2d, sizes[-1], uuid)
    pageable = timer.within(timer.deadline.left_s * _PAGEABLE_SHARE)
    sweep += tuple(sweep_of(pageable, sizes, pinned=False))
    slower = headline(sweep, "h2d", pinned=False).value
    module_h2d, module_d2h = module_rates(
        timer, _module_bytes(slower, sizes[-1]), rounds=1 if quick else _MODULE_ROUNDS
    )
    beside = not quick and timer.deadline.leaves("copies beside a kernel")
    facts = nvml.gpu(uuid)
    return Link(
        pcie_generation_max=facts.pcie_generation_max if facts else None,
        pcie_width_max=facts.pcie_width_max if facts else None,
        pcie_generation_in_copy=generation,
        pcie_width_in_copy=width,
        h2d_pinned_bytes_per_s=h2d,
        d2h_pinned_bytes_per_s=headline(sweep, "d2h", pinned=True),
        h2d_pageable_bytes_per_s=headline(sweep, "h2d", pinned=False),
        d2h_pageable_bytes_per_s=headline(sweep, "d2h", pinned=False),
        module_h2d_bytes_per_s=module_h2d,
        module_d2h_bytes_per_s=module_d2h,
        overlap_fraction=measure_overlap(timer, memory_bytes) if beside else None,
        sweep=() if quick else sweep,
    )


def with_module_rates(timer: Timer, link: Link, *, memory_bytes: int) -> Link:
    """A link measured before, with what ``module.to()`` reaches now.

    Args:
        timer: For a discrete CUDA device.
        link: Of that device.
        memory_bytes: Memory that the module may take on the device and on the host.
    """
    size = _module_bytes(link.h2d_pageable_bytes_per_s.value, memory_bytes)
    out, back = module_rates(timer, size)
    return replace(link, module_h2d_bytes_per_s=out, module_d2h_bytes_per_s=back)


def _module_bytes(pageable_bytes_per_s: float, most: int) -> int:
    return min(_LARGE_BYTES, most, int(pageable_bytes_per_s * _MODULE_S))


def sweep_of(timer: Timer, sizes: tuple[int, ...], *, pinned: bool) -> Iterator[TransferPoint]:
    """Copies of every size both ways, smallest first, up to the first that would take too long."""
    on_device = torch.empty(sizes[-1], dtype=torch.uint8, device=timer.device)
    on_host = _host_buffer(sizes[-1], pinned)
    slower = float("inf")
    for size in sizes:
        if size / slower > _LONGEST_COPY_S:
            return
        what = f"{'pinned' if pinned else 'pageable'} copies of {size // MIB} MiB and more"
        # Both ways, a warm-up each, and three samples.
        if size != sizes[0] and not timer.deadline.leaves(what, seconds=8 * size / slower):
            return
        here, there = on_host[:size], on_device[:size]
        share = 1.0 if size == min(_LARGE_BYTES, sizes[-1]) else 0.25
        out = copy_rate(timer, there, here, share)
        back = copy_rate(timer, here, there, share)
        yield TransferPoint("h2d", pinned, size, out)
        yield TransferPoint("d2h", pinned, size, back)
        slower = min(out.value, back.value)


def headline(sweep: tuple[TransferPoint, ...], direction: Direction, *, pinned: bool) -> Figure:
    """The rate of the large size: of the largest measured, up to where rates change no more."""
    points = [
        point
        for point in sweep
        if (point.direction, point.pinned) == (direction, pinned) and point.bytes <= _LARGE_BYTES
    ]
    return max(points, key=lambda point: point.bytes).bytes_per_s


def copy_rate(
    timer: Timer, target: torch.Tensor, source: torch.Tensor, share: float = 1.0
) -> Figure:
    """Bytes per second of copying one tensor onto another."""

    def copy() -> torch.Tensor:
        return target.copy_(source, non_blocking=True)

    return rate(timer.time(copy, share), source.nbytes)


def measure_overlap(timer: Timer, memory_bytes: int) -> Figure | None:
    """How much of a pinned copy to the device hides behind a kernel (``Link.overlap_fraction``).

    The copy runs on a stream of its own, as diffusers' offloading with streams does it, beside
    matrix products that take about as long.
    """
    device = timer.device
    size, side = min(_OVERLAPPED_BYTES, memory_bytes // 2), _OVERLAPPED_SIDE
    if 4 * side * side * 2 > memory_bytes // 2:
        return None
    source = _host_buffer(size, pinned=True)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    left = torch.zeros((side, side), dtype=torch.float16, device=device)
    right, product = torch.zeros_like(left), torch.empty_like(left)
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def multiply(times: int) -> None:
        for _ in range(times):
            torch.mm(left, right, out=product)

    def copy() -> None:
        target.copy_(source, non_blocking=True)

    def copy_beside(times: int) -> None:
        computing = torch.cuda.current_stream(device)
        copying.wait_stream(computing)
        with torch.cuda.stream(copying):
            copy()
        multiply(times)
        computing.wait_stream(copying)

    alone = timer.time(copy, share=0.5).value
    once = timer.time(lambda: multiply(1), share=0.5).value
    times = max(1, min(1000, round(alone / once)))
    computed = timer.time(lambda: multiply(times), share=0.5).value
    return overlap(alone, computed, timer.time(lambda: copy_beside(times), share=0.5))


def overlap(copy_s: float, compute_s: float, both: Figure) -> Figure:
    """Time saved by doing both at once, as a fraction of the most that can be saved."""

    def fraction(seconds: float) -> float:
        saved = (copy_s + compute_s - seconds) / min(copy_s, compute_s)
        return min(1.0, max(0.0, saved))

    return figure_of([fraction(sample) for sample in both.samples], both.source, both.disturbances)


def module_rates(
    timer: Timer, memory_bytes: int, rounds: int = _MODULE_ROUNDS
) -> tuple[Figure, Figure]:
    """Bytes per second of ``module.to(device)`` and of ``module.to("cpu")``, in turn.

    Pageable memory both ways, and a fresh host allocation for every tensor that returns: what
    makes model offload so much slower than the link. The first move each way is warm-up; when the
    deadline passes, the rounds so far are what counts.
    """
    module = offloadable_module(memory_bytes)
    size = sum(parameter.nbytes for parameter in module.parameters())

    def move(target: torch.device | str) -> float:
        return wall_seconds(lambda: module.to(target), timer.device)

    def rounds_both_ways() -> tuple[list[float], list[float]]:
        out, back = [], []
        for _ in range(rounds):
            out.append(move(timer.device))
            back.append(move("cpu"))
            if timer.deadline.left_s < out[-1] + back[-1]:
                break
        return out, back

    cold = (move(timer.device), move("cpu"))
    if timer.deadline.left_s < sum(cold):
        figures = tuple(figure_of([seconds], COLD) for seconds in cold)
    else:
        figures = timer.watched(rounds_both_ways)
    out, back = (rate(figure, size) for figure in figures)
    return out, back


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


def _sizes(memory_bytes: int, quick: bool) -> tuple[int, ...]:
    wanted = _QUICK_SWEEP_BYTES if quick else _SWEEP_BYTES
    return tuple(size for size in wanted if size <= memory_bytes) or (MIB,)


def _host_buffer(size: int, pinned: bool) -> torch.Tensor:
    """Host memory that is really there: pages that were never written are all the same one."""
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned).zero_()


def _link_in_copy(
    timer: Timer, rate_in_copy: Figure, memory_bytes: int, uuid: str | None
) -> tuple[int | None, int | None]:
    """The best link state seen while a copy runs: between copies the link may step down."""
    if uuid is None:
        return None, None
    size = max(MIB, min(_LARGE_BYTES, memory_bytes, int(rate_in_copy.value * _POLLED_COPY_S)))
    source = _host_buffer(size, pinned=True)
    target = torch.empty(size, dtype=torch.uint8, device=timer.device)
    states = []
    for _ in range(_LINK_POLLS):
        for _ in range(2):
            target.copy_(source, non_blocking=True)
        states.append(nvml.link_state(uuid))
        if timer.deadline.has_passed:
            break
    synchronize(timer.device)
    return max((state for state in states if None not in state), default=(None, None), key=_order)


def _order(state: tuple[int | None, int | None]) -> tuple[int, int]:
    return state[0] or 0, state[1] or 0
