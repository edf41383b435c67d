"""``autotune machines``: the recorded machines that a plan can be made for without having them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autotune.cli.output import JsonFlag, console, print_json
from autotune.errors import MachineError
from autotune.probe import reference
from autotune.probe.machine import Machine
from autotune.units import GIB

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(help="List, show and add recorded machines, for `--machine NAME`.")

FileArgument = Annotated[
    Path, typer.Argument(metavar="FILE", help="A file that `autotune probe --save` wrote.")
]
NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="A recorded machine, or a .json file.")
]


@app.callback(invoke_without_command=True)
def machines(context: typer.Context, json: JsonFlag = False) -> None:
    """List the recorded machines: published reference machines, and those you added."""
    if context.invoked_subcommand is not None:
        return
    readable, broken = _read_all()
    if json:
        print_json({"machines": [_summary(name, machine) for name, machine in readable]})
    else:
        console().print(_table(readable))
    for problem in broken:
        typer.echo(problem, err=True)


@app.command()
def show(name: NameArgument, json: JsonFlag = False) -> None:
    """Show one recorded machine with all it can do."""
    machine = reference.load_machine(name)
    if json:
        print_json(machine)
    else:
        from autotune.cli.probe import print_machine

        print_machine(machine)


@app.command()
def add(file: FileArgument) -> None:
    """Check a machine file and keep a copy under its name."""
    copy = reference.add_machine(file)
    typer.echo(f"Added {copy.stem} ({copy}): use it with --machine {copy.stem}")


def _read_all() -> tuple[list[tuple[str, Machine]], list[str]]:
    """Every machine that can be read, and what is wrong with the others."""
    readable, broken = [], []
    for name, path in reference.reference_machines().items():
        try:
            readable.append((name, reference.read_machine(path)))
        except MachineError as error:
            broken.append(str(error))
    return readable, broken


def _summary(name: str, machine: Machine) -> dict[str, Any]:
    return {
        "name": name,
        "device": machine.device.name,
        "memory_bytes": machine.device.total_bytes,
        "source": machine.source,
        "default_attention": machine.default_attention,
    }


def _table(named: list[tuple[str, Machine]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("name", no_wrap=True, style="bold")
    table.add_column("device")
    for title in ("memory\nGiB", "float16\nTFLOP/s", "memory\nGB/s", "link\nGB/s"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("source", no_wrap=True)
    for name, machine in named:
        device = machine.device.name.removeprefix("NVIDIA ")
        table.add_row(name, device, *_rates(machine), machine.source)
    return table


def _rates(machine: Machine) -> tuple[str, ...]:
    kernels, link = machine.kernels, machine.link
    half = kernels.matmul_flops_per_s.get("float16")
    return (
        f"{machine.device.total_bytes / GIB:.0f}",
        f"{half.value / 1e12:.0f}" if half else "—",
        f"{kernels.memory_bytes_per_s.value / 1e9:.0f}",
        f"{link.h2d_pinned_bytes_per_s.value / 1e9:.0f}" if link else "—",
    )
