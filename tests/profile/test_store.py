from __future__ import annotations

import errno
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import filelock
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.errors import ProfileError
from autotune.probe.machine import GpuProcess
from autotune.profile import files, store
from autotune.profile.profile import SCHEMA_VERSION, PhaseMeasurement, Profile, RunRecord

NOBODY = 65534
FIXTURES = Path(__file__).parent / "fixtures"
REPOSITORY = Path(__file__).parents[2]

finite = st.floats(allow_nan=False, allow_infinity=False)
counts = st.none() | st.integers(0, 1 << 60)
phases = st.lists(
    st.builds(PhaseMeasurement, name=st.text(), seconds=finite, peak_bytes=counts), max_size=3
).map(tuple)
runs = st.builds(
    RunRecord,
    workload=st.text(),
    optimizations=st.lists(st.text()).map(tuple),
    predicted=phases,
    measured=phases,
    at=st.text(),
)


def with_runs(profile: Profile, *records: RunRecord) -> Profile:
    return msgspec.structs.replace(profile, runs=records)


def set_aside(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.set-aside-*"))


def put(key: str, data: bytes) -> Path:
    store.cache_folder()
    path = store.profile_path(key)
    path.write_bytes(data)
    return path


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


# --- the cache folder


def test_the_folder_is_made_for_its_owner_alone(cache: Path) -> None:
    assert store.cache_folder() == cache
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_the_default_folder_is_the_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOTUNE_CACHE", "")
    assert "diffusers-autotune" in str(store.profile_path("key"))


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AUTOTUNE_CACHE", "~/here")
    assert store.cache_folder() == tmp_path / "here"


def test_an_unknown_users_home_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOTUNE_CACHE", "~no-such-user-here/cache")
    with pytest.raises(ProfileError, match="no-such-user-here"):
        store.cache_folder()


@pytest.mark.parametrize("below", [".", "deeper/down"])
def test_a_folder_that_cannot_be_is_named(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: Profile
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOTUNE_CACHE", str(tmp_path / "file" / below))
    with pytest.raises(ProfileError, match=r"file.*AUTOTUNE_CACHE"):
        store.cache_folder()
    with pytest.raises(ProfileError, match=r"file.*AUTOTUNE_CACHE"):
        store.save_profile(profile)
    assert store.load_profile(profile.key) is None
    assert store.list_profiles() == ()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_read_and_not_written(cache: Path, profile: Profile) -> None:
    store.save_profile(profile)
    cache.chmod(0o500)
    try:
        assert store.load_profile(profile.key) == profile
        with pytest.raises(ProfileError, match="not writable"):
            store.save_profile(profile)
    finally:
        cache.chmod(0o700)


def test_a_corrupt_file_in_a_read_only_folder_is_no_crash(
    profile: Profile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = put(profile.key, b"{")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert store.load_profile(profile.key) is None
    assert "could not be set aside" in caplog.text
    assert path.read_bytes() == b"{"


# --- writing and reading


def test_what_is_saved_is_loaded(profile: Profile) -> None:
    assert store.load_profile(profile.key) is None
    store.save_profile(profile)
    assert store.load_profile(profile.key) == profile


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_profile_survives_the_round_trip(data: st.DataObject) -> None:
    old = store.read_profile(FIXTURES / "v1.json")
    profile = msgspec.structs.replace(
        old,
        key=data.draw(st.text()),
        created_at=data.draw(st.text()),
        runs=tuple(data.draw(st.lists(runs, max_size=3))),
        machine=msgspec.structs.replace(
            old.machine,
            context_bytes=data.draw(st.integers(0, old.machine.device.total_bytes)),
            software=data.draw(st.dictionaries(st.text(), st.text())),
            findings=tuple(data.draw(st.lists(st.text()))),
        ),
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, AUTOTUNE_CACHE=folder),
    ):
        store.save_profile(profile)
        assert store.load_profile(profile.key) == profile


def test_another_process_change_is_seen_at_once(profile: Profile, run: RunRecord) -> None:
    """Though a file that is the same is not read twice."""
    store.save_profile(profile)
    first = store.load_profile(profile.key)
    assert store.load_profile(profile.key) is first
    path = store.profile_path(profile.key)
    files.replace_file(path, path.read_bytes().replace(b"580.82", b"590.44"), "")
    changed = store.load_profile(profile.key)
    assert changed is not None
    assert changed.machine.device.driver == "590.44"
    path.write_bytes(b"{")
    assert store.load_profile(profile.key) is None


def test_files_are_their_owners_and_say_their_schema(cache: Path, profile: Profile) -> None:
    store.save_profile(profile)
    path = store.profile_path(profile.key)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["schema_version"] == SCHEMA_VERSION
    assert list(cache.glob("*.tmp")) == []


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), "fast", 10**400])
def test_what_would_not_read_back_is_not_written(
    seconds: Any, cache: Path, profile: Profile, run: RunRecord
) -> None:
    store.save_profile(profile)
    odd = msgspec.structs.replace(run, measured=(PhaseMeasurement(name="x", seconds=seconds),))
    with pytest.raises(ProfileError):
        store.save_profile(with_runs(profile, odd))
    assert store.load_profile(profile.key) == profile


