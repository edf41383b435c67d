"""The host, with made-up control groups of both versions."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from autotune.probe import host
from autotune.probe.host import (
    Neighbours,
    cpu_name,
    memlock_limit,
    ram,
    read_host,
    usable_cores,
)

GIB = 1 << 30


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def membership(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "self-cgroup"
    file.write_text(text)
    return file


def test_the_real_host() -> None:
    here = read_host()
    assert here.cpu
    assert 1 <= here.cores <= (os.cpu_count() or 1)
    assert 0 < here.ram_available_bytes <= here.ram_total_bytes
    assert here.disk_read_bytes_per_s is None, "that takes longer than reading facts may"


def test_memory_limit_of_version_2_counts_at_any_level(tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    write(groups / "a", memory__max=f"{GIB}\n", memory__current=f"{GIB // 2}\n")
    write(groups / "a" / "b", memory__max="max\n", memory__current="1\n")
    total, available = ram(membership(tmp_path, "0::/a/b\n"), groups)
    assert (total, available) == (GIB, GIB // 2)


def test_droppable_cache_is_available(tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    write(
        groups,
        memory__max=f"{GIB}",
        memory__current=f"{GIB}",
        memory__stat=f"anon 5\ninactive_file {GIB // 4}\n",
    )
    assert ram(membership(tmp_path, "0::/\n"), groups) == (GIB, GIB // 4)


def test_memory_limit_of_version_1(tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    folder = groups / "memory" / "docker" / "x"
    write(folder, memory__limit_in_bytes=f"{GIB}", memory__usage_in_bytes=f"{GIB // 4}")
    file = membership(tmp_path, "5:devices:/\n4:memory:/docker/x\n0::/\n")
    assert ram(file, groups) == (GIB, 3 * GIB // 4)


def test_inside_a_container_the_mount_root_speaks(tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    write(groups / "memory", memory__limit_in_bytes=f"{GIB}", memory__usage_in_bytes="0")
    file = membership(tmp_path, "4:memory:/docker/of-the-host\n")
    assert ram(file, groups) == (GIB, GIB)


@pytest.mark.parametrize("text", ["", "nonsense\n", "0::/gone\n", "4:memory\n"])
def test_no_limit_leaves_the_machine(tmp_path: Path, text: str) -> None:
    total, available = ram(membership(tmp_path, text), tmp_path / "nothing")
    assert total >= available > 0
    assert usable_cores(membership(tmp_path, text), tmp_path / "nothing") >= 1


@pytest.mark.parametrize("quota", ["50000 100000", "100000 100000"])
def test_cpu_quota_is_rounded_up(tmp_path: Path, quota: str) -> None:
    groups = tmp_path / "cgroup"
    write(groups, cpu__max=quota)
    assert usable_cores(membership(tmp_path, "0::/\n"), groups) == 1


def test_cpu_quota_of_version_1(tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    write(groups / "cpu,cpuacct", cpu__cfs_quota_us="80000", cpu__cfs_period_us="100000")
    assert usable_cores(membership(tmp_path, "3:cpu,cpuacct:/\n"), groups) == 1


def test_cpu_name(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nmodel name\t: Intel(R)  Xeon(R) CPU\n")
    assert cpu_name(file) == "Intel(R) Xeon(R) CPU"
    assert cpu_name(tmp_path / "absent")


def test_neighbours_are_never_negative() -> None:
    watch = Neighbours()
    sum(range(10**6))
    assert 0 <= watch.busy_cores() <= (os.cpu_count() or 1) + 1
    assert 0 <= watch.stolen_cores() <= (os.cpu_count() or 1) + 1


def test_stolen_time_is_not_the_work_of_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([host._Times(0, 0, 0, 0), *[host._Times(10, 25, 5, 15)] * 2])
    monkeypatch.setattr(host, "_read_times", lambda: next(readings))
    monkeypatch.setattr(host, "_affinity", lambda: 4)
    monkeypatch.setattr(host, "usable_cores", lambda: 4)
    watch = Neighbours()
    assert (watch.busy_cores(), watch.stolen_cores()) == (2.0, 1.5)


def test_a_quota_leaves_cores_that_others_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([host._Times(0, 0, 0, 0), host._Times(10, 630, 30, 0)])
    monkeypatch.setattr(host, "_read_times", lambda: next(readings))
    monkeypatch.setattr(host, "_affinity", lambda: 64)
    monkeypatch.setattr(host, "usable_cores", lambda: 8)
    assert Neighbours().busy_cores() == 4.0


def test_the_limit_of_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8 << 20, resource.RLIM_INFINITY))
    assert memlock_limit() == 8 << 20
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert memlock_limit() is None
    monkeypatch.setitem(sys.modules, "resource", None)
    assert memlock_limit() is None
