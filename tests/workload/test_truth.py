"""Rehearsals against what the pipelines really do: the calls, their shapes, their memory.

Both are given the same arguments. Scratch that an operator's kernel takes inside is left out of
what was measured: it depends on the device, and no trace of tensors has it.
"""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from autotune.testing.pipelines import BUILDERS, SIDE, arguments, call
from autotune.workload.architecture import describe_pipeline
from autotune.workload.arguments import copies_name, guidance_name
from autotune.workload.components import meta_module
from autotune.workload.live import pipeline_dtype
from autotune.workload.phases import trace_workload
from autotune.workload.rehearsal import Call, rehearse
from autotune.workload.stage import meta_pipeline
from autotune.workload.standins import StandInTokenizer
from autotune.workload.trace import ALLOCATION_BYTES
from autotune.workload.variants import switched
from autotune.workload.workload import ComponentRun, Request, Workload
from tests.thorough import part
from tests.workload.truth import Call as RealCall
from tests.workload.truth import tensors_of, truth

STEPS = 2

NOT_OPTIONS = {"height", "width", "num_frames", "guidance_scale", "true_cfg_scale"}
"""Arguments that are fields of a request."""

BY_LENGTH = {"sana", "qwen-image", "z-image"}
"""Kinds whose tensors are as long as the prompt. The small pipelines' tokenizers know letters or a
few words; here they count as a stand-in does, which is as large vocabularies do."""

DRAWS_ONE = {"CogVideoXPipeline", "AnimateDiffPipeline"}
"""Pipelines that take a number of videos and do not heed it: they are given as many prompts."""

KEEPS = {"z-image", "qwen-image"}
"""Kinds whose modules keep what they made at the first call (tables of positions): the later ones
allocate less, and a trace is of the first."""


class Asked(NamedTuple):
    """The same generation, for the pipeline itself and for its rehearsal."""

    changes: dict[str, Any]
    request: Request


def ask(
    pipe: Any,
    side: int = SIDE,
    batch: int = 1,
    guidance: float | None = None,
    steps: int = STEPS,
    size: dict[str, int] | None = None,
    **options: Any,
) -> Asked:
    """A small generation.

    Args:
        pipe: One of ``BUILDERS``.
        side: Of the image, in pixels.
        batch: Images.
        guidance: Instead of the pipeline's usual.
        steps: Of the scheduler.
        size: Width, height and frames where they are not the usual.
        **options: Further arguments of the pipeline.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    options |= size or {}
    given = arguments(pipe, side) | options
    unusual = {n: parameters[n].default for n, v in given.items() if v is None}
    name = guidance_name(parameters)
    if guidance is None:
        guidance = given.get(name, parameters[name].default if name in parameters else 1.0)
    changes = {"side": side, "steps": steps, **options, **unusual}
    if name in parameters:
        changes[name] = guidance
    plain = {
        n: v
        for n, v in given.items()
        if n not in NOT_OPTIONS and isinstance(v, (bool, int, float, str))
    }
    copies = copies_name(parameters)
    if copies is not None and type(pipe).__name__ not in DRAWS_ONE:
        changes[copies] = batch
    elif batch > 1:
        texts = {n: v for n, v in plain.items() if n in ("prompt", "negative_prompt")}
        changes |= {n: [text] * batch for n, text in texts.items()}
    request = Request(
        height=given.get("height", side),
        width=given.get("width", side),
        batch=batch,
        steps=steps,
        guidance_scale=guidance,
        dtype=pipeline_dtype(pipe),
        frames=given.get("num_frames", 1),
        options=plain,
    )
    return Asked(changes, request)


class Rehearsed(NamedTuple):
    """One call of a rehearsal."""

    call: Call
    out: Any
    activation_bytes: int


def rehearsed(pipe: Any, request: Request) -> list[Rehearsed]:
    """Every call, in order; the trace is that of the first with the same shapes."""
    architecture = describe_pipeline(pipe)
    dtype = getattr(torch, request.dtype)
    modules = {
        name: meta_module(name, component, dtype, pipe.components)
        for name, component in architecture.components.items()
    }
    made: list[Rehearsed] = []

    def tracer(call: Call) -> Any:
        trace, out, guesses = call.trace()
        assert not guesses, call.component
        made.append(Rehearsed(call, out, trace.activation_bytes))
        return out

    meta = meta_pipeline(architecture, type(pipe), modules, pipe)
    calls = rehearse(meta, request, tracer)
    first = dict(zip(dict.fromkeys(calls), made, strict=True))
    return [first[key] for key in calls]


def measured(pipe: Any, changes: dict[str, Any]) -> list[RealCall]:
    return truth(pipe, lambda: call(pipe, **changes), rounding=ALLOCATION_BYTES)


def described(value: Any) -> list[tuple[Any, ...]]:
    tensors = (t for t in tree_flatten(value)[0] if isinstance(t, Tensor))
    return [(*t.shape, t.dtype) for t in tensors]


def returned(out: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(t.shape) for t in tensors_of(out))


def compare(pipe: Any, asked: Asked, keeps: bool = False) -> list[RealCall]:
    """Assert that the rehearsal's calls are those of the real run, which it returns."""
    real = measured(pipe, asked.changes)
    made = rehearsed(pipe, asked.request)
    assert [(m.call.component, m.call.entry) for m in made] == [
        (r.component, r.method) for r in real
    ]
    seen: set[int] = set()
    for mine, theirs in zip(made, real, strict=True):
        name = f"{theirs.component}.{theirs.method}"
        assert described((mine.call.args, mine.call.kwargs)) == described(theirs.arguments), name
        assert returned(mine.out) == theirs.outputs, name
        peak = theirs.peak_without_scratch_bytes
        if keeps and id(mine) in seen:
            assert peak <= mine.activation_bytes * 1.01, name
        else:
            assert mine.activation_bytes == pytest.approx(peak, rel=0.01), name
        seen.add(id(mine))
    return real


