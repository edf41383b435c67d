"""What could be changed where nothing fits, and what the machine and the question would then be."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple, TypeVar

import msgspec

from autotune.decide.limits import Limits, looser_than
from autotune.decide.plan import Change, WayOutKind
from autotune.decide.prediction import Budget, Needs
from autotune.probe.machine import GpuProcess, Machine
from autotune.units import GIB, format_bytes
from autotune.workload.workload import Request

SMALLER_SIDES = (3 / 4, 1 / 2)
SIDE_FACTOR = 64
"""Pixels: every model's sides may be multiples of it."""

HALF_DTYPES = ("bfloat16", "float16")

FRAMES_AT_ONCE = (8, 2)
CHUNKED = ("StableVideoDiffusion", "AnimateDiff", "I2VGenXL")
"""What the names of pipelines begin with that decode so many frames at a time as they are told."""

LARGEST_GPU_BYTES, LARGEST_RAM_BYTES = 288 * GIB, 4096 * GIB
"""More than this is no way out: it cannot be bought."""


class Step(NamedTuple):
    """One thing to change, in words and as a program reads it."""

    kind: WayOutKind
    what: str
    change: Change


Steps = tuple[Step, ...]
"""Of one kind, from the mildest to the strongest."""


class Situation(NamedTuple):
    """What is decided for."""

    machine: Machine
    limits: Limits
    request: Request


def changed(situation: Situation, change: Change) -> Situation:
    """The same after a change."""
    machine, limits, request = situation
    device, host = machine.device, machine.host
    pids = change.get("pids", ())
    assert isinstance(pids, tuple)
    closed = [p for p in device.processes if p.pid in pids]
    # What is freed of what is there, and then what is put in.
    free = min(device.total_bytes, device.free_bytes + sum(p.used_bytes or 0 for p in closed))
    free += more_of(change, "device_bytes")
    available = host.ram_available_bytes + more_of(change, "host_bytes")
    machine = msgspec.structs.replace(
        machine,
        device=msgspec.structs.replace(
            device, free_bytes=free, total_bytes=max(free, device.total_bytes)
        ),
        host=msgspec.structs.replace(
            host,
            ram_available_bytes=available,
            ram_total_bytes=max(available, host.ram_total_bytes),
        ),
    )
    return Situation(machine, _replaced(limits, change), _replaced(request, change))


_T = TypeVar("_T", Limits, Request)


def _replaced(value: _T, change: Change) -> _T:
    fields = {name: change[name] for name in value.__struct_fields__ if name in change}
    return msgspec.structs.replace(value, **fields)


# ---- other programs, limits and quality ----------------------------------------------------------


def closing(machine: Machine) -> Steps:
    """The programs that hold device memory, the largest first, one more of them at each step."""
    holders = [p for p in machine.device.processes if p.used_bytes]
    holders.sort(key=lambda p: (-(p.used_bytes or 0), p.pid))
    return tuple(_closed(holders[:count]) for count in range(1, len(holders) + 1))


def _closed(programs: list[GpuProcess]) -> Step:
    names = " and ".join(f"{p.name or 'the program'} (PID {p.pid})" for p in programs)
    hold = "holds" if len(programs) == 1 else "hold"
    freed = format_bytes(sum(p.used_bytes or 0 for p in programs))
    change: Change = {"pids": tuple(p.pid for p in programs)}
    return Step("processes", f"closing {names}, which {hold} {freed}", change)


LIFTS: tuple[tuple[str, Change], ...] = (
    ("--only and --without", {"only": (), "without": ()}),
    ("the VRAM limit", {"vram_limit": None}),
    ("the RAM limit", {"ram_limit": None}),
    ("the reserve", {"reserve": 0}),
)


def lifting(limits: Limits) -> Steps:
    """One of the user's own restrictions, or all of them."""
    found = [(name, lift) for name, lift in LIFTS if _replaced(limits, lift) != limits]
    alone = [Step("limits", f"lifting {name}", lift) for name, lift in found]
    if len(found) < 2:
        return tuple(alone)
    names = " and ".join(name for name, _ in found)
    every: Change = dict(itertools.chain.from_iterable(lift.items() for _, lift in found))
    return (*alone, Step("limits", f"lifting {names}", every))


def lifting_memory(limits: Limits) -> Change:
    """What lifts the user's limits to memory; empty where there are none."""
    names = ("vram_limit", "ram_limit")
    return {name: None for name in names if getattr(limits, name) is not None}


def of_less_quality(limits: Limits) -> Steps:
    """The looser levels."""
    levels = looser_than(limits.quality)
    return tuple(Step("quality", f"quality {level}", {"quality": level}) for level in levels)


# ---- another request ----------------------------------------------------------------------------


def in_half_precision(request: Request, machine: Machine) -> Steps:
    """Half the bytes per number, where the device computes with such numbers."""
    half = next((d for d in HALF_DTYPES if d in machine.kernels.matmul_flops_per_s), None)
    if request.dtype != "float32" or half is None:
        return ()
    return (Step("dtype", half, {"dtype": half}),)


