"""The demonstration model that ships with the package loads, draws readable digits and is small."""

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from PIL import Image
from safetensors.torch import load_file

from autotune.demo import model_path
from autotune.demo.judge import (
    DIGIT_WORDS,
    IMAGE_SIZE,
    UPRIGHT,
    DigitJudge,
    load_digit_split,
    render_digit,
    shrink_images,
)
from tests.thorough import thoroughly

STEPS = 20


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: on a busy machine such small work waits longer for a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """Return the shipped pipeline in float32."""
    return load_pipeline()


@pytest.fixture(scope="module")
def judge() -> DigitJudge:
    """Return a trained judge."""
    return DigitJudge()


def load_pipeline() -> Any:
    """Load the shipped pipeline in float32, without progress bars."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(model_path(), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, prompts: list[str], seed: int = 0, **options: Any) -> list[Image.Image]:
    """Draw one image for each prompt, each with a seed of its own from `seed` on."""
    generators = [torch.Generator().manual_seed(seed + place) for place in range(len(prompts))]
    options = {"num_inference_steps": STEPS, "generator": generators} | options
    images: list[Image.Image] = pipeline(prompts, **options).images
    return images


def recognised_share(pipeline: Any, judge: DigitJudge, template: str, names: list[str]) -> float:
    """Return the share of digits, asked for by the ten names in turn, that the judge sees."""
    digits = list(range(len(names))) * 2
    images = draw(pipeline, [template.format(names[digit]) for digit in digits], seed=1000)
    return judge.accuracy(images, digits)


def test_the_shipped_files_stay_small() -> None:
    total = sum(path.stat().st_size for path in model_path().rglob("*") if path.is_file())
    assert total <= 8_000_000


def test_the_shipped_configurations_name_no_local_path() -> None:
    configurations = sorted(model_path().rglob("*.json"))
    assert len(configurations) >= 6
    for path in configurations:
        if path.name in {"vocab.json", "tokenizer.json"}:
            continue
        assert "_name_or_path" not in path.read_text(), path
        assert not any(is_absolute_path(value) for value in leaves(json.loads(path.read_text())))


def leaves(value: Any) -> list[Any]:
    """Return every value inside nested lists and dictionaries."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def is_absolute_path(value: Any) -> bool:
    """Return whether a configuration's value looks like a path from the root."""
    return isinstance(value, str) and Path(value).is_absolute()


def test_loading_warns_of_nothing_wrong_with_the_files(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = [diffusers_logging.get_logger(), transformers_logging.get_logger()]
    for library in libraries:
        library.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING), warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(configuration|scheduler).*")
            load_pipeline()
    finally:
        for library in libraries:
            library.removeHandler(caplog.handler)
    complaints = [record.getMessage() for record in caplog.records]
    for sign in ("MISSING", "UNEXPECTED", "not initialized", "not used", "outdated", "safety"):
        assert not any(sign in complaint for complaint in complaints), complaints


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_every_weight_comes_from_the_files(pipeline: Any, name: str) -> None:
    (path,) = (model_path() / name).glob("*.safetensors")
    saved = load_file(path)
    # Versions of transformers differ in whether the names start with this.
    prefix = "text_model."
    stored = {key.removeprefix(prefix): weight.float() for key, weight in saved.items()}
    loaded = {
        key.removeprefix(prefix): weight
        for key, weight in getattr(pipeline, name).state_dict().items()
        if not key.endswith("position_ids")
    }
    assert stored.keys() == loaded.keys()
    assert all(weight.dtype == torch.float32 for weight in loaded.values())
    assert all(torch.equal(stored[key], loaded[key]) for key in loaded)


def test_the_text_encoder_is_saved_under_the_names_that_old_and_new_versions_load() -> None:
    saved = load_file(model_path() / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in saved)


