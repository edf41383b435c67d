"""``autotune probe``: measure this machine now, and show what was found."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autotune import tuner
from autotune.cli.options import Batch, Dtype, Height, Width
from autotune.cli.output import JsonFlag, console, print_json, progress
from autotune.decide.choose import predict
from autotune.decide.corrections import plain_operators
from autotune.decide.forward import ForwardModel
from autotune.errors import RequestError
from autotune.probe.machine import (
    AttentionRate,
    Device,
    Figure,
    GpuProcess,
    Kernels,
    Link,
    Machine,
    OtherGpu,
)
from autotune.probe.pcie import line_rate
from autotune.probe.peak import matmul_peak, memory_peak
from autotune.probe.reference import check_writable, load_machine, write_machine
from autotune.tuner import Ask, Measured
from autotune.units import GIB, MIB, format_bytes, format_rate, format_seconds
from autotune.workload.architecture import Architecture, find_architecture
from autotune.workload.cache import workload_of
from autotune.workload.request import complete_request
from autotune.workload.workload import Request, Workload

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
_SMALL_SHARE = 0.001  # of the work: an estimate of that does no harm
_HOLDERS = 4  # processes named
_LABELS = 13  # the width of the first column, in characters
_SHORT = {"tensorfloat32": "tf32", "float8_e4m3fn": "float8"}


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
    ask = Ask(height, width, batch, dtype=dtype)
    if deep is None and ask != Ask():
        options = "--height, --width, --batch and --dtype"
        raise RequestError(f"{options} say what to trace a model at", "add --deep MODEL")
    # What fails, fails before the work.
    architecture = None if deep is None else _checked(find_architecture(deep), ask)
    if save is not None:
        check_writable(save)
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


def _checked(architecture: Architecture, ask: Ask) -> Architecture:
    """The architecture, once the request is one that it can draw on some machine.

    Raises:
        RequestError: a size or a dtype is none that it has.
    """
    _complete(architecture, load_machine("rtx-3080-10gb"), ask)
    return architecture


def _complete(architecture: Architecture, machine: Machine, ask: Ask) -> Request:
    return complete_request(
        architecture,
        machine,
        height=ask.height,
        width=ask.width,
        batch=ask.batch,
        dtype=ask.dtype,
    )


def time_operators(
    measured: Measured, architecture: Architecture, ask: Ask, budget_s: float = _REPLAY_BUDGET_S
) -> tuple[Measured, str]:
    """The machine with a model's operators replayed, and what came of it in one sentence."""
    request = _complete(architecture, measured.machine, ask)
    workload = workload_of(architecture, request)
    measured = tuner.replayed(measured, workload, budget_s)
    wanted = {operator.key for operator in plain_operators(workload)}
    times = measured.machine.operators
    timed = sum(key in times and times[key].seconds is not None for key in wanted)
    phases = predict(measured.machine, workload, ()).prediction.phases
    step_s = sum(phase.seconds for phase in phases if phase.name == "denoise") / request.steps
    return measured, (
        f"Timed {timed} of {len(wanted)} different operators of {workload.model} at "
        f"{request.width}x{request.height}, {request.dtype}{_by_rates(measured, workload)}: "
        f"a denoise step should take {format_seconds(step_s)} where nothing is optimized."
    )


def _by_rates(measured: Measured, workload: Workload) -> str:
    """What part of the work is estimated: operators not reached, or that cannot run alone."""
    times, model = measured.machine.operators, ForwardModel(measured.machine, workload)
    seconds = {True: 0.0, False: 0.0}
    for operator in plain_operators(workload):
        time = times.get(operator.key)
        is_timed = time is not None and time.seconds is not None
        seconds[is_timed] += operator.count * model.rate_seconds(operator)
    share = seconds[False] / max(sum(seconds.values()), 1e-12)
    if share < _SMALL_SHARE:
        return ""
    return f" (rates stand in for the rest, {share:.1%} of the work)"


def print_machine(machine: Machine) -> None:
    """A machine for people: what it can do, who holds its memory, what to know about it."""
    out = console()
    out.print(f"[bold]{_plain(machine.device.name)}[/bold]  {_origin(machine)}", soft_wrap=True)
    out.print(_grid(_device_rows(machine)))
    out.print(_rate_table(machine))
    out.print(_grid(_other_rows(machine)))
    if machine.attention:
        out.print(_attention_table(machine))
        for name, error in _failed(machine.attention):
            out.print(f"{name}: {error}", style="dim", markup=False)
    out.print(_grid((("•", finding) for finding in machine.findings), label_width=1))


