"""A profile measured on one machine, taken over by another of the same kind."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from autotune.errors import ProfileError
from autotune.probe import devices, host, live, nvml, software
from autotune.probe.machine import Device, Figure, GpuProcess, Machine, OperatorTime
from autotune.profile import coding
from autotune.profile.profile import Profile, RunRecord
from autotune.profile.store import load_profile, save_profile
from autotune.tuner import changes_here, fleet
from autotune.tuner import here as here_stage

GIB = 1 << 30
RUN = RunRecord("w", ("tome",), (), (), "2026-01-01T00:00:00+00:00")


@pytest.fixture
def here(rtx_3080: Machine, monkeypatch: pytest.MonkeyPatch) -> Device:
    """This machine has the second of two GPUs, with little free memory."""
    device = replace(
        rtx_3080.device,
        uuid="GPU-here",
        driver="580.82",
        index=1,
        free_bytes=2 * GIB,
        processes=(GpuProcess(7, GIB, "mine"),),
    )
    gpu = nvml.Gpu(
        index=1,
        uuid="GPU-here",
        name=device.name,
        driver="580.82",
        total_bytes=device.total_bytes,
        pcie_generation_max=4,
        pcie_width_max=16,
    )
    monkeypatch.setattr(devices, "choose_device", lambda name: name)
    monkeypatch.setattr(devices, "describe", lambda name, host: device)
    monkeypatch.setattr(nvml, "gpu", lambda uuid: gpu if uuid == "GPU-here" else None)
    monkeypatch.setattr(fleet, "other_gpus", lambda device: ())
    return device


@pytest.fixture
def there(here: Device, rtx_3080: Machine) -> Profile:
    """A profile of a machine of the same kind, with other memory free."""
    device = replace(
        here,
        uuid="GPU-there",
        index=0,
        free_bytes=9 * GIB,
        processes=(GpuProcess(4242, GIB, "theirs"),),
    )
    machine = replace(
        rtx_3080,
        source="measured",
        device=device,
        host=replace(host.read_host(), ram_available_bytes=1),
        software=software.installed_versions(),
        operators={"a": OperatorTime(1.0)},
        findings=("Other processes hold 1.00 GiB of the GPU's memory: theirs (PID 4242).",),
    )
    return Profile(
        key="GPU-there", machine=machine, runs=(RUN,), created_at="2026", updated_at="2026"
    )


def taken_over(profile: Profile, **changes: Any) -> Profile:
    """The profile of a machine with some differences, imported here."""
    exported = coding.encode(replace(profile, machine=replace(profile.machine, **changes)))
    return fleet.import_profile(coding.decode(exported, "it"), "it").profile


def test_the_same_kind_of_machine_takes_it_over(here: Device, there: Profile) -> None:
    stored = taken_over(there)
    assert load_profile("GPU-here") == stored
    assert load_profile("GPU-there") is None
    assert stored.machine.device == here
    assert stored.machine.host.ram_available_bytes > 1
    assert not any("4242" in finding for finding in stored.machine.findings)
    assert stored.machine.kernels == there.machine.kernels
    assert stored.machine.link == there.machine.link
    assert stored.machine.operators == there.machine.operators
    assert stored.runs == there.runs
    assert stored.created_at == "2026"
    assert changes_here(stored) == ()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": "NVIDIA GeForce RTX 3090"}, "device NVIDIA GeForce RTX 3090 there, "),
        ({"total_bytes": 12 * GIB}, "memory 12.0 GiB there, 10.0 GiB here"),
        ({"driver": "590.44"}, "driver 590.44 there, 580.82 here"),
    ],
)
def test_another_device_is_refused(change: dict[str, Any], told: str, there: Profile) -> None:
    with pytest.raises(ProfileError, match="another kind of machine") as raised:
        taken_over(there, device=replace(there.machine.device, **change))
    assert told in raised.value.message
    assert load_profile("GPU-here") is None


def test_other_software_and_another_computer_are_refused(there: Profile) -> None:
    machine = there.machine
    assert machine.link is not None
    for change in (
        {"software": {**machine.software, "torch": "1.0"}},
        {"host": replace(machine.host, cpu="Other")},
        {"link": replace(machine.link, pcie_generation_max=4, pcie_width_max=8)},
    ):
        with pytest.raises(ProfileError, match=r"(torch|CPU|PCIe) .* there, .* here"):
            taken_over(there, **change)


def test_another_amount_of_ram_is_no_other_kind(there: Profile) -> None:
    more = replace(there.machine.host, ram_total_bytes=1 << 45)
    stored = taken_over(there, host=more)
    assert stored.machine.host.ram_total_bytes < 1 << 45


def test_what_is_remembered_here_stays(there: Profile, here: Device) -> None:
    own = replace(RUN, workload="own")
    operators = {"b": OperatorTime(2.0)}
    machine = replace(there.machine, device=here, operators=operators)
    save_profile(replace(there, key="GPU-here", machine=machine, runs=(own,)))
    stored = taken_over(there)
    assert set(stored.runs) == {RUN, own}
    assert set(stored.machine.operators) == {"a", "b"}


def test_a_backup_of_this_machine_is_taken_back_and_found_stale(
    there: Profile, here: Device
) -> None:
    backup = replace(there, key="GPU-here")
    device = replace(here, driver="570.10")
    stored = taken_over(backup, device=device)
    assert stored.key == "GPU-here"
    assert [change.what for change in changes_here(stored)] == ["driver"]


def test_a_backup_from_before_a_change_takes_nothing_away(there: Profile, here: Device) -> None:
    """Neither the figures measured since, nor what was recorded with them."""
    own = replace(there, key="GPU-here", machine=replace(there.machine, device=here))
    save_profile(own)
    kernels = replace(own.machine.kernels, launch_s=Figure(0.5))
    machine = replace(own.machine, kernels=kernels, operators={"old": OperatorTime(9.0)})
    before = replace(own, machine=machine, runs=(replace(RUN, workload="old"),))
    old = replace(before, machine=replace(machine, device=replace(here, driver="570.10")))
    taken = fleet.import_profile(old, "it")
    assert taken.outdated == ("driver 570.10 there, 580.82 here",)
    assert taken.profile.machine == own.machine
    assert (taken.profile.runs, taken.profile.changed_at) == (own.runs, None)
    # What was exported here is as good as what is here, then and after that.
    again = fleet.import_profile(own, "it")
    assert again.outdated == ()
    assert again.profile.machine.kernels == own.machine.kernels
    assert (again.profile.runs, again.profile.changed_at) == (own.runs, None)


def test_after_a_change_what_is_imported_counts(there: Profile, here: Device) -> None:
    """What is stored here is from before it, and is told apart where that can be told."""
    late, early = (replace(RUN, workload="own", at=f"{y}-01-01T00:00:00Z") for y in (2030, 2020))
    device = replace(here, driver="570.10")
    machine = replace(there.machine, device=device, operators={"old": OperatorTime(9.0)})
    save_profile(replace(there, key="GPU-here", machine=machine, runs=(early, late)))
    since = "2025-01-01T00:00:00+00:00"
    stored = fleet.import_profile(replace(there, changed_at=since), "it").profile
    assert stored.machine.operators == there.machine.operators
    assert (stored.runs, stored.changed_at) == ((early, *there.runs), since)


def test_records_from_before_a_change_there_do_not_count_here(there: Profile, here: Device) -> None:
    since = "2026-06-01T00:00:00+00:00"
    stored = fleet.import_profile(replace(there, changed_at=since), "it").profile
    assert stored.is_outdated(stored.runs[0])
    save_profile(replace(stored, changed_at=None, runs=()))
    assert fleet.import_profile(replace(there, changed_at=since), "it").profile.runs == ()


def test_a_processors_profile_is_the_processors(
    there: Profile, here: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the default device is a GPU."""
    asked: list[str | None] = []
    cpu = Device(kind="cpu", name=host.cpu_name(), total_bytes=GIB, free_bytes=GIB)
    monkeypatch.setattr(devices, "choose_device", lambda name: asked.append(name))
    monkeypatch.setattr(devices, "describe", lambda *_: cpu)
    stored = taken_over(there, device=cpu, link=None)
    assert asked == ["cpu"]
    assert stored.key == live.identity("cpu")
    assert here_stage.why_stale(stored) == ()
