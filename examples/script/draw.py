"""Draw a few prompts with a pipeline of your own, configured for this machine.

python examples/script/draw.py "a handwritten three" "a handwritten seven" --seed 0
python examples/script/draw.py "a lighthouse" --model some/model --vram-limit 6GiB
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

import autotune
from autotune.demo import model_path


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw every prompt; return the exit status."""
    options = parse_arguments(arguments)
    try:
        draw_all(options)
    except autotune.AutotuneError as error:
        print(f"error: {error.message}\n  try: {error.hint}", file=sys.stderr)
        return 1
    return 0


def draw_all(options: argparse.Namespace) -> None:
    """Load, configure, draw, and put the pipeline back.

    Raises:
        AutotuneError: what was asked for does not fit, or is impossible.
    """
    tuned = autotune.configure(
        load_pipeline(options.model),
        height=options.height,
        width=options.width,
        steps=options.steps,
        quality=options.quality,
        vram_limit=options.vram_limit,
        images=len(options.prompts),
    )
    print(tuned.explain())
    options.output.mkdir(parents=True, exist_ok=True)
    for seed, prompt in enumerate(options.prompts, start=options.seed):
        start = time.perf_counter()
        image = tuned(prompt, seed=seed).images[0]
        path = options.output / f"{seed}.png"
        image.save(path)
        print(f"{path}: {prompt!r}, seed {seed}, {time.perf_counter() - start:.2f} s")
    tuned.undo()  # only for a program that goes on to use the pipeline as it was


def load_pipeline(model: str) -> Any:
    """A hub id, a folder, or ``"demo"``: any pipeline will do, loaded as you always do.

    It is left in host RAM: the plan decides what goes to the GPU, and when.
    """
    half = {"torch_dtype": torch.float16} if torch.cuda.is_available() else {}
    pipe = DiffusionPipeline.from_pretrained(model_path() if model == "demo" else model, **half)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; a mistake ends the program with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompts", nargs="+", help="one image each, with seeds that count up")
    parser.add_argument("--model", default="demo", help="hub id, folder, or demo (the default)")
    parser.add_argument("--seed", type=int, default=0, help="of the first image")
    parser.add_argument("--height", type=int, help="pixels; the model's own by default")
    parser.add_argument("--width", type=int, help="pixels; the model's own by default")
    parser.add_argument("--steps", type=int, help="denoise steps")
    parser.add_argument("--quality", default="exact", help="exact, high, balanced or fast")
    parser.add_argument("--vram-limit", help='most device memory to use, such as "6GiB"')
    parser.add_argument("--output", type=Path, default=Path(), help="folder of the images")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
