#!/usr/bin/env python3
"""What ``autotune.configure`` adds to the start of a program, with a warm profile.

Each sample is a process of its own: it imports PyTorch and diffusers, loads the demo pipeline, then
imports autotune and configures. What applying the plan takes is told apart. The issue's bar is 100
ms on two cores, and no import of anything heavy.

    scripts/benchmark_startup.py              # a table
    scripts/benchmark_startup.py --samples 9
    scripts/benchmark_startup.py --json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from autotune.units import format_seconds

PROGRAM = """
import json, os, sys, time
import torch, diffusers
from diffusers import DiffusionPipeline
diffusers.logging.disable_progress_bar()
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
before, start, cpu = set(sys.modules), time.perf_counter(), time.process_time()
import autotune
tuned = None
spent = 0.0
import autotune.runtime.tuned as runtime
imported, apply_plan = time.perf_counter(), runtime.apply_plan
def timed(*args, **kwargs):
    global spent
    begun = time.perf_counter()
    try:
        return apply_plan(*args, **kwargs)
    finally:
        spent += time.perf_counter() - begun
runtime.apply_plan = timed
tuned = autotune.configure(pipe)
whole, cpu = time.perf_counter() - start, time.process_time() - cpu
applying = spent
packages = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
from autotune.profile.profile import Profile
from autotune.tuner import plans
calls = []
for _ in range(20):
    tuned.undo()
    recall = plans.recall
    def counted(*args, **kwargs):
        begun = time.perf_counter()
        found = recall(*args, **kwargs)
        calls.append((time.perf_counter() - begun, found is not None))
        return found
    from autotune.tuner import planning
    planning.recall = counted
    begun = time.perf_counter()
    tuned = autotune.configure(pipe)
    again = time.perf_counter() - begun
    planning.recall = recall
print(json.dumps({
    "configure_s": whole - applying, "apply_s": applying,
    "import_s": imported - start, "cpu_s": cpu,
    "again_s": again, "recall_s": sorted(c[0] for c in calls)[len(calls) // 2] if calls else None,
    "recalled": all(found for _, found in calls) and bool(calls), "packages": packages,
}))
"""


def sample(model: str, cache: str) -> dict[str, Any]:
    """One process; all figures in seconds."""
    # Compiled code is kept between starts, as it is for every user.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, model],
        env={**environment, "AUTOTUNE_CACHE": cache},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"error: a sample failed: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from autotune.workload.architecture import find_architecture

    model = find_architecture("demo").weights
    assert model is not None
    with tempfile.TemporaryDirectory() as cache:
        cold = sample(model, cache)
        sample(model, cache)  # what the first run taught may be decided upon once more
        warm = [sample(model, cache) for _ in range(options.samples)]
    figures = {
        name: statistics.median(w[name] for w in warm)
        for name in ("configure_s", "import_s", "apply_s", "cpu_s", "again_s", "recall_s")
    }
    packages = sorted({p for w in warm for p in w["packages"]})
    load = os.getloadavg()[0]
    if options.json:
        report = {"cold_s": cold["configure_s"], **figures, "packages": packages, "load": load}
        print(json.dumps(report, indent=2))
        return
    rows = {
        "cold: the machine is measured": cold["configure_s"],
        "warm: importing and configuring": figures["configure_s"],
        "  of it importing autotune": figures["import_s"],
        "  applying the plan, not in it": figures["apply_s"],
        "again in the same process": figures["again_s"],
        "the plan, from the profile": figures["recall_s"],
    }
    for label, seconds in rows.items():
        print(f"{label:<34}{format_seconds(seconds):>12}")
    print(f"{'imported besides':<34}{', '.join(packages):>12}")
    print(f"{'plan recalled in every sample':<34}{all(w['recalled'] for w in warm)!s:>12}")
    print(f"{'load average':<34}{load:>12.1f}")


if __name__ == "__main__":
    main()
