"""What a user can restrict, and what the choice does with it. What holds always is in
``test_properties.py``."""

from __future__ import annotations

import math

import msgspec
import pytest

from autotune.decide.choose import TOLERANCE, Limits, choose, predict
from autotune.decide.decision import decide, select
from autotune.decide.plan import Plan
from autotune.decide.predict import Predictor
from autotune.decide.rules import OFFLOADS
from autotune.errors import MachineError, OptimizationError, RequestError
from autotune.optimizations import CATALOGUE, CLASSIC, parse_settings
from autotune.optimizations.base import EXACTNESS, Setting
from autotune.probe.machine import Machine
from autotune.runtime.account import left_out
from autotune.units import GIB
from tests.workloads import all_cast


def with_free(machine: Machine, gib: float) -> Machine:
    device = msgspec.structs.replace(machine.device, free_bytes=int(gib * GIB))
    return msgspec.structs.replace(machine, device=device)


def with_ram(machine: Machine, gib: float) -> Machine:
    host = msgspec.structs.replace(machine.host, ram_available_bytes=int(gib * GIB))
    return msgspec.structs.replace(machine, host=host)


def names(plan: Plan) -> list[str]:
    return [s.name for s in plan.optimizations]


def text_of(plan: Plan, optimization: str) -> str:
    told = (*plan.reasons, *plan.rejected)
    return next(r.text for r in told if r.optimization == optimization)


def test_exact_before_lossy(traced, rtx_3080_torch1):
    plan = choose(rtx_3080_torch1, traced("sdxl"), Limits(quality="exact"))
    assert {CATALOGUE[s.name].exactness for s in plan.optimizations} <= {EXACTNESS[0]}


def test_vram_limit_is_a_budget(traced, rtx_3080):
    plan = choose(rtx_3080, traced("sd15"), Limits(vram_limit=int(2.5 * GIB), only=CLASSIC))
    assert plan.budget_bytes <= 2.5 * GIB
    assert plan.fits
    assert names(plan) == ["model_cpu_offload"]


def test_only_and_without(traced, rtx_3080):
    plan = choose(rtx_3080, traced("sdxl"), Limits(without=("model_cpu_offload",)))
    assert "model_cpu_offload" not in {s.name for s in plan.optimizations}
    assert "you left it out" in next(
        r.text for r in plan.rejected if r.optimization == "model_cpu_offload"
    )
    alone = choose(rtx_3080, traced("sdxl"), Limits(only=("sequential_cpu_offload",)))
    assert [s.name for s in alone.optimizations] == ["sequential_cpu_offload"]


def test_what_was_set_by_hand_is_kept(traced, rtx_3080):
    plan = choose(rtx_3080, traced("sdxl"), Limits(keep=(Setting("sequential_cpu_offload"),)))
    assert plan.kept == (Setting("sequential_cpu_offload"),)
    assert plan.execution.placement == "sequential_offload"
    assert "model_cpu_offload" not in {s.name for s in plan.optimizations}
    offload = next(r for r in plan.rejected if r.optimization == "model_cpu_offload")
    assert offload.rule == "one-offload"


@pytest.mark.parametrize(
    ("limits", "error"),
    [
        (Limits(quality="ultra"), RequestError),
        (Limits(only=("xformer",)), OptimizationError),
        (Limits(without=("nothing",)), OptimizationError),
    ],
)
def test_unknown_names_are_refused(traced, rtx_3080, limits, error):
    with pytest.raises(error) as caught:
        choose(rtx_3080, traced("sd15"), limits)
    assert caught.value.hint


def test_predict_refuses_an_incoherent_set(traced, rtx_3080):
    with pytest.raises(OptimizationError, match="slicing-alone"):
        predict(rtx_3080, traced("sd15"), parse_settings("xformers,attention_slicing"))


def test_predict_notes_what_cannot_run(traced, cpu_machine):
    report = predict(cpu_machine, traced("sd15"), parse_settings("xformers"))
    assert any("xFormers has no CPU kernels" in n for n in report.notes)


def test_when_nothing_fits_the_nearest_miss_is_shown(traced, rtx_3080):
    plan = choose(with_free(rtx_3080, 0.6), traced("sdxl"))
    assert not plan.fits
    assert plan.bottleneck.after.resource == "vram"
    assert OFFLOADS & set(names(plan))


def test_the_nearest_miss_lacks_as_few_memories_as_any(traced, rtx_3080):
    """Offloading cures the device though host RAM lacks: all weights are cast as they are read."""
    plan = choose(with_ram(rtx_3080, 4), all_cast(traced("sdxl")))
    assert not plan.fits
    assert names(plan) == ["group_offload"]
    assert plan.prediction.needed_bytes < plan.budget_bytes
    assert plan.bottleneck.after.resource == "ram"
    assert text_of(plan, "group_offload").endswith("either")
    for name in ("channels_last", "vae_tiling"):
        assert "it saves no host RAM, which is what lacks" in text_of(plan, name)


# ---- quality, priority and memory ---------------------------------------------------------------


