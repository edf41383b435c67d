"""A plan as plain diffusers lines: they run, and do what applying the plan does."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys

import msgspec
import pytest

from autotune.decide.choose import Limits, choose
from autotune.decide.code import code_of
from autotune.decide.plan import Plan, WorkloadSummary
from autotune.optimizations import CATALOGUE, parse_settings
from autotune.optimizations.base import Setting
from autotune.probe.reference import load_machine
from autotune.workload.architecture import Architecture, builtin_names, find_architecture


def with_settings(plan: Plan, *settings: Setting) -> Plan:
    return msgspec.structs.replace(plan, optimizations=settings)


def every_setting(machine, workload) -> list[Setting]:
    return [
        optimization.setting(parameters)
        for optimization in CATALOGUE.values()
        for parameters in (
            optimization.defaults,
            *(
                ()
                if optimization.unavailable(machine, workload)
                else optimization.worth_trying(machine, workload)
            ),
        )
    ]


@pytest.fixture
def plan(traced, rtx_3080) -> Plan:
    return choose(rtx_3080, traced("sdxl"))


def test_the_example_of_the_documentation(plan):
    settings = parse_settings("model_cpu_offload,channels_last")
    text = with_settings(plan, *settings).code(find_architecture("sdxl"))
    assert text == (
        "import torch\n"
        "from diffusers import StableDiffusionXLPipeline\n"
        "\n"
        "pipe = StableDiffusionXLPipeline.from_pretrained(\n"
        '    "stabilityai/stable-diffusion-xl-base-1.0",\n'
        "    torch_dtype=torch.float16,\n"
        '    variant="fp16",\n'
        ")\n"
        "pipe.unet.to(memory_format=torch.channels_last)\n"
        "pipe.vae.to(memory_format=torch.channels_last)\n"
        "pipe.enable_model_cpu_offload()\n"
        "\n"
        "output = pipe(\n"
        '    prompt="a lighthouse at dusk",\n'
        "    height=1024,\n"
        "    width=1024,\n"
        "    num_inference_steps=50,\n"
        "    guidance_scale=5.0,\n"
        ")\n"
        "image = output.images[0]\n"
    )


def test_every_optimization_has_lines(plan, traced, rtx_3080):
    for setting in every_setting(rtx_3080, traced("sdxl")):
        text = with_settings(plan, setting).code()
        ast.parse(text)
        assert "no equivalent" not in text
        assert "{" not in text or setting.name in ("device_map", "quantization")


@pytest.mark.parametrize(
    ("model", "weights"),
    [("sdxl", "taesdxl"), ("sd15", "taesd"), ("sd3-medium", "taesd3"), ("flux-dev", "taef1")],
)
def test_the_distilled_autoencoder_is_the_models_own(plan, model, weights):
    workload = summary(find_architecture(model))
    tiny = with_settings(plan, *parse_settings("vae_tiling,tiny_autoencoder"))
    text = msgspec.structs.replace(tiny, workload=workload).code()
    assert f'from_pretrained("madebyollin/{weights}", torch_dtype' in text
    assert text.index(weights) < text.index("enable_tiling")


def test_tiles_are_set_in_the_way_of_the_autoencoder(plan):
    tiled = with_settings(plan, *parse_settings("vae_tiling:tile=256"))
    assert "pipe.vae.tile_latent_min_size = 32\n" in tiled.code()
    ltx = msgspec.structs.replace(tiled, workload=summary(find_architecture("ltx-video")))
    assert "tile_sample_stride_height=224, tile_sample_stride_width=224)\n" in ltx.code()


def test_what_no_library_makes_is_asked_for(plan):
    text = with_settings(plan, *parse_settings("quantization:scheme=gguf_q8_0")).code()
    assert 'search huggingface.co/models for "sdxl gguf"' in text
    assert 'file = "path/to/unet-Q8_0.gguf"\n' in text and "compute_dtype=torch.float16)" in text


def test_weights_are_moved_once(plan):
    assert 'pipe.to("cuda")' in with_settings(plan).code()
    for name in ("model_cpu_offload", "sequential_cpu_offload"):
        assert "pipe.to(" not in with_settings(plan, Setting(name)).code()
    kept = msgspec.structs.replace(plan, kept=(Setting("model_cpu_offload"),), optimizations=())
    assert "pipe.enable_model_cpu_offload()" in kept.code()
    assert "pipe.to(" not in kept.code()


def test_nothing_is_moved_on_a_cpu(traced, cpu_machine):
    assert "pipe.to(" not in choose(cpu_machine, traced("sd15")).code()


def test_parts_in_other_dtypes_are_said(plan):
    architecture = find_architecture("sdxl")
    vae = msgspec.structs.replace(architecture.components["vae"], dtype="float32")
    mixed = msgspec.structs.replace(architecture, components={"vae": vae})
    text = plan.code(mixed)
    assert 'torch_dtype={"vae": torch.float32, "default": torch.float16}' in text
    ast.parse(text)


# ---- every model --------------------------------------------------------------------------------


def summary(architecture: Architecture) -> WorkloadSummary:
    is_video = bool(architecture.frames)
    return WorkloadSummary(
        model=architecture.name,
        pipeline=architecture.pipeline,
        height=512,
        width=512,
        batch=2,
        steps=20,
        guidance_scale=5.0,
        dtype=architecture.half_dtype,
        weight_bytes=1,
        frames=17 if is_video else 1,
        denoisers=("transformer",),
        autoencoders=("vae",),
    )


@pytest.mark.parametrize("name", ["rtx-3080-10gb-torch1", "laptop-rtx-3050-4gb", "t4-16gb"])
def test_every_built_in_model_compiles(traced, name):
    plan = choose(load_machine(name), traced("sdxl"), Limits(quality="fast"))
    for model in builtin_names():
        architecture = find_architecture(model)
        text = code_of(msgspec.structs.replace(plan, workload=summary(architecture)), architecture)
        compile(text, model, "exec")


def test_every_built_in_pipeline_takes_the_arguments(plan):
    """Checked against the signatures of the diffusers that is installed."""
    import diffusers

    for name in builtin_names():
        architecture = find_architecture(name)
        text = code_of(msgspec.structs.replace(plan, workload=summary(architecture)), architecture)
        call = next(
            node
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "pipe"
        )
        pipeline = getattr(diffusers, architecture.pipeline)
        parameters = inspect.signature(pipeline.__call__).parameters
        given = {k.arg for k in call.keywords}
        assert given <= set(parameters), name
        needed = {
            p.name
            for p in parameters.values()
            if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"
        }
        assert needed <= given, name
        guided = "true_cfg_scale" if architecture.pipeline == "QwenImagePipeline" else None
        assert guided is None or guided in given


# ---- for real -----------------------------------------------------------------------------------

RUNNER = """
import json, sys
import numpy as np
import torch
import msgspec
from diffusers import StableDiffusionPipeline
from autotune.decide.plan import Plan
from autotune.demo import model_path
from autotune.optimizations import find
from autotune.runtime.apply import apply_plan
from autotune.testing.standins import nothing_compiled

