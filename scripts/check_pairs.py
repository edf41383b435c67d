"""Every coherent pair of optimizations on several kinds of pipelines: applied, failed, undone.

One line for each kind of pipeline and for each failure; the exit status is 1 where there is one.

    python scripts/check_pairs.py [--kind sd] [--pair tome+vae_slicing] [--without-images]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

APART = Path(sys.prefix) / "torchao"
"""Where ``scripts/setup`` puts torchao."""

if APART.is_dir():
    sys.path.append(str(APART))

from autotune.testing.pairs import DRAWING, KINDS, TRIALS, Subject  # noqa: E402


def main() -> int:
    """Check, print, and return the number of failures, at most 1."""
    options = read_options()
    with tempfile.TemporaryDirectory() as folder:
        save_tiny(folder)
        kinds = options.kind or list(KINDS)
        failures = sum(check(kind, folder, options) for kind in kinds)
    return min(failures, 1)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="only this pipeline")
    parser.add_argument("--pair", action="append", help="only this one, as a+b")
    parser.add_argument("--without-images", action="store_true", help="compare states only")
    return parser.parse_args()


def check(kind: str, tiny: str, options: argparse.Namespace) -> int:
    """Print what goes wrong with the pairs on one kind of pipeline, and how many there are."""
    started = time.perf_counter()
    subject = Subject(kind, tiny)
    pairs = [p for p in subject.pairs() if is_asked(p[0].name, p[1].name, options.pair)]
    failures = 0
    trials = [t for t in TRIALS if not (options.without_images and t in DRAWING)]
    for pair in pairs:
        for problem in subject.problems(pair, trials):
            print(problem, flush=True)
            failures += 1
    seconds = time.perf_counter() - started
    members = len({s.name for pair in pairs for s in pair})
    print(
        f"{kind}: {len(pairs)} pairs of {members} optimizations, {subject.failed} failures put in, "
        f"{failures} problems, {seconds:.0f} s",
        flush=True,
    )
    return failures


def is_asked(one: str, other: str, asked: list[str] | None) -> bool:
    """Whether the command line names this pair, or none."""
    return asked is None or any({one, other} == set(a.split("+")) for a in asked)


def save_tiny(folder: str) -> None:
    """A distilled autoencoder of random weights, for latents of four channels."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    AutoencoderTiny(latent_channels=4).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
