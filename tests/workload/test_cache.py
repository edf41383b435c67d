"""Traces kept on disk: used again, never wrong, never in the way."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from autotune.errors import ModelError
from autotune.profile.store import cache_folder
from autotune.workload import cache, phases
from autotune.workload.architecture import Architecture, ComponentConfig, describe_pipeline
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

    def spy(architecture: Architecture, request: Any, pipe: Any = None) -> Any:
        seen.append(request)
        return original(architecture, request, pipe)

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


def test_a_file_does_not_say_whether_the_pipeline_is_loaded(
    sd_pipe: Any, architecture: Architecture, request_of: RequestOf, traced: list[Any]
) -> None:
    found = [workload_of(architecture, request_of(), p).is_loaded for p in (None, sd_pipe, None)]
    assert found == [False, True, False]
    assert len(traced) == 1


def test_the_name_does_not_trace_again(
    architecture: Architecture, request_of: RequestOf, traced: list[Any]
) -> None:
    first = workload_of(architecture, request_of())
    other = msgspec.structs.replace(architecture, name="other", weights="elsewhere")
    again = workload_of(other, request_of())
    assert len(traced) == len(files()) == 1
    assert again == msgspec.structs.replace(first, model="other")
    assert again == phases.trace_workload(other, request_of())


@pytest.mark.parametrize(
    "change",
    [
        {"side": 128},
        {"batch": 2},
        {"dtype": "bfloat16"},
        {"guidance_scale": 1.0},
        {"steps": 4},
        {"options": {"negative_prompt": "a dog"}},
    ],
    ids=str,
)
def test_what_changes_the_calls_is_traced(
    architecture: Architecture, request_of: RequestOf, traced: list[Any], change: dict[str, Any]
) -> None:
    workload_of(architecture, request_of())
    request = request_of(**change)
    workload = workload_of(architecture, request)
    assert len(traced) == len(files()) == 2
    assert workload.request == request


def test_another_scheduler_tokenizer_or_option_is_traced(
    architecture: Architecture, request_of: RequestOf, traced: list[Any]
) -> None:
    heun = ComponentConfig("diffusers", "HeunDiscreteScheduler", {})
    for changed in (
        {},
        {"schedulers": {"scheduler": heun}},
        {"tokenizers": {"tokenizer": 8}},
        {"options": {"requires_safety_checker": True}},
    ):
        workload_of(msgspec.structs.replace(architecture, **changed), request_of())
    assert len(traced) == len(files()) == 4


def test_an_adapter_is_traced(sd_pipe: Any, request_of: RequestOf, traced: list[Any]) -> None:
    """The configuration is what it was; the modules are not."""
    workload_of(describe_pipeline(sd_pipe), request_of(), sd_pipe)
    sd_pipe.unet.conv_in.register_parameter("lora_A", nn.Parameter(torch.zeros(4, 32)))
    workload_of(describe_pipeline(sd_pipe), request_of(), sd_pipe)
    assert len(traced) == len(files()) == 2


def test_what_of_a_loaded_pipeline_is_estimated_is_not_kept(
    sd_pipe: Any, request_of: RequestOf, traced: list[Any]
) -> None:
    """What its user did to it may be why, and leave with the process."""
    sd_pipe.unet.conv_in.to(torch.bfloat16)
    for _ in range(2):
        workload_of(describe_pipeline(sd_pipe), request_of(), sd_pipe)
    assert len(traced) == 2
    assert files() == []


def test_code_of_the_users_own_is_traced_each_time(
    sd_pipe: Any, request_of: RequestOf, traced: list[Any]
) -> None:
    """Nothing says which version of it a file would be of."""
    sd_pipe.__class__ = type("Mine", (type(sd_pipe),), {})
    for _ in range(2):
        workload_of(describe_pipeline(sd_pipe), request_of(), sd_pipe)
    assert len(traced) == 2
    assert not (cache_folder() / "traces").exists()


@pytest.mark.parametrize("package", ["torch", "diffusers", "transformers"])
def test_another_version_of_a_library_is_traced(
    architecture: Architecture,
    request_of: RequestOf,
    traced: list[Any],
    package: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workload_of(architecture, request_of())
    real = cache.version_of
    monkeypatch.setattr(cache, "version_of", lambda p: "0" if p == package else real(p))
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


def test_large_files_go_sooner(
    architecture: Architecture, request_of: RequestOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload_of(architecture, request_of())
    (first,) = files()
    monkeypatch.setattr(cache, "MAX_BYTES", int(2.5 * first.stat().st_size))
    for i in range(3):
        other = first.with_name(f"other{i}.json")
        other.write_bytes(first.read_bytes())
        os.utime(other, (i, i))
    workload_of(architecture, request_of(steps=4))
    left = {f.name for f in files()}
    assert first.name in left
    assert len(left) == 2


def test_what_was_never_finished_goes_after_an_hour(
    architecture: Architecture, request_of: RequestOf
) -> None:
    workload_of(architecture, request_of())
    (real,) = files()
    old, new = (real.with_name(f"{name}.tmp") for name in ("old", "new"))
    for file in (old, new):
        file.touch()
    os.utime(old, (0, 0))
    workload_of(architecture, request_of(steps=4))
    assert not old.exists()
    assert new.exists()


_WRITER = """
import sys, msgspec
from pathlib import Path
from autotune.workload import cache
from autotune.workload.workload import Workload

cache.MAX_FILES = 4
source, folder = map(Path, sys.argv[1:3])
workload = msgspec.json.decode(source.read_bytes(), type=Workload)
for i in range(60):
    path = folder / f"{i % 6}.json"
    cache._write(path, workload)
    found = cache._read(path)  # another process may have removed it, but never written half of it
    assert found is None or found == workload
    assert not path.exists() or cache._read(path) in (None, workload)
"""


def test_eight_processes_write_at_once(
    architecture: Architecture, request_of: RequestOf, tmp_path: Path
) -> None:
    workload_of(architecture, request_of())
    (real,) = files()
    folder = tmp_path / "shared"
    folder.mkdir()
    command = [sys.executable, "-c", _WRITER, str(real), str(folder)]
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(8)]
    for writer in writers:
        _, errors = writer.communicate()
        assert writer.returncode == 0, errors
    left = list(folder.iterdir())
    assert 1 <= len(left) <= 4
    assert all(f.suffix == ".json" and f.read_bytes() == real.read_bytes() for f in left)


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
    empty = msgspec.structs.replace(architecture, components={})
    with pytest.raises(ModelError):
        workload_of(empty, request_of())
    assert files() == []
