"""Eight and four bits: what needs a package of its own runs in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from autotune.errors import OptimizationError
from autotune.optimizations import find
from autotune.optimizations.quantization import PACKAGES
from autotune.testing.pipelines import build_sd

APART = Path(sys.prefix) / "torchao"
"""Where ``scripts/setup`` puts torchao."""

HERE = Path(__file__).parent


def test_with_torchao() -> None:
    if not APART.is_dir():
        pytest.skip(f"torchao is not in {APART}: scripts/setup installs it")
    root = str(HERE.parent.parent)
    paths = os.pathsep.join([str(APART), root, os.environ.get("PYTHONPATH", "")])
    rules = f"{HERE / 'test_coherence.py'}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    chosen = ["-k", "with_torchao or narrow_once or packed_weights"]
    run = subprocess.run(
        [*command, *chosen, str(HERE / "with_torchao.py"), rules],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "skipped" not in run.stdout


@pytest.mark.parametrize("scheme", PACKAGES)
def test_a_missing_package_is_named(scheme: str) -> None:
    if find_spec(PACKAGES[scheme]):
        pytest.skip(f"{PACKAGES[scheme]} is installed")
    with pytest.raises(OptimizationError, match=PACKAGES[scheme]):
        find("quantization").apply(build_sd(), {"scheme": scheme}, "cpu")