def build(name: str) -> Any:
    pipe = BUILDERS[name]()
    if name in BY_LENGTH:
        pipe.tokenizer = StandInTokenizer(int(pipe.tokenizer.model_max_length))
    return pipe


@pytest.fixture(params=part(tuple(BUILDERS), 3))
def kind(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """Each kind's name and pipeline, in turn."""
    return request.param, build(request.param)


def test_calls_and_peaks_are_the_real_ones(kind: tuple[str, Any]) -> None:
    name, pipe = kind
    compare(pipe, ask(pipe), name in KEEPS)


@pytest.mark.parametrize("name", part(tuple(BUILDERS), 4))
def test_in_16_bit_without_guidance_two_at_once(name: str) -> None:
    pipe = build(name)
    pipe.to(torch.bfloat16)
    steps = 2 if "strength" in arguments(pipe) else 1  # half of them is left out then
    compare(pipe, ask(pipe, batch=2, guidance=1.0, steps=steps), name in KEEPS)


@pytest.mark.parametrize("name", ["sdxl", "flux", "qwen-image", "wan"])
def test_wide_large_and_several(name: str) -> None:
    pipe = build(name)
    frames = {"num_frames": 5} if "num_frames" in arguments(pipe) else {}
    size = {"height": 96, "width": 160} | frames
    compare(pipe, ask(pipe, batch=2, size=size), name in KEEPS)


@pytest.mark.parametrize("name", ["sana", "qwen-image", "z-image", "hunyuanvideo"])
def test_a_text_encoder_that_keeps_keys_and_values(name: str) -> None:
    pipe = build(name)
    asked = ask(pipe, steps=1)
    without = rehearsed(pipe, asked.request)[0].activation_bytes
    config = pipe.text_encoder.config
    config.use_cache = getattr(config, "text_config", config).use_cache = True
    real = compare(pipe, asked, name in KEEPS)
    assert real[0].peak_without_scratch_bytes > without


# ---- an autoencoder's other paths ---------------------------------------------------------------


def decode_of(workload: Workload) -> ComponentRun:
    return workload.phases[-1].runs[0]


def test_an_autoencoder_that_slices_and_tiles() -> None:
    """Switched on as users switch it on; the small one's own tiles are of 64 pixels."""
    pipe = BUILDERS["sd"]()
    asked = ask(pipe, side=128, batch=3, steps=1)
    variants = decode_of(trace_workload(describe_pipeline(pipe), asked.request)).variants
    for name, switches in {
        "sliced": ["enable_slicing"],
        "tiled:64": ["enable_tiling"],
        "sliced+tiled:64": ["enable_slicing", "enable_tiling"],
    }.items():
        pipe = BUILDERS["sd"]()
        for switch in switches:
            getattr(pipe.vae, switch)()
        decode = measured(pipe, asked.changes)[-1]
        assert variants[name].activation_bytes == pytest.approx(
            decode.peak_without_scratch_bytes, rel=0.01
        )


@pytest.mark.parametrize(
    "name",
    part(["sana", "qwen-image", "cogvideox", "ltx-video", "wan", "hunyuanvideo", "animatediff"], 2),
)
def test_every_kind_of_autoencoder(name: str) -> None:
    pipe = BUILDERS[name]()
    size = {"num_frames": 5} if "num_frames" in arguments(pipe) else {}
    request = ask(pipe, side=128, steps=1, size=size).request
    variants = decode_of(trace_workload(describe_pipeline(pipe), request)).variants
    has_batch = name == "animatediff"  # of frames
    assert set(variants) == (
        {"sliced", "tiled:64", "sliced+tiled:64"} if has_batch else {"tiled:64"}
    )
    decode = rehearsed(pipe, request)[-1].call
    (latents,) = decode.tensors
    real = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    for variant, traced in variants.items():
        with switched(pipe.vae, variant):
            (made,) = truth(pipe, lambda: pipe.vae.decode(real, **decode.kwargs), ALLOCATION_BYTES)
        peak = made.peak_without_scratch_bytes
        assert traced.activation_bytes == pytest.approx(peak, rel=0.01), variant


def test_a_sliced_video() -> None:
    pipe = BUILDERS["wan"]()
    request = ask(pipe, side=32, batch=4, steps=1, size={"num_frames": 5}).request
    traced = decode_of(trace_workload(describe_pipeline(pipe), request)).variants["sliced"]
    pipe.vae.enable_slicing()
    real = torch.randn(4, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    decode = lambda: pipe.vae.decode(real, return_dict=False)  # noqa: E731
    (made,) = truth(pipe, decode, ALLOCATION_BYTES)
    assert traced.activation_bytes == pytest.approx(made.peak_without_scratch_bytes, rel=0.01)


def test_an_autoencoder_without_other_paths() -> None:
    pipe = BUILDERS["svd"]()
    request = ask(pipe, 128, batch=2, steps=1).request
    assert decode_of(trace_workload(describe_pipeline(pipe), request)).variants == {}


# ---- unusual generations ------------------------------------------------------------------------


def counts(calls: list[RealCall]) -> Counter[str]:
    return Counter(c.component if c.method == "forward" else f"vae.{c.method}" for c in calls)


@pytest.mark.parametrize(
    ("scheduler", "config", "forwards"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True}, 6),  # the second step twice
        ("PNDMScheduler", {}, 14),  # four forwards for each of the first three
        ("HeunDiscreteScheduler", {}, 9),  # every step twice but the last
        ("LCMScheduler", {}, 5),
    ],
)
def test_schedulers_that_step_more_often(
    scheduler: str, config: dict[str, Any], forwards: int
) -> None:
    import diffusers

    pipe = BUILDERS["sd"]()
    pipe.scheduler = getattr(diffusers, scheduler)(**config)
    assert counts(compare(pipe, ask(pipe, steps=5)))["unet"] == forwards


