"""``Tuned``: called like the pipeline, repeatable, and undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from autotune.errors import OptimizationError, RequestError
from autotune.runtime.measure import with_peaks
from autotune.runtime.tuned import Tuned

PlanOf = Callable[..., Any]
MERGE = "tome:ratio=0.5:max_downsample=2"


@pytest.fixture
def tuned(sd_pipe: Any, plan_of: PlanOf) -> Tuned:
    """Two images of 64 x 64 in two steps, tokens merged."""
    plan, workload = plan_of(sd_pipe, MERGE)
    return Tuned(sd_pipe, plan, workload, "cpu")


def images(tuned: Tuned, **options: Any) -> Any:
    return tuned("a cat", output_type="pt", **options).images


def test_it_draws_what_was_planned_unless_told_otherwise(tuned: Tuned) -> None:
    assert images(tuned).shape == (2, 3, 64, 64)
    assert images(tuned, num_images_per_prompt=1, height=96).shape == (1, 3, 96, 64)


@pytest.mark.parametrize(("prompts", "drawn"), [(1, 2), (2, 2), (3, 3)])
def test_several_prompts_share_the_planned_batch(tuned: Tuned, prompts: int, drawn: int) -> None:
    assert len(tuned(["a cat"] * prompts, output_type="pt").images) == drawn


def test_a_seed_repeats_the_image_with_merged_tokens(tuned: Tuned) -> None:
    first, again = images(tuned, seed=4), images(tuned, seed=4)
    assert torch.equal(first, again)
    assert not torch.equal(images(tuned, seed=5), first)
    given = images(tuned, generator=torch.Generator().manual_seed(4))
    assert torch.equal(given, first)


def test_one_generator_per_image_is_taken_too(tuned: Tuned) -> None:
    def draw() -> Any:
        return images(tuned, generator=[torch.Generator().manual_seed(s) for s in (1, 2)])

    assert torch.equal(draw(), draw())


def test_without_a_seed_images_differ_and_the_global_state_stays(tuned: Tuned) -> None:
    before = torch.get_rng_state()
    assert not torch.equal(images(tuned), images(tuned))
    assert torch.equal(torch.get_rng_state(), before)


def test_undo_brings_the_pipeline_back(
    sd_pipe: Any, plan_of: PlanOf, draw: Any, snapshot: Any
) -> None:
    plan, workload = plan_of(sd_pipe, MERGE + ",vae_slicing")
    plain = draw(sd_pipe)
    before = snapshot(sd_pipe)
    tuned = Tuned(sd_pipe, plan, workload, "cpu")
    images(tuned, seed=1)
    tuned.undo()
    assert snapshot(sd_pipe)["unet."] == before["unet."]
    assert torch.equal(draw(sd_pipe), plain)
    assert snapshot(sd_pipe) == before
    tuned.undo()
    assert snapshot(sd_pipe) == before


def test_a_plan_that_cannot_be_applied_makes_no_tuned(sd_pipe: Any, plan_of: PlanOf) -> None:
    plan, workload = plan_of(sd_pipe, "xformers")
    with pytest.raises(OptimizationError):
        Tuned(sd_pipe, plan, workload, "cpu")


def test_it_explains_itself(tuned: Tuned) -> None:
    text = tuned.explain()
    for word in ("machine", "workload", "bottleneck", "plain", "planned", "chosen", "left out"):
        assert f"\n{word}" in f"\n{text}"
    assert "tome:ratio=0.5,max_downsample=2" in text
    asked = tuned.plan.workload
    assert (asked.height, asked.width, asked.batch, asked.steps) == (64, 64, 2, 2)


def test_measuring_draws_and_times_each_phase(tuned: Tuned, snapshot: Any) -> None:
    before = snapshot(tuned.pipe)["unet."]
    output, phases = tuned.measure("a cat", seed=1, output_type="pt")
    assert torch.equal(output.images, images(tuned, seed=1))
    assert [p.name for p in phases] == ["encode", "denoise", "decode"]
    assert all(p.seconds > 0 and p.peak_bytes is None for p in phases)
    assert snapshot(tuned.pipe)["unet."] == before


def test_measured_peaks_are_weights_and_the_traced_activations(
    sd_pipe: Any, plan_of: PlanOf
) -> None:
    plan, workload = plan_of(sd_pipe, side=128)
    tuned = Tuned(sd_pipe, plan, workload, "cpu")
    tuned.measure_peaks("a cat")
    peaks = tuned.measure_peaks("a cat", output_type="pt")
    traced = {p.name: max(r.trace.activation_bytes for r in p.runs) for p in workload.phases}
    assert set(peaks) == {"encode", "denoise", "decode"}
    for name in ("denoise", "decode"):
        activations = peaks[name] - workload.weight_bytes
        # More by the pipeline's own latents and embeddings, and the kernels' scratch memory.
        assert traced[name] <= activations * 1.005
        assert activations <= traced[name] * 1.25, name


def test_peaks_of_another_pass_are_added(tuned: Tuned) -> None:
    _, phases = tuned.measure("a cat", seed=1)
    added = with_peaks(phases, {"denoise": 5})
    assert [p.peak_bytes for p in added] == [None, 5, None]
    assert [p.seconds for p in added] == [p.seconds for p in phases]


def test_after_undo_it_still_draws(tuned: Tuned) -> None:
    """Token merging was in the plan: nothing of it may be looked for once it is gone."""
    tuned.undo()
    assert len(tuned("a cat", seed=1, output_type="pt").images) == tuned.plan.workload.batch


def test_embeddings_share_the_planned_batch(tuned: Tuned) -> None:
    embeds, negative = tuned.pipe.encode_prompt(["a cat", "a dog"], "cpu", 1, True)[:2]
    out = tuned(prompt_embeds=embeds, negative_prompt_embeds=negative, output_type="pt")
    assert len(out.images) == max(2, tuned.plan.workload.batch)


def test_seed_and_generator_are_one_too_many(tuned: Tuned) -> None:
    with pytest.raises(RequestError, match="both seed and generator"):
        tuned("a cat", seed=1, generator=torch.Generator())
