from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from autotune.probe.machine import Figure, Machine, OperatorTime
from autotune.probe.parts import EVERYTHING
from autotune.probe.reference import load_machine
from autotune.profile.profile import Profile, is_before, moment
from autotune.profile.staleness import Facts, changes, facts_of, reasons, stale_parts


@pytest.fixture
def gpu() -> Machine:
    """A machine with everything that is measured."""
    recorded = load_machine("rtx-3080-10gb")
    device = replace(recorded.device, driver="580.82", uuid="GPU-0")
    host = replace(recorded.host, os="Linux 6.1.0-28-amd64", disk_read_bytes_per_s=Figure(2e9))
    software = {"torch": "2.12.0", "cuda": "13.0", "diffusers": "0.42.1", "python": "3.11.7"}
    return replace(recorded, device=device, host=host, software=software)


@pytest.fixture
def cpu() -> Machine:
    """A machine without a GPU."""
    return replace(load_machine("cpu-16-cores"), software={"torch": "2.12.0"})


def changed(machine: Machine, **now: Any) -> tuple[str, ...]:
    """The reasons after a change of facts."""
    before = facts_of(machine)
    return reasons(changes(before, before._replace(**now)), machine)


def parts(machine: Machine, **now: Any) -> set[str]:
    before = facts_of(machine)
    return set(stale_parts(changes(before, before._replace(**now))))


def software(machine: Machine, **versions: str | None) -> dict[str, str]:
    both: dict[str, str | None] = {**machine.software, **versions}
    return {name: version for name, version in both.items() if version}


def test_nothing_changed(gpu: Machine, cpu: Machine) -> None:
    assert changed(gpu) == changed(cpu) == ()


def test_what_is_not_known_has_not_changed(gpu: Machine) -> None:
    assert changed(gpu, driver=None, pcie=None, total_bytes=None, host=None) == ()
    nameless = replace(gpu, device=replace(gpu.device, driver=None))
    assert changed(nameless, driver="590.44") == ()


def test_a_driver_leaves_the_link_alone(gpu: Machine) -> None:
    assert changed(gpu, driver="590.44") == (
        "driver 580.82 → 590.44: kernels, attention, dispatch costs and module moves measured "
        "again; link and disk kept",
    )
    assert parts(gpu, driver="590.44") == EVERYTHING - {"link", "disk"}


def test_operators_that_go_are_counted(gpu: Machine) -> None:
    timed = replace(gpu, operators={"a": OperatorTime(1.0), "b": OperatorTime(2.0)})
    (reason,) = changed(timed, driver="590.44")
    assert reason.endswith("; link and disk kept; 2 operators timed again when next used")
    (reason,) = changed(timed, software=software(gpu, xformers="0.0.35"))
    assert "operators" not in reason


def test_changes_of_one_consequence_share_a_reason(gpu: Machine) -> None:
    (reason,) = changed(gpu, software=software(gpu, torch="2.13.0", cuda="13.1"))
    assert reason.startswith("torch 2.12.0 → 2.13.0, cuda 13.0 → 13.1: kernels, ")


def test_several_consequences_are_several_reasons(gpu: Machine) -> None:
    versions = software(gpu, diffusers="0.43.0", xformers="0.0.35")
    assert changed(gpu, software=versions) == (
        "xformers not installed → 0.0.35: attention measured again",
        "diffusers 0.42.1 → 0.43.0: dispatch costs measured again; "
        "kernels, link, module moves and disk kept",
    )


def test_packages_come_and_go(gpu: Machine) -> None:
    (reason,) = changed(gpu, software=software(gpu, cuda=None))
    assert reason.startswith("cuda 13.0 → not installed: kernels")


@pytest.mark.parametrize("absent", [{}, {"xformers": ""}])
def test_what_is_said_to_be_absent_is_as_what_is_not_there(
    gpu: Machine, absent: dict[str, str]
) -> None:
    """Profiles from before leave it out."""
    before = facts_of(replace(gpu, software=software(gpu) | absent))
    now = {version: software(gpu) | {"xformers": version} for version in ("", "0.0.35")}
    assert changes(before, before._replace(software=now[""])) == ()
    (change,) = changes(before, before._replace(software=now["0.0.35"]))
    assert str(change) == "xformers not installed → 0.0.35"


def test_what_does_not_matter(gpu: Machine) -> None:
    assert changed(gpu, software=software(gpu, python="3.11.9", tomesd="0.1.3")) == ()
    host = replace(gpu.host, ram_available_bytes=1 << 30, os="Linux 6.1.0-29-amd64")
    assert changed(gpu, host=host) == ()
    host = replace(gpu.host, ram_total_bytes=gpu.host.ram_total_bytes - (200 << 20))
    assert changes(facts_of(gpu), facts_of(gpu)._replace(host=host)) == ()


def test_python_runs_between_the_kernels(gpu: Machine) -> None:
    (reason,) = changed(gpu, software=software(gpu, python="3.13.1"))
    assert reason.startswith("Python 3.11 → 3.13: dispatch costs measured again; kernels,")


def test_another_slot(gpu: Machine) -> None:
    (reason,) = changed(gpu, pcie=(4, 4))
    assert reason.startswith("PCIe 4 x16 → 4 x4: link and module moves measured again; kernels,")


def test_the_host_around_a_gpu(gpu: Machine) -> None:
    assert parts(gpu, host=replace(gpu.host, cores=3)) == {"dispatch", "link", "modules"}
    for host in (replace(gpu.host, cpu="Other"), replace(gpu.host, os="Linux 6.8.1")):
        assert parts(gpu, host=host) == {"dispatch", "link", "modules", "disk"}


def test_the_host_that_is_the_device(cpu: Machine) -> None:
    assert parts(cpu, host=replace(cpu.host, cores=3)) == EVERYTHING
    (reason,) = changed(cpu, host=replace(cpu.host, cpu="Other"))
    assert reason.endswith(" → Other: everything measured again")


def test_ram_is_read_and_not_measured(gpu: Machine, cpu: Machine) -> None:
    for machine in (gpu, cpu):
        host = replace(machine.host, ram_total_bytes=2 * machine.host.ram_total_bytes)
        before = facts_of(machine)
        (change,) = changes(before, before._replace(host=host))
        assert change.what == "RAM"
        assert not change.parts
        assert reasons((change,), machine) == ()


def test_another_device(gpu: Machine) -> None:
    assert parts(gpu, device="Other") == parts(gpu, total_bytes=1 << 30) == EVERYTHING


def test_memory_that_is_the_hosts_is_none_of_the_device(gpu: Machine) -> None:
    shared = replace(gpu, device=replace(gpu.device, unified_memory=True))
    assert facts_of(shared).total_bytes is None
    assert isinstance(facts_of(gpu), Facts)


def test_records_from_before_a_change(profile: Profile) -> None:
    (run,) = profile.runs
    assert not profile.is_outdated(run)
    assert not replace(profile, changed_at=run.at).is_outdated(run)
    assert replace(profile, changed_at="2026-01-02T03:04:06Z").is_outdated(run)


def test_moments() -> None:
    assert is_before("2026-01-01T23:00:00-02:00", "2026-01-02T03:00:00Z")
    assert not is_before("long ago", "2026-01-02T03:00:00Z")
    assert not is_before("2026-01-01", None)
    assert moment("2026-01-01") == moment("2026-01-01T00:00:00+00:00")
