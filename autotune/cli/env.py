"""``autotune env``: versions and devices, for bug reports. Imports no torch."""

from __future__ import annotations

from typing import Any

from autotune.cli.output import JsonFlag, console, print_json
from autotune.probe import nvml
from autotune.probe.host import read_host
from autotune.probe.machine import Host
from autotune.probe.software import installed_versions
from autotune.units import format_bytes


def env(json: JsonFlag = False) -> None:
    """Show versions and devices, to paste into a bug report."""
    gpus, reason = nvml.gpus(), nvml.unavailable_reason()
    versions, host = installed_versions(), read_host()
    if json:
        print_json({"software": versions, "host": host, "gpus": gpus, "nvml": reason or "ok"})
        return
    out = console()
    for name, value in _lines(versions, host, gpus, reason):
        out.print(f"{name:<20} {value}", markup=False, soft_wrap=True)


def _lines(
    versions: dict[str, str], host: Host, gpus: tuple[nvml.Gpu, ...], reason: str | None
) -> list[tuple[str, Any]]:
    ram = f"{format_bytes(host.ram_available_bytes)} of {format_bytes(host.ram_total_bytes)}"
    lines: list[tuple[str, Any]] = [
        *((name, version or "not installed") for name, version in versions.items()),
        ("os", host.os),
        ("cpu", f"{host.cpu}, {host.cores} cores usable"),
        ("ram available", ram),
    ]
    lines += [(f"gpu {gpu.index}", _gpu(gpu)) for gpu in gpus]
    return lines if reason is None else [*lines, ("gpu", reason)]


def _gpu(gpu: nvml.Gpu) -> str:
    facts = [gpu.name]
    if gpu.total_bytes is not None and gpu.free_bytes is not None:
        facts.append(f"{format_bytes(gpu.free_bytes)} free of {format_bytes(gpu.total_bytes)}")
    if gpu.driver is not None:
        facts.append(f"driver {gpu.driver}")
    if gpu.compute_capability is not None:
        facts.append(f"compute capability {gpu.compute_capability}")
    return ", ".join(facts)
