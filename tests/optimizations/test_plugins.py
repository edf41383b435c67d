"""Optimizations of other packages, by the example that ships: found, planned, applied, tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autotune.cli.app import app
from autotune.decide.rules import all_rules, require_coherent
from autotune.errors import OptimizationError
from autotune.optimizations import CATALOGUE, parse_settings
from autotune.optimizations.plugins import BUILT_IN, GROUP, Catalogue, failure_of
from autotune.optimizations.tome import ToMe
from autotune.runtime.by_hand import set_by_hand
from autotune.testing.pipelines import build_sd
from tests.thorough import THOROUGH, thoroughly

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "examples" / "chunked-feed-forward"
NAME = "chunked_feed_forward"

Register = Callable[..., Path]


@pytest.fixture
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Register]:
    """``register(mine="module:Class")``: what installing a package would leave on the path."""

    def add(**entries: str) -> Path:
        site = tmp_path / "site"
        info = site / "some_package-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1.2\n")
        lines = (f"{name} = {value}" for name, value in entries.items())
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n" + "\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(site)
        return site

    forget_what_was_found()
    yield add
    forget_what_was_found()


@pytest.fixture
def example(register: Register, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The example is installed; the value is a PYTHONPATH for processes of their own."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    site = register(**project["entry-points"][GROUP])
    monkeypatch.syspath_prepend(EXAMPLE)
    yield os.pathsep.join(map(str, (site, EXAMPLE, REPOSITORY)))


def forget_what_was_found() -> None:
    vars(CATALOGUE).pop("_members", None)
    all_rules.cache_clear()


def asked_json(*arguments: str) -> Any:
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def predicted(*arguments: str) -> Any:
    asked = ("predict", "sd15", "--machine", "rtx-3080-10gb", "--batch", "4")
    return asked_json(*asked, *arguments)["prediction"]


# ---- the example --------------------------------------------------------------------------------


def test_it_is_listed_with_where_it_comes_from(example: str) -> None:
    listed = {o["name"]: o for o in asked_json("optimizations")["optimizations"]}
    assert listed[NAME]["source"] == "some-package 1.2"
    assert listed["xformers"]["source"] == BUILT_IN
    assert list(listed)[-1] == NAME
    shown = CliRunner().invoke(app, ["optimizations"]).stdout
    assert "some-package 1.2" in " ".join(shown.split())


def test_it_is_planned_and_predicted(example: str) -> None:
    plan = asked_json("plan", "sd15", "--machine", "rtx-3080-10gb")
    assert NAME in {r["optimization"] for r in plan["rejected"]}
    plain, chunked = predicted(), predicted("--with", NAME)
    before, after = (
        next(phase for phase in p["phases"] if phase["name"] == "denoise") for p in (plain, chunked)
    )
    assert after["activation_bytes"] < before["activation_bytes"]
    assert after["seconds"] > before["seconds"]


def test_its_rules_are_kept(example: str) -> None:
    with pytest.raises(OptimizationError, match="merged-blocks-do-not-chunk"):
        require_coherent(parse_settings(f"tome,{NAME}"))


def test_configure_finds_and_applies_it(
    example: str, sd_pipe: Any, cpu_machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import msgspec

    from autotune.decide.choose import Limits, choose
    from autotune.runtime.apply import apply_plan, set_by_hand
    from autotune.workload.architecture import describe_pipeline
    from autotune.workload.phases import trace_workload
    from autotune.workload.workload import Request

    workload = trace_workload(describe_pipeline(sd_pipe), Request(64, 64, 2, 2, 7.5, "float32"))
    plan = choose(cpu_machine, workload, Limits(only=(NAME,)))
    chosen = msgspec.structs.replace(plan, optimizations=parse_settings(NAME))
    undo = apply_plan(sd_pipe, chosen, "cpu")
    assert [s.name for s in set_by_hand(sd_pipe)] == [NAME]
    undo()
    assert set_by_hand(sd_pipe) == ()


@thoroughly
def test_its_own_conformance_test_passes(example: str) -> None:
    """And its optimization is planned with in a process that has no torch."""
    chosen = () if THOROUGH else ("-k", "not goes_with_every_other and not applied_twice")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, str(EXAMPLE)],
        env={**os.environ, "PYTHONPATH": example},
        cwd=EXAMPLE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]


# ---- what is wrong is said and left out ---------------------------------------------------------

WRONG = """
from autotune.optimizations.rule import Rule
from autotune.optimizations.vae import VaeSlicing as Good

class Fine(Good):
    name = "fine"

class Taken(Good):
    name = "tome"

