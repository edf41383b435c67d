"""The kill test of ``scripts/``, with few kills and those where files are written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts" / "kill_test.py"

# A writer that is no longer safe: readers see what it has written so far.
IN_PLACE = """
import runpy, sys
from autotune.profile import store
def in_place(path, data, hint):
    with open(path, "wb") as file:
        file.write(data[:1000])
        file.flush()
        file.write(data[1000:])
store.replace_file = in_place
runpy.run_path("SCRIPT", run_name="__main__")
"""


def killed(*program: str) -> subprocess.CompletedProcess[str]:
    limits = ("--kills", "0", "--stores", "30", "--every", "23")
    return subprocess.run(
        [sys.executable, *program, *limits],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_killed_while_storing_nothing_is_lost() -> None:
    done = killed(str(SCRIPT))
    assert done.returncode == 0, done.stderr
    assert "30 random moments: the same" in done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_writer_that_is_not_safe_is_found_out() -> None:
    done = killed("-c", IN_PLACE.replace("SCRIPT", str(SCRIPT)))
    assert done.returncode == 1
    assert "FAILED" in done.stderr
