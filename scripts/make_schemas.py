#!/usr/bin/env python3
"""Write the JSON Schemas of what this package stores and prints to ``docs/schemas/``.

``--check`` writes nothing and fails when a committed file is not what the code says.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

import msgspec

from autotune.cli.memory import MemoryAccount
from autotune.cli.model import ModelAccount
from autotune.cli.models import ModelList
from autotune.cli.profile_diff import Difference
from autotune.cli.run import RunReport
from autotune.cli.whatif import Comparison
from autotune.decide.plan import Plan, PredictionReport
from autotune.probe.machine import Machine
from autotune.profile.profile import Profile

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "schemas"

SCHEMAS: dict[str, type[msgspec.Struct]] = {
    "comparison.json": Comparison,
    "difference.json": Difference,
    "machine.json": Machine,
    "memory.json": MemoryAccount,
    "model.json": ModelAccount,
    "models.json": ModelList,
    "plan.json": Plan,
    "predict.json": PredictionReport,
    "profile.json": Profile,
    "run.json": RunReport,
}


def schema_text(kind: type[msgspec.Struct]) -> str:
    """The JSON Schema of one type, as committed."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": kind.__name__,
        **msgspec.json.schema(kind),
    }
    for definition in schema["$defs"].values():
        # Python 3.13 strips the indentation of docstrings, older ones keep it.
        definition["description"] = inspect.cleandoc(definition.get("description", ""))
    return (
        msgspec.json.format(msgspec.json.encode(schema, order="sorted"), indent=2).decode() + "\n"
    )


def outdated() -> list[Path]:
    """The schema files that are missing or not current."""
    return [
        FOLDER / name
        for name, kind in SCHEMAS.items()
        if not (FOLDER / name).exists()
        or (FOLDER / name).read_text(encoding="utf-8") != schema_text(kind)
    ]


def write() -> None:
    """Write every schema file."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, kind in SCHEMAS.items():
        (FOLDER / name).write_text(schema_text(kind), encoding="utf-8", newline="\n")


def main() -> int:
    """Write, or check with ``--check``; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail when a file is not current")
    if not parser.parse_args().check:
        write()
    for path in outdated():
        print(f"{path} is not current: run scripts/make_schemas.py", file=sys.stderr)
    return 1 if outdated() else 0


if __name__ == "__main__":
    sys.exit(main())
