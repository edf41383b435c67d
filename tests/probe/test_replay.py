"""Operators come back from their signatures, are timed once, and stay within budget and memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from autotune.probe import replay as module
from autotune.probe.replay import host_seconds_per_operator, rebuild, replay
from autotune.workload.trace import trace
from autotune.workload.workload import Operator, Trace

CPU = torch.device("cpu")
PLENTY = 1 << 30


def traced(make: Any, call: Any) -> Trace:
    with torch.device("meta"):
        shadow = make().eval()
        return trace(shadow, lambda: call(shadow), [])


@pytest.fixture(scope="module")
def small() -> Trace:
    """Convolution, normalization, attention, an in-place operator, an embedding and a cast."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.conv = nn.Conv2d(8, 8, 3, padding=1, stride=2)
            self.norm = nn.GroupNorm(2, 8)
            self.act = nn.SiLU(inplace=True)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            tokens = self.embed(ids).transpose(1, 2).reshape(1, 8, 4, 4)
            hidden = self.act(self.norm(self.conv(tokens)))
            rows = hidden.flatten(2).transpose(1, 2).unsqueeze(1)
            attended = nn.functional.scaled_dot_product_attention(rows, rows, rows)
            return attended.to(torch.float64)

    return traced(Small, lambda m: m(torch.zeros(1, 16, dtype=torch.long)))


def run(trace: Trace, **options: Any) -> dict[str, Any]:
    given = {"known": {}, "budget_s": 5.0, "memory_bytes": PLENTY, "weight": lambda o: o.bytes}
    return replay(trace.operators, CPU, **(given | options))


def test_every_operator_is_timed(small: Trace) -> None:
    times = run(small)
    assert {o.key for o in small.operators} == set(times)
    assert all(t.seconds > 0 and t.workspace_bytes is None for t in times.values())


def test_known_operators_are_not_run_again(small: Trace) -> None:
    times = run(small)
    first = small.operators[0]
    again = run(small, known={k: v for k, v in times.items() if k != first.key})
    assert set(again) == {first.key}


def test_what_is_too_large_for_the_memory_given_is_left_out(small: Trace) -> None:
    limit = sorted(o.bytes for o in small.operators)[len(small.operators) // 2]
    times = run(small, memory_bytes=limit)
    assert set(times) == {o.key for o in small.operators if o.bytes <= limit}


def test_without_a_budget_nothing_is_run(small: Trace) -> None:
    assert run(small, budget_s=0.0) == {}


def test_a_short_budget_reaches_the_heaviest(small: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(i * 0.1 for i in range(1000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(module, "block_seconds", lambda *_, **__: 1e-6)
    times = run(small, budget_s=1.0)
    heaviest = sorted(small.operators, key=lambda o: o.bytes, reverse=True)
    assert 0 < len(times) < len(small.operators)
    assert set(times) == {o.key for o in heaviest[: len(times)]}


def test_operators_that_need_values_are_left_out() -> None:
    unknown = Operator("x", "memory", '["aten.no_such.default",[],{}]', "float32", 1, 0, 0, 0, 0, 0)
    found = replay([unknown], CPU, known={}, budget_s=1, memory_bytes=1, weight=lambda o: 1)
    assert found[unknown.key].seconds is None


def test_shapes_strides_and_dtypes_come_back() -> None:
    signature = (
        '["aten.add.Tensor",[{"t":"float32","s":[2,3],"st":[1,2]},{"t":"float32","s":[3]}],{}]'
    )
    operator = Operator("aten.add.Tensor", "memory", signature, "float32", 1, 0, 0, 0, 0, 0)
    buffers = module._Buffers([operator], CPU)
    view = buffers.view({"t": "float32", "s": [2, 3], "st": [1, 2]})
    assert (view.shape, view.stride()) == ((2, 3), (1, 2))
    other = buffers.view({"t": "float32", "s": [3]})
    assert view.data_ptr() != other.data_ptr()
    assert rebuild(signature, buffers)().shape == (2, 3)


def test_random_state_is_left_alone(small: Trace) -> None:
    before = torch.get_rng_state()
    run(small)
    host_seconds_per_operator(CPU)
    assert torch.equal(before, torch.get_rng_state())


def test_the_host_cost_is_positive_and_small() -> None:
    figure = host_seconds_per_operator(CPU)
    assert 0 <= figure.value < 1e-3
    assert math.isfinite(figure.value)
    assert figure.samples
