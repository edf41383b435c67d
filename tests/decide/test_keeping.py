"""What is on is kept until changing it pays, and never at the price of quality or memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.decide.choose import choose
from autotune.decide.decision import TOLERANCE
from autotune.decide.history import Applied
from autotune.decide.limits import Limits
from autotune.optimizations import parse_settings
from autotune.probe.machine import Machine
from autotune.probe.reference import load_machine
from autotune.units import GIB
from autotune.workload.workload import Workload
from tests.decide.strategies import machines, workloads
from tests.thorough import examples


@pytest.fixture
def rtx_4090() -> Machine:
    return load_machine("rtx-4090-24gb")


def test_a_slower_set_is_kept_until_it_has_cost_what_changing_takes(rtx_4090, traced):
    """Compiling takes longer than it saves in a few images."""
    workload, limits = traced("sdxl"), Limits(images=1000, only=("compile",))
    best = choose(rtx_4090, workload, limits)
    assert [s.name for s in best.optimizations] == ["compile"]
    first = choose(rtx_4090, workload, limits, applied=Applied(()))
    assert first.optimizations == ()
    waiting = first.postponed
    assert waiting is not None
    assert waiting.optimizations == best.optimizations
    lost = first.prediction.mean_seconds - best.prediction.mean_seconds
    assert waiting.saves_s == pytest.approx(lost)
    assert 0 < waiting.saves_s < best.prediction.once_s < waiting.takes_s
    (note,) = [n for n in first.notes if "what is on is kept" in n]
    assert "would save" in note
    just_less = waiting.takes_s - waiting.saves_s - 1e-6
    assert choose(rtx_4090, workload, limits, applied=Applied((), just_less)) == first
    assert choose(rtx_4090, workload, limits, applied=Applied((), just_less + 2e-6)) == best


def test_what_takes_quality_is_not_kept(rtx_4090, traced):
    workload = traced("sdxl")
    on = Applied(parse_settings("tome:ratio=0.3"))
    assert choose(rtx_4090, workload, Limits(only=("tome",)), applied=on).optimizations == ()


def test_members_that_would_be_chosen_anew_say_what_they_are_for(rtx_4090, traced):
    workload, limits = traced("sdxl", batch=2), Limits(priority="memory")
    fresh = choose(rtx_4090, workload, limits)
    assert fresh.optimizations
    assert choose(rtx_4090, workload, limits, applied=Applied(())).reasons == fresh.reasons


def test_what_does_not_fit_is_not_kept(rtx_4090, traced):
    workload = traced("sdxl")
    plan = choose(rtx_4090, workload, Limits(vram_limit=7 * GIB), applied=Applied(()))
    assert plan.optimizations
    assert plan.postponed is None


@given(machine=machines(), workload=workloads(), data=st.data())
@examples(usually=30, thoroughly=300)
def test_keeping_never_loses_more_than_changing_takes(
    machine: Machine, workload: Workload, data: st.DataObject
) -> None:
    """Whatever is on, and however often it is asked: the loss stays below the price of a change."""
    best = choose(machine, workload)
    sets = ({}, {"vram_limit": 6 * GIB}, {"vram_limit": 3 * GIB})
    on = choose(machine, workload, Limits(**data.draw(st.sampled_from(sets)))).optimizations
    cost = 0.0
    for _ in range(20):
        plan = choose(machine, workload, applied=Applied(on, cost))
        if plan.postponed is None:
            break
        cost += plan.postponed.saves_s
        assert cost < plan.postponed.takes_s
        assert plan.optimizations == on
        assert plan.fits
    if plan.postponed is None and plan.fits:
        longest = best.prediction.mean_seconds * (1 + TOLERANCE) ** 2
        assert plan.prediction.mean_seconds <= longest
