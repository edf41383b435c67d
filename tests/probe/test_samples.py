"""Figures from raw samples."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.probe.samples import figure_of, rate, spread

SECONDS = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20)


@given(SECONDS, st.floats(1.0, 1e15))
def test_rate_turns_every_sample_over(samples: list[float], amount: float) -> None:
    figure = rate(figure_of(samples, "elsewhere", ("noise",)), amount)
    assert figure.samples == tuple(amount / sample for sample in samples)
    assert min(figure.samples) <= figure.value <= max(figure.samples)
    assert (figure.source, figure.disturbances) == ("elsewhere", ("noise",))


@given(st.lists(st.floats(1e-6, 1e3), max_size=20), st.floats(1e-3, 1e3))
def test_spread_has_no_unit(samples: list[float], factor: float) -> None:
    scaled = [sample * factor for sample in samples]
    assert spread(scaled) == pytest.approx(spread(samples), rel=1e-6, abs=1e-9)
    assert spread(samples) >= 0


def test_median_and_spread_are_kept_beside_the_samples() -> None:
    figure = figure_of([1.0, 2.0, 3.0, 4.0, 9.0])
    assert (figure.value, figure.spread) == (3.0, pytest.approx(2 / 3, abs=1e-4))
    assert spread(figure) == pytest.approx(2 / 3)


def test_fewer_than_three_samples_tell_no_spread() -> None:
    assert figure_of([1.0, 2.0]).spread is None
