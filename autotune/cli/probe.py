"""``autotune probe``: measure this machine now, and show what was found."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autotune import tuner
from autotune.cli.options import Batch, Dtype, Height, Width
from autotune.cli.output import JsonFlag, console, print_json, progress
from autotune.decide.choose import predict
from autotune.decide.corrections import replayable
from autotune.errors import RequestError
from autotune.probe.machine import AttentionRate, Figure, GpuProcess, Link, Machine
from autotune.probe.pcie import line_rate
from autotune.probe.reference import write_machine
from autotune.tuner import Ask, Measured
from autotune.units import MIB, format_bytes, format_rate, format_seconds
from autotune.workload.architecture import Architecture, find_architecture
from autotune.workload.cache import workload_of
from autotune.workload.request import complete_request

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


QuickOption = Annotated[
    bool,
    typer.Option("--quick", help="A first look in under 3 s; the profile is left as it is."),
]
DeepOption = Annotated[
    str | None,
    typer.Option(
        "--deep",
        metavar="MODEL",
        help="Also time the operators of this model, without its weights, at the size given.",
        show_default=False,
    ),
]

_REPLAY_BUDGET_S = 30.0


def probe(
    device: DeviceOption = None,
    quick: QuickOption = False,
    deep: DeepOption = None,
    height: Height = None,
    width: Width = None,
    batch: Batch = 1,
    dtype: Dtype = "auto",
    json: JsonFlag = False,
    save: SaveOption = None,
) -> None:
    """Measure this machine: memory, link, kernels, attention. Remembers it in the profile."""
    if quick and deep:
        raise RequestError("--quick and --deep exclude each other", "leave one of them out")
    architecture = None if deep is None else find_architecture(deep)  # fails before the work
    account = None
    with progress("Measuring this machine") as say:
        if quick:
            from autotune.probe.measure import measure_machine

            machine = measure_machine(device, quick=True, progress=say)
        else:
            measured = tuner.machine_here(device, remeasure=True, progress=say)
            if architecture is not None:
                if say is not None:
                    say(f"the operators of {deep}")
                ask = Ask(height, width, batch, dtype=dtype)
                measured, account = time_operators(measured, architecture, ask)
            machine = measured.machine
    if save is not None:
        write_machine(machine, save)
    if json:
        print_json(machine)
    else:
        print_machine(machine)
    if account is not None:
        typer.echo(account, err=json)


def time_operators(
    measured: Measured, architecture: Architecture, ask: Ask, budget_s: float = _REPLAY_BUDGET_S
) -> tuple[Measured, str]:
    """The machine with a model's operators replayed, and what came of it in one sentence."""
    request = complete_request(
        architecture,
        measured.machine,
        height=ask.height,
        width=ask.width,
        batch=ask.batch,
        dtype=ask.dtype,
    )
    workload = workload_of(architecture, request)
    measured = tuner.replayed(measured, workload, budget_s)
    wanted = {operator.key for operator in replayable(workload)}
    timed = len(wanted & measured.machine.operators.keys())
    phases = predict(measured.machine, workload, ()).prediction.phases
    step_s = next(p.seconds for p in phases if p.name == "denoise") / request.steps
    return measured, (
        f"Timed {timed} of {len(wanted)} different operators of {workload.model} at "
        f"{request.width}x{request.height}, {request.dtype}: "
        f"a denoise step should take {format_seconds(step_s)} where nothing is optimized."
    )


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
    if host.disk_read_bytes_per_s is not None:
        yield "model cache", f"read from disk at {_speed(host.disk_read_bytes_per_s.value)}"
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
    pinned = [point for point in link.sweep if point.pinned and point.direction == "h2d"]
    if pinned:
        sizes = (f"{p.bytes // MIB} MiB {p.bytes_per_s.value / 1e9:.1f}" for p in pinned)
        yield "  by size", f"{', '.join(sizes)} GB/s to device, pinned"
    if link.overlap_fraction is not None:
        yield "  overlap", f"{link.overlap_fraction.value:.0%} of a copy hides behind a kernel"
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
