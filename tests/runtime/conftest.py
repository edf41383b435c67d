"""Plans for the small pipelines on a recorded CPU."""

from __future__ import annotations

from collections.abc import Callable
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
        request = Request(side, side, batch, 2, 7.5, "float32")
        workload = trace_workload(describe_pipeline(pipe), request)
        plan = choose(cpu_machine, workload)
        chosen = parse_settings(optimizations)
        return msgspec.structs.replace(plan, optimizations=chosen), workload

    return make
