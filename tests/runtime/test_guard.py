"""Memory runs out, requests differ, others take memory: the image comes all the same."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import autotune
from autotune.errors import MemoryShortageError, RequestError
from autotune.optimizations import parse_settings
from autotune.probe import live
from autotune.probe.live import identity
from autotune.profile.store import load_profile
from autotune.runtime import tuned as tuned_module
from autotune.runtime.guard import RETRIES, Before
from autotune.runtime.out_of_memory import Failure
from autotune.runtime.spilling import Load
from autotune.runtime.tuned import Tuned
from autotune.testing.pipelines import BUILDERS
from autotune.units import GIB, MIB
from tests.thorough import thoroughly

ROOT = Path(__file__).resolve().parents[2]
MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 9.77 GiB"
PLAIN = {"only": ("vae_slicing",), "guidance_scale": 1.0, "ram_limit": "1GiB"}
"""A budget that does not change with what else the computer does."""

pytestmark = pytest.mark.usefixtures("measured_here")


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """What pipelines of other tests were promised is not missing here."""
    gc.collect()
    yield


def configured(pipe: Any = None, **options: Any) -> Tuned:
    """Four images of 64 x 64 in one step, decoded at once."""
    pipe = pipe or BUILDERS["sd"]()
    given = {"height": 64, "width": 64, "batch": 4, "steps": 1, "verify": "never", **PLAIN}
    return autotune.configure(pipe, **(given | options))


def names(tuned: Tuned) -> list[str]:
    return [s.name for s in tuned.plan.optimizations]


def image(tuned: Tuned, seed: int = 1, **options: Any) -> torch.Tensor:
    return tuned("a cat", seed=seed, output_type="pt", **options).images


@contextmanager
def running_out(
    module: torch.nn.Module, times: int, error: Callable[[], Exception] | None = None
) -> Iterator[list[int]]:
    """The first calls of a module fail; the list counts all."""
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) <= times:
            torch.rand(3)  # a call that fails half-way has drawn random numbers
            raise error() if error else torch.OutOfMemoryError(MESSAGE)

    handle = module.register_forward_pre_hook(fail)
    try:
        yield calls
    finally:
        handle.remove()


# ---- out of memory -------------------------------------------------------------------------------


def test_a_smaller_plan_draws_the_image_that_it_draws_from_the_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tuned = configured()
    assert names(tuned) == []
    generators = [torch.Generator().manual_seed(s) for s in range(4)]
    random_state = torch.get_rng_state()
    with running_out(tuned.pipe.vae.decoder, 1), caplog.at_level(logging.WARNING, "autotune"):
        drawn = tuned("a cat", generator=generators, output_type="pt").images
    assert names(tuned) == ["vae_slicing"]
    assert torch.equal(torch.get_rng_state(), random_state)

    again = configured()
    assert names(again) == ["vae_slicing"], "the next start begins lower"
    generators = [torch.Generator().manual_seed(s) for s in range(4)]
    assert torch.equal(again("a cat", generator=generators, output_type="pt").images, drawn)
    assert any("ran out of memory" in note for note in again.plan.notes)

    (line,) = [r.getMessage() for r in caplog.records if r.name == "autotune"]
    assert line.startswith("decode ran out of memory with no optimization (CUDA out of memory.")
    assert "trying vae_slicing, predicted to need" in line


def test_it_is_forgotten_with_more_memory() -> None:
    tuned = configured()
    with running_out(tuned.pipe.vae.decoder, 1):
        image(tuned)
    profile = load_profile(identity("cpu"))
    assert profile is not None
    (misfit,) = profile.misfits
    assert (misfit.optimizations, misfit.phase, misfit.available_bytes) == ((), "decode", GIB)
    assert names(configured(ram_limit="1100MiB")) == []


def test_what_others_held_when_it_ran_out_is_not_held_against_it_for_ever() -> None:
    tuned = configured()
    planner: Any = tuned._planner
    failure = Failure("out of memory", "decode", False, room_bytes=300 * MIB)
    smaller = planner.step_down(tuned.plan, tuned._workload, failure)
    assert [s.name for s in smaller.plan.optimizations] == ["vae_slicing"], (
        "it is not tried at once"
    )
    profile = load_profile(identity("cpu"))
    assert profile is not None
    assert profile.misfits[-1].available_bytes == 300 * MIB
    assert names(configured()) == [], "the next start has a gibibyte"
    assert names(configured(ram_limit="300MiB")) == ["vae_slicing"]


def test_the_scheduler_begins_anew() -> None:
    """Some keep what the steps before came to."""
    from diffusers import DPMSolverMultistepScheduler

    def with_memory() -> Any:
        pipe = BUILDERS["sd"]()
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        return pipe

    steps: list[int] = []

    def fail_after_three(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> Any:
        steps.append(step)
        if len(steps) == 3:
            raise torch.OutOfMemoryError(MESSAGE)
        return tensors

    drawn = image(configured(with_memory(), steps=4), callback_on_step_end=fail_after_three)
    assert steps == [0, 1, 2, 0, 1, 2, 3]
    again = configured(with_memory(), steps=4)
    assert names(again) == ["vae_slicing"]
    assert torch.equal(image(again), drawn)


def test_after_enough_tries_it_says_what_would_be_next(
    snapshot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert RETRIES == 3
    monkeypatch.setattr(tuned_module, "RETRIES", 1)  # there are three sets to try here
    pipe = BUILDERS["sd"]()
    pipe("a cat", height=64, width=64, num_inference_steps=1)  # makes attributes of its own
    before = snapshot(pipe)
    only = ("vae_slicing", "vae_tiling")
    tuned = configured(pipe, height=128, width=128, only=only, quality="fast")
    with (
        running_out(pipe.vae.decoder, 99) as calls,
        pytest.raises(MemoryShortageError) as caught,
    ):
        image(tuned)
    assert len(calls) == 2
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert "decode ran out of memory with" in caught.value.message
    assert caught.value.hint.startswith("draw again to try vae_tiling:tile=64, predicted")
    assert snapshot(pipe) == before, "the pipeline is as it was"
    assert image(tuned).shape == (4, 3, 128, 128), "and draws, with that"


def test_what_would_help_is_said_where_nothing_smaller_is_left() -> None:
    tuned = configured()
    with (
        running_out(tuned.pipe.vae.decoder, 99),
        pytest.raises(MemoryShortageError, match="nothing smaller is left") as caught,
    ):
        image(tuned)
    assert "a batch of" in caught.value.hint or "more free device memory" in caught.value.hint
    assert image(tuned).shape[0] == 4, "the next call tries again: others may have left"
    assert any("tried again all the same" in note for note in tuned.plan.notes)
    assert image(configured()).shape[0] == 4, "as does the next start"


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_other_errors_pass_as_they_are(kind: type[Exception]) -> None:
    tuned = configured()
    error = kind("size mismatch")
    with running_out(tuned.pipe.unet, 1, lambda: error) as calls, pytest.raises(kind) as caught:
        image(tuned)
    assert caught.value is error
    assert error.__traceback__ is not None
    assert len(calls) == 1
    assert names(tuned) == []


def test_an_interruption_passes() -> None:
    tuned = configured()
    with (
        running_out(tuned.pipe.unet, 1, KeyboardInterrupt) as calls,  # type: ignore[arg-type]
        pytest.raises(KeyboardInterrupt),
    ):
        image(tuned)
    assert len(calls) == 1


def test_memory_that_runs_out_while_a_plan_is_applied_is_a_failure_of_that_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = BUILDERS["sd"]()
    calls: list[int] = []
    real = type(pipe).to

    def to(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError(MESSAGE)
        return real(self, *arguments, **options)

    monkeypatch.setattr(type(pipe), "to", to)
    assert names(configured(pipe)) == ["vae_slicing"]


def test_measuring_survives_it_too() -> None:
    tuned = configured()
    with running_out(tuned.pipe.vae.decoder, 1):
        output, phases = tuned.measure("a cat", seed=1, output_type="pt")
    assert [p.name for p in phases] == ["encode", "denoise", "decode"]
    assert torch.equal(output.images, image(tuned))


def test_without_a_planner_there_is_one_plan_only(sd_pipe: Any, plan_of: Any) -> None:
    plan, workload = plan_of(sd_pipe)
    tuned = Tuned(sd_pipe, plan, workload, "cpu")
    with running_out(sd_pipe.unet, 1), pytest.raises(torch.OutOfMemoryError):
        image(tuned)


def test_what_a_call_changes_is_put_back() -> None:
    pipe = BUILDERS["sd"]()
    generator = torch.Generator().manual_seed(1)
    given = generator.get_state()
    before = Before(pipe, generator, "cpu")
    scheduler, state = dict(vars(pipe.scheduler)), torch.get_rng_state()
    pipe("a cat", height=64, width=64, num_inference_steps=2, generator=generator)
    torch.rand(5)
    before.restore()
    assert torch.equal(generator.get_state(), given)
    assert torch.equal(torch.get_rng_state(), state)
    assert vars(pipe.scheduler).keys() == scheduler.keys()
    assert pipe.scheduler.num_inference_steps == scheduler["num_inference_steps"]


REALLY = """
import json, logging, os, resource, sys
import msgspec, torch, autotune
from autotune.probe import measure
from autotune.probe.host import read_host
from autotune.probe.live import identity
from autotune.probe.reference import load_machine
from autotune.probe.software import installed_versions
from autotune.profile.store import load_profile
from autotune.tuner import planning

