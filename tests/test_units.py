"""Numbers as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.units import format_seconds
from tests.thorough import examples


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 µs"),
        (0.0123, "12.3 ms"),
        (1.5, "1.50 s"),
        (83, "83.0 s"),
        (546, "546 s"),
        (735, "12.2 min"),
        (6588, "1.83 h"),
        (760_000, "211 h"),
        (-735, "-12.2 min"),
    ],
)
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_times_that_are_compared_have_one_unit():
    assert (format_seconds(735, 546), format_seconds(546, 735)) == ("735 s", "546 s")
    assert (format_seconds(6588, 4000), format_seconds(4000, 6588)) == ("110 min", "66.7 min")
    assert format_seconds(0.5, 735) == "500.0 ms"


times = st.floats(1, 1e7)


@examples(usually=50, thoroughly=500)
@given(times, times)
def test_in_one_unit_the_longer_reads_longer(one: float, other: float) -> None:
    (a, unit), (b, same) = format_seconds(one, other).split(), format_seconds(other, one).split()
    assert unit == same
    assert (one <= other and float(a) <= float(b)) or (one >= other and float(a) >= float(b))