def test_the_native_size_and_the_end_token_are_declared(pipeline: Any) -> None:
    assert pipeline.unet.config.sample_size * pipeline.vae_scale_factor == IMAGE_SIZE
    assert pipeline.vae.config.sample_size == IMAGE_SIZE
    assert pipeline.text_encoder.config.eos_token_id == pipeline.tokenizer.eos_token_id
    assert pipeline.tokenizer("seven").input_ids[-1] == pipeline.tokenizer.eos_token_id


def test_the_attention_at_full_resolution_is_a_transformer_block(pipeline: Any) -> None:
    first = pipeline.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    assert type(first).__name__ == "BasicTransformerBlock"


@pytest.mark.parametrize("word", [*DIGIT_WORDS, "handwritten", "7"])
def test_a_known_word_is_one_token(pipeline: Any, word: str) -> None:
    assert len(pipeline.tokenizer(word).input_ids) == 3


def test_digits_asked_for_by_word_are_recognised(pipeline: Any, judge: DigitJudge) -> None:
    share = recognised_share(pipeline, judge, "a handwritten {}", list(DIGIT_WORDS))
    assert share >= 0.8


@thoroughly
def test_digits_asked_for_in_other_words_are_recognised(pipeline: Any, judge: DigitJudge) -> None:
    numerals = [str(digit) for digit in range(10)]
    assert recognised_share(pipeline, judge, "The NUMBER {}", numerals) >= 0.8


def test_the_same_seed_gives_the_same_image(pipeline: Any) -> None:
    first, again, other = (
        np.asarray(draw(pipeline, ["a handwritten three"], seed=seed, num_inference_steps=5)[0])
        for seed in (3, 3, 4)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    "prompt",
    ["", "   ", "ünïcödé 数字 🙂", "seven " * 200, "<|endoftext|> seven", "a\tb\nc"],
    ids=["empty", "blank", "foreign", "long", "special", "spaces"],
)
def test_any_prompt_draws_an_image(pipeline: Any, prompt: str) -> None:
    image = draw(pipeline, [prompt], num_inference_steps=2)[0]
    assert image.size == (IMAGE_SIZE, IMAGE_SIZE)


@pytest.mark.parametrize(("width", "height"), [(256, 192), (64, 64), (136, 120)])
def test_any_multiple_of_eight_is_a_size(pipeline: Any, width: int, height: int) -> None:
    images = draw(
        pipeline, ["a handwritten two"] * 4, num_inference_steps=2, width=width, height=height
    )
    assert [image.size for image in images] == [(width, height)] * 4


def test_the_judge_recognises_held_out_digits(judge: DigitJudge) -> None:
    assert judge.held_out_accuracy >= 0.95


def test_the_judge_does_not_recognise_noise(judge: DigitJudge) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (50, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    digits = [place % 10 for place in range(50)]
    assert judge.accuracy([Image.fromarray(image) for image in noise], digits) < 0.5


def test_the_judge_refuses_an_image_of_another_size(judge: DigitJudge) -> None:
    with pytest.raises(ValueError, match="128 x 128"):
        judge.recognise([Image.new("RGB", (64, 64))])


def test_the_judge_refuses_a_digit_too_few(judge: DigitJudge) -> None:
    with pytest.raises(ValueError, match="need one for each"):
        judge.accuracy([Image.new("RGB", (128, 128))], [])


def test_shrinking_undoes_the_enlargement() -> None:
    split = load_digit_split()
    rendered = [render_digit(digit, UPRIGHT) for digit in split.held_out_images[:50]]
    images = [Image.fromarray(np.round(image * 255).astype(np.uint8)) for image in rendered]
    shrunk = shrink_images(images)
    similarity = np.corrcoef(shrunk.reshape(-1), split.held_out_images[:50].reshape(-1))[0, 1]
    assert similarity > 0.9


def test_the_held_out_digits_are_a_fifth_of_each_kind() -> None:
    split = load_digit_split()
    for digit in range(10):
        held_out = np.sum(split.held_out_labels == digit)
        everything = held_out + np.sum(split.train_labels == digit)
        assert held_out == everything // 5


def test_without_scikit_learn_the_judge_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        load_digit_split()
