"""Every kind of pipeline: configured, drawn with, measured and put back; saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from autotune.runtime.apply import apply_plan, set_by_hand
from autotune.runtime.load import load_pipeline
from autotune.runtime.tuned import Tuned
from autotune.testing.pipelines import BUILDERS, arguments, call
from autotune.testing.state import differences, whole_state
from autotune.tuner import Ask, configure_pipeline, load_tuned
from autotune.workload.architecture import describe_pipeline, find_architecture
from autotune.workload.components import meta_module
from tests.thorough import part
from tests.workloads import SIZES, few_frames, numbers_of

STEPS = 2


def ask_for(pipe: Any) -> tuple[Ask, dict[str, Any]]:
    """``arguments`` in two: what a plan is made for, and the texts and pictures of a call."""
    numbers = numbers_of(pipe) | few_frames(pipe)
    ask = Ask(
        height=numbers.get("height", 64),
        width=numbers.get("width", 64),
        steps=STEPS,
        guidance_scale=numbers.get("guidance_scale", numbers.get("true_cfg_scale")),
        frames=numbers.get("num_frames"),
        options={k: v for k, v in numbers.items() if k not in SIZES},
    )
    return ask, {k: v for k, v in arguments(pipe).items() if k not in numbers}


@pytest.mark.parametrize("kind", part(tuple(BUILDERS), 3))
def test_configured_drawn_measured_and_put_back(kind: str, measured_here: None) -> None:
    pipe = BUILDERS[kind]()
    plain = call(pipe, STEPS, **few_frames(pipe))
    before = whole_state(pipe)
    ask, content = ask_for(pipe)

    tuned: Tuned = configure_pipeline(pipe, ask, "cpu")
    output, phases = tuned.measure(**content, seed=0, output_type="pt")
    torch.testing.assert_close(output[0], plain, rtol=0, atol=1e-4)
    assert [p.name for p in phases] == ["encode", "denoise", "decode"]
    assert all(p.seconds > 0 for p in phases)

    checks = tuned.verify().phases
    assert [c.name for c in checks] == ["encode", "denoise", "decode"]
    assert min(c.measured.peak_bytes or 0 for c in checks) > tuned.plan.workload.weight_bytes

    tuned.undo()
    assert differences(before, whole_state(pipe)) == {}
    assert torch.equal(call(pipe, STEPS, **few_frames(pipe)), plain)


@pytest.mark.parametrize("kind", ["sd-controlnet", "sd3", "sana", "wan22"])
def test_a_whole_plan_is_applied_and_undone(kind: str, plan_of: Any) -> None:
    plan, _ = plan_of(BUILDERS["sd"](), "channels_last,model_cpu_offload")
    pipe = BUILDERS[kind]()
    plain = call(pipe, STEPS)
    before = whole_state(pipe)
    undo = apply_plan(pipe, plan, "cpu")
    assert {s.name for s in set_by_hand(pipe)} == {"channels_last", "model_cpu_offload"}
    torch.testing.assert_close(call(pipe, STEPS), plain, rtol=0, atol=1e-4)
    undo()
    assert differences(before, whole_state(pipe)) == {}
    assert torch.equal(call(pipe, STEPS), plain)


def test_an_argument_of_the_plan_is_passed_on_and_one_given_wins(measured_here: None) -> None:
    pipe = BUILDERS["sd-img2img"]()
    half, whole = (call(pipe, 4, strength=s) for s in (0.5, 1.0))
    assert not torch.equal(half, whole)
    image = arguments(pipe)["image"]
    ask = Ask(height=64, width=64, steps=4, options={"strength": 0.5})
    tuned = configure_pipeline(pipe, ask, "cpu")

    def draw(**options: Any) -> torch.Tensor:
        return tuned("a small cat", image=image, seed=0, output_type="pt", **options)[0]

    assert torch.equal(draw(), half)
    assert torch.equal(draw(strength=1.0), whole)
    assert torch.equal(draw(num_inference_steps=2, strength=1.0), call(pipe, 2, strength=1.0))


def test_peaks_are_measured_of_steps_that_are_taken(measured_here: None) -> None:
    """Two steps at a strength of 0.3 are none."""
    pipe = BUILDERS["sd-img2img"]()
    ask = Ask(height=64, width=64, steps=20, options={"strength": 0.3})
    tuned = configure_pipeline(pipe, ask, "cpu")
    steps = []
    pipe.unet.register_forward_pre_hook(lambda *_: steps.append(1))
    peaks = tuned.measure_peaks("a small cat", image=arguments(pipe)["image"])
    assert set(peaks) == {"encode", "denoise", "decode"}
    assert len(steps) == 2


def test_guidance_that_was_planned_is_guidance_that_is_drawn(measured_here: None) -> None:
    """Qwen-Image guides only where there is a negative prompt; the plan counts on it."""
    pipe = BUILDERS["qwen-image"]()
    ask = Ask(height=64, width=64, steps=STEPS, guidance_scale=4.0)
    tuned = configure_pipeline(pipe, ask, "cpu")
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    guided = tuned("a small cat", seed=0, output_type="pt")[0]
    assert len(calls) == 2 * STEPS
    assert torch.equal(guided, call(pipe, STEPS, negative_prompt=""))
    embeds, mask = pipe.encode_prompt("a dog", device="cpu")
    given = {"negative_prompt_embeds": embeds, "negative_prompt_embeds_mask": mask}
    other = tuned("a small cat", seed=0, output_type="pt", **given)[0]
    assert not torch.equal(other, guided)


def test_embeddings_may_be_a_list(measured_here: None) -> None:
    """Z-Image has one tensor for each prompt."""
    pipe = BUILDERS["z-image"]()
    ask, content = ask_for(pipe)
    tuned = configure_pipeline(pipe, ask, "cpu")
    embeds, negative = pipe.encode_prompt(
        content["prompt"], negative_prompt=content["negative_prompt"], max_sequence_length=16
    )
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    drawn = tuned(**given, seed=0, output_type="pt")[0]
    assert torch.equal(drawn, call(pipe, STEPS))


def test_components_are_planned_in_the_dtypes_that_they_have(measured_here: None) -> None:
    """A VAE that the user keeps in float32 weighs twice what it would in the denoiser's dtype."""
    pipe = BUILDERS["sdxl"]()
    pipe.to(torch.bfloat16)
    pipe.vae.to(torch.float32)
    real = sum(
        t.nbytes
        for m in pipe.components.values() if isinstance(m, nn.Module)
        for t in (*m.parameters(), *m.buffers())
    )  # fmt: skip
    tuned = configure_pipeline(pipe, Ask(height=64, width=64, steps=STEPS), "cpu")
    assert tuned.plan.workload.dtype == "bfloat16"
    assert tuned.plan.workload.weight_bytes == real


