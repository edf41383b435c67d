"""What verbs share in printing: JSON alone on stdout, everything for people through one console."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def print_json(value: Any) -> None:
    """Print a value (structs, dicts, tuples, paths) as indented JSON on stdout."""
    encoded = msgspec.json.encode(value, enc_hook=str)
    sys.stdout.write(msgspec.json.format(encoded, indent=2).decode() + "\n")


def console(*, stderr: bool = False) -> Console:
    """A rich console, imported late: rich costs start-up time that ``--json`` need not pay."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def table_of(
    titles: Sequence[str], left: Container[int] = (0,), whole: Container[int] = ()
) -> Table:
    """A table without lines but the one below its titles.

    Args:
        titles: Of its columns.
        left: Columns that are flush left, by index; the others are flush right.
        whole: Columns that others are narrowed for, where the terminal is narrow.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, title in enumerate(titles):
        justify: Literal["left", "right"] = "left" if index in left else "right"
        table.add_column(title, justify=justify, overflow="fold", no_wrap=index in whole)
    return table


@contextmanager
def progress(title: str) -> Iterator[Callable[[str], None] | None]:
    """A spinner on stderr that names the step at hand; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    with console(stderr=True).status(f"{title} …") as status:
        yield lambda step: status.update(f"{title}: {step} …")
