"""Requests: what is filled in, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from autotune.errors import RequestError
from autotune.probe.machine import Machine
from autotune.workload.architecture import (
    Architecture,
    ComponentConfig,
    describe_pipeline,
    find_architecture,
)
from autotune.workload.request import complete_request, native_size
from autotune.workload.workload import Request


@pytest.fixture
def sd15() -> Architecture:
    return find_architecture("sd15")


def test_the_model_says_what_the_user_does_not(rtx_3080: Machine) -> None:
    sd15, sdxl = find_architecture("sd15"), find_architecture("sdxl")
    assert complete_request(sd15, rtx_3080) == Request(512, 512, 1, 50, 7.5, "float16")
    assert complete_request(sdxl, rtx_3080) == Request(1024, 1024, 1, 50, 5.0, "float16")


def test_the_pipeline_class_says_it_for_a_loaded_pipeline(
    sdxl_pipe: Any, cpu_machine: Machine
) -> None:
    architecture = describe_pipeline(sdxl_pipe)
    assert complete_request(architecture, cpu_machine) == Request(64, 64, 1, 50, 5.0, "float32")


def test_what_the_user_says_counts(sd15: Architecture, rtx_3080: Machine) -> None:
    asked = {"height": 64, "width": 1024, "batch": 3, "steps": 1, "guidance_scale": 0.0}
    request = complete_request(sd15, rtx_3080, dtype="float32", **asked)  # type: ignore[arg-type]
    assert request == Request(64, 1024, 3, 1, 0.0, "float32")


@pytest.mark.parametrize(
    ("short", "long"), [("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32")]
)
def test_dtypes_have_short_names(
    sd15: Architecture, rtx_3080: Machine, short: str, long: str
) -> None:
    assert complete_request(sd15, rtx_3080, dtype=short).dtype == long


def test_16_bit_only_where_it_is_computed(
    sd15: Architecture, rtx_3080: Machine, cpu_machine: Machine
) -> None:
    assert complete_request(sd15, cpu_machine).dtype == "float32"
    brain = msgspec.structs.replace(sd15, half_dtype="bfloat16")
    kernels = rtx_3080.kernels
    rates = kernels.matmul_flops_per_s
    for known, expected in (
        ({"float16", "bfloat16"}, "bfloat16"),
        ({"float16"}, "float16"),
        (set(), "float32"),
    ):
        figures = {"float32": rates["float32"], **dict.fromkeys(known, rates["float16"])}
        machine = msgspec.structs.replace(
            rtx_3080, kernels=msgspec.structs.replace(kernels, matmul_flops_per_s=figures)
        )
        assert complete_request(brain, machine).dtype == expected


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"height": 100}, "height 100 is not a multiple of 8, the model's factor .use 96 or 104"),
        ({"width": 513}, "use 512 or 520"),
        ({"width": 0}, "width 0 is out of range"),
        ({"height": 4}, "height 4 is out of range"),
        ({"height": -512}, "height -512 is out of range"),
        ({"width": 100_000}, "use 8 to 16384 pixels"),
        ({"batch": 0}, "batch 0 is out of range"),
        ({"batch": 5000}, "use 1 to 1024"),
        ({"steps": 0}, "steps 0 is out of range"),
        ({"steps": 10_000}, "use 1 to 1000"),
        ({"guidance_scale": -1.0}, "guidance -1.0 is out of range"),
        ({"guidance_scale": math.nan}, "guidance nan is out of range"),
        ({"guidance_scale": math.inf}, "guidance inf is out of range"),
        ({"dtype": "float64"}, "unknown dtype 'float64'"),
        ({"frames": 8}, "draws images, not 8 frames"),
    ],
)
def test_the_impossible_is_refused_with_numbers(
    sd15: Architecture, rtx_3080: Machine, asked: dict[str, Any], says: str
) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        complete_request(sd15, rtx_3080, **asked)
    assert caught.value.hint


def test_pipelines_that_pack_latents_round_sides_down(
    rtx_3080: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    """Flux draws 1920 x 1072 where 1080 is asked for, and so it is planned."""
    flux = find_architecture("flux-dev")
    assert complete_request(flux, rtx_3080, height=1080, width=1920).height == 1072
    assert "height 1080 is drawn as 1072, a multiple of 16" in caplog.text
    with pytest.raises(RequestError, match="height 15 is out of range"):
        complete_request(flux, rtx_3080, height=15)


def test_one_frame_is_an_image(sd15: Architecture, rtx_3080: Machine) -> None:
    assert complete_request(sd15, rtx_3080, frames=1) == complete_request(sd15, rtx_3080)


def test_native_sizes() -> None:
    vae = ComponentConfig(
        "diffusers", "AutoencoderKL", {"block_out_channels": [1, 2, 3], "sample_size": 96}
    )

    def of(**unet: Any) -> tuple[int, int]:
        config = ComponentConfig("diffusers", "UNet2DConditionModel", unet)
        return native_size(Architecture("m", "P", {"vae": vae, "unet": config}))

    assert of(sample_size=16) == (64, 64)
    assert of(sample_size=[16, 24]) == (64, 96)
    assert of() == (96, 96)


def test_a_model_without_a_vae_draws_what_its_network_draws(cpu_machine: Machine) -> None:
    unet = ComponentConfig("diffusers", "UNet2DModel", {"sample_size": 8})
    architecture = Architecture("m", "DDPMPipeline", {"unet": unet})
    request = complete_request(architecture, cpu_machine, height=64, width=64)
    assert (request.height, request.width, request.steps) == (64, 64, 1000)