def _plain(text: str) -> str:
    """Text as it is: names and messages may look like rich's markup."""
    from rich.markup import escape

    return escape(text)


def _origin(machine: Machine) -> str:
    name = _plain(machine.name)
    if machine.source == "datasheet":
        return f"{name}, from published figures"
    took = f" in {format_seconds(machine.measured_in_s)}" if machine.measured_in_s else ""
    return f"{name}, measured{took}"


def _grid(rows: Iterable[tuple[str, str]], label_width: int = _LABELS) -> Table:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True, min_width=label_width)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, _plain(value))
    return table


def _device_rows(machine: Machine) -> Iterator[tuple[str, str]]:
    device, host = machine.device, machine.host
    yield "memory", _memory(machine)
    if machine.others:
        yield "other GPUs", ", ".join(map(_other_gpu, machine.others))
    limits = ", ".join(_limits(device))
    if limits:
        yield "device", limits
    if device.kind == "cpu":
        yield "host", f"{host.cores} cores, {host.os}"
    else:
        yield "host", f"{host.cpu}, {host.cores} cores, {_ram(machine)}"


def _other_gpu(gpu: OtherGpu) -> str:
    memory = f"{format_bytes(gpu.free_bytes)} free of {format_bytes(gpu.total_bytes)}"
    return f"cuda:{gpu.index} {gpu.name}, {memory}"


def _limits(device: Device) -> Iterator[str]:
    """What runs the GPU, what it may take and how fast it may run, and what slows it right now."""
    if device.driver is not None:
        yield f"driver {device.driver}"
    if device.power_limit_watts is not None:
        usual = device.power_limit_default_watts
        lowered = usual is not None and usual > device.power_limit_watts
        of = f" of {usual:.0f} W" if lowered else ""
        yield f"{device.power_limit_watts:.0f} W{of}"
    if device.sm_clock_max_mhz is not None:
        yield f"{device.sm_clock_max_mhz} MHz"
    if device.throttle_reasons:
        yield f"slowed by {' and '.join(device.throttle_reasons)}"
    if device.mig_enabled:
        yield "an instance of a split GPU (MIG)"


def _rate_table(machine: Machine) -> Table:
    """Rates by dtype, in one unit, beside what the chip could do at its highest clock."""
    from rich.table import Table

    kernels = machine.kernels
    columns = [
        ("matmul", _values(kernels.matmul_flops_per_s)),
        ("of", _peaks(machine)),
        ("convolution", _values(kernels.convolution_flops_per_s)),
        ("channels-last", _values(kernels.convolution_channels_last_flops_per_s)),
    ]
    columns = [(title, values) for title, values in columns if values]
    factor, unit = _unit(max(v for _, values in columns for v in values.values()))
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(unit, no_wrap=True, style="dim", min_width=_LABELS)
    for title, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for dtype in kernels.matmul_flops_per_s:
        cells = (values.get(dtype) for _, values in columns)
        shown = ("—" if value is None else f"{value / factor:.1f}" for value in cells)
        table.add_row(_SHORT.get(dtype, dtype), *shown)
    return table


def _values(figures: dict[str, Figure]) -> dict[str, float]:
    return {dtype: figure.value for dtype, figure in figures.items()}


def _peaks(machine: Machine) -> dict[str, float]:
    peaks = ((d, matmul_peak(machine.device, d)) for d in machine.kernels.matmul_flops_per_s)
    return {dtype: peak for dtype, peak in peaks if peak is not None}


def _unit(largest: float) -> tuple[float, str]:
    return (1e12, "TFLOP/s") if largest >= 1e12 else (1e9, "GFLOP/s")


def _other_rows(machine: Machine) -> Iterator[tuple[str, str]]:
    host, kernels = machine.host, machine.kernels
    peak = memory_peak(machine.device)
    of = f" of {_speed(peak)}" if peak is not None else ""
    yield "memory rate", f"{_speed(kernels.memory_bytes_per_s.value)}{of}"
    yield "dispatch", _dispatch(kernels)
    if kernels.offload_hook_s is not None:
        yield "offload hook", f"{format_seconds(kernels.offload_hook_s.value)} per layer"
    if machine.link is not None:
        yield from _link_rows(machine.link)
    if host.disk_read_bytes_per_s is not None:
        yield "model cache", f"read from disk at {_speed(host.disk_read_bytes_per_s.value)}"
    if machine.context_bytes:
        yield "context", format_bytes(machine.context_bytes)