@pytest.mark.parametrize(("strength", "forwards"), [(0.4, 2), (1.0, 5)])
def test_a_picture_to_start_from_leaves_steps_out(strength: float, forwards: int) -> None:
    pipe = BUILDERS["sd-img2img"]()
    assert counts(compare(pipe, ask(pipe, steps=5, strength=strength)))["unet"] == forwards


@pytest.mark.parametrize(("boundary", "noisy"), [(0.5, 4), (0.9, 2)])
def test_two_transformers_share_the_steps(boundary: float, noisy: int) -> None:
    pipe = BUILDERS["wan22"]()
    pipe.register_to_config(boundary_ratio=boundary)
    made = counts(compare(pipe, ask(pipe, steps=5)))
    assert made["transformer"] + made["transformer_2"] == 2 * 5
    assert made["transformer"] == 2 * noisy


def test_turbo_is_not_guided() -> None:
    pipe = BUILDERS["sdxl"]()
    real = compare(pipe, ask(pipe, steps=1, guidance=0.0))
    assert counts(real) == {"text_encoder": 1, "text_encoder_2": 1, "unet": 1, "vae.decode": 1}
    assert real[2].outputs == ((1, 4, 16, 16),)


@pytest.mark.parametrize(("name", "decodes"), [("animatediff", 3), ("svd", 3)])
def test_frames_are_decoded_in_chunks(name: str, decodes: int) -> None:
    """Nine of them, four at a time: the last chunk has one."""
    pipe = BUILDERS[name]()
    asked = ask(pipe, decode_chunk_size=4)
    assert counts(compare(pipe, asked))["vae.decode"] == decodes
    runs = trace_workload(describe_pipeline(pipe), asked.request).phases[-1].runs
    assert [r.calls for r in runs] == [2, 1]


