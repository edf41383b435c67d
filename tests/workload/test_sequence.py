"""Sequences of calls in few words."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.workload.sequence import repeats_in
from tests.workloads import workload_of


@given(st.lists(st.integers(0, 2), max_size=40))
def test_nothing_is_lost(calls: list[int]) -> None:
    written = [call for times, pattern in repeats_in(calls) for call in pattern * times]
    assert written == calls


@pytest.mark.parametrize(
    ("calls", "repeats"),
    [
        ("", []),
        ("abc", [(1, "abc")]),
        ("abcabc", [(2, "abc")]),
        ("ab" * 50, [(50, "ab")]),
        ("a" * 13 + "b" * 27, [(13, "a"), (27, "b")]),
        ("aab" * 5 + "c", [(5, "aab"), (1, "c")]),
        ("xyabababc", [(1, "xy"), (3, "ab"), (1, "c")]),
    ],
)
def test_what_repeats_itself_is_written_once(calls: str, repeats: list[tuple[int, str]]) -> None:
    assert repeats_in(calls) == [(times, tuple(pattern)) for times, pattern in repeats]


@pytest.mark.parametrize(
    ("kind", "phase", "order"),
    [
        ("sd3", 0, "text_encoder text_encoder_2 text_encoder_3 " * 2),
        ("sd-controlnet", 1, "controlnet unet " * 2),
        ("wan22", 1, "transformer " * 2 + "transformer_2 " * 2),  # guidance is a call of its own
    ],
)
def test_pipelines_call_their_modules_in_this_order(kind: str, phase: int, order: str) -> None:
    found = workload_of(kind).phases[phase]
    assert [found.runs[i].component for r in found.sequence for i in r.runs * r.times] == (
        order.split()
    )


def test_runs_count_the_calls_of_the_sequence() -> None:
    for kind, phase in itertools.product(("sd3", "wan22", "svd"), range(3)):
        found = workload_of(kind).phases[phase]
        counts = [
            sum(r.times * r.runs.count(i) for r in found.order) for i in range(len(found.runs))
        ]
        assert counts == [run.calls for run in found.runs]