class Mute(Good):
    name, summary = "mute", ""

class Shouting(Good):
    name = "SHOUT"

class Level(Good):
    name = "high"

class Vague(Good):
    name, exactness = "vague", "roughly"

class Lenient(Good):
    name, exactness = "lenient", "lossy"
    def quality(self, parameters):
        return "exact"

class Stray(Good):
    name = "stray"
    rules = (Rule("of-others", "two", frozenset({"tome"}), frozenset({"xformers"}), "raises"),)

class Unfinished(Good):
    name = "unfinished"
    def setting(self, parameters=None):
        raise KeyError("later")

instance = Fine()
number = 3
"""


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("nowhere:Mine", "No module named 'nowhere'"),
        ("wrong:Missing", "has no attribute 'Missing'"),
        ("leaves:Mine", "SystemExit"),
        ("wrong:number", "it is no autotune.optimizations.base.Optimization"),
        ("wrong:Taken", "there is an optimization 'tome' already"),
        ("wrong:Mute", "it has no summary"),
        ("wrong:Shouting", "its name 'SHOUT' is not of lower-case letters"),
        ("wrong:Level", "its name 'high' is that of a quality level"),
        ("wrong:Vague", "its exactness 'roughly' is none of exact, near-exact, lossy"),
        ("wrong:Lenient", "its quality 'exact' is not 'balanced' or looser, though it is lossy"),
        ("wrong:Stray", "its rule of-others is not about it"),
        ("wrong:Unfinished", "KeyError: 'later'"),
    ],
)
def test_a_wrong_one_is_one_warning(
    value: str, says: str, register: Register, caplog: pytest.LogCaptureFixture
) -> None:
    site = register(a_wrong_one=value, fine="wrong:Fine")
    (site / "wrong.py").write_text(WRONG)
    (site / "leaves.py").write_text("raise SystemExit('bye')")
    catalogue = Catalogue((ToMe(),))
    assert list(catalogue) == ["tome", "fine"]
    [said] = [r.getMessage() for r in caplog.records if r.name == "autotune"]
    assert said.startswith("optimization a_wrong_one of some-package 1.2 is left out: ")
    assert says in said
    assert "\n" not in said


def test_the_second_of_a_name_is_left_out(
    register: Register, caplog: pytest.LogCaptureFixture
) -> None:
    site = register(one="wrong:Fine", two="wrong:instance")
    (site / "wrong.py").write_text(WRONG)
    assert list(Catalogue(())) == ["fine"]
    assert "there is an optimization 'fine' already" in caplog.text


def test_a_package_may_read_the_catalogue_while_it_is_imported(
    register: Register, caplog: pytest.LogCaptureFixture
) -> None:
    site = register(fine="nosy:Fine")
    (site / "nosy.py").write_text(
        "from autotune.optimizations import find\n"
        "class Fine(type(find('vae_slicing'))):\n"
        "    name = 'fine'\n"
    )
    assert list(CATALOGUE)[-1] == "fine"
    assert not caplog.records


def test_packages_are_looked_for_when_the_catalogue_is_read(register: Register) -> None:
    catalogue = Catalogue((ToMe(),))
    site = register(fine="wrong:Fine")
    (site / "wrong.py").write_text(WRONG)
    assert "fine" in catalogue
    assert catalogue.source("fine") == "some-package 1.2"


def test_verbs_that_need_no_catalogue_look_for_no_packages() -> None:
    code = (
        "import sys, autotune.cli.app as cli\n"
        "from autotune.optimizations import CATALOGUE\n"
        "sys.argv = ['autotune', 'profile', 'list']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print('_members' in vars(CATALOGUE))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("False"), done.stderr


class Broken(ToMe):
    """Of another package by its module, and in need of a repair."""

    name = "broken"

    def unavailable(self, machine: Any, workload: Any) -> str | None:
        raise ZeroDivisionError("division by zero")

    def found(self, pipe: Any) -> Any:
        raise AttributeError("no such thing")


def test_one_that_fails_when_asked_breaks_no_plan(
    register: Register, caplog: pytest.LogCaptureFixture
) -> None:
    register(broken=f"{__name__}:Broken")
    plan = asked_json("plan", "sd15", "--machine", "rtx-3080-10gb")
    (said,) = [r["text"] for r in plan["rejected"] if r["optimization"] == "broken"]
    assert said == "its package tests fails: ZeroDivisionError: division by zero"
    assert set_by_hand(build_sd()) == ()
    assert "broken is not looked for: its package tests fails" in caplog.text


def test_a_defect_of_ours_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        failure_of(ToMe(), ZeroDivisionError())