def draw(pipe, settings):
    for setting in settings:
        find(setting.name).before_image(pipe, setting.parameters, 0)
    options = dict(num_inference_steps=1, num_images_per_prompt=2, guidance_scale=7.5)
    torch.manual_seed(0)
    return pipe("a lighthouse at dusk", height=128, width=128, **options).images[0]

plain = StableDiffusionPipeline.from_pretrained(model_path())
compiled = nothing_compiled()  # it would take most of the time, and rounds otherwise
compiled.__enter__()
for item in json.load(sys.stdin):
    plan = msgspec.convert(item["plan"], Plan)
    load, call = item["code"].split("\\n\\n")[-2:]
    imports = item["code"].split("\\n\\n")[0]
    names = {}
    exec(imports + "\\n" + load, names)
    images = []
    for _ in range(2):
        torch.manual_seed(0)
        exec(call, names)
        images.append(names["image"])
    undo = apply_plan(plain, plan, "cpu")
    images.append(draw(plain, plan.optimizations))
    undo()
    first, again, applied = (np.asarray(i).astype(int) for i in images)
    assert first.shape == (128, 128, 3)
    print(item["name"], abs(first - again).max(), abs(first - applied).max(), flush=True)
"""


def test_the_lines_do_what_applying_the_plan_does(traced, cpu_machine):
    """Run in a process of its own with the demo model, one step each."""
    workload = traced("demo", batch=2, steps=1, dtype="float32")
    plan = choose(cpu_machine, workload, Limits(without=tuple(CATALOGUE)))
    architecture = find_architecture("demo")
    usable = [
        optimization.setting(parameters)
        for optimization in CATALOGUE.values()
        if optimization.name == "channels_last"  # of no use on a CPU, but it runs
        or not optimization.unavailable(cpu_machine, workload)
        for parameters in optimization.worth_trying(cpu_machine, workload)[-1:]
    ]
    assert {"tome", "vae_slicing", "vae_tiling"} <= {s.name for s in usable}
    usable.append(CATALOGUE["device_map"].setting())  # on "cpu:1", which is the CPU by name only
    plans = {str(s): with_settings(plan, s) for s in usable}
    plans["nothing"] = with_settings(plan)
    items = [
        {
            "name": name,
            "code": p.code(architecture).replace("cuda:", "cpu:"),
            "plan": msgspec.to_builtins(p),
        }
        for name, p in plans.items()
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(items),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line.rsplit(" ", 2) for line in done.stdout.splitlines()]
    assert {name for name, *_ in found} == set(plans)
    assert all(again == "0" for _, again, _ in found), f"another image of the same seed: {found}"
    assert all(applied in "01" for *_, applied in found), found  # of 255
