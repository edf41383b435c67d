"""Whether a remembered profile still describes this machine, in words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from autotune.probe.machine import Host
from autotune.profile.profile import SCHEMA_VERSION, Profile
from autotune.units import format_bytes

# What chooses and compiles the kernels; "cuda" is the version that torch was built for.
PACKAGES: Final = ("torch", "diffusers", "accelerate", "xformers", "cuda")

# The kernel and the firmware take a slightly different share of the same RAM at each start.
_RAM_TOLERANCE: Final = 0.05


def stale_reasons(
    profile: Profile,
    *,
    software: Mapping[str, str],
    driver: str | None = None,
    host: Host | None = None,
) -> tuple[str, ...]:
    """Why ``profile`` must be measured again; empty when it holds.

    Args:
        profile: The remembered profile.
        software: Distribution name → version installed now, gathered as ``Machine.software`` is.
            A name left out is not installed.
        driver: The device driver's version now; ``None`` when it is not known.
        host: The computer now; ``None`` leaves it out of the comparison.

    Returns:
        One reason per change, as ``"driver 580.82 → 590.44"``.
    """
    return (
        *_schema_reasons(profile.schema_version),
        *_driver_reasons(profile.machine.device.driver, driver),
        *_software_reasons(profile.machine.software, software),
        *(_host_reasons(profile.machine.host, host) if host else ()),
    )


def _schema_reasons(version: int) -> Iterator[str]:
    if version != SCHEMA_VERSION:
        yield f"measured by profile schema {version}, this version has {SCHEMA_VERSION}"


def _driver_reasons(before: str | None, now: str | None) -> Iterator[str]:
    if before and now and before != now:
        yield f"driver {before} → {now}"


def _software_reasons(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name in PACKAGES:
        old, new = before.get(name, "not installed"), now.get(name, "not installed")
        if old != new:
            yield f"{name} {old} → {new}"


def _host_reasons(before: Host, now: Host) -> Iterator[str]:
    if abs(now.ram_total_bytes - before.ram_total_bytes) > _RAM_TOLERANCE * before.ram_total_bytes:
        old_ram, new_ram = format_bytes(before.ram_total_bytes), format_bytes(now.ram_total_bytes)
        yield f"RAM {old_ram} → {new_ram}"
    for name, old, new in (
        ("CPU", before.cpu, now.cpu),
        ("cores", str(before.cores), str(now.cores)),
    ):
        if old != new:
            yield f"{name} {old} → {new}"
    if _os_series(before.os) != _os_series(now.os):
        yield f"OS {before.os} → {now.os}"


def _os_series(name: str) -> str:
    """``"Linux 6.1.0-28-amd64"`` → ``"Linux 6.1"``: security updates change no rate."""
    match = re.match(r"\D*\d+(\.\d+)?", name)
    return match[0] if match else name
