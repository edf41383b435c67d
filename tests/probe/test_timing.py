"""Timing: what is kept, what is repeated, when it ends."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch

from autotune.probe import timing
from autotune.probe.deadline import Deadline
from autotune.probe.machine import Figure
from autotune.probe.noise import OTHERS_ON_GPU
from autotune.probe.samples import UNSTEADY
from autotune.probe.timing import COLD, Timer, time_call

CPU = torch.device("cpu")
QUIET, LOUD = [1.0, 1.01, 1.0, 1.02], [1.0, 2.0, 3.0, 9.0]


def test_a_sleep_is_timed_by_the_clock() -> None:
    figure = time_call(lambda: time.sleep(0.005), CPU, budget_s=0.03)
    assert figure.value >= 0.005
    assert len(figure.samples) >= 3
    assert figure.spread is not None
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


class FakeWatch:
    """Says what disturbed each measurement in turn."""

    def __init__(self, *reasons: tuple[str, ...]) -> None:
        self.reasons = iter(reasons)

    def begin(self) -> Any:
        return lambda: next(self.reasons)


def test_one_long_call_is_watched_and_repeated_too(slow_clock: Any) -> None:
    durations = iter([5.0, 9.0, 4.0])
    watch: Any = FakeWatch((OTHERS_ON_GPU,), ())
    figure = Timer(CPU, watch=watch).time(lambda: slow_clock.advance(next(durations)))
    assert figure.samples == (pytest.approx(4.0, rel=1e-3),)
    assert figure.disturbances == ()


def timed(monkeypatch: pytest.MonkeyPatch, *series: list[float], watch: Any = None) -> Figure:
    """A figure made of given series; asking for one more than given fails."""
    given = iter(series)
    monkeypatch.setattr(Timer, "_series", lambda *_: next(given))
    monkeypatch.setattr(timing, "block_seconds", lambda *_: 0.01)
    figure = Timer(CPU, watch=watch).time(lambda: None)
    assert next(given, None) is None, "a series was not needed"
    return figure


def test_a_disturbed_series_is_repeated_and_the_quieter_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figure = timed(monkeypatch, LOUD, QUIET)
    assert figure.samples == tuple(QUIET)
    assert figure.disturbances == ()


def test_a_quiet_series_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = timed(monkeypatch, QUIET)
    assert (figure.value, figure.disturbances) == (1.005, ())
    assert figure.spread == pytest.approx(0.0124, abs=1e-4)


def test_what_stays_unsteady_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = timed(monkeypatch, LOUD, [1.0, 2.0, 4.0, 9.0])
    assert figure.disturbances == (UNSTEADY,)


def test_a_steady_series_beside_somebody_elses_work_is_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A game that always takes half of the GPU leaves no spread."""
    slow = [2 * second for second in QUIET]
    figure = timed(monkeypatch, slow, QUIET, watch=FakeWatch((OTHERS_ON_GPU,), ()))
    assert figure.samples == tuple(QUIET)
    assert figure.disturbances == ()


def test_work_that_goes_on_is_flagged_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = FakeWatch((OTHERS_ON_GPU,), (OTHERS_ON_GPU,))
    assert timed(monkeypatch, QUIET, QUIET, watch=watch).disturbances == (OTHERS_ON_GPU,)


def test_of_two_series_beside_others_the_quicker_suffered_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = FakeWatch((OTHERS_ON_GPU,), (OTHERS_ON_GPU,))
    slow = [2 * second for second in QUIET]
    uneven = [1.0, 1.0, 1.1, 1.6]
    figure = timed(monkeypatch, slow, uneven, watch=watch)
    assert figure.samples == tuple(uneven)


def test_a_series_of_ones_own_is_better_than_a_steady_one_beside_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = FakeWatch((OTHERS_ON_GPU,), ())
    assert timed(monkeypatch, QUIET, LOUD, watch=watch).samples == tuple(LOUD)


def test_after_the_deadline_a_call_is_timed_once_and_says_so() -> None:
    calls: list[None] = []
    figure = Timer(CPU, deadline=Deadline(0.0)).time(lambda: calls.append(None))
    assert len(calls) == 1
    assert figure.source == COLD


def test_a_series_ends_with_the_deadline(slow_clock: Any) -> None:
    timer = Timer(CPU, budget_s=10.0, deadline=Deadline(1.0))
    figure = timer.time(lambda: slow_clock.advance(0.15))
    assert 1 <= len(figure.samples) <= 6
    assert slow_clock.now - 1.0 <= 0.15 + 1e-3


@pytest.mark.parametrize(("seconds", "size"), [(1e-6, 4096), (1e-3, 2048), (1e-2, 1024), (1, 512)])
def test_slow_devices_get_smaller_work(slow_clock: Any, seconds: float, size: int) -> None:
    """Sizes double, work grows eightfold, and no call may take longer than a tenth of a second."""

    def call_of(side: int) -> Any:
        return lambda: slow_clock.advance(seconds * (side / 512) ** 3)

    found = Timer(CPU).largest((512, 1024, 2048, 4096), call_of, power=3)
    assert found == size


def test_the_largest_size_is_judged_by_the_quickest_call(slow_clock: Any) -> None:
    durations = itertools.chain([0.9, 0.001], itertools.repeat(0.9))
    found = Timer(CPU).largest(
        (1, 2), lambda _: lambda: slow_clock.advance(next(durations)), power=1
    )
    assert found == 2
