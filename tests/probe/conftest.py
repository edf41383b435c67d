"""A stand-in for the NVIDIA driver, which the real binding loads in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.probe.pretend import SlowClock

ROOT = Path(__file__).resolve().parents[2]
STUB = Path(__file__).with_name("nvml_stub.c")

# (scenario, code that prints one JSON value, further environment) → the value.
UnderDriver = Callable[..., Any]


@pytest.fixture(scope="session")
def stub_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a ``libnvidia-ml.so.1``: of today's driver, and of an old one."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("the stub driver needs Linux and a C compiler")
    folders = {}
    for age, flags in (("new", []), ("old", ["-DOLD_DRIVER"])):
        folders[age] = tmp_path_factory.mktemp(f"driver-{age}")
        library = folders[age] / "libnvidia-ml.so.1"
        command = [compiler, "-shared", "-fPIC", "-w", *flags, "-o", str(library), str(STUB)]
        subprocess.run(command, check=True)
    return folders


@pytest.fixture
def under_driver(stub_folders: dict[str, Path]) -> UnderDriver:
    """Runs Python code under a stub driver and returns the JSON value that it printed."""

    def run(scenario: str, code: str, age: str = "new", **environment: str) -> Any:
        kept = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
        chosen = {"NVML_STUB": scenario, "LD_LIBRARY_PATH": str(stub_folders[age])}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=kept | chosen | {"PYTHONPATH": str(ROOT)} | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> SlowClock:
    """Stands in for the clock: what is slow by it takes no time at all in a test."""
    clock = SlowClock()
    for name in ("perf_counter", "thread_time"):
        monkeypatch.setattr(time, name, clock)
    return clock
