"""A page to draw on: configured at start-up, and again where size or quality changes.

python examples/gradio/app.py --model demo --vram-limit 8GiB
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import gradio as gr
import torch
from diffusers import DiffusionPipeline

import autotune
from autotune.demo import model_path

QUALITIES = ("exact", "high", "balanced", "fast")


class Studio:
    """A pipeline that is configured for what is drawn with it.

    Args:
        pipe: A loaded pipeline.
        size: Pixels of a side, to begin with.
        steps: Denoise steps.
        vram_limit: Most device memory to use, such as ``"8GiB"``.

    Raises:
        AutotuneError: it cannot be configured, or does not fit.
    """

    def __init__(self, pipe: Any, size: int, steps: int | None, vram_limit: str | None) -> None:
        self._pipe = pipe
        self._steps = steps
        self._vram_limit = vram_limit
        self._asked: tuple[int, str] | None = None
        self._tuned: Any = None
        self.configure(size, QUALITIES[0], verify="auto")

    def configure(self, size: int, quality: str, verify: str = "never") -> str:
        """Configure unless it is so already; the plan's account.

        Whoever waits for an image does not wait for a verification besides.

        Raises:
            AutotuneError: it does not fit; the pipeline is then as it was loaded.
        """
        if self._asked != (size, quality):
            self.undo()
            self._tuned = autotune.configure(
                self._pipe,
                height=size,
                width=size,
                steps=self._steps,
                quality=quality,
                vram_limit=self._vram_limit,
                verify=verify,
            )
            self._asked = (size, quality)
        account: str = self._tuned.explain()
        return account

    def undo(self) -> None:
        """Put the pipeline back as it was loaded."""
        if self._tuned is not None:
            self._tuned.undo()
        self._asked = self._tuned = None

    def draw(self, prompt: str, size: int, quality: str, seed: int) -> tuple[Any, str, str]:
        """For the page: an image, predicted against measured time, the plan's account.

        Raises:
            gradio.Error: it does not fit, with what would help.
        """
        try:
            account = self.configure(int(size), quality)
            start = time.perf_counter()
            image = self._tuned(prompt, seed=int(seed)).images[0]
        except autotune.AutotuneError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error
        measured = time.perf_counter() - start
        return image, compare(self._tuned.plan.prediction.seconds, measured), account


def compare(predicted_s: float, measured_s: float) -> str:
    """``"predicted 0.32 s, measured 0.35 s (+9 %)"``."""
    off = measured_s / predicted_s - 1
    return f"predicted {predicted_s:.2f} s, measured {measured_s:.2f} s ({off:+.0%})"


def build(studio: Studio, size: int) -> gr.Blocks:
    """The page; its queue draws one image at a time, and takes no more than 16 who wait."""
    page: gr.Blocks
    with gr.Blocks(title="autotune", analytics_enabled=False) as page:
        prompt = gr.Textbox("a handwritten three", label="Prompt")
        with gr.Row():
            side = gr.Slider(64, 2048, size, step=64, label="Size, in pixels")
            quality = gr.Radio(QUALITIES, value=QUALITIES[0], label="Quality")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        button = gr.Button("Draw", variant="primary")
        image = gr.Image(label="Image", format="png", type="pil")
        seconds = gr.Textbox(label="Time")
        account = gr.Code(studio.configure(size, QUALITIES[0]), label="Plan", language=None)
        gr.on(
            [button.click, prompt.submit],
            studio.draw,
            [prompt, side, quality, seed],
            [image, seconds, account],
            api_name="draw",
            concurrency_limit=1,
        )
    page.queue(max_size=16)
    return page


def load_pipeline(model: str) -> Any:
    """A hub id, a folder, or ``"demo"``; left in host RAM, for the plan to place."""
    half = {"torch_dtype": torch.float16} if torch.cuda.is_available() else {}
    pipe = DiffusionPipeline.from_pretrained(model_path() if model == "demo" else model, **half)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the page until interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="hub id, folder, or demo (the default)")
    parser.add_argument("--size", type=int, default=128, help="pixels of a side, at start-up")
    parser.add_argument("--steps", type=int, help="denoise steps")
    parser.add_argument("--vram-limit", help='most device memory to use, such as "8GiB"')
    parser.add_argument("--port", type=int, help="port to listen on")
    options = parser.parse_args(arguments)
    try:
        pipe = load_pipeline(options.model)
        studio = Studio(pipe, options.size, options.steps, options.vram_limit)
    except autotune.AutotuneError as error:
        parser.exit(1, f"error: {error.message}\n  try: {error.hint}\n")
    try:
        build(studio, options.size).launch(server_port=options.port)
    finally:
        studio.undo()


if __name__ == "__main__":
    main()
