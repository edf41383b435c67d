"""``plan`` for several machines and models, along the frontier, and as code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import jsonschema  # type: ignore[import-untyped]
import pytest
from typer.testing import CliRunner

from autotune.cli.app import app
from autotune.cli.whatif import Case, cases_of, short_names
from autotune.errors import RequestError
from autotune.optimizations import parse_settings
from autotune.units import format_seconds
from tests.cli.test_cli import schema

ON = ("--machine", "rtx-3080-10gb")
Say = Callable[..., str]


@pytest.fixture(scope="module")
def _traces(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("whatif"))


@pytest.fixture
def said(_traces: str, monkeypatch: pytest.MonkeyPatch) -> Say:
    """What ``autotune plan`` prints; models are traced once for all tests of this file."""
    monkeypatch.setenv("AUTOTUNE_CACHE", _traces)
    monkeypatch.setenv("COLUMNS", "80")

    def invoke(*arguments: str) -> str:
        done = CliRunner().invoke(app, ("plan", *arguments), catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout

    return invoke


# ---- several in one table -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "machine", "beside", "expected"),
    [
        ("sdxl", None, None, [("sdxl", "here")]),
        ("sdxl", "t4-16gb", None, [("sdxl", "t4-16gb")]),
        ("sdxl,sd15", "t4-16gb", None, [("sdxl", "t4-16gb"), ("sd15", "t4-16gb")]),
        ("sdxl", None, "t4-16gb", [("sdxl", "here"), ("sdxl", "t4-16gb")]),
        ("sdxl", None, "t4-16gb, x.json", [("sdxl", "t4-16gb"), ("sdxl", "x.json")]),
        ("sdxl", "here", "t4-16gb", [("sdxl", "here"), ("sdxl", "t4-16gb")]),
        ("sdxl", "t4-16gb", "sd15", [("sdxl", "t4-16gb"), ("sd15", "t4-16gb")]),
        ("sdxl", "t4-16gb", "owner/name", [("sdxl", "t4-16gb"), ("owner/name", "t4-16gb")]),
        ("sdxl", "t4-16gb", "t4-16gb,sdxl", [("sdxl", "t4-16gb")]),
        ("", None, None, [("", "here")]),
    ],
)
def test_which_plans_are_asked_for(model, machine, beside, expected):
    assert cases_of(model, machine, beside) == tuple(Case(*e) for e in expected)


def test_a_folder_with_a_comma_in_its_name_is_one_model(tmp_path):
    folder = tmp_path / "a,b"
    folder.mkdir()
    assert cases_of(str(folder), "t4-16gb", None) == (Case(str(folder), "t4-16gb"),)


def test_a_name_that_is_neither_machine_nor_model():
    with pytest.raises(RequestError, match="sdxxl") as caught:
        cases_of("sdxl", None, "sdxxl")
    assert caught.value.hint


def test_machines_and_models_side_by_side(said):
    arguments = ("sdxl,sd15", "--compare", "rtx-4060-8gb,rtx-3080-10gb-torch1,t4-16gb")
    shown = json.loads(said(*arguments, "--json"))
    jsonschema.validate(shown, schema("comparison.json"))
    rows = shown["comparison"]
    assert [r["model"] for r in rows] == ["sdxl"] * 3 + ["sd15"] * 3
    assert [r["machine"] for r in rows[:3]] == ["rtx-4060-8gb", "rtx-3080-10gb-torch1", "t4-16gb"]
    one = json.loads(said("sdxl", "--machine", "t4-16gb", "--json"))
    assert rows[2]["seconds"] == one["prediction"]["seconds"]
    lines = said(*arguments).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("compute in denoise" in line for line in lines) == 6


def test_a_row_that_does_not_fit_says_what_holds_it_back(said):
    text = said("sdxl", "--compare", "t4-16gb,rtx-3080-10gb", "--without", "group_offload",
                "--only", "xformers")  # fmt: skip
    assert "no optimization" in text
    assert "memory in decode" in text


def test_names_are_short_where_parameters_are_the_usual_ones():
    settings = parse_settings("tome,vae_tiling:tile=256,channels_last")
    assert short_names(settings) == "tome, vae_tiling:tile=256, channels_last"
    assert short_names(()) == "no optimization"


# ---- one plan, looked at otherwise --------------------------------------------------------------


def test_the_frontier_has_a_mark_at_the_choice(said):
    asked = ("sdxl", *ON, "--quality", "high", "--vram-limit", "3GiB", "--frontier")
    shown = json.loads(said(*asked, "--json"))
    jsonschema.validate(shown, schema("plan.json"))
    points = shown["frontier"]
    assert points == sorted(points, key=lambda p: p["seconds"])
    assert {p["fits"] for p in points} == {True, False}
    lines = said(*asked).splitlines()
    assert max(map(len, lines)) <= 80
    (marked,) = (line for line in lines if line.startswith(" ▶"))
    assert shown["optimizations"][0]["name"] in marked


def test_a_choice_beside_the_frontier_is_shown_too(said):
    """It gives up less than the tolerance to be smaller."""
    shown = json.loads(said("sdxl", *ON, "--frontier", "--json"))
    chosen = [o["name"] for o in shown["optimizations"]]
    assert chosen not in [[o["name"] for o in p["optimizations"]] for p in shown["frontier"]]
    lines = said("sdxl", *ON, "--frontier").splitlines()
    assert sum(line.startswith(" ▶") for line in lines) == 1


def test_time_is_the_same_wherever_it_is_told(said):
    """With its share of compiling."""
    asked = ("sdxl", "--machine", "a100-80gb", "--images", "1000")
    plan = json.loads(said(*asked, "--frontier", "--json"))
    (compiling,) = (r for r in plan["reasons"] if r["optimization"] == "compile")
    seconds = compiling["after_seconds"]
    assert seconds > plan["prediction"]["seconds"]
    same = [p for p in plan["frontier"] if p["optimizations"] == plan["optimizations"]]
    beside = json.loads(said(*asked, "--compare", "t4-16gb", "--json"))["comparison"]
    assert [p["seconds"] for p in (*same, beside[0])] == pytest.approx([seconds] * (len(same) + 1))
    (planned,) = (line for line in said(*asked).splitlines() if line.startswith("planned"))
    assert f" {format_seconds(seconds)} (" in planned
    assert "of compiling)" in planned
    assert "spread over 1000 images" in " ".join(said(*asked).split())
    (marked,) = (line for line in said(*asked, "--frontier").splitlines() if "▶  " in line)
    assert format_seconds(seconds) in marked


@pytest.mark.parametrize("machine", ["rtx-3080-10gb", "a100-80gb", "cpu-16-cores"])
@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_code_is_python_and_nothing_else(said, model, machine):
    text = said(model, "--machine", machine, "--code")
    compile(text, "pasted", "exec")
    assert ".from_pretrained(" in text
    assert json.loads(said(model, "--machine", machine, "--code", "--json"))["code"] == text


def test_a_priority_trades_time_for_memory(said):
    fast, small = (
        json.loads(said("sdxl", "--machine", "t4-16gb", "--priority", priority, "--json"))
        for priority in ("speed", "memory")
    )
    assert small["priority"] == "memory"
    assert small["prediction"]["needed_bytes"] < fast["prediction"]["needed_bytes"]


def test_what_is_reserved_and_limited_cannot_be_used(said):
    plain = json.loads(said("sd15", *ON, "--json"))
    held = json.loads(said("sd15", *ON, "--reserve", "1GiB", "--ram-limit", "3GiB", "--json"))
    assert held["budget_bytes"] == plain["budget_bytes"] - (1 << 30)
    assert held["host_budget_bytes"] == 3 << 30


def test_smaller_images_are_offered_where_nothing_fits(said):
    shown = json.loads(said("sdxl", *ON, "--only", "xformers", "--json"))
    assert not shown["fits"]
    (size,) = (w for w in shown["remedies"] if w["kind"] == "size")
    assert size["needed_bytes"] <= size["budget_bytes"]
    assert re.match(r"(768x768|512x512) ", size["text"])


def test_help_says_what_a_model_is(said):
    text = " ".join(said("--help").split())
    assert "MODEL is a hub id, a folder, or a name that `autotune models` lists" in text
    assert "sdxl,sd15" in text
