"""The public library, as a program uses it."""

from __future__ import annotations

import numpy
import pytest
import torch
from diffusers import StableDiffusionPipeline

import autotune
from autotune.demo import model_path
from autotune.errors import AutotuneError, ModelError, OptimizationError, RequestError
from autotune.optimizations import parse_settings


@pytest.fixture(scope="module", autouse=True)
def _measured_once(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOTUNE_CACHE", str(tmp_path_factory.mktemp("api-cache")))
        autotune.probe()
        yield autotune


@pytest.fixture(autouse=True)
def _own_cache(_measured_once, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("AUTOTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "api-cache0"))


@pytest.fixture
def pipe():
    pipe = StableDiffusionPipeline.from_pretrained(model_path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **options):
    generator = torch.Generator("cpu").manual_seed(3)
    options = {"num_inference_steps": 3, "height": 128, "width": 128} | options
    output = pipe("a handwritten five", generator=generator, output_type="np", **options)
    return output.images


def test_configure_explain_undo(pipe):
    before = draw(pipe)
    tuned = autotune.configure(pipe, height=128, width=128, batch=1, steps=3, quality="fast")
    assert tuned.pipe is pipe
    assert tuned.plan.workload.dtype == "float32"
    text = tuned.explain()
    assert "bottleneck" in text
    for rejection in tuned.plan.rejected:
        assert rejection.optimization in text
    tuned.undo()
    tuned.undo()
    assert numpy.array_equal(before, draw(pipe))


def test_exact_plan_draws_the_same_image(pipe):
    before = draw(pipe)
    tuned = autotune.configure(pipe, steps=3)
    after = tuned("a handwritten five", seed=3, output_type="np").images
    assert numpy.allclose(before, after, atol=1e-4)


def test_tuned_uses_what_was_planned(pipe):
    tuned = autotune.configure(pipe, height=64, width=96, batch=2, steps=2)
    images = tuned("a handwritten five", seed=3).images
    assert [i.size for i in images] == [(96, 64)] * 2
    assert len(tuned("a handwritten five", seed=3, num_images_per_prompt=1).images) == 1


def test_same_seed_same_image_with_tome(pipe):
    tuned = autotune.configure(
        pipe, height=256, width=256, steps=2, quality="fast", only=["tome"], verify="never"
    )
    first, second = (tuned("a five", seed=9, output_type="np").images for _ in range(2))
    assert numpy.array_equal(first, second)


def test_what_the_user_set_is_kept(pipe):
    pipe.enable_attention_slicing("max")
    processors = pipe.unet.attn_processors
    tuned = autotune.configure(pipe, steps=3)
    assert "attention_slicing" in {s.name for s in tuned.plan.kept}
    assert "attention_slicing" in tuned.explain()
    assert pipe.unet.attn_processors == processors
    tuned.undo()
    assert pipe.unet.attn_processors == processors


def test_load_plans_before_it_reads_weights():
    tuned = autotune.load("demo", steps=2)
    assert tuned.plan.workload.model == "demo"
    assert tuned("a handwritten five", seed=1).images[0].size == (128, 128)


def test_a_video_of_so_many_frames_with_arguments_of_the_pipeline():
    from autotune.testing.pipelines import BUILDERS

    tuned = autotune.configure(
        BUILDERS["animatediff"](),
        height=64,
        width=64,
        frames=8,
        steps=2,
        call={"guidance_scale": 1.0},
        verify="never",
    )
    assert (tuned.plan.workload.frames, tuned.plan.workload.options) == (8, {"guidance_scale": 1.0})
    assert [len(video) for video in tuned("a cat", seed=1).frames] == [8]


def test_plan_for_another_machine():
    plan = autotune.plan("sdxl", machine="rtx-4060-8gb")
    assert plan.machine.name == "rtx-4060-8gb"
    assert plan.fits


def test_limits_are_those_of_the_command_line():
    plain = autotune.plan("sd15", machine="t4-16gb")
    held = autotune.plan(
        "sd15", machine="t4-16gb", priority="memory", reserve="1GiB", ram_limit=8 << 30
    )
    assert (held.priority, held.host_budget_bytes) == ("memory", 8 << 30)
    assert held.budget_bytes == plain.budget_bytes - (1 << 30)


def test_a_plan_is_told_what_is_set_by_hand():
    kept = parse_settings("xformers,tome:ratio=0.5")
    for keep in ("xformers,tome:ratio=0.5", ["xformers", "tome:ratio=0.5,max_downsample=1"]):
        plan = autotune.plan("sd15", machine="t4-16gb", keep=keep)
        assert plan.kept == kept and not any(s in plan.optimizations for s in kept)
        assert plan.execution.merge is not None


def test_probe_and_profiles():
    machine = autotune.probe("cpu")
    assert machine.device.kind == "cpu"
    assert machine.source == "measured"
    profiles = autotune.profiles()
    assert machine.name in {p.machine.name for p in profiles}


def test_submodule_does_not_hide_the_function():
    from autotune.probe import machine  # noqa: F401

    assert callable(autotune.probe)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: autotune.load("no-such-model"), ModelError),
        (lambda: autotune.plan("sdxl", machine="t4-16gb", height=1001), RequestError),
        (lambda: autotune.plan("sdxl", machine="t4-16gb", vram_limit="lots"), RequestError),
        (lambda: autotune.plan("sdxl", machine="t4-16gb", reserve="lots"), RequestError),
        (lambda: autotune.plan("sdxl", machine="t4-16gb", reserve=-(10**13)), RequestError),
        (lambda: autotune.plan("sdxl", machine="t4-16gb", vram_limit=1.5), RequestError),
        (lambda: autotune.plan("sdxl", machine="t4-16gb", ram_limit=-1), RequestError),
        (lambda: autotune.plan("sdxl", machine="t4-16gb", priority="x"), RequestError),
        (lambda: autotune.plan("sdxl", machine="t4-16gb", frames=8), RequestError),
        (lambda: autotune.plan("sdxl", machine="t4-16gb", call={"width": 512}), RequestError),
        (lambda: autotune.plan("sdxl", machine="t4-16gb", call={"sigmas": [1]}), RequestError),
        (lambda: autotune.plan("sd15", machine="t4-16gb", call={"strength": 0.5}), RequestError),
        (
            lambda: autotune.plan("sd15", machine="t4-16gb", only=["tome"], without=["tome"]),
            OptimizationError,
        ),
        (
            lambda: autotune.plan("sd15", machine="t4-16gb", keep="tome", without=["tome"]),
            OptimizationError,
        ),
        (lambda: autotune.configure(object()), AutotuneError),
    ],
)
def test_errors_have_a_remedy(call, error):
    with pytest.raises(error) as caught:
        call()
    assert caught.value.hint
