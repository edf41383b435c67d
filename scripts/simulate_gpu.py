#!/usr/bin/env python3
"""Tries the code for GPUs on a CUDA device that is not there (``simulated_gpu``): needs g++.

    scripts/simulate_gpu.py sets                   # what is applied draws the same, and is undone
    scripts/simulate_gpu.py sets --kind flux --most 2
    scripts/simulate_gpu.py recovery --kind sdxl   # memory runs out in the middle of a call
    scripts/simulate_gpu.py memory sd15 512 --recording tests/data/simulated/memory.jsonl
    scripts/simulate_gpu.py report                 # the table in docs/simulation.md

Devices, memory and errors are as on a GPU; times mean nothing. One line for each kind of pipeline
and each failure; the exit status is 1 where there is one.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import simulated_gpu  # noqa: E402
from simulated_gpu.report import Measured, append  # noqa: E402

MACHINE = "rtx-3080-10gb"
"""Says what is worth trying."""

WITHOUT = (
    "compile",
    "tiny_autoencoder",
    "sage_attention",
    "xformers",
    "device_map",
    "quantization",
)
"""What needs a compiler for GPUs, weights, kernels, a second GPU or packages."""

ROUNDING = 1e-3
"""Largest difference of a pixel, of 1, between images drawn by the same mathematics."""

LEAK_BYTES = 1 << 16

CARD_BYTES = 24 << 30

DTYPE = "bfloat16"

MEASURED = (
    *("", "model_cpu_offload", "text_encoder_offload", "sequential_cpu_offload"),
    *("group_offload", "group_offload:level=leaf", "group_offload:stream=False"),
    *("layerwise_casting", "fuse_qkv", "channels_last", "vae_tiling"),
)
"""Sets whose memory is measured: each place that weights can be in, and what changes them."""


class Problems(list[str]):
    """Printed as they are found."""

    def add(self, *what: object) -> None:
        line = " ".join(map(str, what))
        print(line, flush=True)
        self.append(line)


# ---- sets ---------------------------------------------------------------------------------------


def try_sets(simulated: simulated_gpu.Simulated, kind: str, most: int, problems: Problems) -> int:
    """Applies every coherent set of up to so many members, draws twice, and undoes it.

    Returns:
        How many sets.
    """
    from msgspec.structs import replace
    from validation.sets import coherent_sets, names_of

    from autotune.decide.choose import choose
    from autotune.decide.predict import Predictor
    from autotune.optimizations import find
    from autotune.probe.reference import load_machine
    from autotune.runtime.apply import apply_plan
    from autotune.testing.pipelines import BUILDERS, SIDE, call
    from autotune.testing.state import differences, whole_state
    from autotune.workload.architecture import describe_pipeline
    from autotune.workload.phases import trace_workload
    from autotune.workload.workload import Request

    pipe, machine = BUILDERS[kind](), load_machine(MACHINE)
    workload = trace_workload(describe_pipeline(pipe), Request(SIDE, SIDE, 1, 4, 5.0, "float32"))
    plan = choose(machine, workload)
    plain = call(pipe)
    undo = apply_plan(pipe, replace(plan, optimizations=()), "cuda:0")
    call(pipe)  # leaves notes on the pipeline, and a random state on the device
    undo()
    before, held = whole_state(pipe), simulated.stats()["allocated"]
    sets = [s for s in coherent_sets(Predictor(machine, workload), WITHOUT) if len(s) <= most]
    for settings in sets:
        names = ",".join(names_of(settings)) or "plain"
        try:
            undo = apply_plan(pipe, replace(plan, optimizations=tuple(settings)), "cuda:0")
            try:
                images = [call(pipe).cpu() for _ in range(2)][-1]
            finally:
                undo()
        except Exception as error:  # whatever a pipeline or a hook raises
            problems.add(kind, names, described(error))
            return len(sets)
        if all(find(s.name).quality(s.parameters) == "exact" for s in settings):
            apart = float((images - plain).abs().max())
            if apart > ROUNDING:
                problems.add(kind, names, f"draws another image: {apart:.1e} apart")
        del undo, images
        gc.collect()
        after = differences(before, whole_state(pipe))
        if after:
            problems.add(kind, names, f"leaves {str(after)[:300]}")
            before = whole_state(pipe)
        more = simulated.stats()["allocated"] - held
        if more > LEAK_BYTES:
            problems.add(kind, names, f"leaves {more} bytes on the device")
            held += more
    for settings in (s for s in sets if len(s) == 1 and s[0].name == "group_offload"):
        try_printed(kind, settings[0], plain, problems)
    return len(sets)


def try_printed(kind: str, setting: Any, plain: Any, problems: Problems) -> None:
    """Runs the lines that are printed for a setting on a pipeline of their own."""
    import torch

    from autotune.optimizations import find
    from autotune.optimizations.target import Target
    from autotune.testing.pipelines import BUILDERS, call
    from autotune.workload.architecture import describe_pipeline

    pipe = BUILDERS[kind]()
    architecture = describe_pipeline(pipe)
    target = Target(architecture.pipeline, kind, "float32", components=architecture.components)
    lines = find(setting.name).code(setting.parameters, target)
    try:
        exec("\n".join(lines), {"pipe": pipe, "torch": torch})
        images = [call(pipe).cpu() for _ in range(2)][-1]
    except Exception as error:  # whatever a pipeline or a hook raises
        problems.add(kind, setting, "as it is printed:", described(error))
        return
    apart = float((images - plain).abs().max())
    if apart > ROUNDING:
        problems.add(kind, setting, f"as it is printed draws another image: {apart:.1e} apart")


# ---- recovery -----------------------------------------------------------------------------------


def try_recovery(
    simulated: simulated_gpu.Simulated, kind: str, points: int, problems: Problems
) -> int:
    """Lets an allocation fail at so many places of a call: the image is that of its seed.

    Returns:
        How many places.
    """
    import torch

    import autotune
    from autotune.testing.pipelines import BUILDERS, SIDE, arguments, call
    from autotune.tuner import machine_here

    pipe = BUILDERS[kind]()
    plain = call(pipe)

    def configured() -> Any:
        """By the same machine, of which no other generation is remembered."""
        os.environ["AUTOTUNE_CACHE"] = tempfile.mkdtemp(dir=folder)
        shutil.copytree(measured, os.environ["AUTOTUNE_CACHE"], dirs_exist_ok=True)
        return autotune.configure(
            pipe, height=SIDE, width=SIDE, steps=4, device="cuda:0", quality="exact"
        )

    def draw(tuned: Any) -> torch.Tensor:
        options = {"num_inference_steps": 2, "output_type": "pt"}
        generator = torch.Generator().manual_seed(0)
        images: torch.Tensor = tuned(**arguments(pipe), **options, generator=generator)[0]
        return images.cpu()

    with tempfile.TemporaryDirectory() as folder:
        measured = os.environ["AUTOTUNE_CACHE"] = tempfile.mkdtemp(dir=folder)
        machine_here("cuda:0")
        tuned = configured()
        start = simulated.stats()["allocations"]
        draw(tuned)
        made = simulated.stats()["allocations"] - start
        for point in range(points):
            tuned.undo()
            tuned = configured()
            plan, failures = tuned.plan, simulated.stats()["failures"]
            simulated.fail_in(made * point // points)
            try:
                apart = float((draw(tuned) - plain).abs().max())
                if apart > ROUNDING:
                    problems.add(kind, point, f"draws another image: {apart:.1e} apart")
                if simulated.stats()["failures"] == failures:
                    problems.add(kind, point, "no allocation failed")
                elif tuned.plan.optimizations == plan.optimizations:
                    problems.add(kind, point, "took no smaller plan")
            except Exception as error:  # whatever a pipeline or a hook raises
                problems.add(kind, point, described(error))
            simulated.fail_in(-1)
        tuned.undo()
    return points


def described(error: BaseException) -> str:
    """Kind, message, and where it came from."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    places = ", ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames)
    return f"{type(error).__name__}: {str(error)[:300]} ({places})"


