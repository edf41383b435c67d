"""What an operator costs the host beside its own work."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from autotune.probe.deadline import Deadline
from autotune.probe.dispatch import host_seconds_per_operator
from autotune.probe.timing import Timer
from tests.probe.pretend import SlowDevice

CPU = torch.device("cpu")


def test_the_host_cost_is_positive_and_small() -> None:
    before = torch.get_rng_state()
    figure = host_seconds_per_operator(Timer(CPU))
    assert torch.equal(before, torch.get_rng_state())
    assert figure is None or 0 <= figure.value < 1e-3
    assert figure is None or (math.isfinite(figure.value) and figure.samples)


def test_a_host_cost_that_could_not_be_worked_out_is_none(slow_clock: Any) -> None:
    pytest.importorskip("diffusers")
    with SlowDevice(slow_clock.advance, 0.01):
        assert host_seconds_per_operator(Timer(CPU, deadline=Deadline(1.0))) is None
