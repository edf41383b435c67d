"""Workloads of whole pipelines: sizes, phases, code paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from autotune.errors import ModelError
from autotune.workload.architecture import (
    Architecture,
    ComponentConfig,
    describe_pipeline,
    find_architecture,
)
from autotune.workload.components import build_on_meta, describe
from autotune.workload.phases import trace_workload
from autotune.workload.variants import switched, tile_sizes, variants_of
from autotune.workload.workload import Component

RequestOf = Callable[..., Any]


def real_component(name: str, module: Any) -> Component:
    """Counted from the weights themselves."""
    parameters = list(module.parameters())
    leaves = [list(m.parameters(recurse=False)) for m in module.modules()]
    owned = [sum(p.nbytes for p in leaf) for leaf in leaves if leaf]
    return Component(
        name=name,
        class_name=type(module).__name__,
        parameters=sum(p.numel() for p in parameters),
        weight_bytes=sum(t.nbytes for t in (*parameters, *module.buffers())),
        largest_leaf_bytes=max(owned),
        leaf_count=len(owned),
        tensor_count=len(parameters),
        tensor_bytes=tuple(t.nbytes for t in (*parameters, *module.buffers())),
        unmoved_bytes=sum(b.nbytes for b in _unmoved(module)),
    )


def _unmoved(module: Any) -> Any:
    own = {id(b) for m in module.modules() for n, b in m._buffers.items() if _is_in_file(m, n)}
    return [b for b in module.buffers() if not (module._parameters and id(b) in own)]


def _is_in_file(module: Any, name: str) -> bool:
    return name not in module._non_persistent_buffers_set


def without_groups(component: Component) -> Component:
    """What ``describe`` says: what optimizations make of it is tested with these."""
    return Component(**{name: getattr(component, name) for name in DESCRIBED})


DESCRIBED = (
    *("name", "class_name", "parameters", "weight_bytes", "tensor_count", "tensor_bytes"),
    *("largest_leaf_bytes", "leaf_count", "unmoved_bytes"),
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_components_weigh_what_the_real_ones_weigh(
    pipe: Any, dtype: str, request_of: RequestOf
) -> None:
    workload = trace_workload(describe_pipeline(pipe), request_of(dtype=dtype))
    pipe.to(getattr(torch, dtype))
    modules = {n: m for n, m in pipe.components.items() if hasattr(m, "parameters")}
    real = {n: real_component(n, m) for n, m in modules.items()}
    assert {c.name: without_groups(c) for c in workload.components} == real
    assert workload.weight_bytes == sum(c.weight_bytes for c in real.values())
    assert without_groups(workload.component("unet")) == real["unet"]


def test_phases_run_in_order_and_as_often_as_the_pipeline_runs_them(
    sdxl_pipe: Any, request_of: RequestOf
) -> None:
    workload = trace_workload(describe_pipeline(sdxl_pipe), request_of())
    calls = {p.name: [(r.component, r.calls) for r in p.runs] for p in workload.phases}
    assert calls == {
        "encode": [("text_encoder", 1), ("text_encoder_2", 1)],
        "denoise": [("unet", 3)],
        "decode": [("vae", 1)],
    }
    assert workload.offload_order == ("text_encoder", "text_encoder_2", "unet", "vae")


def test_guidance_doubles_the_denoisers_batch(sd_pipe: Any, request_of: RequestOf) -> None:
    architecture = describe_pipeline(sd_pipe)
    guided = trace_workload(architecture, request_of(batch=1))
    alone = trace_workload(architecture, request_of(batch=2, guidance_scale=1.0))
    flops = [w.phases[1].runs[0].trace.flops for w in (guided, alone)]
    assert flops[0] == flops[1]
    assert alone.phases[0].runs[0].calls == 1


def test_sdxl_in_float16_decodes_in_float32(sdxl_pipe: Any, request_of: RequestOf) -> None:
    architecture = describe_pipeline(sdxl_pipe)
    half = trace_workload(architecture, request_of(dtype="float16"))
    run = half.phases[-1].runs[0]
    assert run.upcast_bytes == half.component("vae").weight_bytes
    assert {o.dtype for o in run.trace.operators} == {"float32"}
    for dtype in ("float32", "bfloat16"):
        workload = trace_workload(architecture, request_of(dtype=dtype))
        assert workload.phases[-1].runs[0].upcast_bytes == 0


def test_sd15_in_float16_decodes_in_float16(sd_pipe: Any, request_of: RequestOf) -> None:
    workload = trace_workload(describe_pipeline(sd_pipe), request_of(dtype="float16"))
    assert workload.phases[-1].runs[0].upcast_bytes == 0


# ---- code paths of the decode -------------------------------------------------------------------


def test_slicing_and_tiling_shrink_the_decode(sd_pipe: Any, request_of: RequestOf) -> None:
    run = trace_workload(describe_pipeline(sd_pipe), request_of(128, 2)).phases[-1].runs[0]
    peaks = {name: t.activation_bytes for name, t in run.variants.items()}
    assert set(peaks) == {"sliced", "tiled:64", "sliced+tiled:64"}
    whole = run.trace.activation_bytes
    image = 3 * 128 * 128 * 4
    assert peaks["sliced"] == pytest.approx(whole / 2 + 2 * image, rel=0.05)
    assert peaks["tiled:64"] < whole / 3
    assert peaks["sliced+tiled:64"] < min(peaks["sliced"], peaks["tiled:64"])
    assert run.variants["sliced"].flops == run.trace.flops
    assert run.variants["tiled:64"].flops > run.trace.flops  # tiles overlap


def test_a_path_that_changes_nothing_is_no_path(sd_pipe: Any, request_of: RequestOf) -> None:
    run = trace_workload(describe_pipeline(sd_pipe), request_of(64, 1)).phases[-1].runs[0]
    assert run.variants == {}


@pytest.mark.parametrize(
    ("side", "tiles"), [(64, ()), (127, ()), (128, (64,)), (512, (256,)), (520, (512,))]
)
def test_a_tile_really_cuts_the_image(
    sd_pipe: Any, side: int, tiles: tuple[int, ...], request_of: RequestOf
) -> None:
    assert tile_sizes(request_of(side)) == tiles
    assert variants_of(sd_pipe.vae, request_of(side), batch=1) == tuple(f"tiled:{t}" for t in tiles)


@pytest.mark.parametrize("variant", ["", "sliced", "tiled:64", "sliced+tiled:128"])
def test_a_vae_is_switched_for_a_while(sd_pipe: Any, variant: str) -> None:
    vae = sd_pipe.vae
    vae.use_slicing = True  # by hand: it stays
    before = dict(vae.__dict__)
    with pytest.raises(KeyError), switched(vae, variant):
        assert vae.use_tiling == ("tiled" in variant)
        if "tiled" in variant:
            assert vae.tile_latent_min_size * 4 == vae.tile_sample_min_size
        raise KeyError
    assert vae.__dict__ == before


# ---- what cannot be traced ----------------------------------------------------------------------


def replaced(architecture: Architecture, component: str, **config: Any) -> Architecture:
    old = architecture.components[component]
    new = msgspec.structs.replace(old, config=old.config | config)
    return msgspec.structs.replace(
        architecture, components=architecture.components | {component: new}
    )


def test_an_unknown_class_is_named(sd_pipe: Any, request_of: RequestOf) -> None:
    architecture = describe_pipeline(sd_pipe)
    strange = ComponentConfig("diffusers", "UNet9DModel", {})
    components = architecture.components | {"image_encoder": strange}
    with pytest.raises(ModelError, match="image_encoder needs UNet9DModel of diffusers"):
        trace_workload(msgspec.structs.replace(architecture, components=components), request_of())


def test_a_configuration_that_cannot_be_built_is_one_line(
    sd_pipe: Any, request_of: RequestOf
) -> None:
    broken = replaced(describe_pipeline(sd_pipe), "unet", norm_num_groups=7)
    with pytest.raises(ModelError, match="cannot build unet") as caught:
        trace_workload(broken, request_of())
    assert "\n" not in str(caught.value)


def test_a_forward_that_fails_is_estimated_and_said(sd_pipe: Any, request_of: RequestOf) -> None:
    architecture = replaced(describe_pipeline(sd_pipe), "unet", class_embed_type="timestep")
    workload = trace_workload(architecture, request_of())
    (note,) = workload.notes
    assert note.startswith(
        "denoise: unet (UNet2DConditionModel) cannot be traced: class_labels should be"
    )
    assert "\n" not in note
    assert [(p.name, r.is_estimated) for p in workload.phases for r in p.runs] == [
        ("encode", False),
        ("denoise", True),
        ("decode", False),
    ]


def test_a_pipeline_without_a_denoiser_is_refused(sd_pipe: Any, request_of: RequestOf) -> None:
    architecture = describe_pipeline(sd_pipe)
    rest = {n: c for n, c in architecture.components.items() if n != "unet"}
    with pytest.raises(ModelError, match="has nothing like a denoiser") as caught:
        trace_workload(msgspec.structs.replace(architecture, components=rest), request_of())
    assert "\n" not in str(caught.value)


def test_a_pipeline_class_that_is_not_installed_is_refused(
    sd_pipe: Any, request_of: RequestOf
) -> None:
    newer = msgspec.structs.replace(describe_pipeline(sd_pipe), pipeline="StableDiffusion9Pipeline")
    with pytest.raises(ModelError, match="no pipeline of the installed diffusers"):
        trace_workload(newer, request_of())


# ---- the built-in files -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "parameters"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_built_in_files_describe_the_published_networks(name: str, parameters: int) -> None:
    config = find_architecture(name).components["unet"]
    unet = describe("unet", build_on_meta("unet", config, torch.float16))
    assert unet.parameters == parameters
    assert unet.weight_bytes == 2 * parameters
