"""The way through: what is measured when, and what is remembered."""

from __future__ import annotations

import msgspec
import pytest

from autotune import tuner
from autotune.decide.limits import Limits
from autotune.errors import ModelError, RequestError
from autotune.probe import measure
from autotune.probe.live import identity
from autotune.probe.machine import Machine
from autotune.profile.profile import PhaseMeasurement
from autotune.profile.store import load_profile
from autotune.tuner import Ask, Measured, machine_here, make_plan, plan_here, planning, replayed
from autotune.tuner import here as here_stage


@pytest.fixture
def here(cpu_machine: Machine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A measurement that takes no time; the list counts how often it is asked for."""
    calls: list[int] = []
    from autotune.probe.host import read_host
    from autotune.probe.software import installed_versions

    def pretend(device: str | None = None, **_: object) -> Machine:
        calls.append(1)
        return msgspec.structs.replace(
            cpu_machine, source="measured", host=read_host(), software=installed_versions()
        )

    monkeypatch.setattr(measure, "measure_machine", pretend)
    return calls


def test_measured_once(here):
    first, second = machine_here("cpu"), machine_here("cpu")
    assert len(here) == 1
    assert first.reasons == ("no profile of this machine yet",)
    assert second.reasons == ()
    assert load_profile(identity("cpu")) is not None


def test_measured_again_when_something_changed(here, monkeypatch):
    machine_here("cpu")
    versions = here_stage.installed_versions() | {"torch": "99.0"}
    monkeypatch.setattr(here_stage, "installed_versions", lambda: versions)
    again = machine_here("cpu")
    assert len(here) == 2
    assert any("99.0" in r for r in again.reasons)


def test_a_new_driver_makes_the_profile_stale(rtx_3080, monkeypatch):
    """The driver is read now: the remembered machine still has the one it was measured with."""
    device = msgspec.structs.replace(rtx_3080.device, uuid="GPU-1", driver="580.82")
    profile = here_stage.new_profile("GPU-1", msgspec.structs.replace(rtx_3080, device=device))
    gpu = here_stage.nvml.Gpu(index=0, name="A", uuid="GPU-1", driver="590.44")
    monkeypatch.setattr(here_stage.nvml, "gpu", lambda uuid: gpu if uuid == "GPU-1" else None)
    assert "driver 580.82 → 590.44" in tuner.why_stale(profile)


def test_asked_to_measure(here):
    machine_here("cpu")
    assert machine_here("cpu", remeasure=True).reasons == ("asked to",)
    assert len(here) == 2


def test_free_memory_is_read_at_every_start(here, monkeypatch):
    machine_here("cpu")
    from autotune.probe import live

    monkeypatch.setattr(live, "ram", lambda: (8 << 30, 3 << 30))
    assert machine_here("cpu").machine.device.free_bytes == 3 << 30


def test_operators_are_timed_once_per_workload(here, monkeypatch):
    monkeypatch.setattr(planning, "REPLAY_S", 60.0)  # all of them, however busy the machine is
    measured = machine_here("cpu")
    planned = plan_here("demo", measured, Ask())
    stored = load_profile(measured.key)
    assert stored is not None
    keys = set(stored.machine.operators)
    assert keys
    measured = machine_here("cpu")
    assert replayed(measured, planned.workload, 3.0) is measured
    assert set(measured.machine.operators) == keys


def test_runs_are_remembered(here):
    measured = machine_here("cpu")
    planned = make_plan("demo", measured.machine, Ask())
    assert not tuner.was_verified(measured, planned)
    phases = tuple(PhaseMeasurement(p, 1.0) for p in ("encode", "denoise", "decode"))
    tuner.remember_run(measured, planned, phases)
    assert not tuner.was_verified(measured, planned)
    seen = tuple(msgspec.structs.replace(p, peak_bytes=1) for p in phases)
    tuner.remember_run(measured, planned, seen)
    assert tuner.was_verified(measured, planned)
    stored = load_profile(measured.key)
    assert stored is not None
    assert len(stored.runs) == 2


def test_a_run_far_from_its_prediction_has_its_operators_timed_again(here):
    """A busy machine, at replay or at the run, must not spoil every later prediction."""
    measured = machine_here("cpu")
    planned = plan_here("demo", measured, Ask())
    predicted = planned.plan.prediction.seconds

    def known() -> int:
        stored = load_profile(measured.key)
        assert stored is not None
        return len(stored.machine.operators)

    tuner.remember_run(measured, planned, (PhaseMeasurement("denoise", 1.5 * predicted),))
    assert known() > 0
    tuner.remember_run(measured, planned, (PhaseMeasurement("denoise", 9 * predicted),))
    assert known() == 0


def test_another_machine_is_never_written_to_the_profile(cpu_machine):
    make_plan("demo", cpu_machine, Ask())
    assert load_profile(identity("cpu")) is None


def test_a_builtin_name_is_loaded_from_its_repository():
    """Without a connection that is an error with a remedy, not a plan for other weights."""
    with pytest.raises(ModelError, match="stable-diffusion-v1-5"):
        tuner.loadable("sd15")
    assert tuner.loadable("demo").name == "demo"


def test_an_unknown_quality_is_refused_before_anything_is_read(cpu_machine):
    with pytest.raises(RequestError):
        make_plan("no-such-model", cpu_machine, Ask(limits=Limits(quality="x")))


def test_device_names(cpu_machine, rtx_3080):
    assert tuner.device_name(cpu_machine) == "cpu"
    assert tuner.device_name(rtx_3080) == "cuda:0"


def test_measured_is_a_plain_value(cpu_machine):
    assert Measured("key", cpu_machine, ()).machine is cpu_machine