def test_attention_set_by_hand_is_kept_and_said(measured_here: None) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    pipe = BUILDERS["sd"]()
    mine = AttnProcessor()
    pipe.unet.set_attn_processor(mine)
    ask = Ask(height=64, width=64, steps=STEPS)
    tuned = configure_pipeline(pipe, ask, "cpu")
    said = "attention set by hand (AttnProcessor) is kept"
    rejected = {r.optimization: r.text for r in tuned.plan.rejected}
    assert rejected["xformers"] == rejected["attention_slicing"] == said
    assert said in tuned.plan.notes
    assert set(pipe.unet.attn_processors.values()) == {mine}
    assert call(pipe, STEPS).isfinite().all()


# ---- saved and loaded ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", part(tuple(BUILDERS), 3, start=1))
def test_what_was_saved_is_loaded_in_the_planned_dtypes(
    kind: str, plan_of: Any, tmp_path: Path
) -> None:
    pipe = BUILDERS[kind]()
    pipe.save_pretrained(tmp_path)
    plan, _ = plan_of(BUILDERS["sd"]())
    half = msgspec.structs.replace(plan.workload, dtype="float16")
    architecture = find_architecture(str(tmp_path))
    loaded = load_pipeline(architecture, msgspec.structs.replace(plan, workload=half))
    assert type(loaded) is type(pipe)
    modules = {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}
    assert set(modules) == set(architecture.components)
    for name, saved in modules.items():
        module = getattr(loaded, name)
        planned = meta_module(name, architecture.components[name], torch.float16, {})
        assert _dtypes(module) == _dtypes(planned)  # T5 keeps some in float32
        weights = module.state_dict()
        for key, weight in saved.state_dict().items():
            expected = weight.to(weights[key].dtype)
            assert torch.equal(weights[key], expected), (name, key)


def _dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    """Of the weights; Wan's ``scale_shift_table``, a few KiB, is planned narrower than it is."""
    tables = ("scale_shift_table",)
    return {n: p.dtype for n, p in module.named_parameters() if not n.endswith(tables)}


def test_a_component_of_another_dtype_is_loaded_in_it(plan_of: Any, tmp_path: Path) -> None:
    pipe = BUILDERS["flux"]()
    pipe.save_pretrained(tmp_path)
    architecture = find_architecture(str(tmp_path))
    vae = msgspec.structs.replace(architecture.components["vae"], dtype="float32")
    mixed = msgspec.structs.replace(
        architecture, components={**architecture.components, "vae": vae}
    )
    plan, _ = plan_of(BUILDERS["sd"]())
    half = msgspec.structs.replace(plan.workload, dtype="bfloat16")
    loaded = load_pipeline(mixed, msgspec.structs.replace(plan, workload=half))
    assert (loaded.vae.dtype, loaded.transformer.dtype) == (torch.float32, torch.bfloat16)
    assert describe_pipeline(loaded).components.keys() == architecture.components.keys()


@pytest.mark.parametrize("kind", ["sd3", "wan22", "svd"])
def test_planned_from_its_files_loaded_and_drawn_with(
    kind: str, measured_here: None, tmp_path: Path
) -> None:
    pipe = BUILDERS[kind]()
    plain = call(pipe, STEPS, **few_frames(pipe))
    ask, content = ask_for(pipe)
    pipe.save_pretrained(tmp_path)
    tuned = load_tuned(str(tmp_path), ask, "cpu")
    tuned.pipe.set_progress_bar_config(disable=True)
    drawn = tuned(**content, seed=0, output_type="pt")[0]
    # Weights read from a file lie at other addresses, where kernels add in another order.
    torch.testing.assert_close(drawn, plain, rtol=0, atol=1e-4)
