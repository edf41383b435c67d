"""What has changed since a machine was measured, what follows from it, and how to say so."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from autotune.probe.machine import Host, Machine
from autotune.probe.parts import EVERYTHING, Part
from autotune.units import format_bytes

_STACK: Final = frozenset[Part](
    ("kernels", "attention", "dispatch", "modules", "context", "operators")
)
"""All but what PCIe and disk do by themselves."""

STALE: Final[Mapping[str, frozenset[Part]]] = {
    # The driver compiles, launches and allocates; torch chooses the kernels, and is built for one
    # version of CUDA. Copies between pinned memory and the device are the hardware's own.
    "driver": _STACK,
    "torch": _STACK,
    "cuda": _STACK,
    "hip": _STACK,
    "xpu": _STACK,
    "xformers": frozenset(("attention",)),
    "sageattention": frozenset(("attention",)),
    # Only Python that runs between kernels: of models, of hooks, or the interpreter itself.
    "diffusers": frozenset(("dispatch",)),
    "accelerate": frozenset(("dispatch",)),
    "Python": frozenset(("dispatch",)),
    "PCIe": frozenset(("link", "modules")),
    "CPU": frozenset(("dispatch", "link", "modules", "disk")),
    "cores": frozenset(("dispatch", "link", "modules")),
    "OS": frozenset(("dispatch", "link", "modules", "disk")),
    "device": EVERYTHING,
    "memory": EVERYTHING,
    # How much there is and how much of it is free is read at every start.
    "RAM": frozenset(),
}
"""What has to be measured again, by what has changed."""

_HOST: Final = ("CPU", "cores", "OS")
"""Where the device is the CPU, these are about the device."""

PACKAGES: Final = (
    "torch",
    "cuda",
    "hip",
    "xpu",
    "xformers",
    "sageattention",
    "diffusers",
    "accelerate",
)
"""Of the software, what decisions depend on. "cuda" is the version that torch was built for."""

_NAMES: Final[Mapping[Part, str]] = {
    "kernels": "kernels",
    "attention": "attention",
    "dispatch": "dispatch costs",
    "link": "link",
    "modules": "module moves",
    "disk": "disk",
}
"""In the order of a sentence. Context and operators are no measurements of their own."""

# The kernel and the firmware take a slightly different share of the same RAM at each start, and
# drivers of the GPU's memory.
_TOLERANCE: Final = 0.05

_ABSENT: Final = "not installed"


class Facts(NamedTuple):
    """What figures depend on.

    Attributes:
        device: Its name.
        total_bytes: Of the device's own memory; ``None`` where it has none, or nobody tells.
        on_cpu: The device is the host's own processor.
        driver: ``None`` where it is not known.
        software: Distribution name → version; one left out, or empty, is not installed.
        host: The computer; ``None`` where it does not matter.
        pcie: Generation and width that the link can reach; ``None`` where nobody tells.
    """

    device: str
    total_bytes: int | None
    on_cpu: bool
    driver: str | None
    software: Mapping[str, str]
    host: Host | None
    pcie: tuple[int, int] | None = None


class Change(NamedTuple):
    """One difference, and the parts that it makes stale."""

    what: str
    before: str
    now: str
    parts: frozenset[Part]

    def __str__(self) -> str:
        return f"{self.what} {self.before} → {self.now}"


def facts_of(machine: Machine) -> Facts:
    """What the figures of a measured machine depended on."""
    device, link = machine.device, machine.link
    pcie = (link.pcie_generation_max, link.pcie_width_max) if link else (None, None)
    return Facts(
        device=device.name,
        total_bytes=None if device.unified_memory else device.total_bytes,
        on_cpu=device.kind == "cpu",
        driver=device.driver,
        software=machine.software,
        host=machine.host,
        pcie=known_pcie(*pcie),
    )


def known_pcie(generation: int | None, width: int | None) -> tuple[int, int] | None:
    """Both, or ``None``."""
    return None if generation is None or width is None else (generation, width)


def changes(before: Facts, now: Facts) -> tuple[Change, ...]:
    """What differs, as far as it is known on both sides; what matters to no figure is left out."""
    pairs = itertools.chain(_device(before, now), _software(before, now), _host(before, now))
    return tuple(
        Change(what, old, new, EVERYTHING if now.on_cpu and what in _HOST else STALE[what])
        for what, old, new in pairs
        if old != new
    )


def stale_parts(found: Collection[Change]) -> frozenset[Part]:
    """What has to be measured again after these changes."""
    return frozenset[Part]().union(*(change.parts for change in found))


def reasons(found: Sequence[Change], machine: Machine) -> tuple[str, ...]:
    """The changes that make something stale, with what follows, each as a sentence for people.

    ``"driver 580.82 → 590.44: kernels, attention, dispatch costs and module moves measured again;
    link and disk kept"``. Changes of the same consequence share one; what is kept by all of them is
    in the last.

    Args:
        found: As of ``changes``.
        machine: As measured before them.
    """
    effective = [change for change in found if change.parts]
    if not effective:
        return ()
    groups: dict[frozenset[Part], list[str]] = {}
    for change in effective:
        groups.setdefault(change.parts, []).append(str(change))
    texts = [f"{', '.join(who)}: {_follows(parts, machine)}" for parts, who in groups.items()]
    return (*texts[:-1], texts[-1] + _kept(stale_parts(effective), machine))


def _follows(parts: frozenset[Part], machine: Machine) -> str:
    names = [_NAMES[part] for part in _present(machine) if part in parts]
    what = "everything" if parts >= set(_present(machine)) else _listed(names)
    return f"{what} measured again"


def _kept(stale: frozenset[Part], machine: Machine) -> str:
    names = [_NAMES[part] for part in _present(machine) if part not in stale]
    text = f"; {_listed(names)} kept" if names else ""
    if "operators" in stale and machine.operators:
        text += f"; {len(machine.operators)} operators timed again when next used"
    return text


def _present(machine: Machine) -> tuple[Part, ...]:
    """Parts that the machine has figures of, in the order of a sentence."""
    has = {
        "attention": bool(machine.attention),
        "link": machine.link is not None,
        "modules": machine.link is not None,
        "disk": machine.host.disk_read_bytes_per_s is not None,
    }
    return tuple(part for part in _NAMES if has.get(part, True))


def _listed(names: Sequence[str]) -> str:
    """``"a, b and c"``."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


