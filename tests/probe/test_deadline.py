"""Deadlines: parts end within their whole, and what is left out is noted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autotune.probe.deadline import Deadline, import_by, never


def test_it_passes(slow_clock: Any) -> None:
    deadline = Deadline(1.0)
    assert not deadline.has_passed
    slow_clock.advance(0.6)
    assert deadline.left_s == pytest.approx(0.4, abs=1e-3)
    slow_clock.advance(0.6)
    assert deadline.has_passed
    assert deadline.left_s == 0.0
    assert not never().has_passed


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(0, 5), min_size=1, max_size=6), st.floats(0, 5))
def test_no_part_ends_after_its_whole(slow_clock: Any, parts: list[float], whole_s: float) -> None:
    whole = deadline = Deadline(whole_s)
    for seconds in parts:
        deadline = deadline.part(seconds)
    assert deadline.left_s <= min(whole.left_s, *parts) + 1e-3


def test_what_is_left_out_of_a_part_is_left_out_of_the_whole(slow_clock: Any) -> None:
    whole = Deadline(1.0)
    part = whole.part(0.5)
    assert part.leaves("the first")
    assert not part.leaves("what takes a second", seconds=1.0)
    slow_clock.advance(0.7)
    assert not part.leaves("the last")
    assert not part.leaves("the last"), "noted once"
    assert whole.leaves("another")
    assert whole.left_out == ("what takes a second", "the last")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a module that runs some code when imported."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name: str, code: str) -> str:
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(code)
        return name

    return make


def test_a_quick_import_is_waited_for(module: Any) -> None:
    name = module("imported_quickly", "value = 3")
    assert import_by(never(), name)
    assert sys.modules[name].value == 3
    assert import_by(Deadline(0.0), name), "it is there already"


def test_an_import_that_fails_is_over(module: Any) -> None:
    assert import_by(Deadline(30.0), module("imported_badly", "1 / 0"))
    assert import_by(Deadline(30.0), "no_such_module_at_all")


def test_a_slow_import_is_not_waited_for(module: Any) -> None:
    name = module("imported_slowly", "import time\ntime.sleep(0.4)\nvalue = 4")
    assert not import_by(Deadline(0.01), name)
    assert __import__(name).value == 4, "it goes on, and whoever needs it waits"
