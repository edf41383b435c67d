"""Timing: what is kept, what is repeated, how rates follow."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autotune.probe import timing
from autotune.probe.machine import Figure
from autotune.probe.timing import rate, spread, time_call

CPU = torch.device("cpu")


def test_a_sleep_is_timed_by_the_clock() -> None:
    figure = time_call(lambda: time.sleep(0.005), CPU, budget_s=0.03)
    assert figure.value >= 0.005
    assert len(figure.samples) >= 3
    assert figure.source == "measured"


def test_a_slow_call_is_warmed_up_and_timed_once() -> None:
    calls: list[None] = []

    def slow() -> None:
        calls.append(None)
        time.sleep(0.01)

    assert len(time_call(slow, CPU, budget_s=0.001).samples) == 1
    assert len(calls) == 2


def test_quick_calls_are_timed_in_blocks() -> None:
    calls: list[None] = []
    figure = time_call(lambda: calls.append(None), CPU, budget_s=0.02)
    assert len(calls) > 100 * len(figure.samples)


def test_a_disturbed_series_is_repeated_and_the_quieter_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quiet = [1.0, 1.01, 1.0, 1.02]
    series = iter([[1.0, 2.0, 3.0, 9.0], quiet])
    monkeypatch.setattr(timing, "_series", lambda *_: next(series))
    monkeypatch.setattr(timing, "block_seconds", lambda *_: 0.01)
    assert time_call(lambda: None, CPU).samples == tuple(quiet)


def test_a_quiet_series_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    series = iter([[1.0, 1.01, 1.0]])
    monkeypatch.setattr(timing, "_series", lambda *_: next(series))
    monkeypatch.setattr(timing, "block_seconds", lambda *_: 0.01)
    assert time_call(lambda: None, CPU).value == 1.0


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20), st.floats(1.0, 1e15))
def test_rate_turns_every_sample_over(samples: list[float], amount: float) -> None:
    figure = rate(Figure(value=samples[0], samples=tuple(samples)), amount)
    assert figure.value == amount / samples[0]
    assert figure.samples == tuple(amount / sample for sample in samples)


@given(st.lists(st.floats(1e-6, 1e3), max_size=20), st.floats(1e-3, 1e3))
def test_spread_has_no_unit(samples: list[float], factor: float) -> None:
    scaled = [sample * factor for sample in samples]
    assert spread(scaled) == pytest.approx(spread(samples), rel=1e-6, abs=1e-9)
    assert spread(samples) >= 0
