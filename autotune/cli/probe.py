"""``autotune probe``: measure this machine now, and show what was found."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autotune.cli.output import JsonFlag, console, print_json, progress
from autotune.probe.machine import AttentionRate, Figure, GpuProcess, Link, Machine
from autotune.probe.pcie import line_rate
from autotune.probe.reference import write_machine
from autotune.units import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:
    from rich.table import Table

DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="What to measure: cuda:1, cpu, … By default the GPU with most free memory.",
        show_default=False,
    ),
]
SaveOption = Annotated[
    Path | None,
    typer.Option(
        "--save",
        metavar="FILE",
        dir_okay=False,
        help="Also write the machine to a JSON file, for --machine and `autotune machines add`.",
        show_default=False,
    ),
]


def probe(device: DeviceOption = None, json: JsonFlag = False, save: SaveOption = None) -> None:
    """Measure this machine: memory, link, kernels, attention. Remembers it in the profile."""
    with progress("Measuring this machine") as say:
        from autotune.tuner import machine_here

        machine = machine_here(device, remeasure=True, progress=say).machine
    if save is not None:
        write_machine(machine, save)
    if json:
        print_json(machine)
    else:
        print_machine(machine)


def print_machine(machine: Machine) -> None:
    """A machine for people: what it can do, who holds its memory, what to know about it."""
    out = console()
    out.print(f"[bold]{machine.device.name}[/bold]  {_origin(machine)}", soft_wrap=True)
    out.print(_facts(machine))
    if machine.attention:
        out.print(_attention_table(machine))
    for finding in machine.findings:
        out.print("•", finding, markup=False)


def _origin(machine: Machine) -> str:
    if machine.source == "datasheet":
        return f"{machine.name}, from published figures"
    took = f" in {format_seconds(machine.measured_in_s)}" if machine.measured_in_s else ""
    return f"{machine.name}, measured{took}"


def _facts(machine: Machine) -> Table:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in _rows(machine):
        table.add_row(name, value)
    return table


def _rows(machine: Machine) -> Iterator[tuple[str, str]]:
    device, host, kernels = machine.device, machine.host, machine.kernels
    yield "memory", _memory(machine)
    if device.kind != "cpu":
        yield "host", f"{host.cpu}, {host.cores} cores, {_ram(machine)}"
    else:
        yield "cores", f"{host.cores}, {host.os}"
    yield "matmul", _by_dtype(kernels.matmul_flops_per_s)
    yield "convolution", _by_dtype(kernels.convolution_flops_per_s)
    if kernels.convolution_channels_last_flops_per_s:
        yield "  channels-last", _by_dtype(kernels.convolution_channels_last_flops_per_s)
    yield "memory rate", format_rate(kernels.memory_bytes_per_s.value, "B/s")
    yield "dispatch", f"{format_seconds(kernels.dispatch_s.value)} per operator"
    if kernels.offload_hook_s is not None:
        yield "offload hook", f"{format_seconds(kernels.offload_hook_s.value)} per layer"
    if machine.link is not None:
        yield from _link_rows(machine.link)
    if machine.context_bytes:
        yield "context", format_bytes(machine.context_bytes)


def _memory(machine: Machine) -> str:
    device = machine.device
    text = f"{format_bytes(device.free_bytes)} free of {format_bytes(device.total_bytes)}"
    others = ", ".join(_held(process) for process in device.processes[:4])
    return f"{text}; held by {others}" if others else text


def _held(process: GpuProcess) -> str:
    size = "" if process.used_bytes is None else f" {format_bytes(process.used_bytes)}"
    return f"{process.name or 'a process'} (PID {process.pid}){size}"


def _ram(machine: Machine) -> str:
    host = machine.host
    available, total = format_bytes(host.ram_available_bytes), format_bytes(host.ram_total_bytes)
    return f"{available} available of {total}"


def _by_dtype(figures: dict[str, Figure]) -> str:
    return "  ".join(
        f"{dtype} {format_rate(figure.value, 'FLOP/s')}" for dtype, figure in figures.items()
    )


def _link_rows(link: Link) -> Iterator[tuple[str, str]]:
    promised = line_rate(link.pcie_generation_max, link.pcie_width_max)
    bus = f" of {_speed(promised)} (PCIe {link.pcie_generation_max} x{link.pcie_width_max})"
    yield (
        "to device",
        _copies(
            link.h2d_pinned_bytes_per_s, link.h2d_pageable_bytes_per_s, bus if promised else ""
        ),
    )
    yield "from device", _copies(link.d2h_pinned_bytes_per_s, link.d2h_pageable_bytes_per_s, "")
    out, back = link.module_h2d_bytes_per_s.value, link.module_d2h_bytes_per_s.value
    yield "module.to()", f"{_speed(out)} to device, {_speed(back)} back"


def _copies(pinned: Figure, pageable: Figure, bus: str) -> str:
    return f"{_speed(pinned.value)} pinned{bus}, {_speed(pageable.value)} pageable"


def _speed(bytes_per_s: float | None) -> str:
    return format_rate(bytes_per_s or 0.0, "B/s")


def _attention_table(machine: Machine) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("attention", "speed", "best rate", "extra memory"):
        table.add_column(title, no_wrap=True, justify="left" if title == "attention" else "right")
    table.add_column("", overflow="fold")
    for name, speed in ranked(machine.attention):
        rates = [rate for rate in machine.attention if rate.implementation == name]
        failed = next((rate.error for rate in rates if rate.error), "")
        note = failed or ("default" if name == machine.default_attention else "")
        shown = f"{speed:.2f}×" if speed else "—"
        table.add_row(name, shown, _best_rate(rates), _extra(rates), escape(note))
    return table


def ranked(rates: tuple[AttentionRate, ...]) -> list[tuple[str, float]]:
    """Implementations, fastest first, with their speed against the fastest at the same shape.

    The median over the shapes; 0 for an implementation that never worked.
    """
    speeds: dict[str, list[float]] = {rate.implementation: [] for rate in rates}
    best: dict[tuple[int, ...], float] = {}
    for rate in rates:
        best[_shape(rate)] = max(best.get(_shape(rate), 0.0), _value(rate))
    for rate in rates:
        if _value(rate):
            speeds[rate.implementation].append(_value(rate) / best[_shape(rate)])
    typical = {name: statistics.median(values or [0.0]) for name, values in speeds.items()}
    return sorted(typical.items(), key=lambda item: -item[1])


def _value(rate: AttentionRate) -> float:
    return rate.flops_per_s.value if rate.flops_per_s is not None else 0.0


def _shape(rate: AttentionRate) -> tuple[int, ...]:
    return (rate.batch, rate.heads, rate.q_tokens, rate.kv_tokens, rate.head_dim)


def _best_rate(rates: list[AttentionRate]) -> str:
    highest = max(map(_value, rates))
    return format_rate(highest, "FLOP/s") if highest else "—"


def _extra(rates: list[AttentionRate]) -> str:
    sizes = [rate.extra_bytes for rate in rates if rate.extra_bytes is not None]
    return f"≤ {format_bytes(max(sizes))}" if sizes else "—"