def _dispatch(kernels: Kernels) -> str:
    if kernels.launch_s is None:
        return f"{format_seconds(kernels.dispatch_s.value)} per operator"
    bare = f"{format_seconds(kernels.launch_s.value)} per bare operator"
    if kernels.dispatch_s.value == kernels.launch_s.value:
        return bare
    return f"{format_seconds(kernels.dispatch_s.value)} per operator of a model, {bare}"


def _memory(machine: Machine) -> str:
    device = machine.device
    text = f"{format_bytes(device.free_bytes)} free of {format_bytes(device.total_bytes)}"
    held = [_held(process) for process in device.processes[:_HOLDERS]]
    if len(device.processes) > _HOLDERS:
        held.append(f"and {len(device.processes) - _HOLDERS} more")
    return f"{text}; held by {', '.join(held)}" if held else text


def _held(process: GpuProcess) -> str:
    size = "" if process.used_bytes is None else f" {format_bytes(process.used_bytes)}"
    return f"{process.name or 'a process'} (PID {process.pid}){size}"


def _ram(machine: Machine) -> str:
    host = machine.host
    available, total = format_bytes(host.ram_available_bytes), format_bytes(host.ram_total_bytes)
    return f"{available} available of {total}"


def _link_rows(link: Link) -> Iterator[tuple[str, str]]:
    promised = line_rate(link.pcie_generation_max, link.pcie_width_max)
    bus = f" of {_speed(promised)} ({_bus(link)})" if promised else ""
    out, back = link.h2d_pinned_bytes_per_s, link.d2h_pinned_bytes_per_s
    yield "to device", _copies(out, link.h2d_pageable_bytes_per_s, bus)
    yield "from device", _copies(back, link.d2h_pageable_bytes_per_s, "")
    pinned = [point for point in link.sweep if point.pinned and point.direction == "h2d"]
    if pinned:
        sizes = (f"{_size(p.bytes)} {p.bytes_per_s.value / 1e9:.1f}" for p in pinned)
        yield "  by size", f"{', '.join(sizes)} GB/s to device, pinned"
    if link.overlap_fraction is not None:
        yield "  overlap", f"{link.overlap_fraction.value:.0%} of a copy hides behind a kernel"
    to, from_ = link.module_h2d_bytes_per_s.value, link.module_d2h_bytes_per_s.value
    yield "module.to()", f"{_speed(to)} to device, {_speed(from_)} back"


def _size(count: int) -> str:
    return f"{count // MIB} MiB" if count < GIB else f"{count // GIB} GiB"


def _bus(link: Link) -> str:
    """``"PCIe 4 x16"``, and what the link ran at where that was less."""
    most = (link.pcie_generation_max, link.pcie_width_max)
    ran = (link.pcie_generation_in_copy or most[0], link.pcie_width_in_copy or most[1])
    text = f"PCIe {most[0]} x{most[1]}"
    return text if ran == most else f"{text}, running at {ran[0]} x{ran[1]}"


def _copies(pinned: Figure, pageable: Figure, bus: str) -> str:
    return f"{_speed(pinned.value)} pinned{bus}, {_speed(pageable.value)} pageable"


def _speed(bytes_per_s: float) -> str:
    return format_rate(bytes_per_s, "B/s")


def _attention_table(machine: Machine) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("attention", no_wrap=True, min_width=_LABELS)
    for title in ("speed", "best rate", "extra memory"):
        table.add_column(title, no_wrap=True, justify="right")
    table.add_column("")
    for name, speed in ranked(machine.attention):
        rates = [rate for rate in machine.attention if rate.implementation == name]
        note = "default" if name == machine.default_attention else ""
        if speed:
            table.add_row(name, f"{speed:.2f}×", _best_rate(rates), _extra(rates), note)
    return table


def _failed(rates: tuple[AttentionRate, ...]) -> Iterator[tuple[str, str]]:
    """Implementations that worked at no shape, with what they said at the first."""
    for name, speed in ranked(rates):
        errors = [rate.error for rate in rates if rate.implementation == name and rate.error]
        if not speed and errors:
            yield name, errors[0]


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
