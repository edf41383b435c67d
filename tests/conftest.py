"""What all tests share: a cache folder of their own, recorded machines, small real pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from autotune.probe.machine import Machine
from autotune.probe.reference import load_machine


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test reads or writes the user's profiles, and none reaches for the hub."""
    monkeypatch.setenv("AUTOTUNE_CACHE", str(tmp_path / "autotune-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield


@pytest.fixture
def rtx_3080() -> Machine:
    """A desktop card on today's stack: xFormers ties with SDPA."""
    return load_machine("rtx-3080-10gb")


@pytest.fixture
def rtx_3080_torch1() -> Machine:
    """The same card where the default attention is vanilla and xFormers measures faster."""
    return load_machine("rtx-3080-10gb-torch1")


@pytest.fixture
def cpu_machine() -> Machine:
    """A machine without a GPU."""
    return load_machine("cpu-16-cores")