_Pair = tuple[str, str, str]


def _device(before: Facts, now: Facts) -> Iterator[_Pair]:
    if not now.on_cpu:
        yield "device", before.device, now.device
    if before.total_bytes and now.total_bytes and not now.on_cpu:
        yield from _size("memory", before.total_bytes, now.total_bytes)
    if before.driver and now.driver:
        yield "driver", before.driver, now.driver
    if before.pcie and now.pcie:
        yield "PCIe", _bus(before.pcie), _bus(now.pcie)


def _bus(pcie: tuple[int, int]) -> str:
    return f"{pcie[0]} x{pcie[1]}"


def _software(before: Facts, now: Facts) -> Iterator[_Pair]:
    for name in PACKAGES:
        yield name, before.software.get(name) or _ABSENT, now.software.get(name) or _ABSENT
    old, new = before.software.get("python"), now.software.get("python")
    if old and new:
        yield "Python", _minor(old), _minor(new)


def _host(before: Facts, now: Facts) -> Iterator[_Pair]:
    old, new = before.host, now.host
    if old is None or new is None:
        return
    yield "CPU", old.cpu, new.cpu
    yield "cores", str(old.cores), str(new.cores)
    if _minor(old.os) != _minor(new.os):
        yield "OS", old.os, new.os
    yield from _size("RAM", old.ram_total_bytes, new.ram_total_bytes)


def _size(what: str, before: int, now: int) -> Iterator[_Pair]:
    if abs(now - before) > _TOLERANCE * before:
        yield what, format_bytes(before), format_bytes(now)


def _minor(version: str) -> str:
    """``"3.11.7"`` → ``"3.11"``, ``"Linux 6.1.0-28"`` → ``"Linux 6.1"``: fixes change no rate."""
    match = re.match(r"\D*\d+(\.\d+)?", version)
    return match[0] if match else version
