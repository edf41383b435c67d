#!/usr/bin/env python3
"""What planning costs: tracing, reading a trace again, predicting, deciding, a process's own RAM.

Each figure is the median of several runs in processes that have imported PyTorch and diffusers
already; a cold trace has an empty trace cache. No weights are read.

    scripts/benchmark_overhead.py               # a table
    scripts/benchmark_overhead.py sd15 flux-dev # of other models
    scripts/benchmark_overhead.py --json        # {"machine", "process_bytes", "rows"}
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

from autotune.decide.choose import Limits, choose
from autotune.decide.predict import Predictor
from autotune.optimizations.execution import Execution, TokenMerge
from autotune.probe.machine import Machine
from autotune.probe.reference import load_machine
from autotune.units import format_bytes, format_seconds
from autotune.workload.architecture import find_architecture
from autotune.workload.cache import workload_of
from autotune.workload.request import complete_request

MACHINE = "rtx-3080-10gb"
REPEATS = 5
SETS = 1000

IMPORTS = """
import psutil, torch, diffusers, transformers
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTextModel, T5EncoderModel
print(psutil.Process().memory_info().rss)
"""


def median_seconds(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median wall-clock seconds of a call."""
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def measure(model: str, machine: Machine) -> dict[str, Any]:
    """All figures of one model, in seconds."""
    architecture = find_architecture(model)
    request = complete_request(architecture, machine)

    def cold() -> None:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["AUTOTUNE_CACHE"] = folder
            workload_of(architecture, request)

    cold()  # the first one imports what the model's classes need
    row: dict[str, Any] = {"model": model, "trace_cold_s": median_seconds(cold, 3)}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["AUTOTUNE_CACHE"] = folder
        workload = workload_of(architecture, request)
        row["trace_cached_s"] = median_seconds(lambda: workload_of(architecture, request))
    executions = [
        Execution(
            merge=TokenMerge((i % 75 + 1) / 100, 1) if i % 2 else None,
            channels_last=bool(i % 4 // 2),
            placement=("device", "model_offload", "sequential_offload")[i % 3],
        )
        for i in range(SETS)
    ]

    def predict_all() -> None:
        predictor = Predictor(machine, workload)
        for execution in executions:
            predictor.predict(execution)

    row["predict_1000_s"] = median_seconds(predict_all)
    for quality in ("exact", "fast"):
        limits = Limits(quality=quality)
        row[f"decide_{quality}_s"] = median_seconds(lambda: choose(machine, workload, limits))  # noqa: B023
    return row


def process_bytes() -> int:
    """Resident size of a process that has imported everything and holds no weights."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", nargs="*", default=["sd15", "sdxl"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    machine = load_machine(MACHINE)
    rows = [measure(model, machine) for model in options.models]
    own = process_bytes()
    if options.json:
        print(json.dumps({"machine": MACHINE, "process_bytes": own, "rows": rows}, indent=2))
        return
    names = [n for n in rows[0] if n != "model"]
    print(f"{'planning for ' + MACHINE:<28}" + "".join(f"{r['model']:>14}" for r in rows))
    for name in names:
        label = name.removesuffix("_s").replace("_", " ")
        print(f"{label:<28}" + "".join(f"{format_seconds(r[name]):>14}" for r in rows))
    print(f"{'a process without weights':<28}{format_bytes(own):>14}")


if __name__ == "__main__":
    main()