machine = msgspec.structs.replace(
    load_machine("cpu-16-cores"), source="measured", host=read_host(), software=installed_versions()
)
measure.measure_machine = lambda *_, **__: machine
planning.REPLAY_S = 0.0
logging.basicConfig(level=logging.WARNING)

def start():
    tuned = autotune.load(
        "demo", batch=16, steps=1, guidance_scale=1.0, ram_limit="1GiB", only=("vae_slicing",),
        verify="never",
    )
    tuned.pipe.set_progress_bar_config(disable=True)
    return tuned

def draw(tuned):
    return tuned("a handwritten seven", seed=1, output_type="pt").images

def data_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) << 10 for l in lines if l.startswith("VmData"))

tuned = start()
tuned.pipe("a handwritten one", num_inference_steps=1)  # what is loaded at the first call
whole, sliced = 107 << 20, 30 << 20
needed = tuned.plan.prediction.needed_bytes
resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + needed * 6 // 10, -1))
drawn = draw(tuned)
resource.setrlimit(resource.RLIMIT_DATA, (-1, -1))
first = [str(s) for s in tuned.plan.optimizations]
(misfit,) = load_profile(identity("cpu")).misfits
tuned.undo()
again = start()
print(json.dumps({
    "stepped down to": first,
    "misfit": [misfit.optimizations, misfit.phase, misfit.error],
    "begins with": [str(s) for s in again.plan.optimizations],
    "same image": torch.equal(draw(again), drawn),
}))
"""


@thoroughly
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
def test_an_allocator_that_really_fails(tmp_path: Path) -> None:
    """A process that may not take the memory which decoding sixteen images at once needs."""
    done = subprocess.run(
        [sys.executable, "-c", REALLY],
        env=os.environ
        | {
            "AUTOTUNE_CACHE": str(tmp_path),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "131072",  # what is freed is given back
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["stepped down to"] == ["vae_slicing"]
    assert answer["misfit"][:2] == [[], "decode"]
    assert "DefaultCPUAllocator" in answer["misfit"][2]
    assert answer["begins with"] == ["vae_slicing"]
    assert answer["same image"]
    assert "decode ran out of memory" in done.stderr


# ---- another request -----------------------------------------------------------------------------


def test_another_request_has_another_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget in which four images are decoded at once at 64 x 64, and not at 96 x 96."""
    tuned = configured()
    here = tuned.plan.prediction.needed_bytes
    tuned.undo()
    tuned = configured(ram_limit=int(here * 1.2))
    assert names(tuned) == []
    drawn = image(tuned)
    assert image(tuned, height=96, width=96).shape == (4, 3, 96, 96)
    assert "vae_slicing" in names(tuned)
    assert (tuned.plan.workload.height, tuned.plan.workload.batch) == (96, 4)
    assert torch.allclose(image(tuned), drawn, atol=1e-4)
    assert tuned.plan.workload.height == 64, "what is not given is as configured"
    with pytest.raises(MemoryShortageError, match="does not fit"):
        image(tuned, num_images_per_prompt=64)
    assert torch.allclose(image(tuned), drawn, atol=1e-4)


