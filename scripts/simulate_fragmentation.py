#!/usr/bin/env python3
"""How much memory a generation needs beyond the sum of its parts: free memory lies in pieces.

Whole generations are replayed through a model of PyTorch's caching allocator
(``autotune/decide/allocator.py``), with less and less memory, until one does not run. Nothing here
is measured on a GPU. ``margin`` is what the predictor adds for it; it must not be less than
``needed``.

    scripts/simulate_fragmentation.py [MODEL ...]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from autotune.decide.metrics import fits
from autotune.decide.predict import Predictor
from autotune.optimizations.execution import Execution
from autotune.probe.reference import load_machine
from autotune.tuner import Ask, work_out
from autotune.units import GIB, MIB, format_bytes

MODELS = ("sd15", "sdxl", "sd3-medium", "flux-dev", "pixart-sigma", "qwen-image", "sana")
PLACEMENTS = ("device", "encoder_offload", "model_offload", "sequential_offload")


def least_bytes(predictor: Predictor, execution: Execution, low: int, high: int) -> int:
    """The least memory, to 16 MiB, with which the generation runs."""
    while high - low > 16 * MIB:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(predictor, execution, middle) else (middle, high)
    return high


def main() -> None:
    """Print a row per model, batch and placement."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    machine = load_machine("a100-80gb")
    print(f"{'model':14}{'batch':>6}  {'placement':20}{'phase':9}{'needed':>10}{'margin':>10}")
    for model in parser.parse_args().models:
        for batch in (1, 4):
            _, workload = work_out(model, machine, Ask(batch=batch))
            predictor = Predictor(machine, workload)
            for placement in PLACEMENTS:
                execution = Execution(placement=placement)
                phase = predictor.predict(execution).binding_phase
                parts = phase.needed_bytes - phase.margin_bytes
                high = parts + 2 * phase.activation_bytes + 2 * GIB
                needed = least_bytes(predictor, execution, parts // 2, high) - parts
                margin, lost = format_bytes(phase.margin_bytes), format_bytes(max(0, needed))
                mark = "  too small" if needed > phase.margin_bytes else ""
                figures = f"{phase.name:9}{lost:>10}{margin:>10}{mark}"
                print(f"{model:14}{batch:6}  {placement:20}{figures}", flush=True)


if __name__ == "__main__":
    main()
