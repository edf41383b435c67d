from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import typer
from msgspec.structs import replace
from typer.testing import CliRunner, Result

from autotune.cli import profile as cli
from autotune.cli import profile_diff, profile_show
from autotune.cli.profile_diff import difference
from autotune.errors import MachineError, ProfileError
from autotune.probe import host, live, software
from autotune.probe.machine import AttentionRate, Figure, Machine
from autotune.profile import coding, store
from autotune.profile.profile import (
    Available,
    MisfitRecord,
    PhaseMeasurement,
    PlanRecord,
    Profile,
)

REPOSITORY = Path(__file__).parents[2]

SHOW = """
import sys
from autotune.cli.profile import app
app(["show", "--json"], standalone_mode=False)
print(*sys.modules, file=sys.stderr)
"""


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine is the test machine."""
    real = live.identity
    names = {None: "GPU-0", "cpu": real("cpu")}
    monkeypatch.setattr(live, "identity", lambda device=None: names.get(device, device))
    monkeypatch.setenv("COLUMNS", "200")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def output(*arguments: str) -> str:
    result = call(*arguments)
    assert result.exception is None
    return result.stdout


def as_json(*arguments: str) -> dict[str, Any]:
    """What a verb prints: one object and nothing else."""
    printed: dict[str, Any] = json.loads(output(*arguments, "--json"))
    return printed


def problem(*arguments: str) -> str:
    """The error of a verb, for the central handler; nothing is on stdout."""
    result = call(*arguments)
    assert isinstance(result.exception, ProfileError)
    assert result.stdout == ""
    return str(result.exception)


@pytest.fixture
def fresh(profile: Profile) -> Profile:
    """The test machine's profile, as if measured here and now."""
    machine = replace(
        profile.machine, software=software.installed_versions(), host=host.read_host()
    )
    return replace(profile, machine=machine)


@pytest.fixture
def cpu(profile: Profile, cpu_machine: Machine) -> Profile:
    """A profile of this machine's processor."""
    machine = replace(
        cpu_machine,
        source="measured",
        device=replace(cpu_machine.device, name=host.cpu_name()),
        software=software.installed_versions(),
        host=host.read_host(),
    )
    return replace(profile, key=live.identity("cpu"), machine=machine)


def changed(profile: Profile, **versions: str) -> Profile:
    """The profile with other software, and a faster product for it."""
    kernels = profile.machine.kernels
    rates = {**kernels.matmul_flops_per_s, "float16": Figure(7.5e13)}
    machine = replace(
        profile.machine,
        software={**profile.machine.software, **versions},
        kernels=replace(kernels, matmul_flops_per_s=rates),
    )
    return replace(profile, machine=machine)


def run_phases(seconds: float) -> tuple[PhaseMeasurement, ...]:
    return (PhaseMeasurement("denoise", seconds, 5 << 30),)


def test_no_profile_yet() -> None:
    assert "`autotune probe`" in problem("show")
    assert "`autotune probe`" in problem("show", "--json")
    assert "No profile yet" in output("list")
    assert as_json("list") == {"profiles": []}
    assert output("clear", "--yes") == "Nothing to delete.\n"
    assert as_json("clear") == {"deleted": []}


def test_show(fresh: Profile) -> None:
    store.save_profile(fresh)
    text = output("show")
    for part in ("Test GPU, 10.0 GiB", "driver 580.82", "days ago", "xformers, tome:ratio=0.3"):
        assert part in text
    for part in ("1.50 s", "3.00 GiB", "1.80 s", "4.00 GiB"):
        assert part in text
    assert "Stale    no" in text
    shown = as_json("show")
    assert shown["stale"] == []
    assert shown["path"] == str(store.profile_path("GPU-0"))
    assert shown["profile"]["machine"]["device"]["name"] == "Test GPU"


def test_show_says_what_is_stale_why_and_what_follows(fresh: Profile) -> None:
    store.save_profile(changed(fresh, torch="1.0"))
    text = output("show")
    assert "Stale    yes; at the next start:" in text
    assert "torch 1.0 → " in text
    assert "measured again" in text
    shown = as_json("show")
    (reason,) = shown["stale"]
    assert reason.startswith("torch 1.0 → ")
    (change,) = shown["changes"]
    assert (change["what"], change["before"]) == ("torch", "1.0")
    assert "kernels" in change["parts"]


