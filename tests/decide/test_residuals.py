"""Corrections by verified runs: they converge, do not oscillate, and are never unsafe."""

from __future__ import annotations

import hashlib
import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.decide.choose import Limits, choose, predict
from autotune.decide.decision import TOLERANCE, decide, select
from autotune.decide.history import History, Observation, Observed
from autotune.decide.limits import QUALITIES, budget_within
from autotune.decide.predict import Predictor
from autotune.decide.prediction import Prediction
from autotune.decide.residuals import LATEST, explain, residuals_of
from autotune.decide.search import execution_of
from autotune.decide.whatif import frontier
from autotune.optimizations import CATALOGUE, parse_settings
from autotune.optimizations.base import Setting
from autotune.probe.machine import Machine
from autotune.units import GIB, MIB
from autotune.workload.workload import Workload
from tests.decide.strategies import machines, workloads
from tests.decide.test_properties import ROUNDING, more, with_more
from tests.decide.test_search import plainly, rank, some_optimizations

Settings = tuple[Setting, ...]
PLAIN: Settings = ()
PAIR = (PLAIN, parse_settings("model_cpu_offload"))
noises = st.lists(st.floats(-0.04, 0.04), min_size=8, max_size=8)
hidden = st.floats(0.6, 1.6)
machines_with_link = machines().filter(lambda m: m.link is not None)


def observed(
    prediction: Prediction, chosen: Settings, factor: float = 1.0, more_bytes: int = 0
) -> Observation:
    """A run that took so many times longer, and so many bytes more, than predicted."""
    phases = (
        Observed(p.name, p.seconds * factor, p.peak_bytes + more_bytes) for p in prediction.phases
    )
    return Observation(chosen, tuple(phases))


def predicted(
    machine: Machine, workload: Workload, chosen: Settings, history: History | None = None
) -> Prediction:
    return Predictor(machine, workload, history=history).predict(execution_of(chosen))


# ---- it converges -------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    machine=machines_with_link,
    workload=workloads(),
    factors=st.tuples(hidden, hidden),
    noise=noises,
    flips=st.booleans(),
)
def test_predictions_converge_to_the_truth_and_stay(machine, workload, factors, noise, flips):
    """From the first run on, each is off by no more than the runs themselves scatter."""
    raw = [predicted(machine, workload, chosen) for chosen in PAIR]
    history, before = History(), {}
    for i, noisy in enumerate(noise):
        which = i % 2 if flips else 0
        run = observed(raw[which], PAIR[which], factors[which] * (1 + noisy))
        history = History((*history.observations, run))
        for other in range(min(i, 1) + 1 if flips else 1):
            found = predicted(machine, workload, PAIR[other], history).seconds
            truth = raw[other].seconds * factors[other]
            assert found == pytest.approx(truth, rel=0.04 + ROUNDING)
            assert found == pytest.approx(before.get(other, found), rel=0.08 + ROUNDING)
            before[other] = found


@settings(max_examples=20, deadline=None)
@given(machine=machines(), workload=workloads(), quality=st.sampled_from(QUALITIES), salt=hidden)
def test_the_choice_settles(machine, workload, quality, salt):
    """Every set has a truth of its own; whatever is chosen is run. None is come back to and left.

    Once a set is chosen that was run before, another run of it teaches nothing new.
    """
    limits = Limits(quality=quality)
    history, chosen = History(), []
    for _ in range(7):
        plan = choose(machine, workload, limits, history=history)
        chosen.append(plan.optimizations)
        raw = predicted(machine, workload, plan.optimizations)
        truth = observed(raw, plan.optimizations, own_factor(plan.optimizations, salt))
        history = History((*history.observations, truth))
    names = [str(c) for c in chosen]
    settled = next((i for i, name in enumerate(names) if name in names[:i]), len(names))
    assert len(set(names[settled:])) <= 1


def own_factor(chosen: Settings, salt: float) -> float:
    """Some number between 0.6 and 1.6, always the same for a set."""
    digest = hashlib.sha256(f"{salt}{chosen}".encode()).digest()
    return 0.6 + digest[0] / 255


@settings(max_examples=25, deadline=None)
@given(machine=machines_with_link, workload=workloads(), repeats=st.integers(1, 12), factor=hidden)
def test_repeating_a_run_changes_nothing(machine, workload, repeats, factor):
    """A correction is made of measurements and raw predictions, never of corrected ones."""
    raw = predicted(machine, workload, PLAIN)
    run = observed(raw, PLAIN, factor)
    for chosen in PAIR:
        once = predicted(machine, workload, chosen, History((run,)))
        assert predicted(machine, workload, chosen, History((run,) * repeats)) == once