# ---- memory -------------------------------------------------------------------------------------


def measure_memory(
    simulated: simulated_gpu.Simulated, options: argparse.Namespace, problems: Problems
) -> Iterator[Measured]:
    """Draws with each set and random weights, in bfloat16: CPUs are quick at that."""
    import torch
    from msgspec.structs import replace
    from validation.device import Simulated
    from validation.measure import Subject
    from validation.models import HOST, Model, architecture_of

    from autotune.decide.choose import choose
    from autotune.optimizations import parse_settings
    from autotune.probe.reference import load_machine
    from autotune.workload.architecture import describe_pipeline
    from autotune.workload.phases import trace_workload
    from autotune.workload.workload import Request

    model, side, steps = options.model, options.side, options.steps
    pipe = Model(architecture_of(model), DTYPE, HOST).at(HOST)
    request = Request(side, side, 1, steps, 5.0, DTYPE)
    workload = trace_workload(describe_pipeline(pipe), request)
    plan = choose(load_machine(MACHINE), workload)
    subject = Subject(pipe, workload, replace(plan, optimizations=()), Simulated())
    for text in options.set or MEASURED:
        gc.collect()
        simulated.reset_pinned()
        drawn = subject.drawn_with(parse_settings(text), times=0, peaks=False)
        if drawn.error:
            problems.add(model, text, drawn.error)
            continue
        yield Measured(
            model=model,
            side=side,
            steps=steps,
            dtype=DTYPE,
            settings=text,
            torch=torch.__version__.partition("+")[0],
            allocated={p.name: p.peak_bytes or 0 for p in drawn.first},
            reserved=max(p.reserved_bytes or 0 for p in drawn.first),
            pinned=simulated.stats()["peak_pinned"],
        )