def test_what_is_on_is_kept_where_it_does_as_well() -> None:
    tuned = configured(batch=1)
    applied = tuned._undo
    for options in ({"num_inference_steps": 3}, {"guidance_scale": 1.0}, {"height": 96}, {}):
        image(tuned, **options)
        assert tuned._undo is applied
    assert names(tuned) == []


def test_requests_that_were_planned_for_are_not_planned_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from autotune.tuner import replan

    tuned = configured(batch=1)
    image(tuned, height=96)
    monkeypatch.setattr(replan, "decided", lambda *_: pytest.fail("decided again"))
    monkeypatch.setattr(replan, "workload_of", lambda *_: pytest.fail("traced again"))
    image(tuned)


def test_the_number_of_steps_needs_no_new_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    from autotune.tuner import replan

    tuned = configured(batch=1, steps=2)
    monkeypatch.setattr(replan, "workload_of", lambda *_: pytest.fail("traced again"))
    image(tuned, num_inference_steps=5)
    assert tuned.plan.workload.steps == 5
    unet = next(r for r in tuned._workload.runs if r.component == "unet")
    assert unet.calls == 5


@pytest.mark.parametrize("options", [{"height": 65}, {"width": "wide"}])
def test_what_cannot_be_planned_is_left_to_the_pipeline(options: dict[str, Any]) -> None:
    tuned = configured(batch=1)
    with pytest.raises(Exception) as caught:  # whatever the pipeline says
        image(tuned, **options)
    assert not isinstance(caught.value, RequestError)
    assert image(tuned).shape[0] == 1


