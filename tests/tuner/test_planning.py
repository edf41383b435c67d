"""The way through: what is measured when, and what is remembered."""

from __future__ import annotations

import msgspec
import pytest

from autotune import tuner
from autotune.decide.corrections import replayable
from autotune.decide.limits import Limits
from autotune.errors import ModelError, RequestError
from autotune.probe import measure
from autotune.probe.live import identity
from autotune.probe.machine import Machine, OperatorTime
from autotune.probe.parts import EVERYTHING, Part
from autotune.probe.reference import load_machine
from autotune.probe.software import OPTIONAL
from autotune.profile.merging import with_operators
from autotune.profile.profile import PhaseMeasurement
from autotune.profile.store import load_profile, profile_path, update_profile
from autotune.tuner import Ask, Measured, machine_here, make_plan, plan_here, replayed
from autotune.tuner import here as here_stage
from autotune.workload.workload import Workload


@pytest.fixture
def here(cpu_machine: Machine, monkeypatch: pytest.MonkeyPatch) -> list[frozenset[Part]]:
    """A measurement that takes no time; the list has what it is asked for."""
    calls: list[frozenset[Part]] = []
    from autotune.probe.host import read_host

    def pretend(
        device: str | None = None, parts: frozenset[Part] = EVERYTHING, **_: object
    ) -> Machine:
        calls.append(parts)
        installed_versions = here_stage.installed_versions  # as a test may have changed it
        return msgspec.structs.replace(
            cpu_machine, source="measured", host=read_host(), software=installed_versions()
        )

    monkeypatch.setattr(measure, "measure_machine", pretend)
    return calls


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    """The demo's, traced once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return tuner.work_out("demo", load_machine("cpu-16-cores"), Ask())[1]


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
    assert here == [EVERYTHING, EVERYTHING - {"link", "disk"}]
    (reason,) = again.reasons
    assert "→ 99.0: everything measured again" in reason  # disk and link, this machine has not
    assert machine_here("cpu").reasons == ()
    assert len(here) == 2


def test_only_what_is_stale_is_measured_again(here, monkeypatch):
    key = machine_here("cpu").key
    stored = load_profile(key)
    assert stored is not None
    versions = here_stage.installed_versions() | {"xformers": "99.0"}
    monkeypatch.setattr(here_stage, "installed_versions", lambda: versions)
    (reason,) = machine_here("cpu").reasons
    assert reason.endswith("→ 99.0: attention measured again; kernels and dispatch costs kept")
    assert here[1:] == [{"attention"}]
    again = load_profile(key)
    assert again is not None
    assert again.changed_at is not None
    assert stored.changed_at is None
    assert again.created_at == stored.created_at


def test_an_older_schema_is_no_reason_to_measure(here):
    key = machine_here("cpu").key
    path = profile_path(key)
    path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 1'))
    assert machine_here("cpu").reasons == ()
    assert len(here) == 1


def test_a_folder_that_cannot_be_used_is_a_warning(here, workload, monkeypatch, tmp_path, caplog):
    """As in a container with a read-only file system: measured at every start, and said."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOTUNE_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        measured = machine_here("cpu")
        assert measured.reasons == ("no profile of this machine yet",)
    assert replayed(measured, workload, 0.1).machine.operators
    assert len(here) == 2
    assert "not remembered" in caplog.text
    assert "AUTOTUNE_CACHE" in caplog.text


def test_what_was_measured_before_is_merged_not_replaced(here, workload):
    """A corrupt file apart, nothing that was remembered is lost by measuring again."""
    measured = machine_here("cpu")
    replayed(measured, workload, 0.1)
    stored = load_profile(measured.key)
    assert stored is not None
    again = machine_here("cpu", remeasure=True)
    assert set(again.machine.operators) == set(stored.machine.operators) != set()


def test_a_corrupt_profile_is_set_aside_and_measured_again(here):
    path = profile_path(machine_here("cpu").key)
    path.write_text(path.read_text()[:500])
    assert machine_here("cpu").reasons == ("no profile of this machine yet",)
    assert len(list(path.parent.glob("*.set-aside-*"))) == 1
    assert machine_here("cpu").reasons == ()


def test_a_new_driver_makes_the_profile_stale(rtx_3080, monkeypatch):
    """The driver is read now: the remembered machine still has the one it was measured with."""
    device = msgspec.structs.replace(rtx_3080.device, uuid="GPU-1", driver="580.82")
    profile = here_stage.new_profile("GPU-1", msgspec.structs.replace(rtx_3080, device=device))
    gpu = here_stage.nvml.Gpu(index=0, name="A", uuid="GPU-1", driver="590.44")
    monkeypatch.setattr(here_stage.nvml, "gpu", lambda uuid: gpu if uuid == "GPU-1" else None)
    monkeypatch.setattr(here_stage, "installed_versions", lambda: rtx_3080.software)
    monkeypatch.setattr(here_stage, "read_host", lambda: rtx_3080.host)
    (reason,) = tuner.why_stale(profile)
    assert "driver 580.82 → 590.44" in reason


def test_asked_to_measure(here):
    machine_here("cpu")
    assert machine_here("cpu", remeasure=True).reasons == ("asked to",)
    assert len(here) == 2


def test_free_memory_is_read_at_every_start(here, monkeypatch):
    machine_here("cpu")
    from autotune.probe import live

    monkeypatch.setattr(live, "ram", lambda: (8 << 30, 3 << 30))
    assert machine_here("cpu").machine.device.free_bytes == 3 << 30


def test_a_package_installed_since_is_there_and_makes_nothing_stale(here, monkeypatch):
    """Nor does one that a profile from before knows nothing of."""
    then = here_stage.installed_versions()
    bare = {name: version for name, version in then.items() if name not in OPTIONAL}
    monkeypatch.setattr(here_stage, "installed_versions", lambda: bare)
    assert machine_here("cpu").machine.has("triton")
    monkeypatch.setattr(here_stage, "installed_versions", lambda: bare | {"triton": ""})
    assert not machine_here("cpu").machine.has("triton")
    monkeypatch.setattr(here_stage, "installed_versions", lambda: bare | {"triton": "3.6.0"})
    again = machine_here("cpu")
    assert again.machine.has("triton")
    assert again.reasons == ()
    assert len(here) == 1


def test_operators_are_timed_once_per_workload(here, workload):
    measured = machine_here("cpu")
    timed = replayed(measured, workload, 0.1).machine.operators
    assert timed
    measured = machine_here("cpu")
    assert measured.machine.operators == timed
    every = {o.key: OperatorTime(1.0) for o in replayable(workload)} | timed
    update_profile(measured.key, lambda p: with_operators(p, "", measured.machine, every, "2026"))
    measured = machine_here("cpu")
    assert replayed(measured, workload, 0.1) is measured
    assert measured.machine.operators == every


def test_runs_are_remembered(here):
    measured = machine_here("cpu")
    planned = make_plan("demo", measured.machine, Ask())
    assert not tuner.was_verified(measured, planned)
    phases = tuple(PhaseMeasurement(p, 1.0) for p in ("encode", "denoise", "decode"))
    tuner.remember_run(measured, planned, phases)
    assert not tuner.was_verified(measured, planned)
    seen = tuple(msgspec.structs.replace(p, first_seconds=1.5) for p in phases)
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