# ---- the command line ---------------------------------------------------------------------------


def main() -> int:
    """Does one of them, and returns 1 where something is wrong."""
    options = read_options()
    if options.what == "report":
        from simulated_gpu.report import report

        report(ROOT, options.write)
        return 0
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    try:
        simulated = simulated_gpu.install(CARD_BYTES, context_bytes=128 << 20)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    import torch

    torch.set_num_threads(1)
    problems = Problems()
    if options.what == "memory":
        for line in measure_memory(simulated, options, problems):
            append(options.recording, line)
            print(line.model, line.settings or "plain", f"{line.reserved >> 20} MiB", flush=True)
        return min(len(problems), 1)
    from autotune.testing.pipelines import BUILDERS

    for kind in options.kind or list(BUILDERS):
        start, before = time.perf_counter(), len(problems)
        if options.what == "sets":
            tried = f"{try_sets(simulated, kind, options.most, problems)} sets"
        else:
            tried = f"{try_recovery(simulated, kind, options.points, problems)} allocations failed"
        seconds = time.perf_counter() - start
        print(f"{kind}: {tried}, {len(problems) - before} problems, {seconds:.0f} s", flush=True)
    return min(len(problems), 1)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    sets = commands.add_parser("sets", help="apply, draw, undo")
    sets.add_argument("--kind", action="append", help="only this kind of pipeline")
    sets.add_argument("--most", type=int, default=1, help="members of a set")
    recovery = commands.add_parser("recovery", help="run out of memory")
    recovery.add_argument("--kind", action="append", help="only this kind of pipeline")
    recovery.add_argument("--points", type=int, default=6, help="places in a call")
    memory = commands.add_parser("memory", help="of a full-size model with random weights")
    memory.add_argument("model")
    memory.add_argument("side", type=int, help="of the image, in pixels")
    memory.add_argument("--steps", type=int, default=2, help="groups are fetched early from 2 on")
    memory.add_argument("--set", action="append", help="only this set, as a,b:c=d")
    memory.add_argument("--recording", type=Path, required=True, help="JSON lines, added to")
    report = commands.add_parser("report", help="predicted beside what was recorded")
    report.add_argument("--write", action="store_true", help="into docs/simulation.md")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
