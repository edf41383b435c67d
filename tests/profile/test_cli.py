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
from autotune.errors import MachineError, ProfileError
from autotune.probe import host, live, software
from autotune.profile import store
from autotune.profile.profile import Profile

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
    monkeypatch.setattr(live, "identity", lambda device=None: device or "GPU-0")
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


def test_show_says_what_is_stale(fresh: Profile) -> None:
    machine = replace(fresh.machine, software={**fresh.machine.software, "torch": "1.0"})
    store.save_profile(replace(fresh, machine=machine))
    assert "torch 1.0 → " in output("show")
    (reason,) = as_json("show")["stale"]
    assert reason.startswith("torch 1.0 → ")


def test_show_falls_back_on_the_latest_of_another_machine(profile: Profile) -> None:
    store.save_profile(replace(profile, key="old", updated_at="2020"))
    store.save_profile(replace(profile, key="new", updated_at="2025"))
    assert as_json("show")["profile"]["key"] == "new"
    assert as_json("show")["stale"] is None
    assert "another machine's" in output("show")
    with mock.patch.object(live, "identity", side_effect=MachineError("no device")):
        assert as_json("show")["stale"] is None


def test_the_cpu_profile_of_a_machine_with_a_gpu_is_its_own(fresh: Profile) -> None:
    device = replace(fresh.machine.device, uuid=None)
    machine = replace(fresh.machine, device=device)
    store.save_profile(replace(fresh, key="cpu", machine=machine, updated_at="2020"))
    store.save_profile(replace(fresh, key="other"))
    assert as_json("show")["profile"]["key"] == "cpu"
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


def test_export_and_import(tmp_path: Path, profile: Profile) -> None:
    file = str(tmp_path / "out.json")
    assert "no profile yet" in problem("export", file)
    store.save_profile(replace(profile, key="other"))
    assert as_json("export", file) == {"key": "other", "path": file}
    store.save_profile(replace(profile, key="third"))
    assert "--key" in problem("export", file)
    assert "Test GPU" in output("export", file, "--key", "third")
    store.clear_profiles()
    assert "Test GPU" in output("import", file)
    assert as_json("import", file)["key"] == "third"
    assert "cannot read" in problem("import", file + ".missing")


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
    assert age in cli._age(timestamp)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 seconds"), (59, "59 seconds"), (120, "2 minutes"), (86400, "24 hours")],
)
def test_span(seconds: float, text: str) -> None:
    assert cli._span(seconds) == text