def test_nan_in_an_optional_field_is_not_written_as_missing(profile: Profile) -> None:
    device = msgspec.structs.replace(profile.machine.device, power_limit_watts=float("nan"))
    machine = msgspec.structs.replace(profile.machine, device=device)
    with pytest.raises(ProfileError, match="not finite"):
        store.save_profile(msgspec.structs.replace(profile, machine=machine))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_other(
    step: str, cache: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_profile(profile)
    before = sorted(cache.iterdir())

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    with pytest.raises(ProfileError, match=r"No space left.*AUTOTUNE_CACHE"):
        store.save_profile(with_runs(profile))
    assert sorted(cache.iterdir()) == before
    assert store.load_profile(profile.key) == profile


FILL = """
import resource, sys
from pathlib import Path
from autotune.errors import ProfileError
from autotune.probe.machine import GpuProcess
from autotune.profile import store
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
profile = store.load_profile(sys.argv[1])
for write in (
    lambda: store.update_profile(sys.argv[1], lambda old: old),
    lambda: store.export_profile(sys.argv[1], Path(sys.argv[2])),
):
    try:
        write()
    except ProfileError as error:
        print(error.message)
assert store.updated_if_possible(sys.argv[1], lambda old: old) is None
assert store.load_profile(sys.argv[1]) == profile
"""


@pytest.mark.skipif(os.name != "posix", reason="no such limits here")
def test_a_write_that_really_fails_leaves_the_old_file_and_no_other(
    cache: Path, tmp_path: Path, profile: Profile
) -> None:
    store.save_profile(profile)
    child = python(FILL, profile.key, str(tmp_path / "out.json"))
    printed, _ = child.communicate(timeout=20)
    assert child.returncode == 0
    assert printed.count("File too large") == 2
    assert store.load_profile(profile.key) == profile
    assert not (tmp_path / "out.json").exists()
    assert list(cache.glob(".*.tmp")) == []


@contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """Root may write anywhere: for a while this process is somebody who may only read."""
    for path in (folder, *folder.iterdir()):
        os.chown(path, NOBODY, NOBODY)
    folder.chmod(0o500)
    try:
        os.setresuid(NOBODY, NOBODY, 0)
        yield
    finally:
        os.setresuid(0, 0, 0)
        folder.chmod(0o700)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root to be nobody")
def test_root_in_a_read_only_folder(
    profile: Profile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("AUTOTUNE_CACHE", folder)
        store.save_profile(profile)
        put("corrupt", b"{")
        with as_nobody(Path(folder)):
            assert store.load_profile(profile.key) == profile
            with pytest.raises(ProfileError, match="not writable"):
                store.save_profile(profile)
            assert store.updated_if_possible(profile.key, lambda old: old or profile) is None
            assert store.load_profile("corrupt") is None
        assert "is not remembered" in caplog.text
        assert "could not be set aside" in caplog.text
        assert store.profile_path("corrupt").read_bytes() == b"{"


def test_ctrl_c_while_writing_leaves_nothing_half_written(
    cache: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_profile(profile)
    before = sorted(cache.iterdir())
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.save_profile(with_runs(profile))
    assert sorted(cache.iterdir()) == before


def test_what_a_killed_writer_left_is_swept(cache: Path, profile: Profile) -> None:
    store.cache_folder()
    orphan = cache / f".{store.profile_path('x').name}.abc.tmp"
    orphan.touch()
    store.save_profile(profile)
    assert not orphan.exists()


# --- files that cannot be used


def bad_files() -> dict[str, bytes]:
    good = (FIXTURES / "v1.json").read_bytes()
    v2 = (FIXTURES / "v2.json").read_bytes()
    fields = json.loads(good)
    return {
        "empty": b"",
        "truncated": good[: len(good) // 2],
        "binary": bytes(range(256)) * 10,
        "not UTF-8": good.replace(b"Test GPU", b"\xff\xfe"),
        "foreign": b'{"name": "something", "version": "1.0"}',
        "a list": b"[1, 2, 3]",
        "deep": b"[" * 1_000_000,
        "deep inside": b'{"schema_version": 1, "key": ' + b"[" * 1_000_000,
        "deep in an unknown field": b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        "NaN": good.replace(b'"seconds": 1.5', b'"seconds": NaN'),
        "infinite": good.replace(b'"seconds": 1.5', b'"seconds": 1e999'),
        "wrong type": json.dumps({**fields, "runs": "none"}).encode(),
        "unknown field": json.dumps({**fields, "extra": 1}).encode(),
        "newer": json.dumps({**fields, "schema_version": SCHEMA_VERSION + 1, "new": 1}).encode(),
        "another's": json.dumps({**fields, "key": "GPU-9"}).encode(),
        "no version": json.dumps({**fields, "schema_version": None}).encode(),
        "huge": b" " * (files.MAX_FILE_BYTES + 1),
        "a huge number": good.replace(b'"cores": 8', b'"cores": ' + b"8" * 5000),
        "a machine that cannot be": good.replace(b'"value": 700000000000.0', b'"value": 0.0'),
        "an absurd rate": good.replace(b'"value": 700000000000.0', b'"value": 1e-300'),
        "negative memory": good.replace(b'"free_bytes": 9', b'"free_bytes": -9'),
        "a version that never was": json.dumps({**fields, "schema_version": 0}).encode(),
        "deep in a plan": v2.replace(b'"fits": true', b'"x": ' + b"[" * 9999 + b"]" * 9999),
        "NaN in a plan": v2.replace(b'"fits": true', b'"x": NaN'),
    }


@pytest.mark.parametrize("kind", bad_files())
def test_a_bad_file_is_set_aside_and_measured_again(
    kind: str, cache: Path, profile: Profile, caplog: pytest.LogCaptureFixture
) -> None:
    data = bad_files()[kind]
    path = put(profile.key, data)
    with caplog.at_level(logging.WARNING, "autotune"):
        assert store.load_profile(profile.key) is None
    (kept,) = set_aside(cache)
    assert kept.read_bytes() == data
    assert kept.name.startswith(path.name)
    assert str(kept) in caplog.text
    assert not path.exists()
    store.save_profile(profile)
    assert store.load_profile(profile.key) == profile


def test_every_bad_file_is_kept(cache: Path, profile: Profile) -> None:
    for number in range(3):
        put(profile.key, b"%d" % number)
        store.load_profile(profile.key)
    assert [path.read_bytes() for path in set_aside(cache)] == [b"0", b"1", b"2"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders here")
def test_a_pipe_in_the_files_place_is_set_aside_unread(cache: Path, profile: Profile) -> None:
    """Reading it would wait for a writer for ever."""
    store.cache_folder()
    os.mkfifo(store.profile_path(profile.key))
    assert store.load_profile(profile.key) is None
    assert len(set_aside(cache)) == 1


def test_a_link_in_the_files_place_is_replaced_and_not_followed(
    cache: Path, tmp_path: Path, profile: Profile
) -> None:
    store.cache_folder()
    other = tmp_path / "other"
    other.write_text("somebody's")
    store.profile_path(profile.key).symlink_to(other)
    assert store.load_profile(profile.key) is None
    store.save_profile(profile)
    assert other.read_text() == "somebody's"
    assert store.load_profile(profile.key) == profile


def test_what_would_steer_a_terminal_is_spelled_out(
    profile: Profile, caplog: pytest.LogCaptureFixture
) -> None:
    put(profile.key, b'{"schema_version": 2, "\\u001b[2Jgone": 1}')
    assert store.load_profile(profile.key) is None
    assert "\x1b" not in caplog.text
    assert "x1b[2Jgone" in caplog.text


def test_a_folder_in_the_files_place_is_set_aside(cache: Path, profile: Profile) -> None:
    store.cache_folder()
    store.profile_path(profile.key).mkdir()
    assert store.load_profile(profile.key) is None
    assert len(set_aside(cache)) == 1


def test_updating_a_bad_file_sets_it_aside_too(cache: Path, profile: Profile) -> None:
    put(profile.key, b"{}")
    assert store.update_profile(profile.key, lambda old: old or profile) == profile
    assert len(set_aside(cache)) == 1


def test_reading_a_file_by_path_is_strict(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot read"):
        store.read_profile(tmp_path / "missing.json")
    (tmp_path / "newer.json").write_bytes(b'{"schema_version": 99, "anything": []}')
    with pytest.raises(ProfileError, match=r"schema 99.*update"):
        store.read_profile(tmp_path / "newer.json")


# --- keys


@pytest.mark.parametrize(
    "key",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/b",
        "a\\b",
        "C:\\x",
        "nul\0byte",
        "CON",
        "*",
        "~root",
        "é" * 500,
        "x" * 5000,
        "\ud800",
        "-rf",
        "a\nb",
    ],
)
def test_no_key_leaves_the_folder(key: str, cache: Path, profile: Profile) -> None:
    path = store.profile_path(key)
    assert path.parent == cache
    assert len(path.name) < 120
    assert path.name.isascii()
    if key != "\ud800":
        named = msgspec.structs.replace(profile, key=key)
        store.save_profile(named)
        assert store.load_profile(key) == named


@given(st.lists(st.text(), min_size=2, max_size=2, unique=True))
def test_two_keys_have_two_files(keys: list[str]) -> None:
    first, second = map(store.profile_path, keys)
    assert first.name.lower() != second.name.lower()


# --- several writers


# Each of the processes measures the machine, times operators, plans, runs, and runs out of memory.
WORK = """
import sys
from msgspec.structs import replace
from autotune.profile import store
from autotune.probe.machine import Figure, OperatorTime
from autotune.profile.merging import with_machine, with_operators, with_records
key, file, me = sys.argv[1], store.Path(sys.argv[2]), sys.argv[3]
given = store.read_profile(file)
sys.stdin.readline()  # all begin at once
kernels = given.machine.kernels
rates = {"float32": Figure(1e12), f"dtype {me}": Figure(1e12)}
machine = replace(given.machine, kernels=replace(kernels, matmul_flops_per_s=rates))
for turn in range(4):
    name = f"process {me}, turn {turn}"
    now = f"2027-01-01T00:00:0{turn}+00:00"
    store.update_profile(key, lambda old: with_machine(old, key, machine, now))
    found = {name: OperatorTime(1.0)}
    store.update_profile(key, lambda old: with_operators(old, key, machine, found, now))
    run, plan, misfit = (
        replace(record, workload=name, at=now)
        for record in (given.runs[0], given.plans[0], given.misfits[0])
    )
    store.update_profile(
        key, lambda old: with_records(old, now, runs=[run], plans=[plan], misfits=[misfit])
    )
"""

LOAD = """
import sys
from autotune.profile import store
store.load_profile("x")
print(*sys.modules)
"""

HOLD = """
import sys, time
from autotune.profile.files import locked
with locked():
    print("held", flush=True)
    time.sleep(60)
"""


def test_eight_processes_lose_nothing() -> None:
    """They find no profile, so that even who makes it is up to chance."""
    key, file = "GPU-0", str(FIXTURES / "v2.json")
    workers = [python(WORK, key, file, str(me)) for me in range(8)]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    assert [worker.wait(60) for worker in workers] == [0] * 8
    stored = store.load_profile(key)
    assert stored is not None
    names = {f"process {me}, turn {turn}" for me in range(8) for turn in range(4)}
    assert set(stored.machine.operators) == names
    assert {run.workload for run in stored.runs} == names
    assert {plan.workload for plan in stored.plans} == names
    assert {misfit.workload for misfit in stored.misfits} == names
    rates = stored.machine.kernels.matmul_flops_per_s
    assert {f"dtype {me}" for me in range(8)} <= set(rates)


def test_threads_lose_nothing(profile: Profile, run: RunRecord) -> None:
    def add(number: int) -> None:
        one = msgspec.structs.replace(run, at=str(number))
        store.update_profile(
            profile.key, lambda old: with_runs(profile, *(old.runs if old else ()), one)
        )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(16)))
    stored = store.load_profile(profile.key)
    assert stored is not None
    assert {run.at for run in stored.runs} == set(map(str, range(16)))


def test_a_held_lock_is_named_and_a_killed_holder_does_not_block(
    cache: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LOCK_TIMEOUT_S", 0.2)
    store.save_profile(profile)
    holder = python(HOLD)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ProfileError, match=rf"process {holder.pid} .*\.lock for 0.2 s"):
            store.save_profile(profile)
        # Nobody waits long for it a second time; it is said in the same words.
        monkeypatch.setattr(files, "LOCK_TIMEOUT_S", 3600)
        with pytest.raises(ProfileError, match=rf"process {holder.pid} has held the lock"):
            store.save_profile(profile)
        assert store.load_profile(profile.key) == profile
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate(timeout=10)
    store.save_profile(profile)
    assert not files._hung


def test_a_folder_without_locks_is_read_and_not_written(
    profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some network file systems are."""
    store.save_profile(profile)
    monkeypatch.setattr(filelock.FileLock, "acquire", mock.Mock(side_effect=NotImplementedError))
    with pytest.raises(ProfileError, match="has no locks"):
        store.save_profile(profile)
    assert store.load_profile(profile.key) == profile


def test_an_update_may_fail_and_changes_nothing(profile: Profile) -> None:
    store.save_profile(profile)
    with pytest.raises(ZeroDivisionError):
        store.update_profile(profile.key, lambda _: 1 // 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="'other'"):
        store.update_profile("other", lambda _: profile)
    assert store.load_profile(profile.key) == profile


# --- listing, clearing, moving


def test_the_list_has_the_unreadable_too(profile: Profile) -> None:
    store.save_profile(profile)
    bad = put("bad", b"{")
    listed = {stored.path: stored for stored in store.list_profiles()}
    assert listed[store.profile_path(profile.key)].profile == profile
    assert listed[bad].profile is None
    assert "not a readable profile" in str(listed[bad].problem)


def test_clearing_deletes_profiles_and_nothing_else(cache: Path, profile: Profile) -> None:
    assert store.clear_profiles() == ()
    assert not cache.exists()
    put(profile.key, b"{")
    store.load_profile(profile.key)
    store.save_profile(profile)
    store.save_profile(msgspec.structs.replace(profile, key="other"))
    foreign = cache / "package.json"
    foreign.touch()
    assert len(store.clear_profiles("other")) == 1
    assert len(store.clear_profiles()) == 2
    assert store.list_profiles() == ()
    assert foreign.exists()


def test_export(tmp_path: Path, profile: Profile) -> None:
    held = (GpuProcess(4242, 1 << 30, "secret-project"),)
    device = msgspec.structs.replace(profile.machine.device, processes=held)
    machine = msgspec.structs.replace(profile.machine, device=device)
    store.save_profile(msgspec.structs.replace(profile, machine=machine))
    file = tmp_path / "out.json"
    assert store.export_profile(profile.key, file) == profile  # without those processes
    assert store.read_profile(file) == profile


def test_export_writes_regular_files_only(tmp_path: Path, profile: Profile) -> None:
    with pytest.raises(ProfileError, match="no profile of GPU-0"):
        store.export_profile(profile.key, tmp_path / "x")
    store.save_profile(profile)
    with pytest.raises(ProfileError, match="not a regular file"):
        store.export_profile(profile.key, Path(os.devnull))
    with pytest.raises(ProfileError, match="not a regular file"):
        store.export_profile(profile.key, tmp_path)
    with pytest.raises(ProfileError, match="cannot write"):
        store.export_profile(profile.key, tmp_path / "no" / "folder")
    assert Path(os.devnull).is_char_device()


def test_reading_profiles_imports_nothing_heavy() -> None:
    output, _ = python(LOAD).communicate(timeout=20)
    assert not {"torch", "rich", "filelock"} & set(output.split())
