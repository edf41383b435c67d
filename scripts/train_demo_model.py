"""Trains the demonstration model that ships in ``autotune/demo/model`` and reports its quality.

The model is a complete but tiny Stable Diffusion pipeline that draws handwritten digits of
128 x 128 pixels. The stages, all seeded: the text encoder learns which prompts mean the same
digit, the autoencoder learns to compress rendered digits, their latents are computed once, and
the denoiser learns from these together with the text encoder. One digit in five is held out from
everything (see `autotune.demo.judge`); the reported reconstruction error and the judge's own
accuracy come from those.

    python scripts/train_demo_model.py                  # train, save, judge: some 25 minutes
    python scripts/train_demo_model.py --evaluate-only  # judge the saved weights

Training needs transformers 5 or later; what it saves loads in transformers 4 too. Weights repeat
exactly on one machine with one number of threads; elsewhere rounding differs.
"""

import argparse
import itertools
import json
import logging
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from autotune.demo import model_path
from autotune.demo.judge import (
    DIGIT_WORDS,
    IMAGE_SIZE,
    DigitJudge,
    FloatArray,
    IntArray,
    Placement,
    load_digit_split,
    render_digit,
)

T = TypeVar("T")

log = logging.getLogger("train_demo_model")

LATENT_CHANNELS = 4
VAE_CHANNELS = (16, 32, 64, 64)
VAE_FACTOR = 2 ** (len(VAE_CHANNELS) - 1)
UNET_CHANNELS = (48, 96)
TEXT_WIDTH = 64
TEXT_LENGTH = 32
INFERENCE_STEPS = 20
NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
}

START_TOKEN = "<|startoftext|>"
END_TOKEN = "<|endoftext|>"
WORD_END = "</w>"

TEMPLATES = (
    "a handwritten {}",
    "a handwritten {}",
    "a handwritten {}",
    "handwritten {}",
    "handwritten digit {}",
    "a handwritten digit {}",
    "the handwritten number {}",
    "the number {}",
    "number {}",
    "the digit {}",
    "digit {}",
    "{}",
    "a {}",
    "an {}",
    "draw a {}",
    "a drawing of a {}",
    "a picture of the number {}",
    "an image of a handwritten {}",
    "a photo of a handwritten {}",
    "the number {} written by hand",
)
"""Prompts to learn; the one that the quality is judged on comes more often."""

ENDINGS = ("", "", "", "", ".", ", white on black", " please", ", high quality", ", sharp")
"""What may follow a prompt without a change of meaning."""


@dataclass(frozen=True)
class Recipe:
    """How long to train, and on how much.

    Attributes:
        variants: Randomly placed copies of each training digit, beside the upright one.
        vae_steps: Optimizer steps of the autoencoder.
        vae_batch: Images in each.
        text_steps: Optimizer steps of the text encoder on its own.
        text_batch: Prompts in each; a multiple of ten.
        unet_steps: Optimizer steps of the denoiser and the text encoder.
        unet_batch: Latents in each.
        prompt_dropout: Share of prompts replaced by the empty one, for guidance.
    """

    variants: int = 2
    vae_steps: int = 240
    vae_batch: int = 16
    text_steps: int = 300
    text_batch: int = 60
    unet_steps: int = 1200
    unet_batch: int = 32
    prompt_dropout: float = 0.1


QUICK_RECIPE = Recipe(
    variants=0, vae_steps=4, vae_batch=4, text_steps=4, unet_steps=4, unet_batch=4
)
"""Just enough to run every line; the result draws nothing."""


class Stopwatch:
    """Collects the seconds that named stages take."""

    def __init__(self) -> None:
        """Start with no stage."""
        self.seconds: dict[str, float] = {}

    def measure(self, stage: str, work: Callable[[], T]) -> T:
        """Run `work`, note how long it took under `stage` and return its result."""
        begin = time.perf_counter()
        result = work()
        self.seconds[stage] = round(time.perf_counter() - begin, 2)
        log.info("%s: %.1f s", stage, self.seconds[stage])
        return result


# Text: a byte-level vocabulary in which every word of the prompts is one token.


