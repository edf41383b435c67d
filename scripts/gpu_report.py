#!/usr/bin/env python3
"""What a recording of gpu_validation says: errors, ranking, regret, out-of-memory, peers.

From the recording alone; the planner of today predicts and chooses anew for the machine and the
workloads in it.

    scripts/gpu_report.py recording.jsonl             # tables
    scripts/gpu_report.py recording.jsonl --json      # the figures that tests hold
    scripts/gpu_report.py --write                     # the tables of docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from documents import between  # noqa: E402
from validation.judge import bars_of, evidence_of  # noqa: E402
from validation.recording import read  # noqa: E402
from validation.tables import verdict  # noqa: E402

FOLDER = ROOT / "tests" / "data" / "measured"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
END = "<!-- end -->"


def main() -> int:
    """Prints or writes the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recordings", nargs="*", type=Path, help="those of the tests by default")
    parser.add_argument("--json", action="store_true", help="print the figures alone")
    parser.add_argument("--write", action="store_true", help=f"rewrite {DOCUMENT.name}'s tables")
    options = parser.parse_args()
    paths = options.recordings or sorted(FOLDER.glob("*.jsonl*"))
    if options.json:
        print(json.dumps({p.name: figures(p) for p in paths}, indent=2))
    elif options.write:
        for path in paths:
            _write(path)
    else:
        print("\n".join(map(report, paths)))
    return 0


def report(path: Path) -> str:
    """The tables of one recording."""
    lines = list(read(path))
    return "\n".join(verdict(lines, evidence_of(lines)))


def figures(path: Path) -> dict[str, object]:
    """What is held to a bar, without and with verification."""
    evidence = evidence_of(list(read(path)))
    rows = [row for e in evidence for row in e.comparisons]
    return {
        name: bars_of(rows, [a for e in evidence for a in e.answers(verify)])._asdict()
        for name, verify in (("unverified", False), ("verified", True))
    }


def _write(path: Path) -> None:
    text = placed(DOCUMENT.read_text(encoding="utf-8"), path.name, report(path))
    DOCUMENT.write_text(text, encoding="utf-8")


def placed(text: str, name: str, tables: str) -> str:
    """A document with a recording's tables between its two marker lines.

    Raises:
        SystemExit: it has none.
    """
    begin = f"<!-- written by scripts/gpu_report.py from {name} -->"
    try:
        return between(text, begin, END, tables)
    except ValueError:
        sys.exit(f"{DOCUMENT} has no place for {name}: add the two lines\n{begin}\n{END}")


if __name__ == "__main__":
    sys.exit(main())