def test_several_controlnets() -> None:
    from diffusers import MultiControlNetModel

    pipe = BUILDERS["sd-controlnet"]()
    pipe.register_modules(controlnet=MultiControlNetModel([pipe.controlnet, pipe.controlnet]))
    picture = arguments(pipe)["image"]
    asked = ask(pipe)
    compare(pipe, Asked(asked.changes | {"image": [picture, picture]}, asked.request))


def test_a_safety_checker_looks_at_what_was_drawn() -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = CLIPConfig(
        text_config=small | {"num_attention_heads": 2},
        vision_config=small | {"num_attention_heads": 2, "image_size": 224, "patch_size": 32},
        projection_dim=16,
    )
    pipe = BUILDERS["sd"]()
    pipe.register_modules(
        safety_checker=StableDiffusionSafetyChecker(config).eval(),
        feature_extractor=CLIPImageProcessor(),
    )
    workload = trace_workload(describe_pipeline(pipe), ask(pipe).request, pipe)
    real = measured(pipe, ask(pipe).changes)
    assert [r.component for r in workload.phases[-1].runs] == ["vae", "safety_checker"]
    checked = workload.phases[-1].runs[1]
    assert checked.is_estimated  # it reads how close pictures are to what it knows
    assert "safety_checker" in workload.notes[0]
    assert [r.component for r in real][-2:] == ["vae", "safety_checker"]
    peak = real[-1].peak_without_scratch_bytes
    assert checked.trace.activation_bytes == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_a_pipeline_that_is_given_embeddings(name: str) -> None:
    pipe = BUILDERS[name]()
    encoders = [n for n in pipe.components if n.startswith("text_encoder")]
    width = getattr(pipe, "unet", getattr(pipe, "transformer", None)).config
    wide = width.get("joint_attention_dim") or width.get("cross_attention_dim")
    tokens = 256 if name == "sd3" else 77
    given = {n: torch.randn(1, tokens, wide) for n in ("prompt_embeds", "negative_prompt_embeds")}
    if name != "sd":
        pooled = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        given |= {n: torch.randn(1, 64 if name == "sd3" else 32) for n in pooled}
    pipe.register_modules(**dict.fromkeys(encoders), tokenizer=None)
    asked = ask(pipe, guidance=5.0)
    request = msgspec.structs.replace(asked.request, options={})
    changes = asked.changes | given | {"prompt": None, "negative_prompt": None}
    made = counts(compare(pipe, Asked(changes, request)))
    assert set(made) == {"unet" if name != "sd3" else "transformer", "vae.decode"}
