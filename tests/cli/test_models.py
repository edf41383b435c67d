"""``autotune models``."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jsonschema  # type: ignore[import-untyped]
import pytest
from typer.testing import CliRunner

from autotune.cli.app import app
from autotune.units import GIB
from autotune.workload.architecture import builtin_names
from tests.cli.test_cli import schema


def shown_json(*arguments: str) -> dict:
    done = CliRunner().invoke(app, ["models", *arguments, "--json"], catch_exceptions=False)
    return json.loads(done.stdout)


def test_the_list_keeps_its_contract_and_imports_no_torch():
    done = subprocess.run(
        [sys.executable, "-m", "autotune", "models", "--json"],
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "diffusers", "transformers"}
    listed = json.loads(done.stdout)
    jsonschema.validate(listed, schema("models.json"))
    by_name = {m["name"]: m for m in listed["models"]}
    assert set(by_name) == set(builtin_names())
    assert all(m["parameters"] > 1e6 and m["width"] and m["height"] for m in listed["models"])
    sdxl = by_name["sdxl"]
    assert sdxl["parameters"] == pytest.approx(3.47e9, rel=0.01)
    assert sdxl["weight_bytes"] == {
        "float32": 4 * sdxl["parameters"],
        "float16": 2 * sdxl["parameters"],
    }
    assert (sdxl["width"], sdxl["height"], sdxl["frames"], sdxl["steps"]) == (1024, 1024, 1, 50)
    assert by_name["wan21-1.3b"]["frames"] == 81


def test_the_list_fits_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(app, ["models"], catch_exceptions=False)
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) == len(builtin_names()) + 3


def test_needs_are_traced_and_a_model_that_cannot_be_costs_its_line(monkeypatch):
    from autotune.cli import models
    from autotune.errors import ModelError

    monkeypatch.setattr(models, "builtin_names", lambda: ("demo", "sd15"))
    traced = models.native_workload

    def native_workload(architecture, machine):
        if architecture.name == "sd15":
            raise ModelError("cannot be traced", "upgrade")
        return traced(architecture, machine)

    monkeypatch.setattr(models, "native_workload", native_workload)
    done = CliRunner().invoke(app, ["models", "--needs", "--json"], catch_exceptions=False)
    demo, sd15 = json.loads(done.stdout)["models"]
    assert sd15["needs"] is None
    assert "sd15: cannot be traced" in done.stderr
    needs = demo["needs"]
    assert demo["weight_bytes"]["float16"] < needs["needed_bytes"] < GIB
    assert needs["offloaded_bytes"] <= needs["needed_bytes"]
    assert {needs["phase"], needs["offloaded_phase"]} <= {"encode", "denoise", "decode"}


def test_one_in_detail_keeps_its_contract():
    account = shown_json("sd15")
    jsonschema.validate(account, schema("model.json"))
    assert account["native"]["width"] == 512
    assert {c["name"] for c in account["components"]} >= {"unet", "vae", "text_encoder"}
    assert sum(c["parameters"] for c in account["components"]) == account["parameters"]
    calls = {c["component"]: c for c in account["calls"]}
    assert calls["unet"]["calls"] * calls["unet"]["flops"] == pytest.approx(
        account["step_flops"] * account["native"]["steps"]
    )
    assert account["source"]


def test_one_for_people(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(app, ["models", "sd15"], catch_exceptions=False)
    for word in ("UNet2DConditionModel", "TFLOP per step", "vae.decode", "model_cpu_offload"):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_an_unknown_name_is_answered_with_the_closest(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "autotune", "models", "sdxll"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "unknown model 'sdxll'" in done.stderr
    assert "did you mean sdxl?" in done.stderr
