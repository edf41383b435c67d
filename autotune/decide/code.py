"""A plan as plain diffusers lines: what a user would write to run it without this package."""

from __future__ import annotations

import json
from collections.abc import Iterator

from autotune.decide.plan import Plan, WorkloadSummary
from autotune.decide.rules import PLACEMENTS
from autotune.errors import ModelError
from autotune.optimizations import find
from autotune.optimizations.base import Setting
from autotune.optimizations.target import BEFORE_IMAGE, LOADING, Target
from autotune.workload.architecture import Architecture, find_architecture

TAKES_NO = {
    "StableDiffusionUpscalePipeline": ("height", "width"),
    "StableDiffusionXLImg2ImgPipeline": ("height", "width"),
    "StableDiffusionImg2ImgPipeline": ("height", "width"),
    "StableVideoDiffusionPipeline": ("prompt", "guidance_scale"),
}
"""Pipeline → usual arguments that it does not take."""

GUIDED_BY = {"QwenImagePipeline": "true_cfg_scale"}
"""Pipeline → the argument that guides, where it is another than ``guidance_scale``."""

GIVEN = {
    "FluxKontextPipeline": ("image",),
    "StableDiffusionControlNetPipeline": ("image",),
    "StableDiffusionImg2ImgPipeline": ("image",),
    "StableDiffusionInpaintPipeline": ("image", "mask_image"),
    "StableDiffusionUpscalePipeline": ("image",),
    "StableDiffusionXLControlNetPipeline": ("image",),
    "StableDiffusionXLImg2ImgPipeline": ("image",),
    "StableVideoDiffusionPipeline": ("image",),
}
"""Pipeline → pictures that it is given."""


def code_of(plan: Plan, architecture: Architecture | None = None) -> str:
    """A script that loads the pipeline, turns the plan's optimizations on and draws.

    Args:
        plan: What to do.
        architecture: Of the model; without it, it is read where that needs no download, or else
            weights are named as the user named the model.
    """
    architecture = architecture or _readable(plan.workload.model)
    pipeline = plan.workload.pipeline
    lines = list(_optimizing(plan, architecture))
    imports = {line for line in lines if line.startswith(("import ", "from "))}
    loading, before_image = (_beginning(prefix, lines) for prefix in (LOADING, BEFORE_IMAGE))
    body = [x for x in lines if x not in imports and not x.startswith((LOADING, BEFORE_IMAGE))]
    imports |= {"import torch", f"from diffusers import {pipeline}"}
    if pipeline in GIVEN:
        imports.add("from diffusers.utils import load_image")
    drawn = "video = output.frames[0]" if plan.workload.frames > 1 else "image = output.images[0]"
    return "\n".join(
        (
            *sorted(imports, key=lambda line: (line.startswith("from "), line)),
            "",
            *_call(f"pipe = {pipeline}.from_pretrained", (*_load(plan, architecture), *loading)),
            *body,
            "",
            *before_image,
            *_call("output = pipe", tuple(_arguments(plan.workload))),
            drawn,
            "",
        )
    )


def _readable(model: str) -> Architecture | None:
    """The model's architecture, where it is to be had without a download."""
    try:
        return find_architecture(model, download=False)
    except ModelError:
        return None


def _beginning(prefix: str, lines: list[str]) -> tuple[str, ...]:
    return tuple(line.removeprefix(prefix) for line in lines if line.startswith(prefix))


def _call(function: str, arguments: tuple[str, ...]) -> tuple[str, ...]:
    return (f"{function}(", *(f"    {a}," for a in arguments), ")")


def _optimizing(plan: Plan, architecture: Architecture | None) -> Iterator[str]:
    """The lines of every optimization, in an order in which each finds what it changes."""
    target = _target(plan, architecture)
    settings = (*plan.kept, *plan.optimizations)
    for setting in sorted(settings, key=_order):
        yield from find(setting.name).code(setting.parameters, target)
    if not PLACEMENTS & {s.name for s in settings} and plan.machine.device != "cpu":
        yield f'pipe.to("{plan.machine.device}")'


def _order(setting: Setting) -> tuple[bool, bool, bool]:
    """What moves weights comes last: its hooks wrap the rest."""
    handler = find(setting.name)
    return (setting.name in PLACEMENTS, not handler.before_moving, not handler.replaces)


def _target(plan: Plan, architecture: Architecture | None) -> Target:
    w = plan.workload
    components = {} if architecture is None else architecture.components
    return Target(
        w.pipeline,
        w.model,
        w.dtype,
        plan.machine.index,
        w.encoders,
        w.denoisers,
        w.autoencoders,
        components,
    )


def _load(plan: Plan, architecture: Architecture | None) -> Iterator[str]:
    """Arguments of ``from_pretrained``; ``torch_dtype`` is what old and new versions know."""
    weights = plan.workload.model if architecture is None else architecture.weights
    yield _quoted(weights or "path/to/the/model")
    dtype = plan.workload.dtype
    parts = {} if architecture is None else architecture.components
    others = {name: c.dtype for name, c in parts.items() if c.dtype not in ("", dtype)}
    if others:
        pairs = (f"{_quoted(n)}: torch.{d}" for n, d in {**others, "default": dtype}.items())
        yield f"torch_dtype={{{', '.join(pairs)}}}"
    else:
        yield f"torch_dtype=torch.{dtype}"
    if architecture is not None and architecture.variant and dtype != "float32":
        yield f"variant={_quoted(architecture.variant)}"


def _arguments(workload: WorkloadSummary) -> Iterator[str]:
    """Arguments of the pipeline's call: what was planned for."""
    w, pipeline = workload, workload.pipeline
    copies = "num_videos_per_prompt" if w.frames > 1 else "num_images_per_prompt"
    usual: dict[str, object] = {
        "prompt": "a lighthouse at dusk",
        "height": w.height,
        "width": w.width,
        "num_frames": w.frames,
        "num_inference_steps": w.steps,
        "guidance_scale": w.guidance_scale,
        copies: w.batch,
    }
    left_out = {*TAKES_NO.get(pipeline, ())}
    left_out |= {name for name in ("num_frames", copies) if usual[name] == 1}
    for name, value in usual.items():
        if name not in left_out:
            name = GUIDED_BY.get(pipeline, name) if name == "guidance_scale" else name
            yield f"{name}={_quoted(value)}"
    yield from (f"{name}={_quoted(value)}" for name, value in w.options.items())
    yield from (f'{name}=load_image("{name}.png")' for name in GIVEN.get(pipeline, ()))


def _quoted(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