def test_show_says_what_changed_and_makes_nothing_stale(fresh: Profile) -> None:
    computer = replace(fresh.machine.host, ram_total_bytes=1 << 40)
    store.save_profile(replace(fresh, machine=replace(fresh.machine, host=computer)))
    text = output("show")
    assert "Stale    no" in text
    assert "RAM 1024.0 GiB → " in text
    assert "read at every start" in text


def test_show_has_plans_and_what_did_not_fit(fresh: Profile) -> None:
    (run,) = fresh.runs
    plan = PlanRecord(
        run.workload, "0", run.optimizations, run_phases(1.25), Available(1), None, {}, run.at
    )
    misfit = MisfitRecord("big", ("channels_last",), 4 << 30, 3 << 30, "decode", "no", run.at)
    plans = (plan, replace(plan, workload="never run"))
    store.save_profile(replace(fresh, plans=plans, misfits=(misfit,), runs=()))
    assert "not run" in output("show")
    store.save_profile(replace(fresh, plans=plans, misfits=(misfit,)))
    text = output("show")
    for part in ("Plans", "1.25 s", "5.00 GiB", "1.80 s", "never run", "not run"):
        assert part in text
    for part in ("What did not fit", "channels_last", "3.00 GiB", "4.00 GiB", "decode"):
        assert part in text
    assert "before the change" not in text
    later = replace(plan, basis="1", at="2026-01-05T00:00:00+00:00")
    again = replace(run, at=later.at, measured=run_phases(7.5))
    store.save_profile(replace(fresh, plans=(plan, later), runs=(run, again)))
    planned = output("show").split("Runs")[0]
    assert planned.index("7.50 s") < planned.index("1.80 s"), "each with its own, newest first"
    store.save_profile(replace(fresh, plans=plans, changed_at="2026-06-01T00:00:00Z"))
    assert "before the change" in output("show")


def test_show_of_a_file(profile: Profile, tmp_path: Path) -> None:
    file = tmp_path / "any.json"
    file.write_bytes(coding.encode(profile))
    assert as_json("show", str(file))["profile"]["key"] == "GPU-0"
    file.write_text("{")
    assert "not a readable profile" in problem("show", str(file))


def test_show_falls_back_on_the_latest_of_another_machine(profile: Profile) -> None:
    store.save_profile(replace(profile, key="old", updated_at="2020"))
    store.save_profile(replace(profile, key="new", updated_at="2025"))
    assert as_json("show")["profile"]["key"] == "new"
    assert as_json("show")["stale"] is None
    assert "another machine's" in output("show")
    with mock.patch.object(live, "identity", side_effect=MachineError("no device")):
        assert as_json("show")["stale"] is None


def test_the_cpu_profile_of_a_machine_with_a_gpu_is_its_own(fresh: Profile, cpu: Profile) -> None:
    store.save_profile(replace(cpu, updated_at="2020"))
    store.save_profile(replace(fresh, key="other"))
    assert as_json("show")["profile"]["key"] == cpu.key
    assert as_json("show")["stale"] == []


def test_show_finds_by_key_beginning_and_file_name(profile: Profile) -> None:
    for key in ("GPU-1a", "GPU-1b", "GPU-1"):
        store.save_profile(replace(profile, key=key))
    for name in ("GPU-1", "GPU-1a", store.profile_path("GPU-1").name):
        assert as_json("show", name)["profile"]["key"].startswith("GPU-1")
    assert as_json("show", "GPU-1b")["profile"]["key"] == "GPU-1b"
    assert "more than one" in problem("show", "GPU")
    assert "no profile" in problem("show", "../x")


def test_show_of_an_unreadable_profile_is_an_error() -> None:
    store.cache_folder()
    path = store.profile_path("GPU-0")
    path.write_text("{")
    assert str(path) in problem("show")
    assert path.exists()


def test_markup_in_names_is_text(fresh: Profile) -> None:
    device = replace(fresh.machine.device, name="[bold]GPU[/nonsense]")
    store.save_profile(replace(fresh, machine=replace(fresh.machine, device=device)))
    assert "[bold]GPU[/nonsense]" in output("show")
    assert "[bold]GPU[/nonsense]" in output("list")


def test_names_do_not_steer_the_terminal(fresh: Profile) -> None:
    evil = "\x1b[2J\x07GPU"
    device = replace(fresh.machine.device, name=evil)
    (run,) = fresh.runs
    machine = replace(fresh.machine, device=device)
    store.save_profile(replace(fresh, machine=machine, runs=(replace(run, workload=evil),)))
    store.save_profile(replace(fresh, key=evil, machine=machine))
    for text in (output("show"), output("list"), output("diff", "GPU-0", evil)):
        assert "\x1b" not in text
        assert "\x07" not in text
        assert "[2J" in text


