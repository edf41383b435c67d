"""The sets that every guide names must come out of the numbers, on the machines they are for."""

from __future__ import annotations

import msgspec
import pytest

from autotune.decide.choose import Limits, choose
from autotune.decide.plan import Plan
from autotune.optimizations import CLASSIC
from autotune.probe.machine import Machine
from autotune.units import GIB
from autotune.workload.workload import Workload

# A desktop and a browser hold about this much of a small card.
HELD_BYTES = int(0.4 * GIB)


def names(plan: Plan) -> list[str]:
    return [s.name for s in plan.optimizations]


def card(machine: Machine, gib: float) -> Machine:
    total = int(gib * GIB)
    device = msgspec.structs.replace(
        machine.device, total_bytes=total, free_bytes=total - HELD_BYTES
    )
    return msgspec.structs.replace(machine, device=device)


def classic(machine: Machine, workload: Workload, quality: str = "exact") -> Plan:
    return choose(machine, workload, Limits(quality=quality, only=CLASSIC))


@pytest.mark.parametrize("quality", ["exact", "high"])
@pytest.mark.parametrize("side", [768, 1024])
def test_sd15_takes_xformers_alone(traced, rtx_3080_torch1, side, quality):
    plan = classic(rtx_3080_torch1, traced("sd15", height=side, width=side), quality)
    assert plan.fits
    assert names(plan) == ["xformers"]


def test_sd15_1024_slices_only_where_memory_asks_for_it(traced, rtx_3080_torch1):
    workload = traced("sd15", height=1024, width=1024)
    without_xformers = Limits(only=("attention_slicing",))
    plenty = choose(card(rtx_3080_torch1, 40), workload, without_xformers)
    scarce = choose(card(rtx_3080_torch1, 10), workload, without_xformers)
    assert plenty.baseline.needed_bytes > 10 * GIB
    assert names(scarce) == ["attention_slicing"]
    assert scarce.fits
    # Where everything fits, slicing is a matter of time alone.
    assert plenty.prediction.seconds <= plenty.baseline.seconds


def test_sd15_1024_batch_takes_tome_when_quality_was_offered(traced, rtx_3080_torch1):
    workload = traced("sd15", height=1024, width=1024, batch=2)
    assert names(classic(rtx_3080_torch1, workload)) == ["xformers"]
    offered = classic(rtx_3080_torch1, workload, "balanced")
    assert names(offered) == ["xformers", "tome"]
    assert offered.optimizations[1].parameters["ratio"] <= 0.3


def test_sdxl_takes_xformers_and_model_offload(traced, rtx_3080_torch1):
    plan = classic(rtx_3080_torch1, traced("sdxl"))
    assert plan.fits
    assert names(plan) == ["xformers", "model_cpu_offload"]


def test_sdxl_balanced_adds_mild_tome(traced, rtx_3080_torch1):
    plan = classic(rtx_3080_torch1, traced("sdxl"), "balanced")
    assert names(plan)[:2] == ["xformers", "model_cpu_offload"]
    assert all(0.2 <= s.parameters["ratio"] <= 0.3 for s in plan.optimizations[2:])


@pytest.mark.parametrize(("model", "gib"), [("sdxl", 4), ("sd15", 1.8)])
def test_small_cards_take_sequential_offload_where_model_offload_does_not_fit(
    traced, rtx_3080_torch1, model, gib
):
    machine = card(rtx_3080_torch1, gib)
    plan = classic(machine, traced(model))
    assert names(plan) == ["xformers", "sequential_cpu_offload"]
    model_offload = choose(machine, traced(model), Limits(only=("xformers", "model_cpu_offload")))
    assert not model_offload.fits


@pytest.mark.parametrize("gib", [4, 6])
def test_small_cards_take_tome_only_when_offered(traced, rtx_3080_torch1, gib):
    machine = card(rtx_3080_torch1, gib)
    workload = traced("sdxl")
    assert "tome" not in names(classic(machine, workload))
    offered = classic(machine, workload, "fast")
    for setting in offered.optimizations:
        if setting.name == "tome":
            assert 0.3 <= setting.parameters["ratio"] <= 0.5


def test_todays_stack_keeps_its_default_attention(traced, rtx_3080):
    """Where SDPA measures as fast, xFormers buys nothing, and the times are shown."""
    plan = classic(rtx_3080, traced("sd15", height=768, width=768))
    assert names(plan) == []
    xformers = next(r for r in plan.rejected if r.optimization == "xformers")
    assert xformers.seconds == plan.prediction.seconds
    assert "changes nothing" in xformers.text


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
@pytest.mark.parametrize("gib", [4, 6, 10, 24])
@pytest.mark.parametrize("quality", ["exact", "balanced", "fast"])
def test_whole_catalogue_is_no_worse_than_the_classic_one(
    traced, rtx_3080_torch1, model, gib, quality
):
    machine = card(rtx_3080_torch1, gib)
    workload = traced(model)
    old = classic(machine, workload, quality)
    new = choose(machine, workload, Limits(quality=quality))
    assert new.fits or not old.fits
    if old.fits:
        assert new.prediction.mean_seconds <= old.prediction.mean_seconds * 1.03
