"""Every rule of coherence: what it forbids, what it allows, and the reason a user reads."""

from __future__ import annotations

import itertools

import pytest

from autotune.decide.choose import Limits, choose, execution_of
from autotune.decide.predict import Predictor
from autotune.decide.rules import RULES, broken_rule, require_coherent, transfer_dominates
from autotune.errors import OptimizationError
from autotune.optimizations import CATALOGUE, find, parse_settings


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.id)
def test_rules_name_known_optimizations_and_give_a_reason(rule):
    assert rule.first | rule.second <= set(CATALOGUE)
    assert len(rule.reason) > 20
    assert not rule.reason.endswith(".")


def test_rule_ids_are_unique():
    assert len({r.id for r in RULES}) == len(RULES)


@pytest.mark.parametrize(
    "rule",
    [r for r in RULES if not r.while_transfer_dominates and not r.by_hand],
    ids=lambda r: r.id,
)
def test_forbidden_pairs_are_refused(rule):
    pairs = [(a, b) for a, b in itertools.product(rule.first, rule.second) if a != b]
    assert pairs
    for pair in pairs:
        assert rule.broken_by(frozenset(pair))
        with pytest.raises(OptimizationError, match=r"do not go together: .+ \(rule "):
            require_coherent(tuple(find(n).setting() for n in pair))


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.id)
def test_a_rule_that_hangs_on_a_prediction_is_about_gain(rule):
    assert not rule.while_transfer_dominates or rule.clash == "gains nothing"


@pytest.mark.parametrize("rule", [r for r in RULES if r.by_hand], ids=lambda r: r.id)
def test_what_only_the_order_forbids_is_refused_after_what_was_set_by_hand(rule, traced, rtx_3080):
    """A plan puts its own members on in the order that works."""
    for first, second in itertools.product(rule.first, rule.second):
        names = (first, second)
        assert broken_rule(names, kept=frozenset({first})) == rule
        assert broken_rule(names) is None
        assert broken_rule(names, kept=frozenset({second})) is None
        plan = choose(
            rtx_3080, traced("sd15"), Limits(quality="fast", keep=(find(first).setting(),))
        )
        assert second not in {s.name for s in plan.optimizations}
        rejected = {r.optimization: r.rule for r in plan.rejected}
        assert rejected[second] in (rule.id, "offload-or-tune")


def test_faster_kernels_have_no_return_under_sequential_offload(traced, rtx_3080):
    settings = parse_settings("sequential_cpu_offload,channels_last")
    predictor = Predictor(rtx_3080, traced("sd15"))
    both, alone = (predictor.predict(execution_of(s)) for s in (settings, settings[:1]))
    assert both.seconds > 0.97 * alone.seconds
    rule = broken_rule((s.name for s in settings), transfer_dominates(both.phases))
    assert rule is not None
    assert rule.id == "offload-or-tune"


def test_single_optimizations_are_coherent():
    for name in CATALOGUE:
        assert broken_rule([name]) is None


def test_merging_goes_with_offload_while_compute_dominates(traced, rtx_3080):
    """Model offload moves SDXL once per image: computing takes longer, and merging still pays."""
    settings = parse_settings("model_cpu_offload,tome:ratio=0.3:max_downsample=4")
    prediction = Predictor(rtx_3080, traced("sdxl")).predict(execution_of(settings))
    assert not transfer_dominates(prediction.phases)
    assert broken_rule((s.name for s in settings), dominated=False) is None


def test_merging_under_sequential_offload_is_pointless(traced, rtx_3080):
    settings = parse_settings("sequential_cpu_offload,tome:ratio=0.3")
    prediction = Predictor(rtx_3080, traced("sd15")).predict(execution_of(settings))
    assert transfer_dominates(prediction.phases)
    rule = broken_rule((s.name for s in settings), dominated=True)
    assert rule is not None
    assert rule.id == "offload-or-merge"
