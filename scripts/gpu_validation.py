#!/usr/bin/env python3
"""Measures what predictions and choices are worth on this device, and what others make of it.

On an NVIDIA GPU: full-size SDXL, SD 1.5, SD 3 medium and Flux with random weights, and small cards
made of a large one. On a CPU: small pipelines like them, and memory limits that are only reckoned
with. Needs no network. What is finished is written at once; run it again and it goes on.

    scripts/gpu_validation.py recording.jsonl                # nine minutes
    scripts/gpu_validation.py recording.jsonl --budget-s 1800 --models sdxl,sd15
    scripts/gpu_validation.py recording.jsonl --device cpu --clock cpu   # on a busy machine
    scripts/gpu_report.py recording.jsonl                    # what it says

Packages that are missing on a machine without a network are brought along as wheels:

    pip download -d wheels --no-deps --only-binary :all: --python-version 3.12 \
        --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
        diffusers tomesd msgspec nvidia-ml-py platformdirs diffusers-mm mmgp optimum-quanto xformers
    scripts/gpu_validation.py recording.jsonl --wheels wheels
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
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

GRACE_S = 120.0
"""A worker ends itself when time is up; one that has not by then is ended."""

INTERRUPTED_S = 20.0
"""So long an interrupted worker may take to say so in the recording."""

IDLE_WORKERS = 2
"""So many in a row that failed and recorded nothing: more of them would not help."""


def main() -> int:
    """Runs workers until one has finished."""
    options = _options()
    if options.until is not None:
        with tempfile.TemporaryDirectory() as folder:  # what is compiled already costs nothing
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
            return work(options)
    end = time.time() + options.budget_s
    os.environ.setdefault("AUTOTUNE_CACHE", str(_cache(options.recording)))
    with tempfile.TemporaryDirectory() as packages:
        if options.wheels is not None:
            status = install(options.wheels, packages)
            if status:
                return status
        return supervise([sys.executable, __file__, *sys.argv[1:]], options.recording, end)


def supervise(command: list[str], recording: Path, end: float) -> int:
    """Runs workers, one after another, until one has finished or time is up.

    Args:
        command: Of a worker, without the time.
        recording: Where to it writes; that it grows tells that there is a use in another one.
        end: By ``time.time``.

    Returns:
        0 when time is up, too; else the status of a worker that could do nothing.
    """
    idle = 0
    while time.time() < end:
        before = _size(recording)
        status = _run([*command, "--until", f"{end:.1f}"], end + GRACE_S - time.time())
        if status in (0, 2, 130):  # finished, misused, interrupted
            return status
        idle = idle + 1 if _size(recording) == before else 0
        print(f"worker ended with status {status}", file=sys.stderr)
        if idle == IDLE_WORKERS:
            return status
    return 0


def _run(command: list[str], patience_s: float) -> int:
    worker = subprocess.Popen(command)
    try:
        return worker.wait(patience_s)
    except KeyboardInterrupt:  # the worker got it, too
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            worker.wait(INTERRUPTED_S)
        return 130
    except subprocess.TimeoutExpired:
        return LOST
    finally:
        worker.kill()
        worker.wait()


def install(wheels: Path, folder: str) -> int:
    """What lies in a folder, for this process's workers alone.

    Returns:
        pip's exit status.
    """
    names = sorted({wheel.name.partition("-")[0] for wheel in wheels.glob("*.whl")})
    paths = (folder, os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps", "--find-links", str(wheels), "--target", folder]
    if not names:
        print(f"{wheels}: there are no wheels", file=sys.stderr)
        return 2
    return subprocess.run([*pip, *offline, *names], check=False).returncode


def _cache(recording: Path) -> Path:
    """The same for the same recording: what is probed for it is not probed again."""
    place = str(recording.resolve())
    return Path(tempfile.gettempdir()) / f"autotune-validation-{zlib.crc32(place.encode()):08x}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def work(options: argparse.Namespace) -> int:
    """One process's work; imports torch.

    Returns:
        0 when time is up or nothing is left to do.
    """
    if options.simulated:
        import simulated_gpu

        simulated_gpu.install(context_bytes=128 << 20)
    say = functools.partial(print, flush=True)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from validation import device as devices
    from validation.bench import Bench, IncomparableError, cases_of
    from validation.measure import DeviceLostError
    from validation.recording import Recording

    from autotune.errors import MachineError

    devices.keep_clock(options.clock, options.threads)
    recording = Recording(options.recording)
    models = options.models.split(",") if options.models else ()
    try:
        device = devices.Simulated() if options.simulated else devices.chosen(options.device)
        bench = Bench(recording, device, options.clock, options.until - time.time(), say)
        bench.run(cases_of(device, models, options.tiny))
    except (IncomparableError, MachineError) as error:
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
    parser.add_argument(
        "--simulated",
        action="store_true",
        help="a GPU that is not there, with small pipelines: times mean nothing",
    )
    parser.add_argument("--wheels", type=Path, help="a folder with wheels of what is missing here")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # makes it a worker
    options = parser.parse_args()
    if options.clock == "cpu" and options.device != "cpu":
        parser.error("--clock cpu goes with --device cpu")
    return options


if __name__ == "__main__":
    sys.exit(main())
