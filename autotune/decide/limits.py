"""What the user allows: quality, priority, memory, and which optimizations."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from autotune.decide.prediction import Budget, budget_of
from autotune.errors import OptimizationError, RequestError
from autotune.optimizations import find, parse_settings
from autotune.optimizations.base import QUALITIES as QUALITIES
from autotune.optimizations.base import Optimization, Parameters, Setting
from autotune.probe.machine import Machine
from autotune.units import format_bytes

PRIORITIES = ("speed", "balanced", "memory")


class Limits(msgspec.Struct, frozen=True):
    """What the user allows.

    Attributes:
        quality: ``exact``, ``high`` (near-exact too), ``balanced`` (mildly lossy too) or ``fast``;
            or the optimizations that may change the image, by name: ``"vae_tiling,tome"``. Both
            go together: ``"high,tome"``.
        only: Consider these alone; empty means all.
        without: Leave these out.
        keep: Set by hand already, as found: neither proposed nor touched.
        vram_limit: Most bytes of device memory to use; of each GPU where there are several.
        reserve: Bytes to leave free for others; on each GPU.
        ram_limit: Most bytes of host RAM to use.
        priority: ``speed``; ``memory``: the least device memory that at most doubles the time; or
            ``balanced``: the least that costs at most a quarter more time.
        images: Generations expected in one process: over them is spread what is done once, such as
            compiling.
    """

    quality: str = "exact"
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    keep: tuple[Setting, ...] = ()
    vram_limit: int | None = None
    reserve: int = 0
    ram_limit: int | None = None
    priority: str = "speed"
    images: int = 1


def check_limits(limits: Limits) -> None:
    """Refuse unknown quality levels, priorities and names, and sizes that are none.

    Raises:
        RequestError: an unknown quality level or priority, no image is expected, or a size is
            negative or no whole number.
        OptimizationError: an unknown name in ``only`` or ``without``, or one in both.
    """
    if limits.images < 1:
        raise RequestError(f"{limits.images} images expected", "expect one image or more")
    if limits.priority not in PRIORITIES:
        raise RequestError(f"unknown priority {limits.priority!r}", f"use {', '.join(PRIORITIES)}")
    for name in ("vram_limit", "ram_limit", "reserve"):
        size = getattr(limits, name)
        if size is not None and (type(size) is not int or size < 0):
            hint = "give whole bytes, 5 * 2**30, or text with a unit, '5GiB'"
            raise RequestError(f"{name} {size!r} is no number of bytes", hint)
    _parse_quality(limits.quality)
    for name in (*limits.only, *limits.without):
        find(name)
    both = next((name for name in limits.only if name in limits.without), None)
    if both is not None:
        raise OptimizationError(
            f"{both} is both to be considered alone and to be left out",
            "name it in only or in without",
        )


def parse_keep(text: str, without: tuple[str, ...]) -> tuple[Setting, ...]:
    """What a user says is set by hand: ``"xformers,tome:ratio=0.3"``.

    Raises:
        OptimizationError: an optimization is unknown or named twice, or is to be left out.
    """
    keep = parse_settings(text)
    both = next((s.name for s in keep if s.name in without), None)
    if both is not None:
        raise OptimizationError(
            f"{both} is both set by hand and to be left out", "name it in keep or in without"
        )
    return keep


def allows(quality: str, optimization: Optimization, parameters: Parameters) -> bool:
    """Whether a quality, as a user gives it, allows an optimization with these parameters."""
    level, names = _parse_quality(quality)
    is_named = optimization.name in names
    return is_named or level_of(optimization, parameters) <= QUALITIES.index(level)


def level_of(optimization: Optimization, parameters: Parameters) -> int:
    """Index of the strictest quality level that allows it."""
    return QUALITIES.index(optimization.quality(parameters))


def looser_than(quality: str) -> tuple[str, ...]:
    """The quality levels that allow more than this one, the strictest first."""
    level, names = _parse_quality(quality)
    looser = QUALITIES[QUALITIES.index(level) + 1 :]
    return tuple(",".join((q, *names)) for q in looser)


def _parse_quality(quality: str) -> tuple[str, tuple[str, ...]]:
    """A level (``exact`` where none is named) and the names allowed besides.

    Raises:
        RequestError: it has something that is neither, two levels, or nothing.
    """
    items = [i.strip() for i in quality.split(",")]
    levels = [i for i in items if i in QUALITIES]
    names = tuple(i for i in items if i not in QUALITIES)
    hint = f"use {', '.join(QUALITIES)}, or names of optimizations such as vae_tiling,tome"
    if len(levels) > 1:
        raise RequestError(f"quality {quality!r} has two levels", hint)
    for name in names:
        try:
            find(name)
        except OptimizationError as error:
            raise RequestError(f"unknown quality {name!r}", hint) from error
    return levels[0] if levels else QUALITIES[0], names


def budget_within(machine: Machine, limits: Limits) -> Budget:
    """What is free now, within the user's limits.

    Where the device computes in host RAM, both limits are on the same memory.
    """
    budget = budget_of(machine, limits.vram_limit, limits.reserve)
    if limits.ram_limit is None:
        return budget
    if budget.host_bytes is None:
        return Budget(min(budget.device_bytes, limits.ram_limit), None)
    return budget._replace(host_bytes=min(budget.host_bytes, limits.ram_limit))


def nothing_left(machine: Machine, limits: Limits) -> Iterator[str]:
    """One sentence where no device memory at all is left for a pipeline."""
    free, limit, context = machine.device.free_bytes, limits.vram_limit, machine.context_bytes
    if budget_of(machine, limit, limits.reserve).device_bytes:
        return
    binds = limit is not None and limit < free
    what = (
        f"the VRAM limit of {format_bytes(limit or 0)}" if binds else f"{format_bytes(free)} free"
    )
    reserve = f" and the reserve {format_bytes(limits.reserve)}" if limits.reserve else ""
    yield (
        f"{what} leaves nothing for the pipeline: the device's runtime (CUDA's context) takes "
        f"{format_bytes(context)}{reserve}"
    )
