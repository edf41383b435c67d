"""What any choice must hold, on random machines; and what a user can restrict."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autotune.decide.choose import QUALITIES, TOLERANCE, Limits, choose, execution_of, predict
from autotune.decide.predict import Predictor
from autotune.decide.rules import broken_rule
from autotune.errors import OptimizationError, RequestError
from autotune.optimizations import CATALOGUE, parse_settings
from autotune.optimizations.base import EXACTNESS, Setting
from autotune.probe.machine import Figure, Machine
from autotune.probe.reference import load_machine
from autotune.units import GIB

relaxed = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
factors = st.floats(0.2, 5)
free = st.floats(0.5, 30)
qualities = st.sampled_from(QUALITIES)


def scaled(figure: Figure, factor: float) -> Figure:
    return Figure(figure.value * factor, source="scaled")


@st.composite
def machines(draw: st.DrawFn, base: str = "rtx-3080-10gb-torch1") -> Machine:
    """A reference machine with other rates: faster or slower arithmetic, memory, link and host."""
    machine = load_machine(base)
    compute, memory, link, host = (draw(factors) for _ in range(4))
    kernels, wires = machine.kernels, machine.link
    assert wires is not None
    return msgspec.structs.replace(
        machine,
        kernels=msgspec.structs.replace(
            kernels,
            matmul_flops_per_s={
                k: scaled(f, compute) for k, f in kernels.matmul_flops_per_s.items()
            },
            convolution_flops_per_s={
                k: scaled(f, compute) for k, f in kernels.convolution_flops_per_s.items()
            },
            memory_bytes_per_s=scaled(kernels.memory_bytes_per_s, memory),
            dispatch_s=scaled(kernels.dispatch_s, host),
        ),
        link=msgspec.structs.replace(
            wires,
            h2d_pageable_bytes_per_s=scaled(wires.h2d_pageable_bytes_per_s, link),
            module_h2d_bytes_per_s=scaled(wires.module_h2d_bytes_per_s, link),
            module_d2h_bytes_per_s=scaled(wires.module_d2h_bytes_per_s, link),
        ),
    )


def with_free(machine: Machine, gib: float) -> Machine:
    device = msgspec.structs.replace(machine.device, free_bytes=int(gib * GIB))
    return msgspec.structs.replace(machine, device=device)


@pytest.fixture(params=["sd15", "sdxl"])
def workload(request, traced):
    return traced(request.param)


@relaxed
@given(machine=machines(), gib=free, more=st.floats(0, 20), quality=qualities)
def test_more_memory_is_never_slower(workload, machine, gib, more, quality):
    little = choose(with_free(machine, gib), workload, Limits(quality=quality))
    much = choose(with_free(machine, gib + more), workload, Limits(quality=quality))
    assert much.fits or not little.fits
    if little.fits:
        # Within the tolerance the smaller set wins over the last percent.
        assert much.prediction.seconds <= little.prediction.seconds * (1 + TOLERANCE)


@relaxed
@given(machine=machines(), gib=free, quality=qualities)
def test_choice_fits_or_says_so(workload, machine, gib, quality):
    plan = choose(with_free(machine, gib), workload, Limits(quality=quality))
    needed = max(p.needed_bytes for p in plan.prediction.phases)
    assert plan.prediction.needed_bytes == needed
    assert plan.fits == (needed <= plan.budget_bytes)
    for phase in plan.prediction.phases:
        parts = phase.resident_bytes + phase.activation_bytes + phase.workspace_bytes
        assert phase.peak_bytes >= parts  # the largest run of the phase, part by part
    shares = sum(
        p.compute_s + p.memory_s + p.transfer_s + p.launch_s for p in plan.prediction.phases
    )
    assert plan.prediction.seconds == pytest.approx(shares)


@relaxed
@given(machine=machines(), gib=free, quality=qualities)
def test_choice_is_minimal_and_maximal(workload, machine, gib, quality):
    """No member can go without breaking the fit or the tolerance; none can come that gains more."""
    machine = with_free(machine, gib)
    plan = choose(machine, workload, Limits(quality=quality))
    predictor = Predictor(machine, workload)
    if not plan.fits:
        return
    fastest = plan.prediction.seconds / (1 + TOLERANCE)
    for setting in plan.optimizations:
        rest = [s for s in plan.optimizations if s != setting]
        without = predictor.predict(execution_of(rest))
        breaks_fit = without.needed_bytes > plan.budget_bytes
        assert breaks_fit or without.seconds > fastest * (1 + TOLERANCE) * 0.999999
    allowed = [
        o
        for o in CATALOGUE.values()
        if o.name not in {s.name for s in plan.optimizations}
        and not o.unavailable(machine, workload)
    ]
    for optimization in allowed:
        for parameters in optimization.worth_trying(machine, workload):
            if QUALITIES.index(optimization.quality(parameters)) > QUALITIES.index(quality):
                continue
            larger = (*plan.optimizations, optimization.setting(parameters))
            added = predictor.predict(execution_of(larger))
            coherent = broken_rule([s.name for s in larger], added) is None
            if coherent and added.needed_bytes <= plan.budget_bytes:
                assert added.seconds >= fastest * 0.999999


@relaxed
@given(machine=machines(), gib=free)
def test_stricter_quality_is_never_lossier(workload, machine, gib):
    machine = with_free(machine, gib)
    worst = []
    for quality in QUALITIES:
        plan = choose(machine, workload, Limits(quality=quality))
        levels = [
            QUALITIES.index(CATALOGUE[s.name].quality(s.parameters)) for s in plan.optimizations
        ]
        assert max(levels, default=0) <= QUALITIES.index(quality)
        worst.append(max(levels, default=0))
    assert worst[0] == 0


@relaxed
@given(machine=machines(), gib=free, quality=qualities)
def test_same_input_same_plan(workload, machine, gib, quality):
    machine = with_free(machine, gib)
    first = choose(machine, workload, Limits(quality=quality))
    assert choose(machine, workload, Limits(quality=quality)) == first


@relaxed
@given(machine=machines(), gib=free, quality=qualities)
def test_everything_is_explained(workload, machine, gib, quality):
    plan = choose(with_free(machine, gib), workload, Limits(quality=quality))
    chosen = [s.name for s in plan.optimizations]
    assert [r.optimization for r in plan.reasons] == chosen
    assert sorted([*chosen, *(r.optimization for r in plan.rejected)]) == sorted(CATALOGUE)
    assert all(r.text for r in (*plan.reasons, *plan.rejected))


def test_exact_before_lossy(traced, rtx_3080_torch1):
    plan = choose(rtx_3080_torch1, traced("sdxl"), Limits(quality="exact"))
    assert {CATALOGUE[s.name].exactness for s in plan.optimizations} <= {EXACTNESS[0]}


def test_vram_limit_is_a_budget(traced, rtx_3080):
    plan = choose(rtx_3080, traced("sd15"), Limits(vram_limit=int(2.2 * GIB)))
    assert plan.budget_bytes <= 2.2 * GIB
    assert plan.fits
    assert [s.name for s in plan.optimizations] == ["model_cpu_offload"]


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
    assert "sequential_cpu_offload" in {s.name for s in plan.optimizations}
