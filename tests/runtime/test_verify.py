"""Verification: two short passes that leave nothing behind, and an account that adds up."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import numpy
import pytest
import torch

import autotune
from autotune.errors import OptimizationError, RequestError
from autotune.optimizations import find
from autotune.optimizations.base import Setting
from autotune.optimizations.execution import StepCache
from autotune.probe.live import identity
from autotune.probe.reference import load_machine
from autotune.profile.profile import PhaseMeasurement
from autotune.profile.store import load_profile, update_profile
from autotune.runtime import measure
from autotune.runtime import verify as passes
from autotune.runtime.measure import CudaGauge, Level, PhaseMeter, RamGauge
from autotune.runtime.tuned import Tuned
from autotune.runtime.verification import Verification, check_phase, joined
from autotune.runtime.verify import Configured, _scale
from autotune.testing.state import differences, whole_state
from autotune.tuner import Ask, Measured, Planned, make_plan, remember_run
from autotune.tuner.history import observations_in
from autotune.tuner.verifying import is_verified_now, verified
from autotune.units import GIB, MIB

PlanOf = Callable[..., Any]
MERGE = "tome:ratio=0.5:max_downsample=2"


@pytest.fixture
def tuned(sd_pipe: Any, plan_of: PlanOf) -> Tuned:
    """Two images of 64 x 64 in two steps, tokens merged."""
    plan, workload = plan_of(sd_pipe, MERGE)
    return Tuned(sd_pipe, plan, workload, "cpu")


def random_state() -> tuple[Any, ...]:
    arrays = numpy.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), arrays[1].tolist(), arrays[2]


# ---- the passes ----------------------------------------------------------------------------------


def test_each_phase_is_measured_against_its_prediction(tuned: Tuned) -> None:
    assert tuned.verification is None
    found = tuned.verify()
    assert tuned.verification is found
    assert [p.name for p in found.phases] == ["encode", "denoise", "decode"]
    predicted = {p.name: p for p in tuned.plan.prediction.phases}
    for check in found.phases:
        measured = check.measured
        assert measured.seconds > 0
        assert measured.first_seconds is not None
        assert measured.peak_bytes is not None
        assert measured.device_bytes is not None
        assert measured.reserved_bytes is None  # a CPU has no caching allocator
        assert check.predicted.seconds == predicted[check.name].seconds
        assert measured.peak_bytes > tuned._workload.weight_bytes
    text = tuned.explain()
    assert "\nverified    3 passes of 2 steps in " in text
    assert all(f"  = {p.name}: {p.text}" in text for p in found.phases)


def test_nothing_is_left_behind(tuned: Tuned) -> None:
    pipe = tuned.pipe
    pipe.set_progress_bar_config(desc="mine")
    image = tuned("a cat", seed=1, output_type="pt").images
    for seed_all in (random.seed, numpy.random.seed, torch.manual_seed):
        seed_all(5)
    before, chance, scheduler = whole_state(pipe), random_state(), dict(vars(pipe.scheduler))
    tuned.verify()
    assert differences(before, whole_state(pipe)) == {}
    assert random_state() == chance
    assert vars(pipe.scheduler).keys() == scheduler.keys()
    assert all(vars(pipe.scheduler)[n] is v for n, v in scheduler.items())
    assert torch.equal(tuned("a cat", seed=1, output_type="pt").images, image)


def test_nor_before_the_first_image(sd_pipe: Any, plan_of: PlanOf) -> None:
    """A first call gives a pipeline attributes that it did not have."""
    plan, workload = plan_of(sd_pipe)
    tuned = Tuned(sd_pipe, plan, workload, "cpu")
    before = whole_state(sd_pipe)
    tuned.verify()
    assert differences(before, whole_state(sd_pipe)) == {}


def test_it_is_verified_while_weights_are_offloaded(
    sd_pipe: Any, plan_of: PlanOf, draw: Any
) -> None:
    """Hooks are renewed by every call: they must not be put back to the ones before."""
    plan, workload = plan_of(sd_pipe)
    sd_pipe.enable_model_cpu_offload(device="cpu")
    kept = msgspec.structs.replace(plan, kept=(Setting("model_cpu_offload"),))
    tuned = Tuned(sd_pipe, kept, workload, "cpu")
    plain = draw(sd_pipe)
    assert [p.name for p in tuned.verify().phases] == ["encode", "denoise", "decode"]
    assert torch.equal(draw(sd_pipe), plain)


def test_seconds_are_scaled_by_calls_of_the_denoiser(sd_pipe: Any, plan_of: PlanOf) -> None:
    """Not by steps: some schedulers take more calls than that."""
    workload = plan_of(sd_pipe)[1]
    many = msgspec.structs.replace(
        workload.phases[1],
        runs=tuple(msgspec.structs.replace(r, calls=31) for r in workload.phases[1].runs),
    )
    meter = PhaseMeter(sd_pipe, workload, "cpu")
    meter.calls["denoise", "unet"] = 3
    meter.calls["encode", "text_encoder"] = 1
    assert _scale(many, meter) == 31 / 3
    assert _scale(workload.phases[0], meter) == 1


def test_few_steps_or_as_many_as_take_half_a_second(sd_pipe: Any, plan_of: PlanOf) -> None:
    plan, workload = plan_of(sd_pipe)
    request = msgspec.structs.replace(workload.request, steps=20)
    workload = msgspec.structs.replace(workload, request=request)

    def steps(seconds: float, step_cache: StepCache | None = None) -> int:
        phases = tuple(
            msgspec.structs.replace(p, seconds=seconds if p.name == "denoise" else 0.0)
            for p in plan.prediction.phases
        )
        planned = msgspec.structs.replace(
            plan,
            prediction=msgspec.structs.replace(plan.prediction, phases=phases),
            execution=msgspec.structs.replace(plan.execution, step_cache=step_cache),
        )
        return Configured(sd_pipe, planned, workload, "cpu", 2).short_steps

    assert (steps(60.0), steps(1.0), steps(0.01)) == (2, 10, 20)
    assert steps(60.0, StepCache("first_block", 0.1)) == 20


# ---- the account ---------------------------------------------------------------------------------


def recorded(**levels: int) -> PhaseMeasurement:
    return PhaseMeasurement("denoise", 1.1, first_seconds=1.5, **levels)


def test_what_a_gpu_held_is_taken_apart(plan_of: PlanOf, sd_pipe: Any) -> None:
    phase = msgspec.structs.replace(
        plan_of(sd_pipe)[0].prediction.phases[1],
        resident_bytes=3 * GIB,
        activation_bytes=1 * GIB,
        workspace_bytes=128 * MIB,
        peak_bytes=4 * GIB + 128 * MIB,
        seconds=1.0,
    )
    levels = [4 * GIB + 228 * MIB, 4 * GIB + 512 * MIB, 5 * GIB]
    measured = recorded(peak_bytes=levels[0], reserved_bytes=levels[1], device_bytes=levels[2])
    check = check_phase(phase, measured)
    parts = (check.workspace_bytes, check.fragmentation_bytes, check.other_bytes)
    assert check.tensors_bytes + sum(p or 0 for p in parts) == levels[2]
    assert check.rest_bytes == 100 * MIB
    assert (check.rest_s, check.first_run_s) == pytest.approx((0.1, 0.4))
    assert check.text == (
        "1.10 s for 1.00 s predicted (10% more), 400.0 ms more the first time; "
        "4.22 GiB allocated for 4.12 GiB predicted (2% more): 4.00 GiB weights and activations, "
        "228.0 MiB beyond (128.0 MiB predicted); 284.0 MiB lost to fragmentation; "
        "512.0 MiB held by the process besides"
    )


def test_what_is_not_measured_is_not_explained(plan_of: PlanOf, sd_pipe: Any) -> None:
    phase = plan_of(sd_pipe)[0].prediction.phases[1]
    check = check_phase(phase, recorded())
    assert (check.workspace_bytes, check.fragmentation_bytes, check.other_bytes) == (None,) * 3
    assert ";" not in check.text
    small = check_phase(phase, recorded(peak_bytes=phase.resident_bytes, device_bytes=MIB))
    assert "less than the weights and activations predicted" in small.text
    assert "still pages of the weights' files" in small.text


def test_the_image_that_follows_counts_with_all_its_steps(plan_of: PlanOf, sd_pipe: Any) -> None:
    phase = plan_of(sd_pipe)[0].prediction.phases[1]
    check = check_phase(phase, recorded(peak_bytes=5, device_bytes=9))
    passes = Verification((check,), 2, 20, 2, 1.0)
    image = (PhaseMeasurement("denoise", 2.0, peak_bytes=7), PhaseMeasurement("decode", 1.0))
    found = joined(image, passes)
    assert found[0] == PhaseMeasurement("denoise", 2.0, 7, None, 9, pytest.approx(2.4))
    assert found[1] == image[1]


# ---- gauges --------------------------------------------------------------------------------------


def test_ram_is_sampled() -> None:
    gauge = RamGauge()
    with gauge.watching():
        gauge.begin()
        before = gauge.read().device or 0
        held = bytearray(b"x" * (64 * MIB))
        after = gauge.read().device or 0
        del held
    assert after - before > 60 * MIB


@pytest.mark.parametrize(("held", "device"), [(900, 1400), (500, 1000), (None, None)])
def test_the_device_level_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, held: int | None, device: int | None
) -> None:
    """The peak of what was reserved, and what the process holds beside the segments."""
    monkeypatch.setattr(measure, "_uuid", lambda _: "GPU-1")
    monkeypatch.setattr(measure.nvml, "own_bytes", lambda _: held)
    for name, count in (
        ("max_memory_allocated", 800),
        ("max_memory_reserved", 1000),
        ("memory_reserved", 500),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda _, count=count: count)
    level = CudaGauge(torch.device("cuda:0"), asks_driver=True).read()
    assert level == Level(800, 1000, device)
    assert level.or_more(Level(900, None, 1)) == Level(900, 1000, device or 1)


# ---- when ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned() -> Planned:
    machine = load_machine("cpu-16-cores")
    machine = msgspec.structs.replace(machine, measured_at="2026-01-01T00:00:00+00:00")
    return make_plan("demo", machine, Ask(steps=2))


def remembered(planned: Planned, first_seconds: float | None) -> Measured:
    measured = Measured("k", planned.machine, ())
    phases = tuple(
        PhaseMeasurement(p.name, p.seconds, p.peak_bytes, first_seconds=first_seconds)
        for p in planned.plan.prediction.phases
    )
    remember_run(measured, planned, phases)
    return measured


def test_auto_verifies_once_for_each_plan_and_measurement(planned: Planned) -> None:
    measured = Measured("k", planned.machine, ())
    assert is_verified_now("auto", measured, planned) == (True, "")
    remembered(planned, first_seconds=None)  # a first image is no steady state
    assert is_verified_now("auto", measured, planned) == (True, "")
    remembered(planned, first_seconds=1.0)
    assert is_verified_now("auto", measured, planned) == (False, "")
    assert is_verified_now("always", measured, planned) == (True, "")
    kept = msgspec.structs.replace(planned.plan, kept=(Setting("vae_slicing"),))
    assert is_verified_now("auto", measured, planned._replace(plan=kept)) == (True, "")
    assert is_verified_now("never", measured, planned) == (False, "")

    def again(profile: Any) -> Any:
        machine = msgspec.structs.replace(profile.machine, measured_at="2999-01-01T00:00:00+00:00")
        return msgspec.structs.replace(profile, machine=machine)

    update_profile("k", again)
    assert is_verified_now("auto", measured, planned) == (True, "")


def test_what_takes_long_is_verified_only_when_asked_for(planned: Planned) -> None:
    phases = tuple(msgspec.structs.replace(p, seconds=30.0) for p in planned.plan.prediction.phases)
    prediction = msgspec.structs.replace(planned.plan.prediction, phases=phases)
    slow = planned._replace(plan=msgspec.structs.replace(planned.plan, prediction=prediction))
    measured = Measured("k", planned.machine, ())
    now, note = is_verified_now("auto", measured, slow)
    assert not now
    assert note.startswith("not verified: short passes are predicted to take 270 s")
    assert is_verified_now("always", measured, slow) == (True, "")


def test_observations_are_the_verified_runs(planned: Planned) -> None:
    remembered(planned, first_seconds=None)
    remembered(planned, first_seconds=1.0)
    profile = load_profile("k")
    assert profile is not None
    gone = msgspec.structs.replace(profile.runs[-1], optimizations=("no_such_thing",))
    namesake = msgspec.structs.replace(profile.runs[-1], weight_bytes=1)
    (*phases, last) = profile.runs[-1].measured
    absurd = (*phases, msgspec.structs.replace(last, peak_bytes=10**15))
    edited = msgspec.structs.replace(profile.runs[-1], measured=absurd)
    profile = msgspec.structs.replace(profile, runs=(*profile.runs, gone, namesake, edited))
    (found,) = observations_in(profile, planned.workload)
    assert found.settings == (*planned.plan.kept, *planned.plan.optimizations)
    assert [p.name for p in found.phases] == ["encode", "denoise", "decode"]
    other = msgspec.structs.replace(planned.workload, model="another")
    assert list(observations_in(profile, other)) == []


@pytest.mark.parametrize("ask", [autotune.configure, autotune.load])
def test_an_unknown_mode_is_refused_before_anything_is_done(ask: Any) -> None:
    with pytest.raises(RequestError, match="unknown verify 'sometimes'"):
        ask(object(), verify="sometimes")


# ---- what fails ----------------------------------------------------------------------------------


class Failing(Tuned):
    """Its calls raise."""

    error: BaseException

    def _draw(self, *_: Any, **__: Any) -> Any:
        raise self.error


@pytest.fixture
def failing(sd_pipe: Any, plan_of: PlanOf) -> Failing:
    plan, workload = plan_of(sd_pipe, MERGE)
    return Failing(sd_pipe, plan, workload, "cpu")


def test_unasked_for_a_pipeline_that_refuses_stays_configured(failing: Failing) -> None:
    failing.error = ValueError("a ControlNet needs an image of a cat")
    assert verified(failing, "auto") is None
    assert failing.plan.notes[-1] == "not verified: a ControlNet needs an image of a cat"
    assert failing.verification is None
    assert find("tome").is_set(failing.pipe)


@pytest.mark.parametrize(
    ("error", "mode", "raised"),
    [
        (ValueError("no"), "always", OptimizationError),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "auto", OptimizationError),
        (OptimizationError("nothing fits", "a smaller image"), "auto", OptimizationError),
        (KeyboardInterrupt(), "auto", KeyboardInterrupt),
    ],
    ids=["asked for", "memory", "its own", "interrupted"],
)
def test_otherwise_the_pipeline_is_as_it_was(
    sd_pipe: Any, plan_of: PlanOf, error: BaseException, mode: str, raised: type[BaseException]
) -> None:
    before = whole_state(sd_pipe)
    plan, workload = plan_of(sd_pipe, MERGE)
    failing = Failing(sd_pipe, plan, workload, "cpu")
    failing.error = error
    with pytest.raises(raised):
        verified(failing, mode)
    assert differences(before, whole_state(sd_pipe)) == {}


# ---- the way through -----------------------------------------------------------------------------


@pytest.mark.usefixtures("measured_here")
def test_what_is_verified_is_the_plan_for_all_steps(
    sd_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the passes take fewer, which another plan might be made for."""
    monkeypatch.setattr(passes, "QUICK_S", 0.0)
    tuned = autotune.configure(sd_pipe, height=64, width=64, steps=5, device="cpu")
    found = tuned.verification
    assert found is not None
    assert (found.steps, found.planned_steps, tuned.plan.workload.steps) == (2, 5, 5)
    predicted = {p.name: p.seconds for p in tuned.plan.prediction.phases}
    assert {p.name: p.predicted.seconds for p in found.phases} == predicted
    assert found.notes == ("denoise: seconds of 2 of 5 steps, scaled to all",)


@pytest.mark.usefixtures("measured_here")
def test_configure_verifies_once_and_the_next_plan_is_corrected(sd_pipe: Any) -> None:
    def configured(mode: str) -> Tuned:
        return autotune.configure(
            sd_pipe, height=64, width=64, steps=2, device="cpu", verify=mode, only=["vae_slicing"]
        )

    first = configured("auto")
    assert first.verification is not None
    first.undo()
    profile = load_profile(identity("cpu"))
    assert profile is not None
    (run,) = profile.runs
    assert run.measured == first.verification.measured
    second = configured("auto")
    assert second.verification is None
    second.undo()
    assert configured("never").verification is None


def test_what_another_pipeline_disturbed_is_not_remembered(
    sd_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autotune.runtime import verify as stage

    def configured() -> Tuned:
        given = {"height": 64, "width": 64, "steps": 2, "only": ["vae_slicing"]}
        return autotune.configure(sd_pipe, device="cpu", verify="auto", **given)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "draws_alone", lambda pipe: False)
        first = configured()
    assert first.verification is not None
    assert "another pipeline drew meanwhile" in first.explain()
    profile = load_profile(identity("cpu"))
    assert profile is None or profile.runs == ()
    assert configured().verification is not None, "verified again"
