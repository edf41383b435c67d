"""Traces kept on disk: used again, never wrong, never in the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from autotune.profile.store import cache_folder
from autotune.workload import cache, phases
from autotune.workload.architecture import Architecture, describe_pipeline
from autotune.workload.cache import MAX_FILES, workload_of

RequestOf = Callable[..., Any]


@pytest.fixture
def architecture(sd_pipe: Any) -> Architecture:
    return describe_pipeline(sd_pipe)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every request that was really traced."""
    seen: list[Any] = []
    original = phases.trace_workload

    def spy(architecture: Architecture, request: Any) -> Any:
        seen.append(request)
        return original(architecture, request)

    monkeypatch.setattr(phases, "trace_workload", spy)
    return seen


def files() -> list[Path]:
    return sorted((cache_folder() / "traces").iterdir())


def test_the_second_call_reads_the_first_ones_file(
    architecture: Architecture, request_of: RequestOf, traced: list[Any]
) -> None:
    first = workload_of(architecture, request_of())
    assert workload_of(architecture, request_of()) == first
    assert len(traced) == len(files()) == 1


def test_steps_guidance_and_name_do_not_trace_again(
    architecture: Architecture, request_of: RequestOf, traced: list[Any]
) -> None:
    workload_of(architecture, request_of(steps=3))
    other = msgspec.structs.replace(architecture, name="other", weights="elsewhere")
    again = workload_of(other, request_of(steps=9, guidance_scale=2.0))
    assert len(traced) == len(files()) == 1
    assert again.model == "other"
    assert again.request == request_of(steps=9, guidance_scale=2.0)
    assert [r.calls for p in again.phases for r in p.runs] == [2, 9, 1]
    assert again == phases.trace_workload(other, again.request)


@pytest.mark.parametrize(
    "change", [{"side": 128}, {"batch": 2}, {"dtype": "bfloat16"}, {"guidance_scale": 1.0}]
)
def test_what_changes_the_trace_is_traced(
    architecture: Architecture, request_of: RequestOf, traced: list[Any], change: dict[str, Any]
) -> None:
    workload_of(architecture, request_of())
    workload_of(architecture, request_of(**change))
    assert len(traced) == len(files()) == 2


@pytest.mark.parametrize("package", ["torch", "diffusers", "transformers"])
def test_another_version_of_a_library_is_traced(
    architecture: Architecture,
    request_of: RequestOf,
    traced: list[Any],
    package: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workload_of(architecture, request_of())
    real = cache._version
    monkeypatch.setattr(cache, "_version", lambda p: "0" if p == package else real(p))
    workload_of(architecture, request_of())
    assert len(traced) == 2


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"model": 3}', b"\xff", b"[" * 100_000])
def test_a_corrupt_file_is_traced_again_and_replaced(
    architecture: Architecture, request_of: RequestOf, traced: list[Any], text: bytes
) -> None:
    first = workload_of(architecture, request_of())
    (path,) = files()
    path.write_bytes(text)
    assert workload_of(architecture, request_of()) == first
    assert len(traced) == 2
    assert workload_of(architecture, request_of()) == first
    assert len(traced) == 2


def test_the_oldest_files_go(architecture: Architecture, request_of: RequestOf) -> None:
    workload_of(architecture, request_of())
    (real,) = files()
    for i in range(MAX_FILES + 5):
        other = real.with_name(f"other{i:03}.json")
        other.write_text("{}")
        os.utime(other, (i, i))
    real.unlink()
    workload_of(architecture, request_of())
    left = {f.name for f in files()}
    assert len(left) == MAX_FILES
    assert real.name in left
    assert "other005.json" not in left
    assert f"other{MAX_FILES + 4:03}.json" in left


def test_without_a_cache_folder_it_is_traced_each_time(
    architecture: Architecture,
    request_of: RequestOf,
    traced: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOTUNE_CACHE", str(tmp_path / "file" / "cache"))
    assert workload_of(architecture, request_of()) == workload_of(architecture, request_of())
    assert len(traced) == 2


def test_a_full_disk_costs_the_cache_only(
    architecture: Architecture, request_of: RequestOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert workload_of(architecture, request_of()).model
    assert files() == []


def test_an_untraceable_model_leaves_no_file(
    architecture: Architecture, request_of: RequestOf
) -> None:
    from autotune.errors import ModelError

    empty = msgspec.structs.replace(architecture, components={})
    with pytest.raises(ModelError):
        workload_of(empty, request_of())
    assert files() == []
