"""The code for GPUs on a simulated one, and predictions beside what was recorded there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autotune.testing.pipelines import BUILDERS
from tests.thorough import part

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from simulated_gpu.report import RECORDING, Row, rows, table  # noqa: E402

SCRIPT = ROOT / "scripts/simulate_gpu.py"

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or torch.version.cuda is not None,
    reason="needs g++ and a PyTorch without CUDA",
)

ALL = list(rows(ROOT / RECORDING))


def simulate(*arguments: str, cache: Path) -> None:
    """Runs the script in a process of its own: torch must not be there before the device is."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "AUTOTUNE_CACHE": str(cache)},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@needs_compiler
@pytest.mark.parametrize("kind", part(list(BUILDERS), 24))
def test_sets_draw_the_same_and_leave_nothing(kind: str, tmp_path: Path) -> None:
    simulate("sets", "--kind", kind, cache=tmp_path)


@needs_compiler
@pytest.mark.parametrize("kind", part(list(BUILDERS), 24, start=5))
def test_memory_that_runs_out_ends_in_the_image(kind: str, tmp_path: Path) -> None:
    simulate("recovery", "--kind", kind, "--points", "2", cache=tmp_path)


@pytest.mark.parametrize("row", ALL, ids=lambda r: f"{r.measured.model}-{r.measured.settings}")
def test_predictions_hold(row: Row) -> None:
    """Of each phase: what lies there whole to 1.5 %; of parts it is an upper bound.

    The largest part and the most activations need not be there at the same time.
    """
    parts = any(name in row.measured.settings for name in ("sequential", "group_offload"))
    assert row.allocated.keys() == row.measured.allocated.keys()
    for phase, measured in row.measured.allocated.items():
        assert row.allocated[phase] > 0.985 * measured, phase
        assert row.allocated[phase] < (1.6 if parts else 1.015) * measured, phase
    assert row.pinned == pytest.approx(row.measured.pinned, rel=0.02)
    if not parts:
        assert row.reserved == pytest.approx(row.measured.reserved, rel=0.08)


def test_the_document_has_todays_table() -> None:
    document = (ROOT / "docs/simulation.md").read_text()
    assert table(ROOT / RECORDING) in document, "scripts/simulate_gpu.py report --write"