def test_lossy_optimizations_can_be_allowed_by_name(traced, rtx_3080_torch1):
    workload = traced("sd15", height=1024, width=1024, batch=4)
    named = choose(rtx_3080_torch1, workload, Limits(quality="tome"))
    assert "tome" in names(named)
    assert "near-exact: needs --quality high" in text_of(named, "vae_tiling")
    both = choose(rtx_3080_torch1, workload, Limits(quality="high,tome"))
    assert "needs --quality" not in text_of(both, "vae_tiling")
    exact = choose(rtx_3080_torch1, workload, Limits(quality="vae_tiling"))
    assert "lossy: needs --quality balanced" in text_of(exact, "tome")


def test_what_quality_forbids_is_told_with_its_gain(traced, rtx_3080_torch1):
    plan = choose(rtx_3080_torch1, traced("sd15", height=1024, width=1024, batch=4))
    tome = next(r for r in plan.rejected if r.optimization == "tome")
    assert tome.needs_quality == "balanced"
    assert tome.seconds is not None
    assert tome.seconds < plan.prediction.seconds
    assert "would gain" in tome.text


@pytest.mark.parametrize("quality", ["", "high,", "high,fast", "lossy", "high fast"])
def test_other_qualities_are_refused(traced, rtx_3080, quality):
    with pytest.raises(RequestError, match="quality") as caught:
        choose(rtx_3080, traced("sd15"), Limits(quality=quality))
    assert "names of optimizations" in caught.value.hint


def test_unknown_priorities_are_refused(traced, rtx_3080):
    with pytest.raises(RequestError, match="priority 'size'"):
        choose(rtx_3080, traced("sd15"), Limits(priority="size"))


def test_memory_first_takes_up_to_twice_the_time(traced, rtx_3080):
    """On a card with room, speed needs nothing; memory takes what halves the need."""
    machine = with_free(rtx_3080, 24)
    speed, memory = (
        choose(machine, traced("sdxl"), Limits(priority=p, only=CLASSIC))
        for p in ("speed", "memory")
    )
    assert names(speed) == []
    assert "model_cpu_offload" in names(memory)
    assert memory.prediction.needed_bytes < 0.6 * speed.prediction.needed_bytes
    assert memory.prediction.seconds <= 2 * speed.prediction.seconds
    assert "memory" in text_of(memory, "model_cpu_offload").split("without it")[1]


def test_host_ram_is_a_budget(traced, rtx_3080):
    """Offloaded weights lie in RAM: without enough of it, the plan says what is missing."""
    workload = all_cast(traced("sdxl"))
    assert OFFLOADS & set(names(choose(rtx_3080, workload)))
    for plan in (
        choose(with_ram(rtx_3080, 2), workload),
        choose(rtx_3080, workload, Limits(ram_limit=2 * GIB)),
    ):
        assert not plan.fits
        assert plan.host_budget_bytes == 2 * GIB


def test_the_ram_limit_holds_where_the_device_is_the_host(traced, cpu_machine):
    plan = choose(cpu_machine, traced("sd15"), Limits(ram_limit=GIB))
    assert plan.budget_bytes <= GIB
    assert plan.host_budget_bytes is None
    assert not plan.fits


def test_a_member_is_explained_by_what_it_attacks(traced, rtx_3080_torch1):
    plan = choose(rtx_3080_torch1, traced("sdxl"), Limits(only=("xformers", "model_cpu_offload")))
    attention, offload = plan.reasons
    assert (attention.attacks.resource, attention.attacks.phase) == ("compute", "denoise")
    assert attention.after_seconds < attention.before_seconds * (1 - TOLERANCE)
    assert (offload.attacks.resource, offload.attacks.phase) == ("vram", "decode")
    assert offload.after_bytes < plan.budget_bytes < offload.before_bytes
    assert not offload.fits_without


def test_what_does_not_go_with_the_choice_is_told_by_the_best_set_with_it(traced, rtx_3080):
    plan = choose(rtx_3080, traced("sdxl"))
    assert names(plan) == ["group_offload"]
    model = next(r for r in plan.rejected if r.optimization == "model_cpu_offload")
    assert model.instead_of == ("group_offload",)
    assert "the best set with it" in model.text
    assert model.seconds is not None
    assert model.seconds > plan.prediction.mean_seconds
    # Its reason is given once.
    reason = "each moves the same weights"
    assert sum(reason in text for text in left_out(plan)) == 1
    # Quality forbids it besides: the number is told all the same.
    quantized = next(r for r in plan.rejected if r.optimization == "quantization")
    assert quantized.needs_quality == "balanced"
    assert quantized.rule
    assert quantized.needed_bytes


def test_what_changes_nothing_is_said_to(traced, rtx_3080):
    plan = choose(rtx_3080, traced("sdxl"))
    assert "changes nothing" in text_of(plan, "xformers")


@pytest.mark.parametrize("seconds", [-1.0, math.inf, math.nan])
def test_times_that_cannot_be_are_an_error_with_a_remedy(traced, rtx_3080, seconds):
    """Absurd figures overflow, or cancel each other out."""
    decision = decide(Predictor(rtx_3080, traced("sd15")), Limits(only=("vae_slicing",)), CATALOGUE)
    absurd = [c._replace(seconds=seconds) for c in decision.candidates]
    with pytest.raises(MachineError, match="is predicted to take"):
        select(absurd, decision.budget)