def test_list(profile: Profile) -> None:
    store.save_profile(profile)
    store.profile_path("bad").write_text("{")
    text = output("list")
    assert "Test GPU" in text
    assert "cannot be read" in text
    good, bad = as_json("list")["profiles"]
    assert "not a readable profile" in bad["problem"]
    assert (good["key"], good["runs"]) == ("GPU-0", 1)


def test_path(profile: Profile) -> None:
    path = store.profile_path("GPU-0")
    assert output("path") == f"{path}\n"
    assert as_json("path") == {"path": str(path), "exists": False}
    store.save_profile(profile)
    assert as_json("path")["exists"]


def test_clear_asks(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save_profile(profile)
    assert "--yes" in problem("clear")
    assert "--yes" in problem("clear", "--json")
    monkeypatch.setattr("sys.stdin", mock.Mock(isatty=lambda: True))
    with mock.patch.object(typer, "confirm") as confirm:
        cli.clear()
    assert str(store.profile_path("GPU-0")) in confirm.call_args.args[0]
    assert store.list_profiles() == ()


def test_clear_deletes_nothing_after_a_no(
    profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_profile(profile)
    monkeypatch.setattr("sys.stdin", mock.Mock(isatty=lambda: True))
    with mock.patch.object(typer, "confirm", side_effect=typer.Abort), pytest.raises(typer.Abort):
        cli.clear()
    assert store.load_profile(profile.key) == profile


def test_clear_one(profile: Profile) -> None:
    store.save_profile(profile)
    store.save_profile(replace(profile, key="other"))
    assert as_json("clear", "other", "--yes") == {"deleted": [str(store.profile_path("other"))]}
    assert "no profile" in problem("clear", "other", "--yes")
    assert "Deleted" in output("clear", "--yes")
    assert store.list_profiles() == ()


def test_clear_deletes_no_file_elsewhere(tmp_path: Path, profile: Profile) -> None:
    store.save_profile(profile)
    copy = tmp_path / store.profile_path(profile.key).name
    output("export", str(copy))
    assert "no profile has a key" in problem("clear", str(copy), "--yes")
    assert copy.exists()
    assert store.load_profile(profile.key) == profile


def test_export(tmp_path: Path, profile: Profile) -> None:
    file = str(tmp_path / "out.json")
    assert "no profile yet" in problem("export", file)
    store.save_profile(replace(profile, key="other"))
    assert as_json("export", file) == {"key": "other", "path": file}
    store.save_profile(replace(profile, key="third"))
    assert "--key" in problem("export", file)
    assert "Test GPU" in output("export", file, "--key", "third")
    assert store.read_profile(Path(file)).key == "third"
    (tmp_path / "plain").touch()
    assert Path(file).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_import_takes_what_was_exported_here(tmp_path: Path, cpu: Profile) -> None:
    file = str(tmp_path / "out.json")
    store.save_profile(cpu)
    output("export", file, "--key", cpu.key)
    store.clear_profiles()
    assert "here, in" in output("import", file)
    assert as_json("import", file)["key"] == live.identity("cpu")
    assert "cannot read" in problem("import", file + ".missing")


def test_between_two_computers_a_pipe_is_enough(
    cpu: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_profile(cpu)
    sent = CliRunner().invoke(cli.app, ["export", "-", "--key", cpu.key]).stdout_bytes
    store.clear_profiles()
    received = CliRunner().invoke(cli.app, ["import", "-"], input=sent)
    assert received.exception is None
    stored = store.load_profile(cpu.key)
    assert stored is not None
    assert stored.machine.kernels == cpu.machine.kernels
    refused = CliRunner().invoke(cli.app, ["import", "-"], input=b"{")
    assert "standard input is not a readable profile" in str(refused.exception)


def test_a_backup_from_before_a_change_says_what_follows(tmp_path: Path, cpu: Profile) -> None:
    file = tmp_path / "out.json"
    file.write_bytes(coding.encode(changed(cpu, torch="1.0")))
    assert "At the next start: torch 1.0 → " in output("import", str(file))
    store.save_profile(cpu)
    told = output("import", str(file))
    assert "Kept the figures of " in told
    assert "Changed since: torch 1.0 there" in told
    assert "At the next start" not in told
    assert len(as_json("import", str(file))["outdated"]) == 1


def test_import_refuses_another_kind_of_machine(tmp_path: Path, profile: Profile) -> None:
    file = tmp_path / "gpu.json"
    file.write_bytes(coding.encode(profile))
    assert "a cuda device there, cpu here" in problem("import", str(file), "--device", "cpu")
    assert store.list_profiles() == ()


# --- diff


def test_diff_shows_what_differs_and_nothing_else(profile: Profile) -> None:
    plan = PlanRecord("w", "0", ("tome",), run_phases(2.0), Available(1), None, {}, "2026-01-01")
    other = replace(
        changed(profile, torch="2.13.0"),
        key="GPU-1",
        plans=(plan, replace(plan, workload="x")),
    )
    store.save_profile(replace(profile, plans=(replace(plan, optimizations=()),)))
    store.save_profile(other)
    text = output("diff", "GPU-0", "GPU-1")
    for part in ("torch", "2.13.0", "matmul float16", "50.0 TFLOP/s", "75.0 TFLOP/s", "1.50"):
        assert part in text
    for part in ("tome", "none", "not planned"):
        assert part in text
    for part in ("diffusers", "matmul float32", "memory rate", "PCIe", "RAM"):
        assert part not in text
    assert "figures differ by no more than noise" in text
    assert "matmul float32" in output("diff", "GPU-0", "GPU-1", "--all")
    assert output("diff", "GPU-1") == output("diff", "GPU-1", "GPU-0")


def test_diff_as_json(profile: Profile, tmp_path: Path) -> None:
    store.save_profile(profile)
    file = tmp_path / "other.json"
    file.write_bytes(coding.encode(changed(profile, torch="2.13.0")))
    found = as_json("diff", "GPU-0", str(file))
    assert found["b"]["path"] == str(file)
    assert found["difference"]["software"] == [{"name": "torch", "a": "2.12.0", "b": "2.13.0"}]
    (figure,) = found["difference"]["figures"]
    assert (figure["name"], figure["ratio"]) == ("matmul float16", 1.5)
    assert found["difference"]["plans"] == found["difference"]["machine"] == []


def test_what_is_said_to_be_absent_is_no_difference(profile: Profile) -> None:
    store.save_profile(profile)
    store.save_profile(replace(changed(profile, triton="", gguf="0.19.0"), key="GPU-1"))
    found = as_json("diff", "GPU-0", "GPU-1")["difference"]["software"]
    assert found == [{"name": "gguf", "a": None, "b": "0.19.0"}]


def test_nothing_differs(profile: Profile) -> None:
    store.save_profile(profile)
    assert "Nothing differs." in output("diff", "GPU-0", "GPU-0")
    assert "no profile has a key like" in problem("diff", "GPU-0", "no-such")


def test_noise_is_what_samples_say() -> None:
    def compared(a: Figure, b: Figure) -> bool:
        return profile_diff._compared("x", "s", a, b).is_noise

    assert compared(Figure(100.0), Figure(102.0))
    assert not compared(Figure(100.0), Figure(110.0))
    assert compared(Figure(100.0, spread=0.2), Figure(110.0))
    assert not compared(Figure(0.0), Figure(1.0))
    assert compared(Figure(0.0), Figure(0.0))


def test_attention_is_compared_at_a_shape_of_both(profile: Profile) -> None:
    small, large = (
        AttentionRate("sdpa", "float16", 1, 8, tokens, tokens, 40, Figure(float(tokens)))
        for tokens in (64, 128)
    )
    a, b = (
        replace(profile.machine, attention=rates)
        for rates in ((small, large), (replace(small, flops_per_s=Figure(128.0)),))
    )
    found = difference(replace(profile, machine=a), replace(profile, machine=b)).figures
    assert [(f.name, f.a, f.b) for f in found] == [("attention sdpa", 64.0, 128.0)]


def test_showing_imports_no_torch(profile: Profile) -> None:
    store.save_profile(profile)
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert json.loads(done.stdout)["profile"]["key"] == "GPU-0"
    assert not {"torch", "rich", "filelock"} & set(done.stderr.split())


@pytest.mark.parametrize(
    ("timestamp", "age"),
    [("2020-01-01T00:00:00Z", "days ago"), ("2020-01-01", "days ago"), ("long ago", "long ago")],
)
def test_age(timestamp: str, age: str) -> None:
    assert age in profile_show.age(timestamp)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 seconds"), (59, "59 seconds"), (120, "2 minutes"), (86400, "24 hours")],
)
def test_span(seconds: float, text: str) -> None:
    assert profile_show._span(seconds) == text