def fewer_at_once(request: Request) -> Steps:
    """Half of the batch, or one by one."""
    fewer = sorted({request.batch // 2, 1} - {0, request.batch}, reverse=True)
    return tuple(Step("batch", f"a batch of {n}", {"batch": n}) for n in fewer)


def fewer_frames_at_once(request: Request, pipeline: str) -> Steps:
    """A video decoded in parts, where the pipeline can."""
    if not pipeline.startswith(CHUNKED):
        return ()
    name = "decode_chunk_size"
    now = min(int(request.options.get(name, request.frames)), request.frames)
    return tuple(
        Step("options", f"{name}={n}", {"options": {**request.options, name: n}})
        for n in FRAMES_AT_ONCE
        if n < now
    )


def smaller(request: Request) -> Steps:
    """Three quarters or half of each side, nearly."""
    sizes = [_shrunk(request, share) for share in SMALLER_SIDES]
    return tuple(
        Step("size", f"{w}x{h}", {"width": w, "height": h}) for w, h in filter(None, sizes)
    )


def _shrunk(request: Request, share: float) -> tuple[int, int] | None:
    """Width and height of nearly the same shape; ``None``: it cannot be so small."""
    width, height = request.width, request.height
    sizes = [
        (w, h)
        for w, h in itertools.product(_near(width * share), _near(height * share))
        if 0 < w < width and 0 < h < height
    ]

    def unlikeness(size: tuple[int, int]) -> tuple[float, float]:
        w, h = size
        return abs(math.log(w * height / (h * width))), abs(w - width * share)

    return min(sizes, key=unlikeness, default=None)


def _near(side: float) -> tuple[int, ...]:
    nearest = round(side / SIDE_FACTOR)
    return tuple((nearest + more) * SIDE_FACTOR for more in (-1, 0, 1))


def shorter(request: Request) -> Steps:
    """Half or a quarter of the frames; video models want one more than a multiple of 8."""
    fewer = [request.frames // part // 8 * 8 + 1 for part in (2, 4)]
    found = dict.fromkeys(n for n in fewer if 1 < n < request.frames)
    return tuple(Step("frames", f"{n} frames", {"frames": n}) for n in found)


# ---- more memory --------------------------------------------------------------------------------


def more_of(change: Change, name: str) -> int:
    """Bytes that a change asks for besides."""
    found = change.get(name, 0)
    assert isinstance(found, int)
    return found


def holding(available: Budget, needs: Needs) -> Budget:
    """The budget with so much more that a set fits on device and host."""
    host = available.host_bytes
    return available._replace(
        device_bytes=max(available.device_bytes, needs.needed_bytes),
        host_bytes=None if host is None else max(host, needs.host_bytes),
    )


def asked(situation: Situation, available: Budget, target: Budget) -> Change:
    """What must be free besides, for a budget that is larger than the available one."""
    machine, limits, _ = situation
    change: Change = {}
    if target.device_bytes > available.device_bytes:
        beside = machine.context_bytes + limits.reserve
        change["device_bytes"] = target.device_bytes + beside - machine.device.free_bytes
    if (target.host_bytes or 0) > (available.host_bytes or 0):
        change["host_bytes"] = (target.host_bytes or 0) - machine.host.ram_available_bytes
    return change


def is_there(machine: Machine, change: Change) -> bool:
    """Whether the machine has that memory, were it free."""
    device, host = machine.device, machine.host
    free = device.free_bytes + more_of(change, "device_bytes")
    available = host.ram_available_bytes + more_of(change, "host_bytes")
    return free <= device.total_bytes and available <= host.ram_total_bytes


def said_of_memory(machine: Machine, change: Change) -> str:
    """What to free, or to have where there is less than that in all."""
    device, host = machine.device, machine.host
    said = [f"lifting {name}" for name, lift in LIFTS if lift.items() <= change.items()]
    more = more_of(change, "device_bytes")
    shares = device.kind == "cpu" or device.unified_memory
    if more and device.free_bytes + more <= device.total_bytes:
        what = "RAM" if shares else "device memory"
        said.append(f"{format_bytes(more)} more free {what}")
    elif more and shares:
        said.append(_more_ram(device.total_bytes + more))
    elif more:
        said.append(f"a GPU with at least {_whole(device.total_bytes + more)}")
    needed = host.ram_available_bytes + more_of(change, "host_bytes")
    if needed > host.ram_total_bytes:
        said.append(_more_ram(host.ram_total_bytes + more_of(change, "host_bytes")))
    elif needed > host.ram_available_bytes:
        now = format_bytes(host.ram_available_bytes)
        said.append(f"{format_bytes(needed)} of free host RAM instead of {now}")
    return " and ".join(said)


def _more_ram(needed: int) -> str:
    return f"a machine with at least {_whole(needed)} of RAM"


def _whole(needed: int) -> str:
    """What is held by others now stays held: memory is sold in whole GiB."""
    return f"{math.ceil(needed / GIB)} GiB"