def test_what_ran_out_without_a_plan_of_its_own_teaches_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plan that is on is for another request: it would be blamed for what it was not for."""
    from autotune.tuner import replan

    def refuse(*_: Any) -> Any:
        raise RequestError("height 72 is not a multiple of 16, the model's factor", "use 64 or 80")

    tuned = configured()
    monkeypatch.setattr(replan, "completed", refuse)
    with running_out(tuned.pipe.vae.decoder, 1), pytest.raises(MemoryShortageError) as caught:
        image(tuned, height=72)
    assert "without a plan of its own: height 72" in caught.value.message
    assert caught.value.hint == "use 64 or 80"
    profile = load_profile(identity("cpu"))
    assert profile is None or profile.misfits == ()
    assert names(tuned) == []
    assert image(tuned).shape[0] == 4, "configured again for what was planned"


def test_an_interrupted_undo_is_finished_before_the_next_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half undone, a pipeline draws something else, or nothing."""
    tuned = configured()
    drawn = image(tuned)
    real, calls = tuned._undo, []

    def interrupted() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        assert real is not None
        real()

    tuned._undo = interrupted
    with running_out(tuned.pipe.vae.decoder, 1), pytest.raises(KeyboardInterrupt):
        image(tuned)
    assert torch.equal(image(tuned), drawn)
    assert len(calls) == 2
    assert tuned._undo is not interrupted


