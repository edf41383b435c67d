"""Reading the disk of the model cache: bounded, past the page cache, and without a trace."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autotune.probe import disk
from autotune.probe.deadline import Deadline
from autotune.probe.disk import measure_disk, model_cache

MIB = 1 << 20

pytestmark = pytest.mark.skipif(
    not hasattr(os, "posix_fadvise"), reason="only Linux drops pages on request"
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_SAMPLE_BYTES", MIB)
    monkeypatch.setattr(disk, "_READ_BYTES", 4 * MIB)
    monkeypatch.setattr(disk, "_LARGE_BYTES", 2 * MIB)
    monkeypatch.setattr(disk, "_WRITTEN_BYTES", 3 * MIB)


def always() -> Deadline:
    return Deadline(60.0)


def test_the_largest_file_of_the_cache_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir(parents=True)
    for size in (1, 3, 6):
        (blobs / f"{size}").write_bytes(bytes(size * MIB))
    (tmp_path / "link").symlink_to(blobs / "6")
    assert disk._largest(tmp_path, always()) == blobs / "6"
    assert disk._largest(tmp_path, Deadline(0.0)) is None, "no time to look"
    monkeypatch.setattr(tempfile, "TemporaryFile", None)
    figure = measure_disk(tmp_path, budget_s=60.0)
    assert figure is not None
    assert len(figure.samples) == 4, "no more than allowed"
    assert figure.value > 0


def test_an_empty_cache_leaves_nothing_behind(tmp_path: Path) -> None:
    figure = measure_disk(tmp_path / "hub" / "not-there-yet", budget_s=60.0)
    assert figure is not None
    assert len(figure.samples) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_spent_budget_reads_nothing(tmp_path: Path) -> None:
    assert measure_disk(tmp_path, budget_s=0.0) is None


def test_a_full_disk_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=MIB))
    assert measure_disk(tmp_path) is None


@pytest.mark.parametrize("broken", ["fsync", "posix_fadvise", "preadv"])
def test_a_disk_that_fails_is_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("input/output error")

    monkeypatch.setattr(os, broken, fail)
    assert measure_disk(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_elsewhere_than_on_linux_there_is_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    assert measure_disk(tmp_path) is None


def test_the_cache_is_the_hubs() -> None:
    assert model_cache().name == "hub"
