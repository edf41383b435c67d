"""Two profiles side by side: only what differs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import msgspec
import typer

from autotune.cli.profile_show import add_row, age, chosen, measured_at, print_table, table_of
from autotune.probe.machine import AttentionRate, Figure, Machine
from autotune.profile.profile import PlanRecord, Profile
from autotune.profile.store import StoredProfile
from autotune.units import format_bytes, format_rate, format_seconds, printable

_NOISE = 0.03
"""Two measurements of the same thing differ by so much; by more, where their samples do."""


class FactDifference(msgspec.Struct, frozen=True):
    """A fact or version that is another; ``None`` where there is none."""

    name: str
    a: str | None
    b: str | None


class FigureDifference(msgspec.Struct, frozen=True):
    """A figure of both machines.

    Attributes:
        name: What was measured.
        unit: Of both.
        a: The first profile's; ``None`` where it has none.
        b: The second's.
        ratio: ``b / a``.
        is_noise: No further apart than measurements of one thing are.
    """

    name: str
    unit: str
    a: float | None
    b: float | None
    ratio: float | None
    is_noise: bool


class PlanDifference(msgspec.Struct, frozen=True):
    """What was last chosen for one workload; ``None`` where nothing was planned."""

    workload: str
    a: tuple[str, ...] | None
    b: tuple[str, ...] | None
    a_seconds: float | None
    b_seconds: float | None


class Difference(msgspec.Struct, frozen=True):
    """All that is not the same in two profiles. The ``--json`` contract of ``profile diff``.

    Attributes:
        machine: Device, driver and host.
        software: Versions, by distribution.
        figures: What was measured, noise left out unless it was asked for.
        within_noise: How many figures of both differ by no more than noise.
        plans: Of workloads for which something else was chosen.
    """

    machine: tuple[FactDifference, ...]
    software: tuple[FactDifference, ...]
    figures: tuple[FigureDifference, ...]
    within_noise: int
    plans: tuple[PlanDifference, ...]


def difference(a: Profile, b: Profile, *, noise: bool = False) -> Difference:
    """What is not the same in two profiles.

    Args:
        a: One.
        b: The other.
        noise: Also figures that differ by no more than two measurements of one thing do.
    """
    figures = tuple(_figures(a.machine, b.machine))
    return Difference(
        machine=_facts(_facts_of(a.machine), _facts_of(b.machine)),
        software=_facts(_installed(a.machine), _installed(b.machine)),
        figures=tuple(f for f in figures if noise or not f.is_noise),
        within_noise=sum(f.is_noise for f in figures),
        plans=tuple(_plans(a, b)),
    )


def print_difference(first: StoredProfile, second: StoredProfile, found: Difference) -> None:
    """Print two profiles side by side."""
    for label, stored in (("A", first), ("B", second)):
        typer.echo(typer.style(f"{label}  ", bold=True) + printable(_title(stored)))
    _print_facts("Machine", found.machine)
    _print_facts("Software", found.software)
    _print_figures(found.figures)
    _print_plans(found.plans)
    if not (found.machine or found.software or found.figures or found.plans):
        typer.echo("\nNothing differs.")
    if found.within_noise and not any(f.is_noise for f in found.figures):
        typer.echo(
            f"\n{found.within_noise} figures differ by no more than noise; --all shows them."
        )


def _title(stored: StoredProfile) -> str:
    if stored.profile is None:
        return str(stored.path)
    profile = stored.profile
    return f"{profile.key}, measured {age(measured_at(profile))}, {stored.path}"


def _facts_of(machine: Machine) -> dict[str, str | None]:
    device, host = machine.device, machine.host
    link = machine.link
    power = device.power_limit_watts
    return {
        "device": device.name,
        "device memory": format_bytes(device.total_bytes),
        "driver": device.driver,
        "power limit": None if power is None else f"{power:.0f} W",
        "PCIe": None if link is None else f"{link.pcie_generation_max} x{link.pcie_width_max}",
        "CPU": host.cpu,
        "cores": str(host.cores),
        "RAM": format_bytes(host.ram_total_bytes),
        "OS": host.os,
    }


def _installed(machine: Machine) -> dict[str, str | None]:
    return {name: version or None for name, version in machine.software.items()}


def _facts(
    a: Mapping[str, str | None],
    b: Mapping[str, str | None],
) -> tuple[FactDifference, ...]:
    names = dict.fromkeys((*a, *b))
    found = (FactDifference(name, a.get(name), b.get(name)) for name in names)
    return tuple(fact for fact in found if fact.a != fact.b)


def _figures(a: Machine, b: Machine) -> Iterator[FigureDifference]:
    firsts, seconds = dict(_measured(a, b)), dict(_measured(b, a))
    for name in dict.fromkeys((*firsts, *seconds)):
        unit = (firsts.get(name) or seconds[name])[1]
        first, second = (found[name][0] if name in found else None for found in (firsts, seconds))
        yield _compared(name, unit, first, second)


def _compared(name: str, unit: str, a: Figure | None, b: Figure | None) -> FigureDifference:
    if a is None or b is None:
        one, other = (None if figure is None else figure.value for figure in (a, b))
        return FigureDifference(name, unit, one, other, ratio=None, is_noise=False)
    ratio = b.value / a.value if a.value else None
    spread = max(_NOISE, a.spread or 0.0, b.spread or 0.0)
    is_noise = a.value == b.value or (ratio is not None and _within(ratio, spread))
    return FigureDifference(name, unit, a.value, b.value, ratio, is_noise)


def _within(ratio: float, spread: float) -> bool:
    return ratio > 0 and abs(math.log(ratio)) <= math.log1p(spread)


_Named = Iterable[tuple[str, tuple[Figure, str]]]


def _measured(machine: Machine, other: Machine) -> _Named:
    """Every figure of a machine by its name, with its unit."""
    kernels, link, host = machine.kernels, machine.link, machine.host
    for what, rates in (
        ("matmul", kernels.matmul_flops_per_s),
        ("convolution", kernels.convolution_flops_per_s),
        ("channels-last convolution", kernels.convolution_channels_last_flops_per_s),
    ):
        yield from ((f"{what} {dtype}", (rate, "FLOP/s")) for dtype, rate in rates.items())
    single: tuple[tuple[str, Figure | None, str], ...] = (
        ("memory rate", kernels.memory_bytes_per_s, "B/s"),
        ("operator in a model", kernels.dispatch_s, "s"),
        ("bare operator", kernels.launch_s, "s"),
        ("offload hook", kernels.offload_hook_s, "s"),
        ("disk", host.disk_read_bytes_per_s, "B/s"),
        ("context", Figure(machine.context_bytes) if machine.context_bytes else None, "B"),
    )
    if link is not None:
        single += (
            ("pinned copies to the device", link.h2d_pinned_bytes_per_s, "B/s"),
            ("pinned copies from the device", link.d2h_pinned_bytes_per_s, "B/s"),
            ("pageable copies to the device", link.h2d_pageable_bytes_per_s, "B/s"),
            ("pageable copies from the device", link.d2h_pageable_bytes_per_s, "B/s"),
            ("module.to(device)", link.module_h2d_bytes_per_s, "B/s"),
            ("module.to(cpu)", link.module_d2h_bytes_per_s, "B/s"),
            ("copies beside kernels", link.overlap_fraction, ""),
        )
    yield from ((name, (figure, unit)) for name, figure, unit in single if figure is not None)
    yield from _attention(machine, other)


def _attention(machine: Machine, other: Machine) -> _Named:
    """Each implementation at the largest shape that both machines have called it at."""
    shapes = {_call(rate) for rate in other.attention if rate.flops_per_s is not None}
    largest: dict[str, AttentionRate] = {}
    for rate in machine.attention:
        before = largest.get(rate.implementation)
        if rate.flops_per_s is None:
            continue
        if before is None or _rank(rate, shapes) > _rank(before, shapes):
            largest[rate.implementation] = rate
    for name, rate in largest.items():
        if rate.flops_per_s is not None:
            yield f"attention {name}", (rate.flops_per_s, "FLOP/s")


_Call = tuple[str, str, int, int, int, int, int]


def _rank(rate: AttentionRate, shapes: set[_Call]) -> tuple[bool, int]:
    tokens = rate.batch * rate.heads * rate.q_tokens * rate.kv_tokens * rate.head_dim
    return _call(rate) in shapes, tokens


def _call(rate: AttentionRate) -> _Call:
    tokens = (rate.q_tokens, rate.kv_tokens, rate.head_dim)
    return (rate.implementation, rate.dtype, rate.batch, rate.heads, *tokens)


def _plans(a: Profile, b: Profile) -> Iterator[PlanDifference]:
    """Workloads of which the latest plans differ."""
    firsts, seconds = ({plan.workload: plan for plan in profile.plans} for profile in (a, b))
    for workload in dict.fromkeys((*firsts, *seconds)):
        first, second = firsts.get(workload), seconds.get(workload)
        one, other = (plan.optimizations if plan else None for plan in (first, second))
        if one != other:
            yield PlanDifference(workload, one, other, _seconds(first), _seconds(second))


def _seconds(plan: PlanRecord | None) -> float | None:
    return None if plan is None else sum(phase.seconds for phase in plan.predicted)


def _print_facts(title: str, facts: tuple[FactDifference, ...]) -> None:
    if not facts:
        return
    table = table_of("", "A", "B", wrapped=("A", "B"))
    for fact in facts:
        add_row(table, fact.name, fact.a or "-", fact.b or "-")
    print_table(title, table)


def _print_figures(figures: tuple[FigureDifference, ...]) -> None:
    if not figures:
        return
    table = table_of("", "A", "B", "B / A", wrapped=(), right=("A", "B", "B / A"))
    for figure in figures:
        ratio = "-" if figure.ratio is None else f"{figure.ratio:.2f}"
        add_row(
            table, figure.name, _shown(figure.a, figure.unit), _shown(figure.b, figure.unit), ratio
        )
    print_table("Measured", table)


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "s":
        return format_seconds(value)
    if unit == "B":
        return format_bytes(value)
    return format_rate(value, unit) if unit else f"{value:.0%}"


def _print_plans(plans: tuple[PlanDifference, ...]) -> None:
    if not plans:
        return
    columns = ("workload", "A", "B")
    table = table_of(*columns, wrapped=columns)
    for plan in plans:
        add_row(table, plan.workload, _plan(plan.a, plan.a_seconds), _plan(plan.b, plan.b_seconds))
    print_table("Plans", table)


def _plan(optimizations: tuple[str, ...] | None, seconds: float | None) -> str:
    if optimizations is None or seconds is None:
        return "not planned"
    return f"{chosen(optimizations)}\n{format_seconds(seconds)}"
