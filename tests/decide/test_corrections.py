"""Replayed times replace rates, and correct what was not replayed by its kin."""

from __future__ import annotations

import msgspec
import pytest

from autotune.decide.choose import execution_of
from autotune.decide.corrections import (
    Corrections,
    plain_operators,
    replayable,
)
from autotune.decide.forward import ForwardModel
from autotune.decide.history import History
from autotune.decide.predict import Predictor
from autotune.optimizations import parse_settings
from autotune.optimizations.execution import Execution
from autotune.probe.machine import OperatorTime


def slower(machine, workload, factor, keep=lambda operator: True):
    """The machine on which every operator was replayed, at a multiple of what rates say."""
    model = ForwardModel(machine, workload)
    times = {
        o.key: OperatorTime(factor * model.rate_seconds(o))
        for o in plain_operators(workload)
        if keep(o)
    }
    return msgspec.structs.replace(machine, operators=times)


def seconds(machine, workload, text=""):
    prediction = Predictor(machine, workload).predict(execution_of(parse_settings(text)))
    return {p.name: p.compute_s + p.memory_s for p in prediction.phases}


def test_without_replay_rates_stand(traced, rtx_3080):
    workload = traced("sd15")
    corrections = Corrections({}, ((o, 1.0) for o in replayable(workload)))
    assert all(corrections.factor(o) == 1.0 for o in replayable(workload))


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
def test_replayed_times_are_taken(traced, rtx_3080, factor):
    workload = traced("sd15")
    plain = seconds(rtx_3080, workload)
    replayed = seconds(slower(rtx_3080, workload, factor), workload)
    assert replayed == pytest.approx({k: factor * v for k, v in plain.items()})


def test_alternatives_are_corrected_like_what_they_replace(traced, rtx_3080):
    """Nothing of a tiled decode or a merged step is replayed: it must not look fast for that."""
    workload = traced("sdxl")
    machine = slower(rtx_3080, workload, 3.0)
    for text in ("vae_tiling:tile=512", "tome:ratio=0.5:max_downsample=4", "attention_slicing"):
        plain, corrected = seconds(rtx_3080, workload, text), seconds(machine, workload, text)
        for phase in ("denoise", "decode"):
            assert corrected[phase] == pytest.approx(3 * plain[phase], rel=0.15)


def test_what_the_budget_did_not_reach_is_corrected_too(traced, rtx_3080):
    workload = traced("sd15")
    half = {o.key for i, o in enumerate(replayable(workload)) if i % 2}
    machine = slower(rtx_3080, workload, 2.0, keep=lambda o: o.key in half)
    plain, corrected = seconds(rtx_3080, workload), seconds(machine, workload)
    assert corrected["denoise"] == pytest.approx(2 * plain["denoise"], rel=0.1)


def test_replayed_workspace_is_taken(traced, rtx_3080):
    workload = traced("sd15")
    times = {o.key: OperatorTime(1e-6, workspace_bytes=7 << 20) for o in replayable(workload)}
    machine = msgspec.structs.replace(rtx_3080, operators=times)
    before, after = (Predictor(m, workload).predict(execution_of(())) for m in (rtx_3080, machine))
    assert after.phases[-1].workspace_bytes < before.phases[-1].workspace_bytes


def test_an_operator_is_like_those_of_its_name(traced, rtx_3080):
    """A silu tells more of another silu than all additions do."""
    workload = traced("sd15")
    operators = {o.key: o for o in replayable(workload)}.values()
    silus = [o for o in operators if o.name == "aten.silu.default"]
    adds = [o for o in operators if o.name == "aten.add.Tensor"]
    times = {silus[0].key: OperatorTime(5.0), adds[0].key: OperatorTime(2.0)}
    corrections = Corrections(times, ((o, 1.0) for o in replayable(workload)))
    assert corrections.factor(silus[1]) == 5.0
    assert corrections.factor(adds[1]) == 2.0
    norm = next(o for o in operators if o.name == "aten.native_group_norm.default")
    assert corrections.factor(norm) == corrections.of_kind("memory", norm.dtype)
    assert 2.0 < corrections.factor(norm) < 5.0


