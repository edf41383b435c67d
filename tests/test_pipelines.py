"""The small pipelines run, and what is measured on them is what they do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autotune.testing.pipelines import BUILDERS, FRAMES, SIDE, call
from tests.workload.truth import Call, peaks, truth

STEPS = 2

# Where there is guidance, a prompt and a negative one are encoded; as one batch or one by one.
CALLS: dict[str, dict[str, int]] = {
    "sd": {"text_encoder": 2, "unet": 2},
    "sd-img2img": {"text_encoder": 2, "vae.encode": 1, "unet": 1},  # half the strength and steps
    "sd-inpaint": {"text_encoder": 2, "vae.encode": 2, "unet": 1},  # the image, and it masked
    "sd-controlnet": {"text_encoder": 2, "controlnet": 2, "unet": 2},
    "sd-upscale": {"text_encoder": 2, "unet": 2},
    "sdxl": {"text_encoder": 1, "text_encoder_2": 1, "unet": 2},  # zeros for no negative prompt
    "sdxl-img2img": {"text_encoder_2": 1, "vae.encode": 1, "unet": 1},
    "sd3": {"text_encoder": 2, "text_encoder_2": 2, "text_encoder_3": 2, "transformer": 2},
    "flux": {"text_encoder": 1, "text_encoder_2": 1, "transformer": 2},
    "flux-img2img": {"text_encoder": 1, "text_encoder_2": 1, "vae.encode": 1, "transformer": 1},
    "chroma": {"text_encoder": 2, "transformer": 4},
    "pixart-sigma": {"text_encoder": 2, "transformer": 2},
    "sana": {"text_encoder": 2, "transformer": 2},
    "auraflow": {"text_encoder": 2, "transformer": 2},
    "hunyuandit": {"text_encoder": 2, "text_encoder_2": 2, "transformer": 2},
    "qwen-image": {"text_encoder": 2, "transformer": 4},
    "z-image": {"text_encoder": 2, "transformer": 2},
    "cogvideox": {"text_encoder": 2, "transformer": 2},
    "ltx-video": {"text_encoder": 2, "transformer": 2},
    "wan": {"text_encoder": 2, "transformer": 4},
    "wan22": {"text_encoder": 2, "transformer": 2, "transformer_2": 2},
    "hunyuanvideo": {"text_encoder": 1, "text_encoder_2": 1, "transformer": 2},
    "animatediff": {"text_encoder": 2, "unet": 2},
    "svd": {"image_encoder": 1, "vae.encode": 1, "unet": 2},
}

VIDEO = {"cogvideox", "ltx-video", "wan", "wan22", "hunyuanvideo", "animatediff", "svd"}


def named(made: Call) -> str:
    return made.component if made.method == "forward" else f"{made.component}.{made.method}"


@pytest.mark.parametrize("kind", BUILDERS)
def test_each_kind_draws_and_every_call_is_measured(kind: str) -> None:
    pipe = BUILDERS[kind]()
    drawn: list[Tensor] = []
    calls = truth(pipe, lambda: drawn.append(call(pipe, STEPS)))

    frames = (FRAMES,) if kind in VIDEO else ()
    assert drawn[0].shape == (1, *frames, 3, SIDE, SIDE)
    assert torch.isfinite(drawn[0]).all()
    assert drawn[0].std() > 0.05

    assert Counter(named(c) for c in calls) == {**CALLS[kind], "vae.decode": 1}
    assert named(calls[-1]) == "vae.decode"
    for made in calls:
        assert made.outputs, made
        assert 0 < made.input_bytes < made.peak_without_scratch_bytes <= made.peak_bytes


def test_equal_calls_take_equal_memory() -> None:
    pipe = BUILDERS["sd"]()
    first, second = (truth(pipe, lambda: call(pipe, STEPS)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.peak_without_scratch_bytes == b.peak_without_scratch_bytes
    (step,) = {(c.peak_bytes, c.input_bytes) for c in first if c.component == "unet"}
    assert step[1] == 2 * 4 * 16 * 16 * 4 + 2 * 16 * 32 * 4 + 8 * STEPS  # latents, prompts, times


def test_the_pipeline_is_itself_afterwards(snapshot: Callable[[Any], Any]) -> None:
    pipe = BUILDERS["sd"]()
    call(pipe, STEPS)
    before = snapshot(pipe)
    truth(pipe, lambda: call(pipe, STEPS))
    after = snapshot(pipe)
    assert after == before


# ---- single modules -----------------------------------------------------------------------------


class Pipe:
    """A pipeline of one component."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        module = nn.Module()
        module.forward = function  # type: ignore[method-assign]
        self.components = {"it": module}
        self.it = module


KIB256 = 256 * 1024


def measure(function: Callable[[Tensor], Any]) -> Call:
    """One call with an input of 256 KiB."""
    x = torch.ones(256, 256)
    pipe = Pipe(function)
    (made,) = truth(pipe, lambda: pipe.it(x))
    return made


@pytest.mark.parametrize(
    ("function", "tensors"),
    [
        pytest.param(lambda x: x, 1, id="nothing"),
        pytest.param(lambda x: x.view(-1), 1, id="a view"),
        pytest.param(lambda x: x + x, 2, id="a new tensor"),
        pytest.param(lambda x: x + x + x + x, 3, id="the oldest is freed"),
        pytest.param(lambda x: x / 2.0, 2, id="a number is not a tensor"),
        pytest.param(lambda x: torch.mm(x, x).t().contiguous(), 3, id="a copy"),
    ],
)
def test_what_is_alive(function: Callable[[Tensor], Any], tensors: int) -> None:
    made = measure(function)
    assert made.input_bytes == KIB256
    assert made.peak_without_scratch_bytes == tensors * KIB256
    assert made.peak_bytes < (tensors + 0.1) * KIB256


def test_scores_are_scratch() -> None:
    def attend(x: Tensor) -> Tensor:
        x = x[None, None]  # with dropout, only the plain kernel will do, which has the scores
        return functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    made = measure(attend)
    assert made.peak_without_scratch_bytes == 2 * KIB256
    assert made.peak_bytes > 4 * KIB256


def test_every_allocation_is_rounded() -> None:
    x = torch.ones(3)
    pipe = Pipe(lambda x: x + x + x + x)
    (made,) = truth(pipe, lambda: pipe.it(x), rounding=512)
    assert made.peak_without_scratch_bytes == 3 * 512
    assert peaks(lambda: x + x, rounding=512) == (512, 512)


def test_what_the_pipeline_holds_meanwhile() -> None:
    pipe = Pipe(lambda x: x + x)

    def run() -> Any:
        kept = [torch.ones(256, 256)]
        x = torch.ones(256, 256)
        for _ in range(2):
            kept.append(pipe.it(x))
        return kept

    assert [c.held_bytes for c in truth(pipe, run)] == [2 * KIB256, 3 * KIB256]
