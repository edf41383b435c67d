"""What ran out of memory: not tried again until more is free."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autotune.decide.choose import QUALITIES, TOLERANCE, Limits, choose
from autotune.decide.history import History, Misfit
from autotune.decide.misfits import MORE, counting, is_outgrown
from autotune.decide.plan import Plan
from autotune.decide.predict import Predictor
from autotune.decide.prediction import Budget
from autotune.decide.search import execution_of
from autotune.optimizations.base import Setting
from autotune.probe.machine import Machine
from autotune.units import GIB, MIB, format_bytes
from autotune.workload.workload import Workload
from tests.decide.conftest import Traced
from tests.decide.strategies import machines, workloads

often = settings(max_examples=12, deadline=None)
qualities = st.sampled_from(QUALITIES)
phases = st.sampled_from((None, "encode", "denoise", "decode"))


def with_free(machine: Machine, device_bytes: int, host_bytes: int = 0) -> Machine:
    device, host = machine.device, machine.host
    more = host.ram_available_bytes + host_bytes
    return msgspec.structs.replace(
        machine,
        device=msgspec.structs.replace(device, free_bytes=device_bytes),
        host=msgspec.structs.replace(host, ram_available_bytes=more),
    )


def needs(plan: Plan, phase: str | None) -> int:
    prediction = plan.prediction
    return prediction.needed_bytes if phase is None else prediction.phase_needs[phase]


@often
@given(machines(), workloads(), qualities, phases)
def test_a_plan_needs_less_than_what_ran_out(machine, workload, quality, phase):
    """And again, until nothing is left: then it says that nothing fits, and what would help."""
    limits, misfits = Limits(quality=quality), ()
    plan = choose(machine, workload, limits)
    for _ in range(3):
        if not plan.fits:
            break
        ran_out, available = plan, plan.machine.free_bytes
        misfits = (*misfits, Misfit(plan.optimizations, available, phase=phase))
        plan = choose(machine, workload, limits, history=History(misfits=misfits))
        assert not plan.fits or needs(plan, phase) < needs(ran_out, phase)
        assert sum("ran out of memory" in n for n in plan.notes) == len(misfits)
    assert bool(plan.ways_out) == (not plan.fits)


@often
@given(machines(), workloads(), qualities, phases)
def test_with_more_memory_it_is_as_if_nothing_had_run_out(machine, workload, quality, phase):
    limits = Limits(quality=quality)
    plan = choose(machine, workload, limits)
    history = History(misfits=(Misfit(plan.optimizations, plan.budget_bytes, phase=phase),))
    more = with_free(machine, int(machine.device.free_bytes * (1 + 2 * MORE)) + 64 * MIB)
    assert choose(more, workload, limits, history=history) == choose(more, workload, limits)


@often
@given(machines(), workloads(), phases)
def test_where_nothing_smaller_is_left_the_smallest_is_tried_again(machine, workload, phase):
    """In the call in which it ran out nothing is left; a new one may find others gone."""
    plan, misfits = choose(machine, workload), ()
    assume(plan.fits)
    while plan.fits:
        last = plan
        misfits = (*misfits, Misfit(plan.optimizations, plan.machine.free_bytes, phase=phase))
        plan = choose(machine, workload, history=History(misfits=misfits))
    again = choose(machine, workload, history=History(misfits=misfits), retries=True)
    assert again.fits
    assert needs(again, phase) <= needs(last, phase) * (1 + TOLERANCE)
    assert any("tried again all the same" in note for note in again.notes)
    assert again.validity.most_bytes == again.budget_bytes, "with more it is decided anew"


@often
@given(machines(), workloads(), phases)
def test_the_memory_asked_for_after_a_misfit_is_enough(machine, workload, phase):
    """More than there was, though the prediction says that less would do."""
    plan = choose(machine, workload)
    misfits: tuple[Misfit, ...] = ()
    for _ in range(8):
        if not plan.fits:
            break
        misfits = (*misfits, Misfit(plan.optimizations, plan.machine.free_bytes, phase=phase))
        plan = choose(machine, workload, history=History(misfits=misfits))
    for way in plan.remedies:
        if way.kind == "vram":
            free = machine.device.free_bytes + int(way.change["device_bytes"])
            more = with_free(machine, free, int(way.change.get("host_bytes", 0)))
            assert choose(more, workload, history=History(misfits=misfits)).fits


# ---- by hand -------------------------------------------------------------------------------------

SLICING = (Setting("vae_slicing"),)


def test_a_little_more_is_no_more():
    misfit = Misfit((), 100 * MIB)
    assert not is_outgrown(misfit, Budget(102 * MIB, None))
    assert is_outgrown(misfit, Budget(103 * MIB, None))


def test_only_what_counts_decides():
    grown, held = Misfit((), 1 * GIB), Misfit(SLICING, 8 * GIB)
    history = History(misfits=(grown, held))
    assert counting(history, Budget(4 * GIB, 64 * GIB)).misfits == (held,)


@pytest.fixture
def demo(traced: Traced) -> Workload:
    return traced("demo")


def test_host_ram_that_ran_out_is_not_the_devices(rtx_3080: Machine, demo: Workload) -> None:
    plan = choose(rtx_3080, demo)
    needed = plan.prediction.host_bytes
    misfit = Misfit(plan.optimizations, rtx_3080.host.ram_available_bytes, of_host=True)
    smaller = choose(rtx_3080, demo, history=History(misfits=(misfit,)))
    assert smaller.budget_bytes == plan.budget_bytes
    assert smaller.host_budget_bytes == needed - 1
    assert not smaller.fits or smaller.prediction.host_bytes < needed


def test_it_says_what_ran_out_in_numbers(rtx_3080: Machine, demo: Workload) -> None:
    plan = choose(rtx_3080, demo)
    misfit = Misfit(plan.optimizations, plan.budget_bytes)
    smaller = choose(rtx_3080, demo, history=History(misfits=(misfit,)))
    (note,) = (n for n in smaller.notes if "ran out" in n)
    needed = Predictor(rtx_3080, demo).predict(execution_of(plan.optimizations)).needed_bytes
    for figure in (plan.budget_bytes, needed):
        assert format_bytes(figure) in note


def test_only_the_phase_that_ran_out_must_need_less(rtx_3080: Machine, traced: Traced) -> None:
    """Decoding in slices helps where decoding ran out, though denoising needs more."""
    demo = traced("demo", batch=4)
    plan = choose(rtx_3080, demo)
    misfit = Misfit(plan.optimizations, plan.budget_bytes, phase="decode")
    smaller = choose(rtx_3080, demo, history=History(misfits=(misfit,)))
    assert smaller.fits
    assert "vae_slicing" in {s.name for s in smaller.optimizations}
    (reason,) = (r for r in smaller.reasons if r.optimization == "vae_slicing")
    assert "ran out of memory in it" in reason.text
    assert smaller.budget_bytes == plan.budget_bytes


def test_what_cannot_be_predicted_lowers_nothing(rtx_3080: Machine, demo: Workload) -> None:
    tiles = Setting("vae_tiling", {"tile": 100})
    history = History(misfits=(Misfit((tiles,), 1 << 40),))
    with pytest.raises(Exception, match="not traced"):
        Predictor(rtx_3080, demo).predict(execution_of((tiles,)))
    assert choose(rtx_3080, demo, history=history) == choose(rtx_3080, demo)
