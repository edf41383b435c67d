"""A plan as plain diffusers lines: what a user would write to run it without this package."""

from __future__ import annotations

import json
from collections.abc import Iterator

from autotune.decide.plan import Plan, WorkloadSummary
from autotune.decide.rules import PLACEMENTS
from autotune.optimizations import find
from autotune.workload.architecture import Architecture

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

LOADING = "from_pretrained: "
"""How lines of optimizations begin that are arguments of ``from_pretrained``."""


def code_of(plan: Plan, architecture: Architecture | None = None) -> str:
    """A script that loads the pipeline, turns the plan's optimizations on and draws.

    Args:
        plan: What to do.
        architecture: Of the model; without it, weights are named as the user named the model.
    """
    pipeline = plan.workload.pipeline
    lines = list(_optimizing(plan))
    imports = {line for line in lines if line.startswith(("import ", "from "))}
    loading = [line.removeprefix(LOADING) for line in lines if line.startswith(LOADING)]
    body = [line for line in lines if line not in imports and not line.startswith(LOADING)]
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
            *_call("output = pipe", tuple(_arguments(plan.workload))),
            drawn,
            "",
        )
    )


def _call(function: str, arguments: tuple[str, ...]) -> tuple[str, ...]:
    return (f"{function}(", *(f"    {a}," for a in arguments), ")")


def _optimizing(plan: Plan) -> Iterator[str]:
    """The lines of every optimization; what moves weights comes last: its hooks wrap the rest."""
    settings = (*plan.kept, *plan.optimizations)
    for setting in sorted(settings, key=lambda s: s.name in PLACEMENTS):
        lines = find(setting.name).code(setting.parameters)
        lines = tuple(line.replace("{index}", str(plan.machine.index)) for line in lines)
        yield from _expanded(lines, plan.workload)
    if not PLACEMENTS & {s.name for s in settings} and plan.machine.device != "cpu":
        yield f'pipe.to("{plan.machine.device}")'


def _expanded(lines: tuple[str, ...], workload: WorkloadSummary) -> Iterator[str]:
    """The lines for each component that they name by its role, or with all of them in a row."""
    rows = {
        "{denoiser names}": ", ".join(map(_quoted, workload.denoisers)),
        "{denoisers}": ", ".join(f"pipe.{name}" for name in workload.denoisers),
        "{encoders}": ", ".join(f"pipe.{name}" for name in workload.encoders),
        "{autoencoders}": ", ".join(f"pipe.{name}" for name in workload.autoencoders),
    }
    for whole, row in rows.items():
        lines = tuple(line.replace(whole, row) for line in lines)
    named = {
        "{denoiser}": workload.denoisers,
        "{autoencoder}": workload.autoencoders,
        "{network}": (*workload.denoisers, *workload.autoencoders),
    }
    mark = next((m for m in named if any(m in line for line in lines)), None)
    if mark is None:
        yield from lines
        return
    for name in named[mark]:
        yield from (line.replace(mark, name) for line in lines)


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
