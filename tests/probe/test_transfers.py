"""Transfers: what can be checked with no link."""

from __future__ import annotations

import pytest
import torch

from autotune.probe import transfers
from autotune.probe.pcie import line_rate
from autotune.probe.transfers import copy_rate, measure_link, module_rates, offloadable_module

CPU = torch.device("cpu")
MIB = 1 << 20


def test_a_cpu_has_no_link() -> None:
    assert measure_link(CPU, memory_bytes=MIB) is None


def test_a_copy_has_a_rate() -> None:
    source = torch.ones(MIB, dtype=torch.uint8)
    target = torch.zeros_like(source)
    assert copy_rate(target, source, CPU, 0.002).value > 0
    assert torch.equal(target, source)


def test_the_module_is_as_large_as_allowed_and_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    module = offloadable_module(64 * MIB)
    size = sum(parameter.nbytes for parameter in module.parameters())
    assert 32 * MIB < size <= 64 * MIB
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.dtype is torch.float16 for parameter in module.parameters())


def test_module_rates_leave_out_the_first_round() -> None:
    out, back = module_rates(CPU, 8 * MIB)
    assert len(out.samples) == len(back.samples) == transfers._MODULE_ROUNDS


def test_the_link_state_in_copy_is_the_best_one_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter([(1, 16), (4, 16), (None, None), (4, 16), (3, 16)])
    monkeypatch.setattr(transfers.nvml, "link_state", lambda uuid: next(states))
    tensor = torch.zeros(8)
    assert transfers._link_in_copy(tensor, tensor.clone(), "GPU-x") == (4, 16)
    assert transfers._link_in_copy(tensor, tensor, None) == (None, None)


@pytest.mark.parametrize(
    ("generation", "width", "gigabytes"),
    [(3, 16, 15.76), (4, 16, 31.5), (4, 8, 15.75), (5, 16, 63.0), (1, 4, 1.0)],
)
def test_line_rates(generation: int, width: int, gigabytes: float) -> None:
    assert line_rate(generation, width) == pytest.approx(gigabytes * 1e9, rel=1e-3)


def test_an_unknown_link_promises_nothing() -> None:
    assert line_rate(None, 16) is line_rate(4, None) is line_rate(4, 0) is line_rate(9, 16) is None
