"""``--explain memory``, the phase table and the account of the start."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jsonschema  # type: ignore[import-untyped]
import msgspec
import pytest
from typer.testing import CliRunner

from autotune.cli.app import app
from autotune.probe.reference import load_machine
from autotune.runtime.account import describe_start, explain_plan
from autotune.tuner import Ask, make_plan
from tests.cli.test_cli import schema

ON = ("--machine", "rtx-3080-10gb")
CLASSIC = ("--only", "xformers,model_cpu_offload,sequential_cpu_offload")


@pytest.fixture(scope="module", autouse=True)
def _traces_once(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOTUNE_CACHE", str(tmp_path_factory.mktemp("explain")))
        yield patch


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("AUTOTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "explain0"))
    monkeypatch.setenv("COLUMNS", "80")


def said(*arguments: str) -> str:
    return CliRunner().invoke(app, arguments, catch_exceptions=False).stdout


def asked(*arguments: str) -> dict:
    return json.loads(said(*arguments, "--json"))


def test_the_json_is_the_prediction(tmp_path):
    shown = asked("plan", "sdxl", *ON, *CLASSIC, "--explain", "memory")
    jsonschema.validate(shown, schema("plan.json"))
    memory = shown["memory"]
    jsonschema.validate(memory, schema("memory.json"))
    assert memory["budget_bytes"] == shown["budget_bytes"]
    for key in ("prediction", "baseline"):
        for told, phase in zip(memory[key], shown[key]["phases"], strict=True):
            assert told["phase"] == phase["name"]
            for field in ("resident", "activation", "workspace", "margin", "needed", "peak"):
                assert told[f"{field}_bytes"] == phase[f"{field}_bytes"]
            assert sum(r["bytes"] for r in told["resident"]) == phase["resident_bytes"]
    needed = {p["phase"]: p["needed_bytes"] for p in memory["prediction"]}
    assert memory["binding_phase"] == max(needed, key=lambda name: needed[name])
    assert "memory" not in asked("plan", "sdxl", *ON)


def test_bars_without_colour():
    text = said("plan", "sdxl", *ON, *CLASSIC, "--explain", "memory")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    bars = [line for line in lines if "┃" in line and "available" not in line]
    assert [bar.split()[0] for bar in bars] == ["encode", "denoise", "decode"] * 2
    assert len({bar.index("┃") for bar in bars}) == 1  # one budget, one scale
    plain, chosen = bars[:3], bars[3:]
    assert [bar.count("█") > 20 for bar in plain] == [True] * 3
    assert chosen[2].count("▓") > chosen[2].count("█") >= 1
    assert [("▶" in bar) for bar in bars] == [False, False, True, False, True, False]
    legend = ("█ weights", "▓ activations", "▒ margin", "░ workspace")
    words = ("with nothing set", "with model_cpu_offload", "denoise needs the most")
    for word in (*legend, *words, "holds unet 4.78 GiB"):
        assert word in text


def test_one_bar_each_where_nothing_is_chosen():
    shown = asked("plan", "sd15", *ON, "--explain", "memory", "--only", "tome")
    assert shown["memory"]["baseline"] == []
    text = said("plan", "sd15", *ON, "--explain", "memory", "--only", "tome")
    assert text.count("with nothing set") == 1
    assert "stay on the device: unet" in text


def test_predict_explains_too():
    shown = asked("predict", "sdxl", *ON, "--with", "sequential_cpu_offload", "--explain", "memory")
    jsonschema.validate(shown, schema("predict.json"))
    jsonschema.validate(shown["memory"], schema("memory.json"))
    assert all(not r["is_whole"] for p in shown["memory"]["prediction"] for r in p["resident"])
    text = said("predict", "sdxl", *ON, "--with", "sequential_cpu_offload", "--explain", "memory")
    assert "a part of unet" in text


def test_what_is_too_much_is_said():
    text = said("predict", "sdxl", *ON, "--vram-limit", "2GiB", "--explain", "memory")
    assert "too much" in text
    assert max(map(len, text.splitlines())) <= 80


def test_components_of_a_phase_are_listed_where_it_has_several():
    lines = said("plan", "sdxl", *ON).splitlines()
    assert any(line.strip().startswith("text_encoder_2 ×1") for line in lines)
    assert not any(line.strip().startswith("unet ×") for line in lines)
    assert max(map(len, lines)) <= 80


def test_options_and_frames_are_shown(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = said("plan", "sd15", *ON, "--call", "guidance_rescale=0.5", "--steps", "9")
    assert "9 steps, guidance_rescale=0.5, float16" in text
    assert asked("plan", "sd15", *ON, "--call", "guidance_rescale=0.5")["workload"]["options"] == {
        "guidance_rescale": 0.5
    }


def test_the_start_in_plain_words(monkeypatch):
    plan = make_plan("sd15", load_machine("rtx-3080-10gb"), Ask()).plan
    load = msgspec.structs.replace(plan.prediction.load, seconds=12.0)
    prediction = msgspec.structs.replace(
        plan.prediction, load=load, first_image_extra_s=3.0, host_bytes=7 << 30
    )
    plan = msgspec.structs.replace(plan, prediction=prediction, host_budget_bytes=16 << 30)
    words = "loading 12.0 s; first image 3.00 s more; 7.00 GiB of host RAM"
    assert describe_start(plan) == words
    assert f"start       {words}" in explain_plan(plan)
    video = msgspec.structs.replace(
        plan, workload=msgspec.structs.replace(plan.workload, frames=16), host_budget_bytes=None
    )
    assert describe_start(video) == "loading 12.0 s; first video 3.00 s more"


def test_a_plan_that_is_traced_already_imports_no_torch():
    said("plan", "sdxl", *ON)
    done = subprocess.run(
        [sys.executable, "-m", "autotune", "plan", "sdxl", *ON, "--explain", "memory"],
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "diffusers", "transformers"}


def test_one_reason_for_several_is_said_once():
    plan = make_plan("sd15", load_machine("cpu-16-cores"), Ask()).plan
    reasons = [r.text for r in plan.rejected]
    (shared,) = {r.text for r in plan.rejected if r.optimization == "group_offload"}
    assert reasons.count(shared) > 2
    assert explain_plan(plan).count(shared) == 1
    lines = said("plan", "sd15", "--machine", "cpu-16-cores").splitlines()
    assert any(line.startswith("  group_offload") for line in lines)
