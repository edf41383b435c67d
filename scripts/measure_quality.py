#!/usr/bin/env python3
"""What optimizations that change the image do to it: measured on the demo pipeline.

Every optimization of the catalogue that is not exact is applied, with every parameter set that
the search would try, and draws the same digits from the same seeds as the pipeline without it.
What would gain nothing on this device is applied too, where that is possible.

    scripts/measure_quality.py                      # a table
    scripts/measure_quality.py --json               # {"images", "steps", "recognised", "rows", …}
    scripts/measure_quality.py --markdown           # the table of docs/quality.md
    scripts/measure_quality.py --images 20 tome     # fewer digits; these optimizations alone
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import msgspec  # noqa: E402
import numpy  # noqa: E402
from documents import between  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from autotune.demo.judge import DIGIT_WORDS, DigitJudge  # noqa: E402
from autotune.errors import AutotuneError, first_line  # noqa: E402
from autotune.optimizations import CATALOGUE, find  # noqa: E402
from autotune.optimizations.base import Optimization, Parameters, Setting  # noqa: E402
from autotune.probe.machine import Machine  # noqa: E402
from autotune.probe.reference import load_machine  # noqa: E402
from autotune.tuner import Ask, device_name, machine_here, make_plan  # noqa: E402
from autotune.workload.workload import Workload  # noqa: E402

DOCUMENT = ROOT / "docs" / "quality.md"
BEGIN, END = "<!-- written by scripts/measure_quality.py -->", "<!-- end -->"

LARGE_GPU = "h100-80gb"
"""A reference machine that computes everything."""

STEPS = 6
"""Few, for it is a long way through the catalogue; all digits can be read after these."""

BATCH = 20
"""Images drawn at once."""

Images = NDArray[numpy.float32]
"""Shape (count, height, width, 3), from 0 to 1."""


class Row(msgspec.Struct, frozen=True):
    """One optimization with its parameters, against the exact images.

    Attributes:
        setting: It.
        quality: The strictest ``--quality`` that allows it.
        psnr_db: Of all images together; ``None`` where they are identical.
        ssim: Mean over the images; 1 is identical.
        worst_ssim: Of the image that changed most.
        recognised: Share of the digits that the judge recognises.
        is_on_sheets: Whether many digits were decoded as one large image, and cut out again.
    """

    setting: Setting
    quality: str
    psnr_db: float | None
    ssim: float
    worst_ssim: float
    recognised: float
    is_on_sheets: bool = False


class Report(msgspec.Struct, frozen=True):
    """The ``--json`` contract.

    Attributes:
        device: Where it was drawn.
        images: How many digits, the ten kinds in turn.
        steps: Denoise steps of each.
        recognised: Share of the exact images' digits that the judge recognises.
        rows: What was measured.
        useless: Optimization in the rows → why the search would not take it here.
        left_out: Optimization, alone or with its parameters → why it cannot be applied.
    """

    device: str
    images: int
    steps: int
    recognised: float
    rows: tuple[Row, ...]
    useless: dict[str, str]
    left_out: dict[str, str]


# ---- what is measured ---------------------------------------------------------------------------


BETWEEN: dict[str, list[Parameters]] = {
    "tome": [{"ratio": r, "max_downsample": d} for d in (1, 2) for r in (0.1, 0.2, 0.3, 0.4, 0.5)],
    "vae_tiling": [{"tile": 256}, {"tile": 512}],
}
"""Milder and middle values that users may give themselves, or larger images get; the search tries
fewer."""

SHEET = 8
"""Digits along each side of a sheet that is decoded at once: large tiles would not cut a digit."""


def changing(optimization: Optimization, machine: Machine, workload: Workload) -> list[Setting]:
    """The settings that the search would try, here or on a large GPU, and that are not exact."""
    tried = [
        *BETWEEN.get(optimization.name, []),
        *optimization.worth_trying(machine, workload),
        *optimization.worth_trying(load_machine(LARGE_GPU), workload),
    ]
    settings = {str(s): s for s in map(optimization.setting, tried or [optimization.defaults])}
    return [s for s in settings.values() if optimization.quality(s.parameters) != "exact"]


def inexact_names() -> list[str]:
    """The optimizations of the catalogue that are declared to change the image."""
    return [o.name for o in CATALOGUE.values() if o.exactness != "exact"]


class Studio:
    """Draws the same digits again and again.

    Args:
        images: How many, the ten kinds in turn.
        steps: Denoise steps.
        device: PyTorch's name of it.
    """

    def __init__(self, images: int, steps: int, device: str) -> None:
        import torch
        from diffusers import StableDiffusionPipeline
        from diffusers.utils.logging import disable_progress_bar

        from autotune.demo import model_path

        torch.set_num_threads(1)  # more only wait for each other where anything else runs

        disable_progress_bar()
        self.digits = [place % len(DIGIT_WORDS) for place in range(images)]
        self.pipe = StableDiffusionPipeline.from_pretrained(model_path()).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self._steps, self._device = steps, device
        self._judge = DigitJudge()

    def draw(self) -> Images:
        """With the pipeline as it is."""
        return self._draw(())

    def draw_with(self, setting: Setting) -> Images:
        """With an optimization, which is taken off again.

        Raises:
            AutotuneError: it cannot be applied.
        """
        with self._applied(setting):
            return self._draw((setting,))

    @functools.cached_property
    def on_sheets(self) -> Images:
        """The same digits as ``draw``, decoded many at once."""
        return self._decoded_on_sheets()

    def draw_on_sheets_with(self, setting: Setting) -> Images:
        """The same with an optimization of the decode.

        Raises:
            AutotuneError: it cannot be applied.
        """
        _ = self._latents  # drawn without it
        with self._applied(setting):
            return self._decoded_on_sheets()

    @contextmanager
    def _applied(self, setting: Setting) -> Iterator[None]:
        with half_autoencoder(self.pipe) if setting.name == "vae_bfloat16" else nullcontext():
            undo = find(setting.name).apply(self.pipe, setting.parameters, self._device)
            try:
                yield
            finally:
                undo()

    def compare(
        self, exact: Images, settings: Iterable[Setting], reason: str | None
    ) -> tuple[list[Row], dict[str, str]]:
        """A row for each setting, or why there is none.

        Args:
            exact: The same digits without any.
            settings: Of one optimization.
            reason: Why it is not available here, if it is not.
        """
        rows, failed = [], {}
        for setting in settings:
            print(setting, file=sys.stderr)
            try:
                is_on_sheets = int(setting.parameters.get("tile", 0)) >= exact.shape[1]
                plain = self.on_sheets if is_on_sheets else exact
                draw = self.draw_on_sheets_with if is_on_sheets else self.draw_with
                drawn = draw(setting)
            except Exception as error:  # kernels raise all sorts
                failed[str(setting)] = getattr(error, "message", first_line(error))
                continue
            if reason and numpy.array_equal(plain, drawn):
                failed[str(setting)] = reason
            else:
                row = self._row(setting, plain, drawn)
                rows.append(msgspec.structs.replace(row, is_on_sheets=is_on_sheets))
        return rows, failed

    def _row(self, setting: Setting, exact: Images, drawn: Images) -> Row:
        similar = [ssim(a, b) for a, b in zip(exact, drawn, strict=True)]
        return Row(
            setting=setting,
            quality=find(setting.name).quality(setting.parameters),
            psnr_db=psnr(exact, drawn),
            ssim=float(numpy.mean(similar)),
            worst_ssim=min(similar),
            recognised=self.recognised(drawn),
        )

    def recognised(self, drawn: Images) -> float:
        """Share of the digits that are read as what was asked for."""
        return self._judge.accuracy(self.pipe.numpy_to_pil(drawn), self.digits)

    @functools.cached_property
    def _latents(self) -> Any:
        """What the pipeline without anything hands to its autoencoder, on the CPU."""
        import torch

        return torch.from_numpy(self._draw((), output="latent"))

    def _decoded_on_sheets(self) -> Images:
        """Every digit, cut out of sheets; the last one is filled up with the first digits."""
        import torch

        count, channels, height, width = self._latents.shape
        sheets = -(-count // SHEET**2)
        order = [place % count for place in range(sheets * SHEET**2)]
        cells = self._latents[order].reshape(sheets, SHEET, SHEET, channels, height, width)
        latents = cells.permute(0, 3, 1, 4, 2, 5).reshape(
            sheets, channels, SHEET * height, SHEET * width
        )
        vae = self.pipe.vae
        digits = []
        for sheet in latents.split(1):
            with torch.no_grad():
                image = vae.decode(sheet.to(self._device) / vae.config.scaling_factor).sample
            (drawn,) = self.pipe.image_processor.postprocess(image, output_type="np")
            for row in numpy.split(drawn, SHEET, axis=0):
                digits += numpy.split(row, SHEET, axis=1)
        return numpy.stack(digits[:count])

    def _draw(self, settings: tuple[Setting, ...], output: str = "np") -> Images:
        import torch

        drawn = []
        for start in range(0, len(self.digits), BATCH):
            part = self.digits[start : start + BATCH]
            for setting in settings:
                find(setting.name).before_image(self.pipe, setting.parameters, start)
            images = self.pipe(
                [f"a handwritten {DIGIT_WORDS[digit]}" for digit in part],
                num_inference_steps=self._steps,
                generator=[torch.Generator().manual_seed(start + i) for i in range(len(part))],
                output_type=output,
            ).images
            drawn.append(images if output == "np" else images.cpu().numpy())
        return numpy.concatenate(drawn)


@contextmanager
def half_autoencoder(pipe: Any) -> Iterator[None]:
    """The autoencoder as those are that pipelines widen to float32 before they decode.

    The demo's weights are float16's own values: widened, it would decode as it does in float32.
    """
    import torch

    pipe.vae.to(torch.float16)
    try:
        yield
    finally:
        pipe.vae.to(torch.float32)


def measure(names: Iterable[str], images: int, steps: int) -> Report:
    """Draw everything and compare; what cannot be applied is told with its reason."""
    machine = machine_here().machine
    workload = make_plan("demo", machine, Ask(batch=BATCH, steps=steps)).workload
    studio = Studio(images, steps, device_name(machine))
    exact = studio.draw()
    rows: list[Row] = []
    useless: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for optimization in map(find, names):
        reason = optimization.unavailable(machine, workload)
        found, failed = studio.compare(exact, changing(optimization, machine, workload), reason)
        rows += found
        if found and reason:
            useless[optimization.name] = reason
        if failed and not found:
            failed = {optimization.name: next(iter(failed.values()))}
        left_out |= failed
    return Report(
        machine.device.name,
        images,
        steps,
        studio.recognised(exact),
        tuple(rows),
        useless,
        left_out,
    )


# ---- how images are compared --------------------------------------------------------------------


def psnr(one: Images, other: Images) -> float | None:
    """Peak signal-to-noise ratio in dB, of values from 0 to 1; ``None`` where all are the same."""
    error = float(numpy.mean(numpy.square(one.astype(float) - other)))
    return -10 * math.log10(error) if error else None


def ssim(one: Images, other: Images) -> float:
    """Mean structural similarity of two images' brightness.

    Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural
    similarity" (2004): a Gaussian window of 11 x 11 pixels with a deviation of 1.5, only where it
    lies wholly inside the image.

    Args:
        one: Shape (height, width, 3), from 0 to 1, at least 11 pixels each way.
        other: Of the same shape.
    """
    x, y = (image.astype(float).mean(axis=-1) for image in (one, other))
    mean_x, mean_y = _windowed(x), _windowed(y)
    variance_x = _windowed(x * x) - mean_x**2
    variance_y = _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    luminance, contrast = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + luminance) * (2 * covariance + contrast)
    similarity /= (mean_x**2 + mean_y**2 + luminance) * (variance_x + variance_y + contrast)
    return float(similarity.mean())


def _windowed(values: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    """Gaussian-weighted mean round each pixel, shape (height - 10, width - 10)."""
    from scipy.ndimage import gaussian_filter

    radius = 5
    inner = slice(radius, -radius)
    return gaussian_filter(values, sigma=1.5, radius=radius)[inner, inner]


# ---- what is printed ----------------------------------------------------------------------------


def table(report: Report) -> str:
    """The rows and what was left out, in Markdown."""
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    share = f"{report.recognised:.1%}"
    yield (
        f"{report.images} digits of {report.steps} steps each, drawn on {report.device}; "
        f"without any optimization {share} are recognised."
    )
    yield ""
    yield "| optimization | allowed by `--quality` | PSNR | SSIM | worst SSIM | recognised |"
    yield "| --- | --- | ---: | ---: | ---: | ---: |"
    for row in report.rows:
        ratio = "identical" if row.psnr_db is None else f"{row.psnr_db:.1f} dB"
        where = f", {SHEET} × {SHEET} digits at once" if row.is_on_sheets else ""
        yield (
            f"| `{row.setting}`{where} | {row.quality} | {ratio} | {row.ssim:.4f} | "
            f"{row.worst_ssim:.4f} | {row.recognised:.1%} |"
        )
    yield from _listed("Applied although they gain nothing here:", report.useless)
    yield from _listed("Not applicable to the demo pipeline here:", report.left_out)


def _listed(title: str, reasons: dict[str, str]) -> Iterator[str]:
    if reasons:
        yield from ("", title, "")
        yield from (f"- `{name}`: {reason}" for name, reason in reasons.items())


def write(text: str) -> None:
    """Put the table where the document has it."""
    document = between(DOCUMENT.read_text(encoding="utf-8"), BEGIN, END, f"{text}\n")
    DOCUMENT.write_text(document, encoding="utf-8")


def main() -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="these optimizations alone")
    parser.add_argument("--images", type=int, default=200, help="digits to draw (200)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"denoise steps of each ({STEPS})")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", action="store_true", help=f"rewrite {DOCUMENT.name}'s table")
    options = parser.parse_args()
    try:
        report = measure(options.names or CATALOGUE, options.images, options.steps)
    except AutotuneError as error:
        parser.error(str(error))
    if options.json:
        print(json.dumps(msgspec.to_builtins(report), indent=2))
        return 0
    print(table(report))
    if options.markdown:
        write(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
