"""``autotune models NAME``: one model's components, calls and needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from autotune.cli.machine import ANY_MACHINE
from autotune.cli.output import console, progress, table_of
from autotune.decide.predict import Predictor
from autotune.optimizations.execution import Execution
from autotune.probe.machine import Machine
from autotune.probe.reference import load_machine
from autotune.units import format_bytes
from autotune.workload.architecture import Architecture
from autotune.workload.cache import workload_of
from autotune.workload.request import complete_request
from autotune.workload.workload import ComponentRun, Workload

if TYPE_CHECKING:
    from rich.table import Table


class Native(msgspec.Struct, frozen=True):
    """What is drawn when the user says nothing; ``frames`` is 1 for images."""

    height: int
    width: int
    frames: int
    steps: int
    guidance_scale: float


class Needs(msgspec.Struct, frozen=True):
    """Device memory that must be free for the native request in 16 bit.

    Attributes:
        machine: The reference machine that it is predicted for.
        needed_bytes: With nothing set.
        phase: Which needs that.
        offloaded_bytes: With ``model_cpu_offload``.
        offloaded_phase: Which needs that.
    """

    machine: str
    needed_bytes: int
    phase: str
    offloaded_bytes: int
    offloaded_phase: str


class ComponentSummary(msgspec.Struct, frozen=True):
    """A component: its class, size, and bytes by dtype."""

    name: str
    class_name: str
    parameters: int
    weight_bytes: dict[str, int]


class CallSummary(msgspec.Struct, frozen=True):
    """A component's calls in a phase: how many, and what one takes."""

    phase: str
    component: str
    entry: str
    calls: int
    flops: float
    activation_bytes: int
    is_estimated: bool


class ModelAccount(msgspec.Struct, frozen=True):
    """``autotune models NAME``.

    Attributes:
        name: What the user gave.
        pipeline: Its class in diffusers.
        weights: Folder or hub id, ``None`` where there are none to load.
        half_dtype: The 16-bit dtype it is published for, and the one that is traced.
        native: What is drawn when the user says nothing.
        parameters: Of all components.
        weight_bytes: By dtype; some parts stay in float32 in 16 bit too.
        components: With weights.
        calls: Of one native generation, in order.
        step_flops: Floating-point operations of one denoise step.
        needs: For the native request.
        notes: What is estimated rather than traced.
        source: Where configuration values were read, for the built-in ones.
    """

    name: str
    pipeline: str
    weights: str | None
    half_dtype: str
    native: Native
    parameters: int
    weight_bytes: dict[str, int]
    components: tuple[ComponentSummary, ...]
    calls: tuple[CallSummary, ...]
    step_flops: float
    needs: Needs
    notes: tuple[str, ...]
    source: str


def native_workload(architecture: Architecture, machine: Machine) -> Workload:
    """What is drawn when the user says nothing, in 16 bit."""
    request = complete_request(architecture, machine, dtype=architecture.half_dtype)
    return workload_of(architecture, request)


def needs_of(machine: Machine, workload: Workload) -> Needs:
    """With nothing set, and offloaded model by model."""
    predictor = Predictor(machine, workload)
    plain = predictor.predict(Execution())
    offloaded = predictor.predict(Execution(placement="model_offload"))
    return Needs(
        machine.name,
        plain.needed_bytes,
        plain.binding_phase.name,
        offloaded.needed_bytes,
        offloaded.binding_phase.name,
    )


def account_of(architecture: Architecture) -> ModelAccount:
    """From a trace of the native request in 16 bit."""
    machine = load_machine(ANY_MACHINE)
    with progress(f"Tracing {architecture.name}"):
        workload = native_workload(architecture, machine)
    half = architecture.half_dtype
    request = workload.request
    components = tuple(
        ComponentSummary(
            c.name,
            c.class_name,
            c.parameters,
            {"float32": 4 * c.parameters, half: c.weight_bytes},
        )
        for c in workload.components
    )
    parameters = sum(c.parameters for c in components)
    denoise = [r for p in workload.phases if p.name == "denoise" for r in p.runs]
    return ModelAccount(
        name=architecture.name,
        pipeline=architecture.pipeline,
        weights=architecture.weights,
        half_dtype=half,
        native=Native(
            request.height, request.width, request.frames, request.steps, request.guidance_scale
        ),
        parameters=parameters,
        weight_bytes={"float32": 4 * parameters, half: workload.weight_bytes},
        components=components,
        calls=tuple(_call(p.name, run) for p in workload.phases for run in p.runs),
        step_flops=sum(r.calls * r.trace.flops for r in denoise) / request.steps,
        needs=needs_of(machine, workload),
        notes=workload.notes,
        source=architecture.source,
    )


def _call(phase: str, run: ComponentRun) -> CallSummary:
    return CallSummary(
        phase,
        run.component,
        run.entry,
        run.calls,
        run.trace.flops,
        run.trace.activation_bytes,
        run.is_estimated,
    )


def print_account(account: ModelAccount) -> None:
    """Facts, components and calls."""
    from autotune.cli.account import print_notes

    out = console()
    out.print(_facts(account))
    out.print(_components(account))
    out.print(_calls(account))
    print_notes(account.notes)


def _facts(account: ModelAccount) -> Table:
    from rich.markup import escape
    from rich.table import Table

    native, needs = account.native, account.needs
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    grid.add_row("model", escape(f"{account.name}, {account.pipeline}"))
    grid.add_row(
        "weights", escape(account.weights or "of several repositories: load them yourself")
    )
    grid.add_row(
        "native",
        f"{native.width}x{native.height}"
        + (f", {native.frames} frames" if native.frames > 1 else "")
        + f", {native.steps} steps, guidance {native.guidance_scale:g}",
    )
    grid.add_row(
        "needs",
        f"{format_bytes(needs.needed_bytes)} in {account.half_dtype} with nothing set "
        f"({needs.phase}), {format_bytes(needs.offloaded_bytes)} with model_cpu_offload "
        f"({needs.offloaded_phase}), as on {needs.machine}",
    )
    grid.add_row("work", f"{_tera(account.step_flops)} TFLOP per step")
    if account.source:
        grid.add_row("source", escape(account.source))
    return grid


def _components(account: ModelAccount) -> Table:
    table = table_of(
        ("component", "class", "parameters", "float32", account.half_dtype), left=(0, 1)
    )
    for c in account.components:
        table.add_row(c.name, c.class_name, *_sizes(c.parameters, c.weight_bytes))
    table.add_section()
    table.add_row("all", "", *_sizes(account.parameters, account.weight_bytes))
    return table


def _sizes(parameters: int, weight_bytes: dict[str, int]) -> tuple[str, ...]:
    count = f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
    return (count, *map(format_bytes, weight_bytes.values()))


def _calls(account: ModelAccount) -> Table:
    table = table_of(("phase", "component", "calls", "TFLOP a call", "activations"), left=(0, 1))
    before = ""
    for c in account.calls:
        label = c.component if c.entry == "forward" else f"{c.component}.{c.entry}"
        table.add_row(
            "" if c.phase == before else c.phase,
            label,
            str(c.calls),
            _tera(c.flops),
            format_bytes(c.activation_bytes) + (" (estimated)" if c.is_estimated else ""),
        )
        before = c.phase
    return table


def _tera(flops: float) -> str:
    tera = flops / 1e12
    return f"{tera:.0f}" if tera >= 100 else f"{tera:.3g}"