def test_a_disturbed_run_or_two_move_nothing(traced, rtx_3080):
    workload = traced("sd15")
    raw = predicted(rtx_3080, workload, PLAIN)
    runs = [observed(raw, PLAIN, factor) for factor in (1.8, 1.1, 1.1, 1.9, 1.1)]
    found = predicted(rtx_3080, workload, PLAIN, History(tuple(runs)))
    assert found.seconds == pytest.approx(1.1 * raw.seconds)
    # A machine that has become slower is believed after some runs, not never.
    later = (*runs, *(observed(raw, PLAIN, 1.5) for _ in range(LATEST // 2 + 1)))
    found = predicted(rtx_3080, workload, PLAIN, History(later))
    assert found.seconds == pytest.approx(1.5 * raw.seconds)


# ---- what is corrected --------------------------------------------------------------------------


def test_other_sets_are_held_to_the_same_yardstick(traced, rtx_3080):
    workload = traced("sd15")
    raw = [predicted(rtx_3080, workload, chosen) for chosen in PAIR]
    history = History((observed(raw[0], PLAIN, 1.5),))
    for chosen, before in zip(PAIR, raw, strict=True):
        after = predicted(rtx_3080, workload, chosen, history)
        for p, q in zip(before.phases, after.phases, strict=True):
            assert q.seconds == pytest.approx(1.5 * p.seconds)
            assert q.seconds == q.compute_s + q.memory_s + q.transfer_s + q.launch_s
            assert (q.once_s, q.margin_bytes) == (p.once_s, p.margin_bytes)


def test_a_phase_is_corrected_by_what_looks_the_same_from_it(traced, rtx_3080):
    """Attention is the denoiser's: the autoencoder keeps PyTorch's kernel."""
    workload = traced("sd15")
    sets = (PLAIN, parse_settings("xformers"))
    raw = [predicted(rtx_3080, workload, chosen) for chosen in sets]
    history = History((observed(raw[0], sets[0], 1.4), observed(raw[1], sets[1], 1.2)))
    found = predicted(rtx_3080, workload, PLAIN, history)
    factors = {
        p.name: q.seconds / p.seconds for p, q in zip(raw[0].phases, found.phases, strict=True)
    }
    assert factors == pytest.approx({"encode": 1.3, "denoise": 1.4, "decode": 1.3})


@pytest.mark.parametrize("factor", [0.3, 2.5])
def test_a_busy_machine_teaches_nothing(traced, rtx_3080, factor):
    workload = traced("sd15")
    raw = predicted(rtx_3080, workload, PLAIN)
    run = observed(raw, PLAIN, factor)
    far = msgspec.structs.replace(run, expected_s=raw.seconds)
    assert predicted(rtx_3080, workload, PLAIN, History((run, far))) == raw
    # One that has become slower by and by does: that was expected by then.
    near = msgspec.structs.replace(run, expected_s=raw.seconds * factor * 1.1)
    found = predicted(rtx_3080, workload, PLAIN, History((near,)))
    assert found.seconds == pytest.approx(factor * raw.seconds)


def test_what_is_no_longer_there_teaches_nothing(traced, rtx_3080):
    workload = traced("sd15")
    raw = predicted(rtx_3080, workload, PLAIN)
    gone = observed(raw, (Setting("uninstalled_plugin"),), 1.5)
    untraced = observed(raw, (Setting("vae_tiling", {"tile": 48}),), 1.5)
    unnamed = Observation(PLAIN, (Observed("postprocess", 1.0),))
    history = History((gone, untraced, unnamed))
    assert predicted(rtx_3080, workload, PLAIN, history) == raw


def test_the_plan_says_that_it_is_corrected(traced, rtx_3080):
    workload = traced("sd15")
    assert not any("verified" in n for n in choose(rtx_3080, workload).notes)
    raw = predicted(rtx_3080, workload, PLAIN)
    runs = (observed(raw, PLAIN, 1.04, 70 * MIB),) * 3
    notes = choose(rtx_3080, workload, Limits(only=["vae_slicing"]), history=History(runs)).notes
    line = next(n for n in notes if "verified" in n)
    assert line.startswith("predictions are corrected by 3 verified runs: encode ×1.04 +70.0 MiB")
    assert "denoise ×1.04 +70.0 MiB" in line


def test_a_given_set_and_the_frontier_are_corrected_too(traced, rtx_3080):
    workload = traced("sd15")
    raw = predicted(rtx_3080, workload, PLAIN)
    history = History((observed(raw, PLAIN, 1.5),))
    report = predict(rtx_3080, workload, PLAIN, history=history)
    assert report.prediction.seconds == pytest.approx(1.5 * raw.seconds)
    assert report.notes[-1].startswith("predictions are corrected by 1 verified run: ")
    limits = Limits(only=["vae_slicing"])
    (point,) = frontier(rtx_3080, workload, limits, history=history)
    assert point.seconds == report.prediction.seconds


# ---- memory -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(machine=machines(), workload=workloads(), share=st.floats(-0.9, 0.9))
def test_memory_is_as_measured_and_the_margin_stays_on_top(machine, workload, share):
    raw = predicted(machine, workload, PLAIN)
    run = Observation(
        PLAIN,
        tuple(
            Observed(
                p.name,
                p.seconds,
                p.resident_bytes + int((p.peak_bytes - p.resident_bytes) * (1 + share)),
            )
            for p in raw.phases
        ),
    )
    found = predicted(machine, workload, PLAIN, History((run,)))
    for before, after, seen in zip(raw.phases, found.phases, run.phases, strict=True):
        fixed = before.needed_bytes - before.resident_bytes - before.activation_bytes
        fixed -= before.margin_bytes
        assert after.margin_bytes == before.margin_bytes
        assert after.resident_bytes == before.resident_bytes
        assert after.activation_bytes >= 0
        assert after.peak_bytes == max(seen.peak_bytes, before.resident_bytes + fixed)
        # All that was held, but for workspaces that libraries do without.
        spare = after.workspace_bytes - fixed
        assert after.needed_bytes >= seen.peak_bytes - spare + after.margin_bytes
        assert after.needed_bytes <= max(
            before.needed_bytes, before.needed_bytes + seen.peak_bytes - before.peak_bytes
        )


@settings(max_examples=50, deadline=None)
@given(machine=machines(), workload=workloads(), data=st.data())
def test_what_one_set_saves_is_taken_for_granted_of_no_other(machine, workload, data):
    usable = [
        (optimization.setting(parameters),)
        for optimization in CATALOGUE.values()
        if not optimization.unavailable(machine, workload)
        for parameters in optimization.worth_trying(machine, workload)
    ]
    if not usable:
        return
    chosen = data.draw(st.sampled_from(usable))
    raw = [predicted(machine, workload, s) for s in (PLAIN, chosen)]
    run = observed(raw[0], PLAIN, more_bytes=data.draw(st.integers(-500, 500)) * MIB)
    found = [predicted(machine, workload, s, History((run,))) for s in (PLAIN, chosen)]
    for p, q, plain in zip(raw[1].phases, found[1].phases, found[0].phases, strict=True):
        assert q.needed_bytes >= min(p.needed_bytes, plain.needed_bytes)


def test_the_most_that_was_needed_counts(traced, rtx_3080):
    workload = traced("sd15")
    raw = predicted(rtx_3080, workload, PLAIN)
    runs = tuple(observed(raw, PLAIN, more_bytes=m * MIB) for m in (50, 90, 10))
    found = predicted(rtx_3080, workload, PLAIN, History(runs))
    assert found.peak_bytes == raw.peak_bytes + 90 * MIB
    assert found.needed_bytes == raw.needed_bytes + 90 * MIB


@pytest.mark.parametrize("more_bytes", [10**15, 40 * GIB, -(10**15)])
def test_a_peak_that_cannot_be_teaches_nothing(traced, rtx_3080, more_bytes):
    workload = traced("sd15")
    raw = predicted(rtx_3080, workload, PLAIN)
    runs = (observed(raw, PLAIN, 1.5, more_bytes=more_bytes),)
    assert predicted(rtx_3080, workload, PLAIN, History(runs)) == raw


# ---- decisions ----------------------------------------------------------------------------------

histories = st.lists(st.tuples(some_optimizations, hidden, st.integers(-300, 300)), max_size=4)


def history_of(
    machine: Machine, workload: Workload, drawn: list[tuple[tuple[str, ...], float, int]]
) -> History:
    """Runs of the sets that these names choose, each with a factor and MiB of its own."""
    runs = []
    for only, factor, mib in drawn:
        chosen = choose(machine, workload, Limits(quality="fast", only=only)).optimizations
        raw = predicted(machine, workload, chosen)
        runs.append(observed(raw, chosen, factor, mib * MIB))
    return History(tuple(runs))


@settings(max_examples=60, deadline=None)
@given(
    machine=machines(),
    workload=workloads(),
    quality=st.sampled_from(QUALITIES),
    only=some_optimizations,
    drawn=histories,
)
def test_the_choice_is_that_of_the_plain_enumeration(machine, workload, quality, only, drawn):
    """Though a set that was run may be better than others that its costs are no better than."""
    limits, history = Limits(quality=quality, only=only), history_of(machine, workload, drawn)
    decision = decide(Predictor(machine, workload, history=history), limits, CATALOGUE)
    everything = list(plainly(machine, workload, limits, history))
    best = select(everything, budget_within(machine, limits))
    assert rank(decision.chosen) == rank(best)


def test_what_is_no_better_in_any_cost_is_taken_where_it_was_measured_faster(traced, rtx_3080):
    """The search must not leave it out before its correction is known."""
    workload, limits = traced("sd15"), Limits(only=["xformers"])
    slower = tuple(
        msgspec.structs.replace(
            rate,
            flops_per_s=msgspec.structs.replace(
                rate.flops_per_s, value=rate.flops_per_s.value / 1.5
            ),
        )
        if rate.implementation == "xformers" and rate.flops_per_s
        else rate
        for rate in rtx_3080.attention
    )
    machine = msgspec.structs.replace(rtx_3080, attention=slower)
    assert choose(machine, workload, limits).optimizations == PLAIN
    sets = (PLAIN, parse_settings("xformers"))
    raw = [predicted(machine, workload, chosen) for chosen in sets]
    assert raw[1].seconds > raw[0].seconds
    runs = (observed(raw[0], sets[0]), observed(raw[1], sets[1], 0.7))
    assert choose(machine, workload, limits, history=History(runs)).optimizations == sets[1]


@settings(max_examples=40, deadline=None)
@given(machine=machines(), workload=workloads(), vram=more, ram=more, drawn=histories)
def test_more_memory_is_never_slower(machine, workload, vram, ram, drawn):
    history = history_of(machine, workload, drawn)
    little = choose(machine, workload, history=history)
    much = choose(with_more(machine, vram, ram), workload, history=history)
    assert much.fits or not little.fits
    if little.fits:
        most = little.prediction.mean_seconds * (1 + TOLERANCE) * (1 + ROUNDING)
        assert much.prediction.mean_seconds <= most


def test_a_history_survives_json(traced, rtx_3080):
    raw = predicted(rtx_3080, traced("sd15"), PLAIN)
    history = History((observed(raw, PAIR[1]),))
    assert msgspec.json.decode(msgspec.json.encode(history), type=History) == history
    assert residuals_of(History(), lambda _: itertools.repeat(None)) == {}


# ---- what is done once --------------------------------------------------------------------------


@pytest.mark.parametrize(("times", "noise"), [(0.1, 0.1), (3.0, -0.05), (12.0, 0.0)])
def test_compiling_is_corrected_by_what_it_took(traced, rtx_3080, times, noise):
    """And so is another way of compiling that was not run, without touching seconds."""
    workload, compiled = traced("sd15"), parse_settings("compile:scope=regional")
    raw = predicted(rtx_3080, workload, compiled)
    runs = []
    for factor in (times * (1 + noise), times, times * (1 - noise)):
        phases = (
            Observed(p.name, p.seconds, p.peak_bytes, p.seconds + p.once_s * factor)
            for p in raw.phases
        )
        runs.append(Observation(compiled, tuple(phases)))
    history = History(tuple(runs))
    now = predicted(rtx_3080, workload, compiled, history)
    assert now.once_s == pytest.approx(raw.once_s * times)
    assert now.seconds == pytest.approx(raw.seconds)
    whole = parse_settings("compile:scope=whole")
    assert predicted(rtx_3080, workload, whole, history).once_s == pytest.approx(
        predicted(rtx_3080, workload, whole).once_s * times
    )
    predictor = Predictor(rtx_3080, workload, history=history)
    (line,) = explain(predictor.residuals, predictor.corrections(execution_of(compiled)))
    assert "(compiling ×" in line