def test_a_size_that_was_traced_in_another_process_takes_nothing_off() -> None:
    """Taking off moves all weights, twice."""
    image(configured(), height=96)
    planner: Any = configured()._planner
    asked = msgspec.structs.replace(configured()._request, height=96)
    assert not planner.must_trace(asked)
    assert planner.must_trace(msgspec.structs.replace(asked, height=88, width=104))


def test_what_is_applied_is_not_traced_as_what_was_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor kept on the disk as that, for every later start."""
    from autotune.tuner import planning

    tuned = configured()
    planner: Any = tuned._planner
    traced: list[Any] = []
    monkeypatch.setattr(planning, "workload_of", lambda *given: traced.append(given))
    monkeypatch.setattr(planning, "traced_before", lambda *_: None)
    planner.limits = msgspec.structs.replace(planner.limits, ram_limit=MIB)
    planner._plans.clear()
    fused = parse_settings("fuse_qkv")
    assert not planner.plan(tuned._request, fused).plan.fits
    assert traced == []


def test_what_was_taken_off_does_not_count_twice() -> None:
    tuned = configured()
    planner: Any = tuned._planner
    held = planner.held
    planner._held = held._replace(device_bytes=held.device_bytes + GIB)
    tuned._unapply()
    assert planner.held == held


# ---- the memory there is -------------------------------------------------------------------------


@contextmanager
def free(bytes_: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(live, "ram", lambda: (64 * GIB, bytes_))
        yield


def test_memory_that_others_take_is_noticed_before_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = configured(ram_limit=None)
    assert names(tuned) == []
    needed = tuned.plan.prediction.phases[-1].needed_bytes
    held = tuned._planner.held.ram_bytes  # type: ignore[union-attr]
    with free(needed - held - MIB, monkeypatch):
        image(tuned)
        assert names(tuned) == ["vae_slicing"]
    with free(MIB, monkeypatch), pytest.raises(MemoryShortageError, match="does not fit"):
        image(tuned)


TILED = {"only": ("vae_tiling",), "quality": "balanced", "height": 128, "width": 128}
"""In tiles, four images of 128 x 128 take half the memory, and several times as long."""


def test_memory_that_others_give_back_is_noticed_before_a_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tuned = configured(**TILED, ram_limit=None)
    assert names(tuned) == []
    needed = tuned.plan.prediction.needed_bytes
    held = tuned._planner.held.ram_bytes  # type: ignore[union-attr]
    with free(needed - held - MIB, monkeypatch):
        image(tuned)
        assert names(tuned) == ["vae_tiling"]
        on = tuned._undo
        image(tuned)
        assert tuned._undo is on
    image(tuned)
    assert names(tuned) == []


def test_what_ran_out_is_tried_again_when_more_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with free(2 * GIB, monkeypatch):
        tuned = configured(**TILED, ram_limit=None)
        with running_out(tuned.pipe.vae.decoder, 1):
            image(tuned)
        assert names(tuned) == ["vae_tiling"]
        image(tuned)
        assert names(tuned) == ["vae_tiling"]
    with free(4 * GIB, monkeypatch):
        image(tuned)
        assert names(tuned) == []


def test_what_is_on_is_kept_until_changing_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where requests alternate, a set would be put on and taken off at every one."""
    from autotune.decide import keeping

    def as_long_as_is_lost_in_some(on: Any, best: Any, _: Any) -> float:
        return 3.5 * (on.mean_seconds - best.mean_seconds)

    tuned = configured(**TILED, ram_limit=None)
    needed = tuned.plan.prediction.needed_bytes
    held = tuned._planner.held.ram_bytes  # type: ignore[union-attr]
    monkeypatch.setattr(keeping, "_changing_s", as_long_as_is_lost_in_some)
    monkeypatch.setattr(keeping, "loss_of", lambda _: ())  # what takes quality is never kept
    with free(needed - held - MIB, monkeypatch):
        image(tuned)
        on = tuned._undo
        for _ in range(3):
            image(tuned, num_images_per_prompt=1)
            assert tuned._undo is on
            assert names(tuned) == ["vae_tiling"]
            assert tuned.plan.postponed is not None
            assert any("what is on is kept" in note for note in tuned.plan.notes)
            image(tuned)  # it is the best for this one: nothing is lost
        image(tuned, num_images_per_prompt=1)
        assert names(tuned) == []
        image(tuned)
        on = tuned._undo
        for _ in range(3):
            image(tuned, num_images_per_prompt=1)
            assert tuned._undo is on, "having changed once, it would have to pay again"


