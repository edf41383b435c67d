"""``autotune optimizations``: the catalogue."""

from __future__ import annotations

from autotune.cli.output import JsonFlag, console, print_json
from autotune.optimizations import CATALOGUE
from autotune.optimizations.plugins import BUILT_IN


def optimizations(json: JsonFlag = False) -> None:
    """List every optimization that can be chosen."""
    if json:
        print_json(
            {
                "optimizations": [
                    {
                        "name": o.name,
                        "summary": o.summary,
                        "relieves": o.relieves,
                        "exactness": o.exactness,
                        "parameters": dict(o.defaults),
                        "source": CATALOGUE.source(o.name),
                    }
                    for o in CATALOGUE.values()
                ]
            }
        )
        return
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("name", "image", "relieves", "what it does"):
        table.add_column(column, no_wrap=column == "name")
    for o in CATALOGUE.values():
        parameters = "".join(f"\n  {k}={v}" for k, v in o.defaults.items())
        source = CATALOGUE.source(o.name)
        summary = o.summary if source == BUILT_IN else f"{o.summary} ({source})"
        table.add_row(o.name + parameters, o.exactness, o.relieves, summary)
    console().print(table)
