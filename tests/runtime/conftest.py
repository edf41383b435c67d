"""Plans for the small pipelines on a recorded CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from autotune.decide.choose import choose
from autotune.decide.plan import Plan
from autotune.optimizations import parse_settings
from autotune.probe.machine import Machine
from autotune.workload.architecture import describe_pipeline
from autotune.workload.phases import trace_workload
from autotune.workload.workload import Request, Workload

Planned = tuple[Plan, Workload]


@pytest.fixture
def plan_of(cpu_machine: Machine) -> Callable[..., Planned]:
    """``plan_of(pipe, "tome,vae_slicing")``: a plan with exactly these optimizations."""

    def make(pipe: Any, optimizations: str = "", side: int = 64, batch: int = 2) -> Planned:
        workload = _workload(_Alike(pipe), side, batch)
        plan = choose(cpu_machine, workload)
        chosen = parse_settings(optimizations)
        return msgspec.structs.replace(plan, optimizations=chosen), workload

    return make


@pytest.fixture
def folder(sd_pipe: Any, tmp_path: Path) -> Path:
    """The SD-like pipeline, saved in float32."""
    sd_pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class _Alike:
    """Pipelines of one class, which in these tests have one architecture: traced once."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Alike) and type(self.pipe) is type(other.pipe)

    def __hash__(self) -> int:
        return hash(type(self.pipe))


@functools.cache
def _workload(alike: _Alike, side: int, batch: int) -> Workload:
    request = Request(side, side, batch, 2, 7.5, "float32")
    return trace_workload(describe_pipeline(alike.pipe), request)


@pytest.fixture(scope="session")
def _traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture
def measured_here(cpu_machine: Machine, monkeypatch: pytest.MonkeyPatch, _traces: Path) -> None:
    """The machine is measured, operators are replayed, what was traced before is read: no time."""
    from autotune.probe import measure
    from autotune.probe.host import read_host
    from autotune.probe.software import installed_versions
    from autotune.tuner import planning
    from autotune.workload import cache

    here = msgspec.structs.replace(
        cpu_machine, source="measured", host=read_host(), software=installed_versions()
    )
    monkeypatch.setattr(measure, "measure_machine", lambda *_, **__: here)
    monkeypatch.setattr(planning, "REPLAY_S", 0.0)
    monkeypatch.setattr(cache, "cache_folder", lambda: _traces)
