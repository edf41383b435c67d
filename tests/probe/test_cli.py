"""The verbs ``probe``, ``machines`` and ``env``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from autotune import tuner
from autotune.cli import machines
from autotune.cli.env import env
from autotune.cli.probe import probe, ranked
from autotune.errors import MachineError
from autotune.probe.reference import load_machine, read_machine

RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOTUNE_CACHE", str(tmp_path / "cache"))


def verb(function: Any) -> typer.Typer:
    app = typer.Typer()
    app.command()(function)
    return app


@pytest.fixture
def instant_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = load_machine("rtx-3080-10gb")
    measured = tuner.Measured("key", machine, ())
    monkeypatch.setattr(tuner, "machine_here", lambda *_, **__: measured)


@pytest.mark.usefixtures("instant_probe")
def test_probe_for_people_and_programs(tmp_path: Path) -> None:
    file = tmp_path / "saved.json"
    people = RUNNER.invoke(verb(probe), ["--save", str(file)], env={"COLUMNS": "120"})
    assert people.exit_code == 0, people.output
    assert "25.2 GB/s pinned of 31.5 GB/s (PCIe 4 x16)" in people.stdout
    assert "9.50 GiB free of 10.0 GiB" in people.stdout
    assert read_machine(file) == load_machine("rtx-3080-10gb")
    programs = RUNNER.invoke(verb(probe), ["--json"])
    assert json.loads(programs.stdout)["name"] == "rtx-3080-10gb"


def test_attention_is_ranked_shape_by_shape() -> None:
    order = [name for name, _ in ranked(load_machine("rtx-3080-10gb-torch1").attention)]
    assert order == ["xformers", "vanilla", "sdpa"]
    speeds = dict(ranked(load_machine("rtx-3080-10gb-torch1").attention))
    assert speeds["xformers"] == 1.0
    assert 0 < speeds["vanilla"] < 1
    assert speeds["sdpa"] == 0.0


def test_machines_lists_shows_and_adds(tmp_path: Path) -> None:
    listed = json.loads(RUNNER.invoke(machines.app, ["--json"]).stdout)["machines"]
    assert "rtx-3080-10gb" in {machine["name"] for machine in listed}
    assert "rtx-4090-24gb" in RUNNER.invoke(machines.app, []).stdout
    shown = RUNNER.invoke(machines.app, ["show", "t4-16gb", "--json"])
    assert json.loads(shown.stdout)["device"]["name"] == "Tesla T4"
    text = json.dumps(json.loads(shown.stdout) | {"name": "my-t4"})
    (tmp_path / "mine.json").write_text(text)
    assert (
        "--machine my-t4"
        in RUNNER.invoke(machines.app, ["add", str(tmp_path / "mine.json")]).stdout
    )
    assert load_machine("my-t4").device.name == "Tesla T4"


def test_a_broken_added_machine_does_not_hide_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "machines"
    folder.mkdir(parents=True)
    (folder / "broken.json").write_text("{")
    done = RUNNER.invoke(machines.app, ["--json"])
    assert json.loads(done.stdout)["machines"]
    assert "broken.json" in done.stderr


def test_unknown_machines_are_refused() -> None:
    assert isinstance(RUNNER.invoke(machines.app, ["show", "rtx-9999"]).exception, MachineError)


def test_env_for_people_and_programs() -> None:
    programs = json.loads(RUNNER.invoke(verb(env), ["--json"]).stdout)
    assert programs["software"]["torch"]
    assert programs["host"]["cores"] >= 1
    assert "torch" in RUNNER.invoke(verb(env), []).stdout
