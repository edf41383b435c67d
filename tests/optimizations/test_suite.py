"""The conformance suite itself: what breaks a promise is caught, by the test that is about it."""

from __future__ import annotations

from typing import ClassVar

import pytest

from autotune.optimizations import find
from autotune.optimizations.base import Optimization
from autotune.testing import OptimizationConformance
from autotune.testing.pipelines import build_sd
from tests.optimizations import broken


class Suite(OptimizationConformance):
    pipelines = (build_sd,)
    partners: ClassVar = (find("attention_slicing"), find("vae_slicing"))


def run(optimization: Optimization, test: str) -> None:
    suite = type("Suite", (Suite,), {"optimization": optimization})()
    suite.setup_method()
    try:
        getattr(suite, test)()
    finally:
        suite.teardown_method()


TESTS = [name for name in dir(Suite) if name.startswith("test_")]


@pytest.mark.parametrize("test", TESTS)
def test_what_keeps_to_everything_passes(test: str) -> None:
    run(broken.Marked(), test)


@pytest.mark.parametrize(
    ("name", "test", "says"),
    [
        ("Mute", "test_declares_itself", "it has no summary"),
        ("Curt", "test_says_in_a_sentence_where_it_is_unavailable", "'no.' is no sentence"),
        (
            "Heavy",
            "test_is_planned_without_torch",
            "without torch: .*import of torch halted",
        ),
        ("Idle", "test_configures_an_execution", "changes nothing of the execution"),
        ("Adds", "test_configures_an_execution", "configured twice, is another execution"),
        (
            "Forgets",
            "test_draws_as_declared_and_leaves_nothing",
            "leaves behind .*forgotten",
        ),
        ("Unfindable", "test_draws_as_declared_and_leaves_nothing", "is not found"),
        (
            "Blurs",
            "test_draws_as_declared_and_leaves_nothing",
            "declared exact, and differs by",
        ),
        ("Harmless", "test_draws_as_declared_and_leaves_nothing", "no image has changed"),
        ("Rounds", "test_draws_as_declared_and_leaves_nothing", r"leaves behind unet\."),
        (
            "Gambles",
            "test_draws_as_declared_and_leaves_nothing",
            "moves the global random state",
        ),
        (
            "Wavers",
            "test_draws_as_declared_and_leaves_nothing",
            "draws two images of one seed",
        ),
        (
            "Piles",
            "test_applied_twice_is_applied_once",
            "applied twice, draws another image",
        ),
        (
            "Stumbles",
            "test_a_failure_half_way_leaves_the_pipeline_as_it_was",
            "failed at call",
        ),
        ("Accuses", "test_clashes_as_its_rules_say", "overrides; seen: nothing"),
        (
            "Replaces",
            "test_goes_with_every_other",
            "do not go together, and no rule says so",
        ),
    ],
)
def test_what_does_not_is_caught(name: str, test: str, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        run(getattr(broken, name)(), test)


def test_a_suite_that_would_try_nothing_fails() -> None:
    with pytest.raises(AssertionError, match="available on none of the pipelines"):
        run(broken.Absent(), "test_draws_as_declared_and_leaves_nothing")
