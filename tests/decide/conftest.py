"""Workloads of the built-in models, traced once per run, and invented ones for properties."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from _pytest.tmpdir import TempPathFactory

from autotune.probe.machine import Machine
from autotune.probe.reference import load_machine
from autotune.workload.architecture import find_architecture
from autotune.workload.cache import workload_of
from autotune.workload.request import complete_request
from autotune.workload.workload import Workload

Traced = Callable[..., Workload]


@dataclasses.dataclass
class _Tracer:
    cache: Path
    machine: Machine

    def __call__(self, model: str, **request: int | float | str) -> Workload:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AUTOTUNE_CACHE", str(self.cache))
            architecture = find_architecture(model)
            asked = complete_request(architecture, self.machine, **request)  # type: ignore[arg-type]
            return workload_of(architecture, asked)


@pytest.fixture(scope="session")
def traced(tmp_path_factory: TempPathFactory) -> Traced:
    """``traced("sdxl", batch=2)``: a real trace, kept for the rest of the run, for all workers."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    return _Tracer(shared / "traces", load_machine("rtx-3080-10gb"))