def test_of_a_request_that_was_not_replayed_another_ones_operators_tell(traced, rtx_3080):
    """Planned in the middle of others, it has nothing but rates of its own."""
    known, other = traced("sd15"), traced("sd15", batch=2)
    own = {o.key for o in replayable(other)}
    machine = slower(rtx_3080, known, 5.0, keep=lambda o: o.key not in own)
    timed = tuple(o for o in replayable(known) if o.key in machine.operators)

    def denoise_s(history: History) -> float:
        prediction = Predictor(machine, other, history=history).predict(Execution())
        (phase,) = (p for p in prediction.phases if p.name == "denoise")
        return phase.compute_s + phase.memory_s

    plain = seconds(rtx_3080, other)["denoise"]
    assert denoise_s(History(alike=timed)) == pytest.approx(5 * plain, rel=0.1)
    assert denoise_s(History()) == pytest.approx(plain)


def test_a_layout_is_judged_by_what_was_timed_in_it(traced, rtx_3080):
    """Convolutions of large images may gain much more by it than those that rates are of."""
    workload = traced("sd15")
    machine = slower(rtx_3080, workload, 3.0)
    by_rates = seconds(rtx_3080, workload, "channels_last")["decode"]
    untimed = seconds(machine, workload, "channels_last")["decode"]
    assert untimed == pytest.approx(3 * by_rates), "as much more as in the other layout"

    model, layout_gains = ForwardModel(rtx_3080, workload), 0.5
    convolutions = [o for o in plain_operators(workload) if o.is_over_images]
    times = {
        o.in_channels_last().key: OperatorTime(
            layout_gains * 3 * model.rate_seconds(o, channels_last=True)
        )
        for o in convolutions[::2]
    }
    timed = msgspec.structs.replace(machine, operators=machine.operators | times)
    assert seconds(timed, workload) == seconds(machine, workload)
    convolutions_s = sum(
        o.count * model.rate_seconds(o, channels_last=True)
        for r in workload.phases[-1].runs
        for o in r.trace.operators
        if o.is_over_images
    )
    saved_s = untimed - seconds(timed, workload, "channels_last")["decode"]
    assert saved_s == pytest.approx((1 - layout_gains) * 3 * convolutions_s), "all like their kin"


def test_what_is_slow_in_one_layout_is_in_the_other_unless_timed(traced, rtx_3080):
    """Small convolutions are further from their rate than the large ones that were reached."""
    workload = traced("sd15")
    model = ForwardModel(rtx_3080, workload)
    large, small = sorted(
        {o.key: o for o in plain_operators(workload) if o.is_over_images}.values(),
        key=model.rate_seconds,
        reverse=True,
    )[:2]
    times = {
        large.key: OperatorTime(model.rate_seconds(large)),
        large.in_channels_last().key: OperatorTime(model.rate_seconds(large, channels_last=True)),
        small.key: OperatorTime(4 * model.rate_seconds(small)),
    }
    machine = msgspec.structs.replace(rtx_3080, operators=times)
    known = ForwardModel(machine, workload)
    assert known._factor(small, channels_last=True) == pytest.approx(4.0)
    assert known._factor(large, channels_last=True) == pytest.approx(1.0)


def test_a_norm_that_is_slower_in_the_other_layout_is_counted(traced, rtx_3080):
    workload = traced("sd15")
    norms = [o for o in plain_operators(workload) if o.depends_on_layout and not o.is_over_images]
    assert norms
    model = ForwardModel(rtx_3080, workload)
    times = {o.key: OperatorTime(model.rate_seconds(o)) for o in norms}
    times |= {o.in_channels_last().key: OperatorTime(2 * model.rate_seconds(o)) for o in norms}
    machine = msgspec.structs.replace(rtx_3080, operators=times)
    assert seconds(machine, workload) == pytest.approx(seconds(rtx_3080, workload))
    before = seconds(rtx_3080, workload, "channels_last")["decode"]
    norms_s = sum(
        o.count * model.rate_seconds(o)
        for r in workload.phases[-1].runs
        for o in r.trace.operators
        if o.depends_on_layout and not o.is_over_images
    )
    assert seconds(machine, workload, "channels_last")["decode"] == pytest.approx(before + norms_s)
