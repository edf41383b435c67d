#!/usr/bin/env python3
"""Measures what predictions and choices are worth on this device, and what others make of it.

On an NVIDIA GPU: full-size SDXL, SD 1.5, SD 3 medium and Flux with random weights, and small cards
made of a large one. On a CPU: small pipelines like them, and memory limits that are only reckoned
with. Needs no network. What is finished is written at once; run it again and it goes on.

    scripts/gpu_validation.py recording.jsonl                # nine minutes
    scripts/gpu_validation.py recording.jsonl --budget-s 1800 --models sdxl,sd15
    scripts/gpu_validation.py recording.jsonl --device cpu --clock cpu   # on a busy machine
    scripts/gpu_report.py recording.jsonl                    # what it says
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

BUDGET_S = 540.0
LOST = 3
"""Exit status of a worker whose device has failed: another one goes on."""

MOST_RESTARTS = 20


def main() -> int:
    """Runs workers until one has finished."""
    options = _options()
    os.environ.setdefault("AUTOTUNE_CACHE", str(options.recording.resolve()) + ".cache")
    if options.worker:
        with tempfile.TemporaryDirectory() as folder:  # what is compiled already costs nothing
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
            return work(options)
    end = time.monotonic() + options.budget_s
    for _ in range(MOST_RESTARTS):
        left = end - time.monotonic()
        if left <= 0:
            break
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", "--budget-s", f"{left:.0f}"]
        status = subprocess.run(command, check=False).returncode
        if status in (0, 2, 130):  # finished, misused, interrupted
            return status
        print(f"worker ended with status {status}: another one goes on", file=sys.stderr)
    return 0


def work(options: argparse.Namespace) -> int:
    """One process's work; imports torch.

    Returns:
        0 when time is up or nothing is left to do.
    """
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from validation import device as devices
    from validation.bench import Bench, IncomparableError, cases_of
    from validation.measure import DeviceLostError
    from validation.recording import Recording

    devices.keep_clock(options.clock, options.threads)
    device = devices.chosen(options.device)
    recording = Recording(options.recording)
    cases = cases_of(device, options.models.split(",") if options.models else (), options.tiny)
    try:
        bench = Bench(recording, device, options.clock, options.budget_s, print)
        bench.run(cases)
    except IncomparableError as error:
        print(error, file=sys.stderr)
        return 2
    except DeviceLostError as error:
        print(f"the device failed: {error}", file=sys.stderr)
        return LOST
    except KeyboardInterrupt:
        return 130
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="See docs/benchmarks.md.",
    )
    parser.add_argument("recording", type=Path, help="JSON lines; goes on where it ends")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds to spend")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="the GPU where there is one")
    parser.add_argument("--models", help="only these, by their names")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: CPU time of one thread, for a CPU that others use, too",
    )
    parser.add_argument("--threads", type=int, help="PyTorch's, on a CPU")
    parser.add_argument("--tiny", action="store_true", help="seconds: to test this script")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.clock == "cpu" and options.device != "cpu":
        parser.error("--clock cpu goes with --device cpu")
    return options


if __name__ == "__main__":
    sys.exit(main())
