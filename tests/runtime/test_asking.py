"""What a call asks for, and the workload of a request that differs in steps alone."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from autotune.runtime.asking import asked_for, drawn_by
from autotune.testing.pipelines import BUILDERS, build_image
from autotune.tuner.replan import as_asked, is_alike
from autotune.workload.architecture import describe_pipeline
from autotune.workload.phases import trace_workload
from autotune.workload.workload import Request
from tests.workloads import workload_of

PLANNED = Request(64, 64, 2, 4, 7.5, "float32", 1, {"max_sequence_length": 64})


def kind(*names: str) -> Any:
    taken = (n if "=" in n else f"{n}=None" for n in names)
    body = f"def __call__(self, {', '.join(taken)}): pass"
    found: dict[str, Any] = {}
    exec(body, found)  # parameters are read off the signature
    return type("Kind", (), {"__call__": found["__call__"], "vae_scale_factor": 8})()


DISTILLED = kind("prompt", "negative_prompt", "guidance_scale=3.5", "true_cfg_scale")
TEXT = kind("prompt", "height", "width", "num_inference_steps", "guidance_scale", "num_frames",
            "num_images_per_prompt", "timesteps", "max_sequence_length", "eta")  # fmt: skip
PICTURE = kind("prompt", "image", "strength", "num_inference_steps", "guidance_scale")


@pytest.mark.parametrize(
    ("given", "changes"),
    [
        ({}, {}),
        ({"height": 96, "width": 32}, {"height": 96, "width": 32}),
        ({"height": None, "num_inference_steps": True}, {}),
        ({"num_inference_steps": 9}, {"steps": 9}),
        ({"timesteps": [900, 500, 100]}, {"steps": 3}),
        ({"guidance_scale": 1}, {"guidance_scale": 1.0}),
        ({"num_frames": 9}, {"frames": 9}),
        ({"max_sequence_length": 128}, {"options": {"max_sequence_length": 128}}),
        ({"eta": 0.5, "callback": print, "unknown": 3}, {}),
        (
            {"height": np.int64(96), "guidance_scale": np.float32(2)},
            {"height": 96, "guidance_scale": 2.0},
        ),
        ({"timesteps": np.array([900, 500])}, {"steps": 2}),
        ({"max_sequence_length": np.int64(128)}, {"options": {"max_sequence_length": 128}}),
        ({"height": np.zeros(3), "guidance_scale": torch.zeros(2), "timesteps": []}, {}),
        ({"latents": torch.zeros(2, 4, 12, 4)}, {"height": 96, "width": 32}),
        ({"latents": torch.zeros(2, 48, 16)}, {}),  # packed
        ({"strength": 0.5}, {}),  # which this one does not take
    ],
)
def test_arguments_come_to_a_request(given: dict[str, Any], changes: dict[str, Any]) -> None:
    assert asked_for(TEXT, PLANNED, given, 2) == msgspec.structs.replace(PLANNED, **changes)


@pytest.mark.parametrize(
    "picture",
    [
        build_image(96).resize((40, 100)),
        [build_image(96).resize((40, 100))],
        torch.zeros(1, 3, 100, 40),
        torch.zeros(100, 40, 3).numpy(),
    ],
    ids=["picture", "list", "tensor", "array"],
)
def test_what_is_as_large_as_the_picture_given(picture: Any) -> None:
    asked = asked_for(PICTURE, PLANNED, {"image": picture, "strength": 0.5}, 1)
    assert (asked.height, asked.width, asked.batch) == (96, 40, 1)
    assert asked.options["strength"] == 0.5
    assert asked_for(TEXT, PLANNED, {"image": picture}, 2) == PLANNED


def test_distilled_models_are_guided_besides_with_a_negative_prompt() -> None:
    def options(**given: Any) -> dict[str, Any]:
        return asked_for(DISTILLED, PLANNED, given, 1).options

    twice = PLANNED.options | {"true_cfg_scale": 4.0, "negative_prompt": ""}
    assert options(true_cfg_scale=4, negative_prompt="blurred") == twice
    assert options(true_cfg_scale=4) == options(negative_prompt="x") == PLANNED.options
    assert options(true_cfg_scale=1, negative_prompt="blurred") == PLANNED.options


def test_images_are_prompts_times_copies() -> None:
    copies = {"num_images_per_prompt": 2}
    assert drawn_by(copies, {}, 3) == 6
    assert drawn_by(copies, {"num_images_per_prompt": 4}, 1) == 4
    assert drawn_by(copies, {"num_images_per_prompt": np.int32(4)}, 1) == 4
    assert drawn_by({}, {}, 3) == 3, "one of each prompt"


def test_requests_alike_run_the_same() -> None:
    def other(**changes: Any) -> Request:
        return msgspec.structs.replace(PLANNED, **changes)

    assert is_alike(PLANNED, other(steps=50, guidance_scale=3.0))
    assert not is_alike(PLANNED, other(guidance_scale=1.0))
    assert not is_alike(PLANNED, other(batch=1))


@pytest.mark.parametrize("model", ["sd", "sd-controlnet"])
def test_more_steps_are_what_tracing_them_finds(model: str) -> None:
    short = workload_of(model)
    request = msgspec.structs.replace(short.request, steps=6)
    traced = trace_workload(describe_pipeline(BUILDERS[model]()), request)
    made = as_asked(short, request)
    assert [[r.calls for r in p.runs] for p in made.phases] == [
        [r.calls for r in p.runs] for p in traced.phases
    ]
    assert [p.order for p in made.phases] == [p.order for p in traced.phases]
    assert as_asked(made, short.request).phases == short.phases
