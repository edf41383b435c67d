"""How pipelines are called, and what stands in for tokenizers and processors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from autotune.errors import RequestError
from autotune.testing.pipelines import BUILDERS, build_word_tokenizer
from autotune.workload.architecture import describe_pipeline
from autotune.workload.arguments import PROMPT, call_arguments, call_parameters
from autotune.workload.phases import trace_workload
from autotune.workload.standins import StandInProcessor, StandInTokenizer
from autotune.workload.workload import Request

RequestOf = Callable[..., Request]

# ---- arguments ----------------------------------------------------------------------------------


def test_a_batch_is_a_number_where_the_pipeline_takes_one(
    sd_pipe: Any, request_of: RequestOf
) -> None:
    given = call_arguments(sd_pipe, request_of(96, 3, steps=7, guidance_scale=2.0))
    assert given.pop("generator").device.type == "cpu"
    assert given == {
        "prompt": PROMPT,
        "height": 96,
        "width": 96,
        "num_inference_steps": 7,
        "guidance_scale": 2.0,
        "num_images_per_prompt": 3,
        "output_type": "pt",
    }


def test_a_batch_is_prompts_where_the_number_is_not_heeded(request_of: RequestOf) -> None:
    """CogVideoX takes a number of videos, and draws one for each prompt."""
    options = {"negative_prompt": "a dog"}
    given = call_arguments(BUILDERS["cogvideox"](), request_of(batch=2, frames=9, options=options))
    assert "num_videos_per_prompt" not in given
    assert given["prompt"] == [PROMPT, PROMPT]
    assert given["negative_prompt"] == ["a dog", "a dog"]
    assert given["num_frames"] == 9


def test_qwen_is_guided_by_another_name(request_of: RequestOf) -> None:
    given = call_arguments(BUILDERS["qwen-image"](), request_of(guidance_scale=4.0))
    assert (given["true_cfg_scale"], given["negative_prompt"]) == (4.0, "")
    assert "guidance_scale" not in given


@pytest.mark.parametrize(
    ("kind", "pictures"),
    [
        ("sd-img2img", {"image": ("RGB", (64, 64))}),
        ("sd-inpaint", {"image": ("RGB", (64, 64)), "mask_image": ("L", (64, 64))}),
        ("sd-controlnet", {"image": ("RGB", (64, 64))}),
        ("sd-upscale", {"image": ("RGB", (16, 16))}),
        ("svd", {"image": ("RGB", (64, 64))}),
        ("sd", {}),
    ],
)
def test_pictures_are_given_as_users_give_them(
    kind: str, pictures: dict[str, Any], request_of: RequestOf
) -> None:
    given = call_arguments(BUILDERS[kind](), request_of())
    found = {n: (v.mode, v.size) for n, v in given.items() if isinstance(v, Image.Image)}
    assert found == pictures


def test_options_count_and_unknown_ones_are_refused(sd_pipe: Any, request_of: RequestOf) -> None:
    options = {"prompt": "three", "clip_skip": 1, "guidance_rescale": 0.5}
    given = call_arguments(sd_pipe, request_of(options=options))
    assert {n: given[n] for n in options} == options
    with pytest.raises(RequestError, match="takes no argument 'wings'") as caught:
        call_arguments(sd_pipe, request_of(options={"wings": True}))
    assert "clip_skip" in caught.value.hint


def test_a_subclass_takes_what_it_passes_on() -> None:
    base = diffusers.StableDiffusionPipeline

    class PassesOn(base):  # type: ignore[misc]
        def __call__(self, *args: Any, wings: int = 2, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    class Closed(base):  # type: ignore[misc]
        def __call__(self, prompt: str, wings: int = 2) -> Any:
            return super().__call__(prompt)

    assert set(call_parameters(PassesOn)) == set(call_parameters(base)) | {"wings"}
    assert set(call_parameters(Closed)) == {"prompt", "wings"}


@pytest.mark.parametrize("kind", ["sd-img2img", "sd-inpaint", "sdxl-img2img"])
def test_a_picture_that_no_step_changes_is_refused(kind: str, request_of: RequestOf) -> None:
    architecture = describe_pipeline(BUILDERS[kind]())

    def calls(steps: int, strength: float) -> int:
        request = request_of(steps=steps, options={"strength": strength})
        return trace_workload(architecture, request).phases[1].runs[0].calls

    with pytest.raises(RequestError, match=r"strength 0\.3 times 2 steps leaves less than"):
        calls(2, 0.3)
    with pytest.raises(RequestError) as caught:
        calls(1, 0.9)
    assert caught.value.hint == "ask for at least 2 steps, or for a strength of 1 or more"
    assert calls(4, 0.3) == calls(2, 0.5) == 1  # as the first error's remedy says


def test_pipelines_that_round_steps_up_are_left_alone(request_of: RequestOf) -> None:
    architecture = describe_pipeline(BUILDERS["flux-img2img"]())
    workload = trace_workload(architecture, request_of(steps=2, options={"strength": 0.3}))
    assert workload.phases[1].runs[0].calls == 1


# ---- stand-ins ----------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {"padding": "max_length", "max_length": 12, "truncation": True},
    {"padding": "max_length", "max_length": 4, "truncation": True},
    {"padding": "longest"},
    {"padding": True, "max_length": 30, "truncation": True},
    {"padding": "max_length", "truncation": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_stand_in_pads_and_cuts_as_tokenizers_do(options: dict[str, Any], side: str) -> None:
    """A real one, of words of one letter; it adds an end to each text, the stand-in nothing."""
    real, standin = build_word_tokenizer(20), StandInTokenizer(20)
    real.padding_side = standin.padding_side = side
    texts = ["a b c d e", "f g"]
    theirs = real(texts, return_tensors="pt", **options)
    mine = standin([f"{t} x" for t in texts], return_tensors="pt", **options)
    assert mine.input_ids.shape == theirs.input_ids.shape
    assert torch.equal(mine.attention_mask, theirs.attention_mask)


def test_a_stand_in_counts_words_marks_and_signs() -> None:
    standin = StandInTokenizer(77)
    assert len(standin.encode("a cat, (very) small!")) == 8
    assert len(standin.encode("<|im_start|>user\nhello<|im_end|>")) == 5
    assert standin("a cat").input_ids == [[1, 1]]


@pytest.mark.parametrize("content", ["a small cat", [{"type": "text", "text": "a small cat"}]])
def test_a_stand_in_knows_chats(content: Any) -> None:
    standin = StandInTokenizer(77)
    chat = [{"role": "user", "content": content}]
    text = standin.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>user\na small cat<|im_end|>")
    ids = standin.apply_chat_template([chat, chat], return_tensors="pt").input_ids
    assert ids.shape == (2, len(standin.encode(text)))


@pytest.mark.parametrize("images", [Image.new("RGB", (9, 9)), torch.zeros(1, 3, 9, 9), [1, 2, 3]])
def test_a_stand_in_hands_on_pixels(images: Any) -> None:
    count = len(images) if isinstance(images, list) else 1
    found = StandInProcessor(32)(images=images, text="a b", return_tensors="pt")
    assert found.pixel_values.shape == (count, 3, 32, 32)
    assert found.input_ids.shape == (1, 2)
