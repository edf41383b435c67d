"""The computer around the device: CPU, usable cores, and memory within a container's limit."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from autotune.probe.machine import Host

_MEMBERSHIP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")
_CPUINFO = Path("/proc/cpuinfo")


def read_host() -> Host:
    """The host as it is now. Takes milliseconds and imports no torch."""
    total, available = ram()
    return Host(
        cpu=cpu_name(),
        cores=usable_cores(),
        ram_total_bytes=total,
        ram_available_bytes=available,
        os=f"{platform.system()} {platform.release()}".strip(),
        memlock_limit_bytes=memlock_limit(),
    )


class Neighbours:
    """Watches, from its creation on, how many cores others keep busy or the hypervisor takes.

    Only the cores that this process may run on count.
    """

    def __init__(self) -> None:
        self._start = _read_times()

    def seconds(self) -> float:
        """Since the watch began."""
        return self._since().clock

    def busy_cores(self) -> float:
        """Cores' worth of work that was not this process's since the watch began.

        Where a quota leaves it fewer cores than it may run on, the first ones busy are no loss.
        """
        seconds, busy, own, _ = self._since()
        foreign = (busy - own) / seconds if seconds > 0 else 0.0
        return max(0.0, foreign - (_affinity() - usable_cores()))

    def stolen_cores(self) -> float:
        """Cores' worth of time that a hypervisor gave to other virtual machines."""
        seconds, _, _, stolen = self._since()
        return max(0.0, stolen / seconds) if seconds > 0 else 0.0

    def _since(self) -> _Times:
        pairs = zip(_read_times(), self._start, strict=True)
        return _Times(*(now - then for now, then in pairs))


class _Times(NamedTuple):
    """Seconds: of the clock, of busy cores, of this process, of stolen cores."""

    clock: float
    busy: float
    own: float
    stolen: float


def _read_times() -> _Times:
    cores, own = psutil.cpu_times(percpu=True), psutil.Process().cpu_times()
    if hasattr(os, "sched_getaffinity"):
        mine = [cores[core] for core in os.sched_getaffinity(0) if core < len(cores)]
        cores = mine or cores
    busy = stolen = 0.0
    for core in cores:
        taken = float(getattr(core, "steal", 0.0))
        idle = core.idle + getattr(core, "iowait", 0.0)
        guests = getattr(core, "guest", 0.0) + getattr(core, "guest_nice", 0.0)
        busy += sum(core) - idle - guests - taken
        stolen += taken
    return _Times(time.monotonic(), busy, own.user + own.system, stolen)


def memlock_limit() -> int | None:
    """``RLIMIT_MEMLOCK`` in bytes; ``None`` when unlimited, or where there is no such limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def ram(membership: Path = _MEMBERSHIP, cgroups: Path = _CGROUPS) -> tuple[int, int]:
    """Total and available bytes, whichever of machine and container allows less."""
    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    for limit, used in _memory_limits(membership, cgroups):
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def usable_cores(membership: Path = _MEMBERSHIP, cgroups: Path = _CGROUPS) -> int:
    """Cores this process may use: the affinity mask, and a container's quota rounded up."""
    quotas = [math.ceil(quota) for quota in _cpu_quotas(membership, cgroups)]
    return max(1, min([_affinity(), *quotas]))


def cpu_name(cpuinfo: Path = _CPUINFO) -> str:
    """The processor as its maker calls it, or the architecture where nobody says."""
    for line in _text(cpuinfo).splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Processor") and value.strip():
            return " ".join(value.split())
    return platform.processor() or platform.machine() or "CPU"


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_limits(membership: Path, cgroups: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) of every group this process is in; droppable page cache is not used."""
    for folder in _folders(membership, cgroups, "memory"):
        for limit_file, used_file, reclaimable in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _number(folder / limit_file), _number(folder / used_file)
            if limit is not None:
                cache = _stat(folder / "memory.stat", reclaimable)
                yield limit, max(0, (used or 0) - cache)


def _cpu_quotas(membership: Path, cgroups: Path) -> Iterator[float]:
    for folder in _folders(membership, cgroups, "cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota.strip().isdigit() and period.strip().isdigit():
            yield int(quota) / max(1, int(period))
        old_quota, old_period = (
            _number(folder / "cpu.cfs_quota_us"),
            _number(folder / "cpu.cfs_period_us"),
        )
        if old_quota and old_quota > 0 and old_period:
            yield old_quota / old_period


def _folders(membership: Path, cgroups: Path, controller: str) -> Iterator[Path]:
    """The group's folder and its parents: a limit anywhere above holds too.

    ``/proc/self/cgroup`` has lines ``id:controllers:path``; version 2 is the one with no
    controllers. Inside a container the path may be the host's and absent here: the mount's root
    then speaks for it.
    """
    for line in _text(membership).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        roots = (cgroups / controllers, cgroups / controller) if controllers else (cgroups,)
        root = next((folder for folder in roots if folder.is_dir()), cgroups)
        folder = root / path.lstrip("/")
        yield from (part for part in (folder, *folder.parents) if part.is_relative_to(root))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """A file with one number; ``None`` for ``max``, or when there is no such file."""
    try:
        return int(_text(path))
    except ValueError:
        return None


def _stat(path: Path, key: str) -> int:
    for line in _text(path).splitlines():
        name, _, value = line.partition(" ")
        if name == key and value.strip().isdigit():
            return int(value)
    return 0
