"""What the search leaves out is nobody's choice: held against the plain enumeration."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.decide.decision import decide, select, smallness
from autotune.decide.history import History
from autotune.decide.limits import PRIORITIES, QUALITIES, Limits, allows, budget_within
from autotune.decide.predict import Predictor
from autotune.decide.prediction import Budget
from autotune.decide.scope import EVERYWHERE, FIELDS, REACH, WHERE, reach_of
from autotune.decide.search import Candidate, Judge, execution_of, loss_of
from autotune.optimizations import CATALOGUE, find
from autotune.optimizations.base import Setting
from autotune.optimizations.execution import Execution
from autotune.probe.machine import Machine
from autotune.testing.pipelines import build_sd
from autotune.workload.architecture import describe_pipeline
from autotune.workload.phases import trace_workload
from autotune.workload.workload import Request, Workload
from tests.decide.strategies import machines, workloads
from tests.thorough import examples

some_optimizations = st.lists(st.sampled_from(tuple(CATALOGUE)), min_size=1, max_size=6).map(tuple)
"""Few enough that every set of theirs can be enumerated, thousands of times."""


def plainly(
    machine: Machine, workload: Workload, limits: Limits, history: History | None = None
) -> Iterator[Candidate]:
    """Every coherent set, one after the other."""
    predictor = Predictor(machine, workload, limits.images, history)
    judge = Judge(predictor, limits.keep)
    offered: list[list[Setting | None]] = []
    kept = {s.name for s in limits.keep}
    for optimization in CATALOGUE.values():
        if limits.only and optimization.name not in limits.only:
            continue
        if optimization.name in kept or optimization.unavailable(machine, workload):
            continue
        tried = optimization.worth_trying(machine, workload)
        allowed = [p for p in tried if allows(limits.quality, optimization, p)]
        offered.append([None, *map(optimization.setting, allowed)])
    for combination in itertools.product(*offered):
        chosen = tuple(s for s in combination if s is not None)
        # What is set by hand may break a rule; what is chosen may not, nor clash with it.
        pairs = itertools.combinations((*limits.keep, *chosen), 2)
        broken = (judge.rule_between(a, b) for a, b in pairs if b in chosen)
        if any(rule is not None for rule in broken):
            continue
        prediction = predictor.predict(execution_of((*limits.keep, *chosen)))
        yield Candidate(
            chosen,
            prediction.mean_seconds,
            prediction.needed_bytes,
            prediction.host_bytes,
            loss_of(chosen),
            sum(p.needed_bytes for p in prediction.phases),
            prediction.elsewhere_bytes,
            prediction.phase_needs,
        )


def rank(candidate: Candidate) -> tuple[object, ...]:
    """All that is compared before names break the tie."""
    return smallness(candidate)[:-1]


@examples(usually=300, thoroughly=2000)
@given(
    machine=machines(),
    workload=workloads(),
    quality=st.sampled_from((*QUALITIES, "tome", "vae_tiling")),
    priority=st.sampled_from(PRIORITIES),
    only=some_optimizations,
    images=st.sampled_from((1, 1000)),
)
def test_the_choice_is_that_of_the_plain_enumeration(
    machine, workload, quality, priority, only, images
):
    limits = Limits(quality=quality, priority=priority, only=only, images=images)
    decision = decide(Predictor(machine, workload, images), limits, CATALOGUE)
    everything = list(plainly(machine, workload, limits))
    budget = budget_within(machine, limits)
    best = select(everything, budget, priority)
    assert rank(decision.chosen) == rank(best)
    assert decision.fits == budget.holds(best)
    # What is claimed about a set is what is predicted for it, and it is a coherent one.
    known = {str(c.settings): c for c in everything}
    for candidate in decision.candidates:
        assert known[str(candidate.settings)] == candidate
    # Nothing that was left out is better in both respects than all that is left.
    for left_out in everything:
        assert any(
            c.seconds <= left_out.seconds
            and c.needed_bytes <= left_out.needed_bytes
            and c.host_bytes <= left_out.host_bytes
            for c in decision.candidates
        )


@examples(usually=30, thoroughly=60)
@given(machine=machines(), workload=workloads(), data=st.data())
def test_it_is_so_beside_what_was_set_by_hand(machine, workload, data):
    usable = [o for o in CATALOGUE.values() if not o.unavailable(machine, workload)]
    if not usable:
        return
    by_hand = data.draw(st.sampled_from(usable))
    tried = by_hand.worth_trying(machine, workload)
    keep = (by_hand.setting(data.draw(st.sampled_from(tried))),)
    limits = Limits(quality="balanced", keep=keep, only=data.draw(some_optimizations))
    decision = decide(Predictor(machine, workload), limits, CATALOGUE)
    best = select(list(plainly(machine, workload, limits)), budget_within(machine, limits))
    assert rank(decision.chosen) == rank(best)


@pytest.mark.parametrize(
    ("model", "quality"), [("sd15", "fast"), ("sdxl", "exact"), ("pixart-sigma", "balanced")]
)
def test_it_is_so_for_real_models(traced, rtx_3080_torch1, model, quality):
    workload, limits = traced(model), Limits(quality=quality)
    decision = decide(Predictor(rtx_3080_torch1, workload), limits, CATALOGUE)
    everything = list(plainly(rtx_3080_torch1, workload, limits))
    assert rank(decision.chosen) == rank(select(everything, decision.budget))


def test_what_libraries_take_on_a_cpu_is_not_left_out(cpu_machine: Machine) -> None:
    """oneDNN copies what is not in its layout: slices are, and tiles are not."""
    request = Request(128, 128, 4, 1, 7.5, "float32")
    workload = trace_workload(describe_pipeline(build_sd()), request)
    limits = Limits(quality="fast", only=("vae_slicing", "vae_tiling"))
    decision = decide(Predictor(cpu_machine, workload), limits, CATALOGUE)
    for one in plainly(cpu_machine, workload, limits):
        needed = Budget(1 << 40, None)._replace(phase_bytes=one.phase_needs)
        everything = list(plainly(cpu_machine, workload, limits))
        best = select(everything, needed)
        assert rank(select(decision.candidates, needed)) == rank(best), one.settings


@examples(usually=80, thoroughly=300)
@given(machine=machines(), workload=workloads(), data=st.data())
def test_a_field_changes_only_what_it_can_reach(machine, workload, data):
    """The table that the search builds on, against the predictions."""
    predictor = Predictor(machine, workload)
    usable = [
        optimization.setting(parameters)
        for optimization in CATALOGUE.values()
        if not optimization.unavailable(machine, workload)
        for parameters in optimization.worth_trying(machine, workload)
    ]
    if not usable:
        return
    base = execution_of(data.draw(st.lists(st.sampled_from(usable), max_size=4)))
    setting = data.draw(st.sampled_from(usable))
    before, after = base, execution_of((setting,), base)
    reach = set()
    for field in FIELDS:
        if getattr(before, field) != getattr(after, field):
            reach |= REACH.get(field, EVERYWHERE)
    one, other = predictor.predict(before), predictor.predict(after)
    for i, (p, q) in enumerate(zip(one.phases, other.phases, strict=True)):
        if not reach & {r.role for r in workload.phases[i].runs}:
            assert p == q
        seen = [(predictor.costed(i, e), WHERE(e)) for e in (before, after)]
        if seen[0] == seen[1]:
            assert predictor.costs(i, before) == predictor.costs(i, after)
    if "load" not in reach:
        assert (one.load, one.host_bytes) == (other.load, other.host_bytes)


def test_every_field_listed_exists():
    assert set(REACH) <= set(FIELDS)
    assert reach_of(Execution()) == frozenset()
    assert reach_of(Execution(placement="model_offload")) == EVERYWHERE


def test_a_useless_third_member_does_not_make_a_pair_coherent(traced, rtx_3080):
    """The rule on merging under offload is asked about the two alone."""
    judge = Judge(Predictor(rtx_3080, traced("sd15")), ())
    merge = find("tome").setting({"ratio": 0.5})
    pair = (Setting("sequential_cpu_offload"), merge)
    rule = judge.rule_in(pair)
    assert rule is not None
    assert rule.id == "offload-or-merge"
    slow = find("attention_slicing").setting({"slices": "max"})
    assert judge.rule_in((*pair, slow)) == rule
