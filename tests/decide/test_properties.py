"""What holds of every plan, on machines and workloads of any kind."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from autotune.decide.choose import QUALITIES, TOLERANCE, Limits, choose
from autotune.decide.decision import SLACK, Pool, decide
from autotune.decide.limits import PRIORITIES, allows
from autotune.decide.plan import Plan, Reason, Rejection
from autotune.decide.predict import Predictor
from autotune.decide.prediction import Prediction
from autotune.decide.rules import broken_rule
from autotune.decide.search import Judge, execution_of, loss_of
from autotune.decide.wording import lacking, memories
from autotune.optimizations import CATALOGUE
from autotune.optimizations.base import Setting
from autotune.optimizations.execution import Execution
from autotune.probe.machine import Machine
from autotune.units import MIB, format_bytes, format_seconds
from autotune.workload.workload import Workload
from tests.decide.strategies import machines, workloads
from tests.thorough import examples

often = examples(usually=40, thoroughly=100)
qualities = st.sampled_from(QUALITIES)
priorities = st.sampled_from(PRIORITIES)
more = st.integers(0, 16_000).map(lambda mib: mib * MIB)

ROUNDING = 1e-9
"""Of sums of floats, relatively."""


def with_more(machine: Machine, device_bytes: int, host_bytes: int) -> Machine:
    device, host = machine.device, machine.host
    return msgspec.structs.replace(
        machine,
        device=msgspec.structs.replace(device, free_bytes=device.free_bytes + device_bytes),
        host=msgspec.structs.replace(
            host, ram_available_bytes=host.ram_available_bytes + host_bytes
        ),
    )


def available(plan: Plan) -> tuple[int | None, ...]:
    """Bytes of the device, of the host, and of the other GPUs."""
    return (plan.budget_bytes, plan.host_budget_bytes, *plan.elsewhere_budget_bytes.values())


def needed_elsewhere(prediction: Prediction) -> list[int]:
    """Bytes of the other GPUs, in every phase."""
    return [e.needed_bytes for p in prediction.phases for e in p.elsewhere]


def beyond(needs: Prediction, plan: Plan) -> list[int]:
    """Bytes that each memory lacks."""
    return [m.needed_bytes - m.available_bytes for m in lacking(needs, plan.budget)]


def differences(one: Prediction, other: Prediction, plan: Plan) -> list[int]:
    """Bytes by which the needs of each memory differ."""
    pairs = zip(memories(one, plan.budget), memories(other, plan.budget), strict=True)
    return [abs(a.needed_bytes - b.needed_bytes) for a, b in pairs]


@often
@given(machines(), workloads(), more, more, qualities, priorities)
def test_more_memory_is_never_slower(machine, workload, vram, ram, quality, priority):
    """Beyond the tolerance, within which the smaller set wins over the last percents."""
    limits = Limits(quality=quality, priority=priority)
    little = choose(machine, workload, limits)
    much = choose(with_more(machine, vram, ram), workload, limits)
    assert much.fits or not little.fits
    if little.fits:
        slack = SLACK.get(priority, TOLERANCE)
        assert much.prediction.mean_seconds <= little.prediction.mean_seconds * (1 + slack) * (
            1 + ROUNDING
        )


@often
@given(machines(), workloads(), qualities, priorities)
def test_a_plan_fits_with_its_margins_or_says_that_it_does_not(
    machine, workload, quality, priority
):
    plan = choose(machine, workload, Limits(quality=quality, priority=priority))
    prediction = plan.prediction
    device = max(prediction.load.peak_bytes, *(p.needed_bytes for p in prediction.phases))
    fits = device <= plan.budget_bytes
    if plan.host_budget_bytes is not None:
        fits = fits and prediction.host_bytes <= plan.host_budget_bytes
    for gpu, needed in prediction.elsewhere_bytes.items():
        fits = fits and needed <= plan.elsewhere_budget_bytes[gpu]
    assert plan.fits == fits
    for phase in prediction.phases:
        parts = phase.resident_bytes + phase.activation_bytes + phase.margin_bytes
        assert phase.needed_bytes >= parts
    assert (plan.bottleneck.after.resource in ("vram", "ram")) == (not plan.fits)
    assert bool(plan.ways_out) == (not plan.fits)
    assert plan.ways_out == tuple(w.text for w in plan.remedies)


def _lacks_more(without: Prediction, plan: Plan) -> bool:
    return plan.budget.shortage(without) > plan.budget.shortage(plan.prediction)


@often
@given(machines(), workloads(), qualities, priorities)
def test_no_member_can_be_dropped(machine, workload, quality, priority):
    """Without it the rest would not fit, or be behind the best by more than tolerated.

    Where nothing fits, the rest would be further from fitting, or slower.
    """
    limits = Limits(quality=quality, priority=priority)
    plan = choose(machine, workload, limits)
    predictor = Predictor(machine, workload)
    pool = decide(predictor, limits, CATALOGUE).pool
    for setting, reason in zip(plan.optimizations, plan.reasons, strict=True):
        without = predictor.predict(execution_of(s for s in plan.optimizations if s != setting))
        if not plan.fits:
            is_slower = without.mean_seconds > plan.prediction.mean_seconds
            assert is_slower or _lacks_more(without, plan)
            continue
        assert reason.before_bytes == without.needed_bytes
        assert reason.before_seconds == without.mean_seconds
        assert reason.fits_without == plan.budget.holds(without)
        assert (
            not reason.fits_without
            or without.mean_seconds
            > min(plan.fastest_seconds * (1 + TOLERANCE), pool.longest_seconds)
            or (pool.least_bytes and without.needed_bytes > pool.least_bytes * (1 + TOLERANCE))
        )


@often
@given(machines(), workloads(), qualities)
def test_none_can_be_added(machine, workload, quality):
    """Whatever goes with the choice, is allowed and fits, gains less than the tolerance."""
    plan = choose(machine, workload, Limits(quality=quality))
    if not plan.fits:
        return
    predictor = Predictor(machine, workload)
    judge = Judge(predictor, ())
    for setting in allowed(machine, workload, quality):
        larger = (*plan.optimizations, setting)
        names = [s.name for s in larger]
        if len(set(names)) < len(names) or judge.rule_in(larger):
            continue
        added = predictor.predict(execution_of(larger))
        if plan.budget.holds(added):
            assert added.mean_seconds * (1 + TOLERANCE) >= plan.prediction.mean_seconds * (
                1 - ROUNDING
            )


def allowed(machine: Machine, workload: Workload, quality: str) -> list[Setting]:
    return [
        optimization.setting(parameters)
        for optimization in CATALOGUE.values()
        if not optimization.unavailable(machine, workload)
        for parameters in optimization.worth_trying(machine, workload)
        if allows(quality, optimization, parameters)
    ]


@often
@given(machines(), workloads(), priorities)
def test_no_plan_uses_more_quality_than_offered(machine, workload, priority):
    for quality in QUALITIES:
        plan = choose(machine, workload, Limits(quality=quality, priority=priority))
        for s in plan.optimizations:
            assert allows(quality, CATALOGUE[s.name], s.parameters)


@often
@given(machines(), workloads())
def test_a_stricter_quality_is_never_lossier(machine, workload):
    """Nor is a looser one slower, beyond the tolerance, where it fits."""
    plans = [choose(machine, workload, Limits(quality=quality)) for quality in QUALITIES]
    losses = [loss_of(plan.optimizations) for plan in plans]
    assert losses == sorted(losses)
    for strict, loose in itertools.pairwise(plans):
        assert loose.fits or not strict.fits
        if strict.fits:
            assert loose.prediction.mean_seconds <= strict.prediction.mean_seconds * (1 + TOLERANCE)


@often
@given(machines(), workloads(), qualities)
def test_memory_comes_first_where_it_is_asked_to(machine, workload, quality):
    """Memory needs no more than balanced, and that no more than speed, beyond the tolerance."""
    speed, balanced, memory = (
        choose(machine, workload, Limits(quality=quality, priority=p)) for p in PRIORITIES
    )
    if speed.fits:
        few = (1 + TOLERANCE) * (1 + ROUNDING)
        needs = [p.prediction.needed_bytes for p in (memory, balanced, speed)]
        assert needs[0] <= needs[1] * few
        assert needs[1] <= needs[2] * few
        for plan in (balanced, memory):
            longest = speed.prediction.mean_seconds * (1 + SLACK[plan.priority])
            assert plan.prediction.mean_seconds <= longest * (1 + ROUNDING)


@often
@given(machines(), workloads(), qualities, priorities)
def test_the_same_input_gives_the_same_plan_and_survives_json(machine, workload, quality, priority):
    limits = Limits(quality=quality, priority=priority)
    plan = choose(machine, workload, limits)
    assert choose(machine, workload, limits) == plan
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan
    assert msgspec.json.decode(msgspec.json.encode(plan.to_dict()), type=Plan) == plan


@often
@given(machines(), workloads())
def test_slices_that_were_not_timed_are_no_faster_than_the_default_kernel(machine, workload):
    timed = tuple(r for r in machine.attention if r.implementation != "sliced")
    machine = msgspec.structs.replace(machine, attention=timed)
    predictor = Predictor(machine, workload)
    plain, sliced = (
        predictor.predict(Execution(attention_slices=slices)).phases[1] for slices in ("", "auto")
    )
    assert sliced.seconds >= plain.seconds * (1 - ROUNDING)


@examples(usually=40, thoroughly=1000)
@given(machines(), workloads(), st.data())
def test_nothing_predicted_is_negative(machine, workload, data):
    settings: tuple[Setting, ...] = ()
    for setting in data.draw(st.permutations(allowed(machine, workload, QUALITIES[-1]))):
        names = {s.name for s in settings}
        if setting.name not in names and broken_rule({*names, setting.name}) is None:
            settings = (*settings, setting)
    settings = settings[: data.draw(st.integers(0, len(settings)))]
    numbers = list(
        _numbers(msgspec.to_builtins(Predictor(machine, workload).predict(execution_of(settings))))
    )
    assert len(numbers) > 30
    assert min(numbers) >= 0


def _numbers(value: Any) -> Iterator[float]:
    """All of them, of phases, load and other GPUs too."""
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)


# ---- the numbers in the texts -------------------------------------------------------------------

BYTES = re.compile(r"\d[\d.]* (?:B|KiB|MiB|GiB)\b")
SECONDS = re.compile(r"\d[\d.]* (?:s|ms|µs|min|h)\b")
SHARE = re.compile(r"\d[\d.]*%|\d[\d.]* times")


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def check_numbers(
    text: str, sizes: list[int | None], times: list[float], shares: list[str]
) -> None:
    """Each number in the text is one of these, as written everywhere."""
    assert set(BYTES.findall(text)) <= {format_bytes(s) for s in sizes if s is not None}
    finite = [t for t in times if math.isfinite(t)]
    written = {format_seconds(a, b) for a in finite for b in (None, *finite)}
    assert set(SECONDS.findall(text)) <= written
    assert set(SHARE.findall(text)) <= {*shares, "3%"}


def check_reason(reason: Reason, plan: Plan, without: Prediction, pool: Pool) -> None:
    chosen, fastest = plan.prediction, pool.fastest_seconds
    assert fastest == plan.fastest_seconds
    check_numbers(
        reason.text,
        [
            *(without.needed_bytes, chosen.needed_bytes, without.host_bytes, *available(plan)),
            *(*needed_elsewhere(without), *needed_elsewhere(chosen)),
            *(pool.least_bytes, *beyond(without, plan)),
        ],
        [
            *(without.mean_seconds, chosen.mean_seconds, fastest, pool.longest_seconds),
            without.mean_seconds - pool.longest_seconds,
        ],
        [
            percent(without.mean_seconds / chosen.mean_seconds - 1),
            percent(without.mean_seconds / fastest - 1),
            percent(without.needed_bytes / chosen.needed_bytes - 1),
            percent(without.needed_bytes / max(pool.least_bytes, 1) - 1),
            f"{without.mean_seconds / chosen.mean_seconds:.1f} times",
            f"{without.needed_bytes / chosen.needed_bytes:.1f} times",
        ],
    )


def check_rejection(
    rejection: Rejection, plan: Plan, added: Prediction, chosen: Prediction
) -> None:
    """``chosen`` is the choice, or what it leaves of it that the rejected one does not go with."""
    assert rejection.seconds == added.mean_seconds
    assert rejection.needed_bytes == added.needed_bytes
    assert rejection.fits == plan.budget.holds(added)
    saved = {
        a.name: c.needed_bytes - a.needed_bytes
        for a, c in zip(added.phases, chosen.phases, strict=True)
    }
    assert rejection.saved_bytes == max(saved.values()) == saved[rejection.saved_in or ""]
    check_numbers(
        rejection.text,
        [
            *(added.needed_bytes, chosen.needed_bytes, added.needed_bytes - chosen.needed_bytes),
            *(added.host_bytes, rejection.saved_bytes, *available(plan)),
            *(*needed_elsewhere(added), *beyond(added, plan)),
            *differences(added, chosen, plan),
        ],
        [
            *(added.mean_seconds, chosen.mean_seconds),
            *(added.once_s - chosen.once_s, chosen.seconds - added.seconds),
        ],
        [percent(1 - added.mean_seconds / chosen.mean_seconds)],
    )


@often
@given(machines(), workloads(), qualities, priorities)
def test_everything_is_explained_in_the_predictions_own_numbers(
    machine, workload, quality, priority
):
    limits = Limits(quality=quality, priority=priority)
    plan = choose(machine, workload, limits)
    predictor = Predictor(machine, workload)
    judge = Judge(predictor, ())
    pool = decide(predictor, limits, CATALOGUE).pool
    taken = [s.name for s in plan.optimizations]
    assert [r.optimization for r in plan.reasons] == taken
    assert sorted([*taken, *(r.optimization for r in plan.rejected)]) == sorted(CATALOGUE)
    for setting, reason in zip(plan.optimizations, plan.reasons, strict=True):
        rest = execution_of(s for s in plan.optimizations if s != setting)
        check_reason(reason, plan, predictor.predict(rest), pool)
    for rejection in plan.rejected:
        assert rejection.text
        assert " 0.0%" not in rejection.text
        if rejection.setting is not None:
            clashing = [s for s in plan.optimizations if s.name in rejection.instead_of]
            assert bool(clashing) == bool(rejection.rule)
            beside = rejection.beside if clashing else plan.optimizations
            assert judge.rule_in((*beside, rejection.setting)) is None
            for setting in clashing:
                assert judge.rule_between(setting, rejection.setting) is not None
            added = predictor.predict(execution_of((*beside, rejection.setting)))
            is_alone = "; without " in rejection.text
            base = predictor.predict(execution_of(beside)) if is_alone else plan.prediction
            check_rejection(rejection, plan, added, base)
    for way in plan.remedies:
        assert way.needed_bytes <= way.budget_bytes
        assert format_seconds(way.seconds) in way.text
        assert format_bytes(way.needed_bytes) in way.text
