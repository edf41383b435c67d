"""The verbs ``probe``, ``machines`` and ``env``."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from msgspec.structs import replace
from typer.testing import CliRunner

from autotune import tuner
from autotune.cli import machines
from autotune.cli.env import env
from autotune.cli.output import progress
from autotune.cli.probe import probe, ranked
from autotune.decide.corrections import replayable
from autotune.errors import MachineError, ModelError, RequestError
from autotune.probe import measure, reference
from autotune.probe.machine import (
    Device,
    Figure,
    GpuProcess,
    Machine,
    OperatorTime,
    TransferPoint,
)
from autotune.probe.reference import check_writable, load_machine, read_machine
from autotune.probe.software import OPTIONAL

RUNNER = CliRunner()
probe_module = sys.modules[probe.__module__]


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
    assert "669.0 GB/s of 760.1 GB/s" in people.stdout
    assert re.search(r"float16 +44.6 +59.5 +35.7 +38.7", people.stdout)
    assert read_machine(file) == load_machine("rtx-3080-10gb")
    programs = RUNNER.invoke(verb(probe), ["--json"])
    assert json.loads(programs.stdout)["name"] == "rtx-3080-10gb"


@pytest.fixture
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = replace(load_machine("cpu-16-cores"), source="measured", findings=(measure.QUICK,))

    def look(device: str | None, *, quick: bool, progress: object) -> Machine:
        assert quick
        return machine

    monkeypatch.setattr(measure, "measure_machine", look)
    return machine


def test_a_quick_look_says_so_and_leaves_the_profile_alone(
    quick_machine: Machine, tmp_path: Path
) -> None:
    done = RUNNER.invoke(verb(probe), ["--quick", "--json"])
    assert json.loads(done.stdout)["findings"] == [measure.QUICK]
    assert not list((tmp_path / "cache").glob("*.profile.json"))
    assert "A quick look" in RUNNER.invoke(verb(probe), ["--quick"]).stdout


def test_quick_and_deep_exclude_each_other() -> None:
    done = RUNNER.invoke(verb(probe), ["--quick", "--deep", "demo"])
    assert isinstance(done.exception, RequestError)


@pytest.mark.parametrize("option", ["--height=512", "--width=8", "--batch=2", "--dtype=float16"])
def test_a_size_without_a_model_is_refused(option: str) -> None:
    done = RUNNER.invoke(verb(probe), ["--quick", option])
    assert isinstance(done.exception, RequestError)
    assert "--deep" in done.exception.hint


def test_an_unknown_model_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuner, "machine_here", None)
    done = RUNNER.invoke(verb(probe), ["--deep", "no-such-model"])
    assert isinstance(done.exception, ModelError)


@pytest.mark.usefixtures("instant_probe")
def test_deep_says_how_many_operators_were_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(measured: Any, workload: Any, budget_s: float) -> Any:
        keys = list({operator.key: None for operator in replayable(workload)})
        times = dict.fromkeys(keys, OperatorTime(None)) | dict.fromkeys(
            keys[::2], OperatorTime(1e-3)
        )
        machine = replace(measured.machine, operators={"of another model": OperatorTime(1)} | times)
        return measured._replace(machine=machine)

    monkeypatch.setattr(tuner, "replayed", half)
    asked = ["--deep", "demo", "--height", "64", "--width", "64"]
    done = RUNNER.invoke(verb(probe), asked)
    assert done.exception is None, done.exception
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("Timed"))
    timed, wanted = (int(number) for number in re.findall(r"\b(\d+) ", line)[:2])
    assert timed == -(-wanted // 2)
    assert "demo at 64x64" in line
    assert re.search(r"rates stand in for the rest, \d+\.\d% of the work", line)
    programs = RUNNER.invoke(verb(probe), [*asked, "--json"])
    assert json.loads(programs.stdout)["operators"]
    assert programs.stderr.startswith("Timed")


def test_the_sweep_and_what_else_was_measured_are_shown() -> None:
    machine = load_machine("rtx-3080-10gb")
    assert machine.link is not None
    sweep = tuple(
        TransferPoint(direction, True, size << 20, Figure(rate))
        for size, rate in ((1, 9.5e9), (1024, 25.2e9))
        for direction in ("h2d", "d2h")
    )
    link = replace(machine.link, sweep=sweep, overlap_fraction=Figure(0.93))
    host = replace(machine.host, disk_read_bytes_per_s=Figure(2.3e9))
    rows = dict(probe_module._other_rows(replace(machine, link=link, host=host)))
    assert rows["  by size"] == "1 MiB 9.5, 1 GiB 25.2 GB/s to device, pinned"
    assert rows["  overlap"] == "93% of a copy hides behind a kernel"
    assert rows["model cache"] == "read from disk at 2.3 GB/s"


def shown(machine: Machine, capsys: pytest.CaptureFixture[str]) -> str:
    """What a person reads, on lines as long as they like."""
    probe_module.print_machine(machine)
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("wide")
def test_a_gpu_in_trouble_is_shown_with_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    machine = load_machine("rtx-3080-10gb")
    assert machine.link is not None
    names = ("game.exe", "chrome", None, "Xorg", "other", "another")
    held = tuple(GpuProcess(pid, pid << 20, name) for pid, name in enumerate(names, 100))
    device = replace(
        machine.device,
        driver="575.51.03",
        power_limit_watts=250.0,
        throttle_reasons=("power cap", "hardware slowdown"),
        processes=held,
    )
    link = replace(machine.link, pcie_generation_in_copy=4, pcie_width_in_copy=8)
    kernels = replace(machine.kernels, launch_s=Figure(4.1e-6))
    broken = "RuntimeError: no kernel [see]"
    refused = tuple(
        replace(rate, implementation="sdpa_cudnn", flops_per_s=None, error=broken)
        for rate in machine.attention[:2]
    )
    machine = replace(
        machine,
        device=device,
        link=link,
        kernels=kernels,
        attention=machine.attention + refused,
        findings=("One [thing].", "Another."),
    )
    text = shown(machine, capsys)
    assert "held by game.exe (PID 100) 100.0 MiB, chrome (PID 101) 101.0 MiB, a process" in text
    assert "Xorg (PID 103) 103.0 MiB, and 2 more" in text
    assert "driver 575.51.03, 250 W of 320 W, 1710 MHz, slowed by power cap and hardware" in text
    assert "of 31.5 GB/s (PCIe 4 x16, running at 4 x8)" in text
    assert "25.0 µs per operator of a model, 4.1 µs per bare operator" in text
    assert text.count(f"sdpa_cudnn: {broken}") == 1
    assert "• One [thing]. • Another." in text


def test_other_gpus_are_one_line(wide: None, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(load_machine("t4-16gb-x2"), capsys)
    assert "other GPUs cuda:1 Tesla T4, 14.7 GiB free of 15.0 GiB" in text
    assert "other GPUs" not in shown(load_machine("t4-16gb"), capsys)


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.usefixtures("wide")
def test_names_from_a_file_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    machine = load_machine("t4-16gb")
    device = replace(machine.device, name="A [bold]card[/bold]")
    assert "A [bold]card[/bold]" in shown(replace(machine, device=device), capsys)


@pytest.mark.usefixtures("wide")
def test_a_machine_that_knows_little_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    machine = load_machine("rtx-3080-10gb")
    device = Device(kind="xpu", name="Arc", total_bytes=8 << 30, free_bytes=4 << 30)
    bare = replace(machine, device=device, link=None, attention=(), findings=())
    text = shown(bare, capsys)
    assert "4.00 GiB free of 8.00 GiB host" in text, "no row without facts"
    assert " of " not in text.partition("memory rate")[2]


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--save", "{folder}/absent/file.json"], "there is no folder"),
        (["--save", "{folder}/locked/file.json"], "no permission"),
        (["--deep", "demo", "--dtype", "float99"], "float99"),
        (["--deep", "demo", "--height", "-8"], "height"),
        (["--deep", "demo", "--batch", "0"], "batch"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(reference.os, "access", lambda path, mode: "locked" not in str(path))
    monkeypatch.setattr(tuner, "machine_here", None)
    monkeypatch.setattr(measure, "measure_machine", None)
    done = RUNNER.invoke(verb(probe), [part.format(folder=tmp_path) for part in options])
    assert isinstance(done.exception, (MachineError, RequestError))
    assert message in str(done.exception)


def test_a_folder_is_no_file_to_save_to(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="it is a folder"):
        check_writable(tmp_path)


def test_progress_is_shown_on_terminals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, expected in ((io.StringIO(), ""), (Terminal(), "Measuring: float16 kernels …")):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress("Measuring") as say:
            assert (say is None) == (expected == "")
            if say is not None:
                say("float16 kernels")
        assert expected in stream.getvalue()


def test_unknown_machines_are_refused() -> None:
    assert isinstance(RUNNER.invoke(machines.app, ["show", "rtx-9999"]).exception, MachineError)


def test_env_for_people_and_programs() -> None:
    programs = json.loads(RUNNER.invoke(verb(env), ["--json"]).stdout)
    assert programs["software"]["torch"]
    assert programs["host"]["cores"] >= 1
    people = RUNNER.invoke(verb(env), []).stdout
    for name in ("torch", *OPTIONAL):
        version = programs["software"][name] or "not installed"
        assert re.search(rf"^{name} +{re.escape(version)}$", people, re.MULTILINE)