def test_limits_are_held_before_every_call_that_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is no plan for what there is now, and the old one is tried."""
    tuned = configured()
    planner: Any = tuned._planner
    held: list[str] = []
    refused = MemoryShortageError("does not fit")
    monkeypatch.setattr(tuned_module, "hold_limits", held.append)
    monkeypatch.setattr(planner, "is_current", lambda plan: False)
    monkeypatch.setattr(planner, "plan", lambda *_: (_ for _ in ()).throw(refused))
    with pytest.raises(MemoryShortageError):
        image(tuned)
    assert held == ["cpu"]


def test_memory_that_others_take_between_plan_and_apply_is_noticed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from autotune.tuner import configure as stage

    tuned = configured(ram_limit=None)
    pipe, needed = tuned.pipe, tuned.plan.prediction.needed_bytes
    held = tuned._planner.held.ram_bytes  # type: ignore[union-attr]
    tuned.undo()
    real = stage.plan_loaded

    def and_then_others_come(*arguments: Any, **options: Any) -> Any:
        planned = real(*arguments, **options)
        monkeypatch.setattr(live, "ram", lambda: (64 * GIB, needed - held - MIB))
        return planned

    monkeypatch.setattr(stage, "plan_loaded", and_then_others_come)
    tuned = configured(pipe, ram_limit=None)
    assert names(tuned) == ["vae_slicing"]
    assert any("planned again" in note for note in tuned.plan.notes)
    assert "planned again" in caplog.text


# ---- spilling ------------------------------------------------------------------------------------


def test_without_a_planner_a_call_that_spilled_is_drawn(
    sd_pipe: Any, plan_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, workload = plan_of(sd_pipe)
    slow = msgspec.structs.replace(plan.prediction, seconds=1e-9)
    tuned = Tuned(sd_pipe, msgspec.structs.replace(plan, prediction=slow), workload, "cpu")
    full = Load(total_bytes=8 * GIB, free_bytes=64 * MIB, reserved_bytes=7 * GIB)
    monkeypatch.setattr(tuned_module, "_SYSTEM", "wddm")
    monkeypatch.setattr(tuned_module, "device_load", lambda device: full)
    assert image(tuned).shape[0] == workload.request.batch


def test_after_a_call_that_spilled_the_next_one_is_smaller(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = configured()
    image(tuned)
    full = Load(total_bytes=8 * GIB, free_bytes=64 * MIB, reserved_bytes=7 * GIB)
    monkeypatch.setattr(tuned_module, "_SYSTEM", "wddm")
    monkeypatch.setattr(tuned_module, "device_load", lambda device: full)
    slow = msgspec.structs.replace(tuned.plan.prediction, seconds=1e-9)
    tuned.plan = msgspec.structs.replace(tuned.plan, prediction=slow)
    tuned._images = 1
    assert image(tuned).shape[0] == 4
    assert "spilling into host RAM" in caplog.text
    monkeypatch.setattr(tuned_module, "_SYSTEM", "")
    image(tuned)
    assert names(tuned) == ["vae_slicing"]
    assert names(configured()) == ["vae_slicing"]
    assert parse_settings("vae_slicing") == tuned.plan.optimizations