def byte_symbols() -> list[str]:
    """Return the 256 printable characters by which byte-level BPE writes bytes, in byte order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    symbols.update({byte: chr(256 + place) for place, byte in enumerate(unprintable)})
    return [symbols[byte] for byte in range(256)]


def prompt_words() -> list[str]:
    """Return every word of the prompts, without the digits, sorted."""
    text = " ".join([*TEMPLATES, *ENDINGS, *DIGIT_WORDS])
    return sorted(set(text.replace("{}", " ").replace(",", " ").split()) - {"."})


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pair merges, in order, after which each word is one symbol.

    Args:
        words: Words in lower-case ASCII letters.
    """
    spellings = [[*word[:-1], word[-1] + WORD_END] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        counts = Counter(pair for spelling in spellings for pair in itertools.pairwise(spelling))
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spellings = [merge_pair(spelling, best) for spelling in spellings]


def merge_pair(spelling: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """Return the spelling with each occurrence of the pair joined into one symbol."""
    merged: list[str] = []
    for symbol in spelling:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def build_tokenizer() -> CLIPTokenizer:
    """Build the tokenizer; the end token has the highest id, as CLIP's pooling expects."""
    merges = learn_merges(prompt_words())
    base = byte_symbols()
    symbols = [*base, *(symbol + WORD_END for symbol in base)]
    symbols += [left + right for left, right in merges]
    symbols += [START_TOKEN, END_TOKEN]
    vocabulary = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_LENGTH)


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Return padded token ids, shape (count, TEXT_LENGTH)."""
    encoded = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=TEXT_LENGTH,
        truncation=True,
        return_tensors="pt",
    )
    ids: Tensor = encoded.input_ids
    return ids


def tokenize_prompts(tokenizer: CLIPTokenizer) -> Tensor:
    """Return the ids of every prompt for every digit, shape (10, prompts, TEXT_LENGTH)."""
    return torch.stack(
        [
            tokenize(
                tokenizer,
                [
                    template.format(name) + ending
                    for template in TEMPLATES
                    for ending in ENDINGS
                    for name in (word, str(digit))
                ],
            )
            for digit, word in enumerate(DIGIT_WORDS)
        ]
    )


# Models.


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the untrained text encoder."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_vae() -> AutoencoderKL:
    """Build the untrained autoencoder: 128 x 128 x 3 pixels to 16 x 16 x 4 latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(VAE_CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(VAE_CHANNELS),
        block_out_channels=VAE_CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def build_unet() -> UNet2DConditionModel:
    """Build the untrained denoiser, with attention to the prompt at full latent resolution."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // VAE_FACTOR,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=UNET_CHANNELS,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Build the pipeline's scheduler: deterministic, and settled after some twenty steps."""
    return DDIMScheduler(
        **NOISE_SCHEDULE,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
    )


# Data.


def render_training_set(recipe: Recipe, seed: int) -> tuple[NDArray[np.uint8], IntArray]:
    """Render the training digits upright and in random placements.

    Returns:
        Grey images, shape (count, 128, 128), and their digits, shape (count,).
    """
    split = load_digit_split()
    rng = np.random.default_rng(seed)
    images = [render_digit(digit) for digit in split.train_images]
    for _ in range(recipe.variants):
        images += [render_digit(digit, random_placement(rng)) for digit in split.train_images]
    labels = np.tile(split.train_labels, recipe.variants + 1)
    return np.round(np.stack(images) * 255).astype(np.uint8), labels


def random_placement(rng: np.random.Generator) -> Placement:
    """Draw a mild variation that keeps a digit readable and inside its image."""
    return Placement(
        rotation=rng.uniform(-0.1, 0.1),
        scale=rng.uniform(0.93, 1.05),
        shear=rng.uniform(-0.1, 0.1),
        shift_x=rng.uniform(-3, 3),
        shift_y=rng.uniform(-3, 3),
    )


def to_pixels(images: NDArray[np.uint8] | FloatArray, full_scale: float) -> Tensor:
    """Convert grey images to what the autoencoder takes.

    Args:
        images: Brightness from 0 to `full_scale`, shape (count, 128, 128).
        full_scale: The brightness of white.

    Returns:
        RGB from -1 to 1, shape (count, 3, 128, 128).
    """
    grey = torch.from_numpy(np.asarray(images, dtype=np.float32)) / full_scale * 2 - 1
    return grey.unsqueeze(1).expand(-1, 3, -1, -1).contiguous()


def shuffled_batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield `steps` index batches, passing through all `count` items before any repeats."""
    generator = torch.Generator().manual_seed(seed)
    queue = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(queue) < size:
            queue = torch.cat([queue, torch.randperm(count, generator=generator)])
        yield queue[:size]
        queue = queue[size:]


# Training.


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return a rate that rises over the first steps and falls along a cosine to 2 % of `peak`."""
    warm_up = min(1.0, (step + 1) / 50)
    fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * warm_up * fall


class Trainer:
    """AdamW with a learning-rate schedule, gradient clipping and averaged weights."""

    def __init__(self, modules: Sequence[nn.Module], steps: int, peak_rate: float) -> None:
        """Take the modules to train and start the average at their present weights."""
        self._parameters = [p for module in modules for p in module.parameters()]
        self._average = [p.detach().clone() for p in self._parameters]
        self._optimizer = torch.optim.AdamW(self._parameters, weight_decay=0.01)
        self._steps = steps
        self._peak_rate = peak_rate
        self._step = 0

    def update(self, loss: Tensor) -> None:
        """Take one step down the gradient of `loss`, a scalar."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._step, self._steps, self._peak_rate)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        decay = min(0.995, (1 + self._step) / (10 + self._step))
        torch._foreach_lerp_(self._average, [p.detach() for p in self._parameters], 1 - decay)
        self._step += 1
        if self._step % 50 == 0:
            log.info("  step %d of %d, loss %.4f", self._step, self._steps, loss.item())

    def use_average(self) -> None:
        """Replace the modules' weights by their running average."""
        with torch.no_grad():
            for parameter, average in zip(self._parameters, self._average, strict=True):
                parameter.copy_(average)


def train_vae(vae: AutoencoderKL, images: NDArray[np.uint8], recipe: Recipe, seed: int) -> None:
    """Train the autoencoder in place on grey images of shape (count, 128, 128)."""
    trainer = Trainer([vae], recipe.vae_steps, peak_rate=2e-3)
    generator = torch.Generator().manual_seed(seed)
    vae.train()
    for batch in shuffled_batches(len(images), recipe.vae_batch, recipe.vae_steps, seed):
        pixels = to_pixels(images[batch.numpy()], 255.0)
        # Half precision halves the time of the large convolutions; losses stay in float32.
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            drawn = vae.decode(posterior.sample(generator)).sample
        error = reconstruction_loss(drawn.float(), pixels)
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        trainer.update(error + 5e-4 * divergence)
    trainer.use_average()
    vae.eval()


def reconstruction_loss(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean error of pixels plus that of edges, which keeps outlines sharp.

    Args:
        drawn: Reconstruction, shape (batch, 3, height, width).
        wanted: Original, same shape.
    """
    error = drawn - wanted
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + edges


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: NDArray[np.uint8]) -> Tensor:
    """Return the latent means, not scaled, of grey images; shape (count, 4, 16, 16)."""
    parts = [
        vae.encode(to_pixels(images[start : start + 8], 255.0)).latent_dist.mode()
        for start in range(0, len(images), 8)
    ]
    return torch.cat(parts)


@torch.no_grad()
def standardize_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Centre the latent channels and give them one spread, inside the autoencoder's weights.

    The pipeline knows one scaling factor and no offset, so both are folded into the pointwise
    convolutions on either side of the latents, which leaves reconstructions as they are.

    Args:
        vae: Autoencoder, changed in place; its scaling factor is set.
        latents: What it makes of the training images, shape (count, 4, 16, 16).

    Returns:
        The latents as the denoiser sees them: centred, with unit spread; same shape.
    """
    mean = latents.mean(dim=(0, 2, 3))
    spread = latents.std(dim=(0, 2, 3))
    common = spread.square().mean().sqrt()
    gain = common / spread
    encoder, decoder = vae.quant_conv, vae.post_quant_conv
    decoder.bias += decoder.weight[:, :, 0, 0] @ mean
    decoder.weight /= gain.view(1, -1, 1, 1)
    encoder.bias[:LATENT_CHANNELS] -= mean
    encoder.bias[:LATENT_CHANNELS] *= gain
    encoder.weight[:LATENT_CHANNELS] *= gain.view(-1, 1, 1, 1)
    encoder.bias[LATENT_CHANNELS:] += 2 * gain.log()
    vae.register_to_config(scaling_factor=round(1.0 / common.item(), 5))
    factor = float(vae.config.scaling_factor)
    return (latents - mean.view(-1, 1, 1)) * gain.view(-1, 1, 1) * factor


def train_text_encoder(
    text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, recipe: Recipe, seed: int
) -> None:
    """Teach the text encoder, in place, which prompts mean the same digit.

    Learning that from the denoiser's loss alone takes far longer, as the prompt matters there
    only while nearly everything is noise.
    """
    prompts = tokenize_prompts(tokenizer)
    head = nn.Linear(TEXT_WIDTH, len(DIGIT_WORDS))
    trainer = Trainer([text_encoder, head], recipe.text_steps, peak_rate=2e-3)
    generator = torch.Generator().manual_seed(seed)
    text_encoder.train()
    for _ in range(recipe.text_steps):
        digits = torch.arange(len(DIGIT_WORDS)).repeat(recipe.text_batch // len(DIGIT_WORDS))
        choice = torch.randint(prompts.shape[1], digits.shape, generator=generator)
        ids = prompts[digits, choice]
        # From the end token on, every position has seen the whole prompt.
        ended = ids == tokenizer.eos_token_id
        logits = head(text_encoder(ids).last_hidden_state[ended])
        wanted = digits.unsqueeze(1).expand_as(ids)[ended]
        trainer.update(nn.functional.cross_entropy(logits, wanted))
    trainer.use_average()


def train_unet(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    latents: Tensor,
    labels: IntArray,
    recipe: Recipe,
    seed: int,
) -> None:
    """Train the denoiser and the text encoder together, in place.

    Args:
        unet: Denoiser.
        text_encoder: Text encoder.
        tokenizer: Its tokenizer.
        latents: Standardized latents, shape (count, 4, 16, 16).
        labels: Their digits, shape (count,).
        recipe: How long to train.
        seed: Seed of batches, noise and prompts.
    """
    scheduler = build_scheduler()
    prompts = tokenize_prompts(tokenizer)
    empty = tokenize(tokenizer, [""])[0]
    digits = torch.from_numpy(labels)
    trainer = Trainer([unet, text_encoder], recipe.unet_steps, peak_rate=1.5e-3)
    generator = torch.Generator().manual_seed(seed)
    size = recipe.unet_batch
    unet.train()
    text_encoder.train()
    for batch in shuffled_batches(len(latents), size, recipe.unet_steps, seed):
        noise = torch.randn(latents[batch].shape, generator=generator)
        timesteps = spread_timesteps(size, scheduler.config.num_train_timesteps, generator)
        choice = torch.randint(prompts.shape[1], (size,), generator=generator)
        ids = prompts[digits[batch], choice]
        ids[torch.rand(size, generator=generator) < recipe.prompt_dropout] = empty
        noisy = scheduler.add_noise(latents[batch], noise, timesteps)
        target = scheduler.get_velocity(latents[batch], noise, timesteps)
        predicted = unet(noisy, timesteps, text_encoder(ids).last_hidden_state).sample
        trainer.update(nn.functional.mse_loss(predicted, target))
    trainer.use_average()
    unet.eval()
    text_encoder.eval()


def spread_timesteps(size: int, steps: int, generator: torch.Generator) -> Tensor:
    """Draw one timestep from each of `size` equal ranges: less noise between batches."""
    ranges = torch.arange(size) + torch.rand(size, generator=generator)
    return (ranges / size * steps).long().clamp(max=steps - 1)


def train_pipeline(recipe: Recipe, seed: int, watch: Stopwatch) -> StableDiffusionPipeline:
    """Train every part and return the pipeline, in float32."""
    seed_everything(seed)
    tokenizer = build_tokenizer()
    text_encoder = build_text_encoder(tokenizer)
    vae = build_vae()
    unet = build_unet()
    images, labels = watch.measure("render", lambda: render_training_set(recipe, seed))
    watch.measure(
        "train_text_encoder", lambda: train_text_encoder(text_encoder, tokenizer, recipe, seed)
    )
    watch.measure("train_vae", lambda: train_vae(vae, images, recipe, seed))
    raw = watch.measure("encode", lambda: encode_all(vae, images))
    latents = standardize_latents(vae, raw)
    watch.measure(
        "train_unet",
        lambda: train_unet(unet, text_encoder, tokenizer, latents, labels, recipe, seed),
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )


def seed_everything(seed: int) -> None:
    """Seed every generator that building and training may draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Save the pipeline, its two large models in float16; it loads in any precision.

    The text encoder stays in float32: loaded on its own or with no precision named, it takes the
    one that it was saved in, and that must be the other models' default.
    """
    pipeline.vae.half()
    pipeline.unet.half()
    pipeline.save_pretrained(folder)
    # transformers 4 reads the vocabulary from two files of its own.
    pipeline.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    name_weights_for_all_versions(folder / "text_encoder" / "model.safetensors")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)


def name_weights_for_all_versions(path: Path) -> None:
    """Give the text encoder's saved weights the names that transformers 4 and 5 both load.

    Version 5 saves them without the prefix; version 4 would then start from random weights.
    """
    prefix = "text_model."
    weights = load_file(path)
    renamed = {prefix + name.removeprefix(prefix): weight for name, weight in weights.items()}
    save_file(renamed, path, metadata={"format": "pt"})


# Judgement.


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """Load the saved pipeline in float32, the default precision."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate_digits(
    pipeline: StableDiffusionPipeline, digits: Sequence[int], batch: int = 20
) -> list[Image.Image]:
    """Draw one image for each digit, each with a seed of its own: its place in the list."""
    images: list[Image.Image] = []
    for start in range(0, len(digits), batch):
        part = digits[start : start + batch]
        generators = [torch.Generator().manual_seed(start + offset) for offset in range(len(part))]
        prompts = [f"a handwritten {DIGIT_WORDS[digit]}" for digit in part]
        images += pipeline(
            prompts, num_inference_steps=INFERENCE_STEPS, generator=generators
        ).images
    return images


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL) -> float:
    """Return the reconstruction quality on the held-out digits, in dB (8-bit peak)."""
    held_out = np.stack([render_digit(digit) for digit in load_digit_split().held_out_images])
    squared = 0.0
    for start in range(0, len(held_out), 8):
        pixels = to_pixels(held_out[start : start + 8], 1.0)
        drawn = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        squared += ((drawn - pixels) / 2).square().mean(dim=(1, 2, 3)).sum().item()
    return -10 * math.log10(squared / len(held_out))


def seconds_per_image(pipeline: StableDiffusionPipeline, repeats: int = 3) -> float:
    """Return the median time to draw one image on its own."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        generate_digits(pipeline, [7])
        times.append(time.perf_counter() - begin)
    return sorted(times)[repeats // 2]


def evaluate(folder: Path, images: int, sheet: Path | None, watch: Stopwatch) -> dict[str, Any]:
    """Judge the saved weights.

    Args:
        folder: Saved pipeline.
        images: How many digits to generate, the ten kinds in turn.
        sheet: Where to save a picture of the first hundred, or None.
        watch: Takes the time of each part.

    Returns:
        The report, ready for JSON.
    """
    pipeline = load_pipeline(folder)
    judge = watch.measure("train_judge", DigitJudge)
    psnr = watch.measure("reconstruct", lambda: reconstruction_psnr(pipeline.vae))
    digits = [place % len(DIGIT_WORDS) for place in range(images)]
    drawn = watch.measure("generate", lambda: generate_digits(pipeline, digits))
    if sheet is not None:
        save_sheet(drawn[:100], sheet)
    correct = judge.recognise(drawn) == np.asarray(digits)
    parts = ("vae", "unet", "text_encoder")
    counts = {name: sum(p.numel() for p in getattr(pipeline, name).parameters()) for name in parts}
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        "recognised": round(float(correct.mean()), 4),
        "images": images,
        "per_digit": {
            word: round(float(correct[digit :: len(DIGIT_WORDS)].mean()), 4)
            for digit, word in enumerate(DIGIT_WORDS[:images])
        },
        "judge_held_out_accuracy": round(judge.held_out_accuracy, 4),
        "reconstruction_psnr_db": round(psnr, 2),
        "parameters": {**counts, "total": sum(counts.values())},
        "bytes": sum(path.stat().st_size for path in files),
        "seconds_per_image": round(seconds_per_image(pipeline), 3),
    }


def save_sheet(images: Sequence[Image.Image], path: Path) -> None:
    """Save images side by side, ten in a row."""
    columns = min(10, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * IMAGE_SIZE, rows * IMAGE_SIZE))
    for place, image in enumerate(images):
        sheet.paste(image, (place % columns * IMAGE_SIZE, place // columns * IMAGE_SIZE))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


# Command line.


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; a mistake ends the program with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=model_path(), help="folder of the model")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--images", type=int, default=200, help="digits to generate and judge")
    parser.add_argument("--sheet", type=Path, help="save a picture of the first hundred here")
    parser.add_argument("--evaluate-only", action="store_true", help="judge the saved weights")
    parser.add_argument("--quick", action="store_true", help="a few steps, to try the script")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    options = parser.parse_args(arguments)
    if options.images < 1:
        parser.error("--images must be at least 1")
    if options.threads < 1:
        parser.error("--threads must be at least 1")
    if options.quick and options.output.resolve() == model_path().resolve():
        parser.error("--quick draws nothing; give it another --output than the shipped model")
    if options.evaluate_only and not (options.output / "model_index.json").is_file():
        parser.error(f"no model to evaluate in {options.output}")
    return options


def print_report(report: dict[str, Any]) -> None:
    """Print the report for a person to read."""
    for name, value in report.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        print(f"{name}: {value}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train unless told not to, judge and report; return the exit status."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    torch.set_num_threads(options.threads)
    watch = Stopwatch()
    if not options.evaluate_only:
        recipe = QUICK_RECIPE if options.quick else Recipe()
        save_pipeline(train_pipeline(recipe, options.seed, watch), options.output)
    report = evaluate(options.output, options.images, options.sheet, watch)
    report |= {"seconds": watch.seconds, "seed": options.seed}
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
