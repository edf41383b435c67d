#!/usr/bin/env python3
"""Predicted memory and time against published measurements, with no GPU.

Every row of ``tests/data/published_measurements.csv`` that an ``Execution`` can express is
predicted on the datasheet machine of its GPU, and compared under the metric of its source.

    scripts/accuracy.py             # tables
    scripts/accuracy.py --json      # {"mape", "naive", "time", "changes", "rows", "inexpressible",
                                    #  "ratios", "decodes", "steps"}
    scripts/accuracy.py --write     # the tables of docs/accuracy.md
    scripts/accuracy.py sdxl        # rows whose source or model contains the word
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import msgspec  # noqa: E402
from documents import between  # noqa: E402
from make_reference_machines import with_torch1  # noqa: E402
from msgspec.structs import replace  # noqa: E402

from autotune.decide.allocator import CachingAllocator, rounding_bytes  # noqa: E402
from autotune.decide.metrics import Expected, expected, replay  # noqa: E402
from autotune.decide.predict import Predictor  # noqa: E402
from autotune.optimizations.execution import Execution  # noqa: E402
from autotune.probe.machine import Machine  # noqa: E402
from autotune.probe.reference import load_machine  # noqa: E402
from autotune.units import GIB, MIB  # noqa: E402
from autotune.workload.architecture import ComponentConfig, find_architecture  # noqa: E402
from autotune.workload.cache import workload_of  # noqa: E402
from autotune.workload.request import complete_request  # noqa: E402
from autotune.workload.workload import Component, Workload  # noqa: E402

FOLDER = ROOT / "tests" / "data"
DATA = FOLDER / "published_measurements.csv"
DOCUMENT = ROOT / "docs" / "accuracy.md"
BEGIN, END = "<!-- written by scripts/accuracy.py -->", "<!-- end -->"

SAME_TIME = 0.03
"""Published times closer than this are not ranked: repeated runs differ by as much."""

SAFETY_CHECKER_BYTES = 580 * MIB
"""SD 1.5's, a CLIP ViT-L/14 of 304 million parameters in float16, which PR #2269 left on."""


TORCH_1_CONTEXT_BYTES = 1343 * MIB
"""PyTorch 1 loaded every kernel at once (transformers' documentation, "Model training anatomy":
``torch.ones((1, 1)).to("cuda")`` takes 1343 MB); today's load each when it is called."""


class Row(msgspec.Struct, frozen=True):
    """One published run.

    Attributes:
        metric: Of ``peak_gib``: ``allocated``, ``reserved``, ``device``, or ``searched``: the
            device's under PyTorch 1 with ``torch.backends.cudnn.benchmark``, whose search keeps
            what it found fastest, whatever memory that takes. It is shown, but not counted.
        machine: The datasheet machine to predict on, and the PyTorch that it ran where that is not
            today's: ``torch1``, ``torch2.5``.
        execution: ``field=value`` of the ``Execution``, a bare field for true;
            ``group=level``, ``step_cache=method:value``.
        extra: ``ddim`` (the source set that scheduler), ``safety-checker`` (it was on),
            ``untimed`` (no GPU is named).
        left_over: A component that an earlier cell of the same notebook leaves on the GPU.
        inexpressible: What an ``Execution`` cannot say yet; empty for rows that are predicted.
    """

    source: str
    gpu: str
    model: str
    height: int
    width: int
    batch: int
    dtype: str
    steps: int
    as_published: str
    metric: str
    peak_gib: float
    seconds: float
    machine: str
    execution: str = ""
    extra: str = ""
    left_over: str = ""
    inexpressible: str = ""
    notes: str = ""

    @property
    def name(self) -> str:
        """What tells it from the others of its source."""
        size = f" {self.width}x{self.height}" if self.width < 1024 else ""
        return f"{self.model}{size} b{self.batch} {self.dtype} {self.as_published}"


class Outcome(NamedTuple):
    """A row, and what was predicted of it, in GiB and seconds.

    ``left_over_gib`` belongs to the script that measured, not to the pipeline.
    """

    row: Row
    peak_gib: float
    left_over_gib: float
    seconds: float
    weights_gib: float

    @property
    def is_counted(self) -> bool:
        """Whether its memory is of a run that an ``Execution`` describes."""
        return self.row.metric != "searched"

    @property
    def is_timed(self) -> bool:
        """Whether its GPU is known."""
        return "untimed" not in self.row.extra

    @property
    def memory_error(self) -> float:
        """Signed, relative, what the script left over counted."""
        return (self.peak_gib + self.left_over_gib) / self.row.peak_gib - 1

    @property
    def plain_memory_error(self) -> float:
        """The same against the figure as it stands."""
        return self.peak_gib / self.row.peak_gib - 1

    @property
    def time_error(self) -> float:
        """Signed and relative."""
        return self.seconds / self.row.seconds - 1

    def naive_error(self, rule: Callable[[float], float]) -> float:
        """What a rule that knows the weights' size makes of it."""
        return (rule(self.weights_gib) + self.left_over_gib) / self.row.peak_gib - 1


NAIVE: dict[str, Callable[[float], float]] = {
    "weights x 1.5": lambda weights: 1.5 * weights,
    "weights + 3 GB": lambda weights: weights + 3e9 / GIB,
}


# ---- predicting ---------------------------------------------------------------------------------


def read_rows(path: Path = DATA) -> list[Row]:
    """Every published row, the ones that cannot be expressed included."""
    return [msgspec.convert(r, Row, strict=False) for r in _read(path)]


def outcome_of(row: Row) -> Outcome:
    """Predict one row under the metric of its source."""
    machine, execution = _machine(row.machine), _execution(row.execution)
    workload = _workload(row, machine)
    predictor = Predictor(machine, workload)
    prediction = predictor.predict(execution)
    peak = prediction.peak_bytes
    if row.metric != "allocated":
        peak = _seen(row, expected(predictor, execution))
    return Outcome(
        row=row,
        peak_gib=peak / GIB,
        left_over_gib=_held(workload.component(row.left_over)) / GIB if row.left_over else 0.0,
        seconds=prediction.seconds,
        weights_gib=workload.weight_bytes / GIB,
    )


def _seen(row: Row, peaks: Expected) -> int:
    return peaks.reserved_bytes if row.metric == "reserved" else peaks.device_bytes


def _held(component: Component) -> int:
    return component.weight_bytes + rounding_bytes(component.tensor_bytes)


@functools.cache
def _machine(name: str) -> Machine:
    base, _, variant = name.partition(" ")
    machine = load_machine(base)
    if variant == "torch1":
        return replace(with_torch1(machine), context_bytes=TORCH_1_CONTEXT_BYTES)
    return replace(machine, software={"torch": variant[len("torch") :]}) if variant else machine


def _execution(text: str) -> Execution:
    fields: dict[str, Any] = {}
    for part in text.split():
        name, _, value = part.partition("=")
        fields[name] = _PARTS[name](value) if name in _PARTS else value or True
    return msgspec.convert(fields, Execution)


_PARTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "group": lambda level: {"level": level},
    "step_cache": lambda text: dict(zip(("method", "value"), _pair(text), strict=True)),
}
"""Fields of an ``Execution`` that have fields of their own: from their text."""


def _pair(text: str) -> tuple[str, float]:
    method, _, value = text.partition(":")
    return method, float(value)


def _workload(row: Row, machine: Machine) -> Workload:
    architecture = find_architecture(row.model)
    if "ddim" in row.extra:
        ddim = ComponentConfig("diffusers", "DDIMScheduler", {})
        architecture = replace(architecture, schedulers={"scheduler": ddim})
    request = complete_request(
        architecture,
        machine,
        height=row.height,
        width=row.width,
        batch=row.batch,
        steps=row.steps,
        dtype=row.dtype,
    )
    workload = workload_of(architecture, request)
    return _with_safety_checker(workload) if "safety-checker" in row.extra else workload


def _with_safety_checker(workload: Workload) -> Workload:
    """Its weights: beside a decode, what it computes is nothing."""
    size = SAFETY_CHECKER_BYTES
    checker = Component("safety_checker", "StableDiffusionSafetyChecker", size // 2, size, 0, 1, 1)
    return replace(
        workload,
        components=(*workload.components, checker),
        offload_apart=(*workload.offload_apart, checker.name),
    )


# ---- further evidence -------------------------------------------------------------------------


def decodes(sizes: int | None = None) -> Iterator[dict[str, Any]]:
    """Qwen-Image's VAE alone, whose decode was measured at ten sizes: the first so many of them."""
    import torch

    from autotune.decide.attention import Kernel
    from autotune.decide.predict import Path as Forward
    from autotune.workload.components import build_on_meta, describe
    from autotune.workload.trace import trace

    component = find_architecture("qwen-image").components["vae"]
    vae: Any = build_on_meta("vae", component, torch.float16)
    described = describe("vae", vae)
    for row in itertools.islice(_read(FOLDER / "published_vae_decodes.csv"), sizes):
        height, width = int(row["height"]), int(row["width"])
        latent = torch.empty(
            (1, vae.config.z_dim, 1, height // 8, width // 8), dtype=torch.float16, device="meta"
        )
        traced = trace(vae, lambda latent=latent: vae.decode(latent), [latent])
        allocator = CachingAllocator()
        for size in described.tensor_bytes:
            allocator.allocate(size)
        weights = allocator.reserved_bytes
        replay(allocator, load_machine(row["machine"]), Forward(traced, Kernel("sdpa"), False))
        yield {
            "pixels": f"{width}x{height}",
            "allocated_gib": allocator.peak_allocated_bytes / GIB,
            "published_allocated_gib": float(row["allocated_gib"]),
            "reserved_gib": (allocator.peak_reserved_bytes - weights) / GIB,
            "published_reserved_gib": float(row["reserved_beyond_weights_gib"]),
        }


def step_rates() -> Iterator[dict[str, Any]]:
    """Denoise steps per second, from a progress bar: compute and launch, nothing else."""
    for row in _read(FOLDER / "published_step_rates.csv"):
        machine = load_machine(row["machine"])
        architecture = find_architecture(row["model"])
        request = complete_request(
            architecture, machine, batch=int(row["batch"]), steps=50, dtype=row["dtype"]
        )
        workload = workload_of(architecture, request)
        denoise = next(p for p in workload.phases if p.name == "denoise")
        prediction = Predictor(machine, workload).predict(_execution(row["execution"]))
        seconds = next(p.seconds for p in prediction.phases if p.name == "denoise")
        yield {
            "gpu": row["gpu"],
            "model": row["model"],
            "batch": int(row["batch"]),
            "steps_per_s": sum(r.calls for r in denoise.runs) / seconds,
            "published": float(row["steps_per_s"]),
        }


def ratios(words: Iterable[str] = ()) -> Iterator[dict[str, Any]]:
    """What an optimization makes of the time, where the GPU is not known well enough for seconds.

    And what the denoiser alone allocates before it.
    The machine stands for one of about that speed. Only models whose name contains a word, if any.
    """
    for row in _read(FOLDER / "published_ratios.csv"):
        if words and not any(w in row["model"] for w in words):
            continue
        predictor = _predictor_of(row)
        before, after = (
            _seconds(predictor, _execution(text), row["measures"])
            for text in (COMPARED_WITH.get(row["measures"], ""), row["execution"])
        )
        yield {
            "source": row["source"].partition(",")[0].partition(" of ")[0],
            "model": row["model"],
            "what": row["what"],
            "factor": after / before,
            "published_factor": float(row["after_s"]) / float(row["before_s"]),
            "before_gib": _denoiser_bytes(predictor) / GIB if row["before_gib"] else None,
            "published_before_gib": float(row["before_gib"]) if row["before_gib"] else None,
            "evidence": row["evidence"],
        }


COMPARED_WITH = {"compiling": "compiled=whole"}
"""What is measured → the execution before the change, where it is not the default one."""


def _predictor_of(row: dict[str, str]) -> Predictor:
    machine, architecture = load_machine(row["machine"]), find_architecture(row["model"])
    if row["denoiser"]:
        component = architecture.components["transformer"]
        config = component.config | json.loads(row["denoiser"])
        components = {**architecture.components, "transformer": replace(component, config=config)}
        architecture = replace(architecture, components=components)
    request = complete_request(
        architecture,
        machine,
        height=int(row["height"]),
        width=int(row["width"]),
        frames=int(row["frames"]),
        steps=int(row["steps"]),
        guidance_scale=float(row["guidance"]),
        dtype="bfloat16",
        options={name: int(value) for name, _, value in [row["options"].partition("=")] if name},
    )
    return Predictor(machine, workload_of(architecture, request))


def _seconds(predictor: Predictor, execution: Execution, measures: str) -> float:
    """Of a denoise step, of a whole generation, or of the compiler."""
    prediction = predictor.predict(execution)
    if measures == "generation":
        return prediction.seconds
    denoise = next(p for p in prediction.phases if p.name == "denoise")
    return denoise.once_s if measures == "compiling" else denoise.seconds


def _denoiser_bytes(predictor: Predictor) -> int:
    """Allocated while the denoiser runs, and nothing else is on the device."""
    denoise = next(p for p in predictor.workload.phases if p.name == "denoise")
    component = predictor.workload.component(denoise.runs[0].component)
    forward = predictor.phase(predictor.workload.phases.index(denoise), Execution())
    others = forward.resident_bytes - component.weight_bytes
    return forward.peak_bytes - others


def _read(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def evidence() -> dict[str, Any]:
    """What else was published and can be predicted, beside the rows themselves."""
    return {
        "ratios": list(ratios()),
        "decodes": list(decodes()),
        "steps": list(step_rates()),
    }


# ---- comparing ----------------------------------------------------------------------------------


def mape(errors: Iterable[float]) -> float:
    """Mean of the absolute errors; 0 for none."""
    sizes = [abs(e) for e in errors]
    return statistics.fmean(sizes) if sizes else 0.0


def kendall_tau(outcomes: list[Outcome]) -> float:
    """How well times are ranked, from -1 to 1; 1 where there is nothing to rank."""
    score = pairs = 0
    for one, other in itertools.combinations(outcomes, 2):
        fast, slow = sorted((one, other), key=lambda o: o.row.seconds)
        if slow.row.seconds > fast.row.seconds * (1 + SAME_TIME):
            pairs += 1
            score += 1 if slow.seconds > fast.seconds else -1
    return score / pairs if pairs else 1.0


class Change(NamedTuple):
    """Two rows of one source that differ in one thing."""

    what: str
    before: Outcome
    after: Outcome

    @property
    def memory(self) -> tuple[float, float]:
        """GiB more: predicted, published."""
        one, other = self.before, self.after
        predicted = other.peak_gib + other.left_over_gib - one.peak_gib - one.left_over_gib
        return predicted, other.row.peak_gib - one.row.peak_gib

    @property
    def time(self) -> tuple[float, float]:
        """Factor: predicted, published."""
        one, other = self.before, self.after
        return other.seconds / one.seconds, other.row.seconds / one.row.seconds


def _torchao(scheme: str, name: str) -> Iterator[tuple[str, str, str]]:
    """One scheme: eager, compiled, and with fused projections."""
    compiled = "+compile_max_autotune"
    yield scheme, "none(SDPA)", name
    yield f"{scheme} where both are compiled", compiled[1:], name + compiled
    yield f"fused projections in {scheme}", name, f"{name}+fuse_qkv"
    yield (
        f"fused projections in {scheme} where both are compiled",
        name + compiled,
        f"{name}+fuse_qkv{compiled}",
    )


CHANGES = (
    ("float32 to float16", "none(default attn processor)", "default attn processor"),
    ("vanilla attention to SDPA", "default attn processor", "SDPA"),
    ("model offload", "SDPA", "SDPA+model_cpu_offload"),
    ("sequential offload", "SDPA", "SDPA+sequential_cpu_offload"),
    ("VAE slicing", "SDPA", "SDPA+vae_slicing"),
    (
        "VAE slicing under sequential offload",
        "SDPA+sequential_cpu_offload",
        "SDPA+vae_slicing+sequential_cpu_offload",
    ),
    (
        "sequential offload under VAE slicing",
        "SDPA+vae_slicing",
        "SDPA+vae_slicing+sequential_cpu_offload",
    ),
    ("sequential offload", "none", "sequential_cpu_offload(accelerate)"),
    ("layerwise casting", "none", "layerwise_casting_fp8_e4m3(transformer)"),
    ("compiled", "SDPA", "SDPA+compile_unet(reduce-overhead)"),
    ("compiled", "none(SDPA)", "compile_max_autotune"),
    *_torchao("int8", "torchao_int8wo(transformer)"),
    *_torchao("float8", "torchao_fp8wo(transformer)"),
    *_torchao("float8, inputs too", "torchao_fp8dq(transformer)"),
)


def changes(outcomes: list[Outcome]) -> Iterator[Change]:
    """Pairs of rows that differ in one optimization, as far as both are here."""
    for what, before, after in CHANGES:
        for one, other in itertools.permutations(outcomes, 2):
            names = (one.row.as_published, other.row.as_published)
            alike = (one.row.source, one.row.batch) == (other.row.source, other.row.batch)
            if names == (before, after) and alike:
                yield Change(what, one, other)


def by(outcomes: list[Outcome], field: str) -> dict[str, list[Outcome]]:
    """Outcomes by a field of their row, in order of first appearance."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(getattr(outcome.row, field), []).append(outcome)
    return groups


def report(rows: list[Row]) -> dict[str, Any]:
    """What is predicted of the rows against what was published, as JSON can hold it."""
    every = [outcome_of(r) for r in rows if not r.inexpressible]
    outcomes = [o for o in every if o.is_counted]
    timed = [o for o in every if o.is_timed]
    return {
        "mape": {
            "all": mape(o.memory_error for o in outcomes),
            "all_as_published": mape(o.plain_memory_error for o in outcomes),
            "by_metric": _mapes(by(outcomes, "metric")),
            "by_source": _mapes(by(outcomes, "source")),
        },
        "naive": {
            name: {
                "all": mape(o.naive_error(rule) for o in outcomes),
                "by_metric": _naive(by(outcomes, "metric"), rule),
                "by_source": _naive(by(outcomes, "source"), rule),
            }
            for name, rule in NAIVE.items()
        },
        "time": {
            "median": statistics.median(abs(o.time_error) for o in timed) if timed else 0.0,
            "median_by_source": {
                source: statistics.median(abs(o.time_error) for o in group)
                for source, group in by(timed, "source").items()
            },
            "kendall_tau_by_source": {
                source: kendall_tau(group) for source, group in by(timed, "source").items()
            },
        },
        "changes": [
            {
                "what": c.what,
                "source": c.before.row.source,
                "batch": c.before.row.batch,
                "predicted_gib": c.memory[0],
                "published_gib": c.memory[1],
                "predicted_factor": c.time[0] if c.before.is_timed else None,
                "published_factor": c.time[1],
            }
            for c in changes(outcomes)
        ],
        "rows": [_as_dict(o) for o in every],
        "inexpressible": dict(Counter(r.inexpressible for r in rows if r.inexpressible)),
    }


def _mapes(groups: dict[str, list[Outcome]]) -> dict[str, float]:
    return {name: mape(o.memory_error for o in group) for name, group in groups.items()}


def _naive(groups: dict[str, list[Outcome]], rule: Callable[[float], float]) -> dict[str, float]:
    return {name: mape(o.naive_error(rule) for o in group) for name, group in groups.items()}


def _as_dict(outcome: Outcome) -> dict[str, Any]:
    row = outcome.row
    return {
        "source": row.source,
        "row": row.name,
        "gpu": row.gpu,
        "metric": row.metric,
        "counted": outcome.is_counted,
        "predicted_gib": outcome.peak_gib,
        "left_over_gib": outcome.left_over_gib,
        "published_gib": row.peak_gib,
        "memory_error": outcome.memory_error,
        "memory_error_as_published": outcome.plain_memory_error,
        "predicted_s": outcome.seconds if outcome.is_timed else None,
        "published_s": row.seconds,
        "time_error": outcome.time_error if outcome.is_timed else None,
    }


# ---- showing ------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> Iterator[str]:
    """Markdown: rows by source, the summary, and what one change does."""
    for source in dict.fromkeys(r["source"] for r in found["rows"]):
        rows = [r for r in found["rows"] if r["source"] == source]
        yield f"### {source}\n"
        yield _table(
            ("row", "metric", "predicted GiB", "left over", "published", "error", "predicted s",
             "published", "error"),
            (
                (
                    f"{r['row']}" + (f" ({r['gpu']})" if r["gpu"] else ""),
                    r["metric"],
                    f"{r['predicted_gib']:.2f}",
                    f"{r['left_over_gib']:.2f}" if r["left_over_gib"] else "",
                    f"{r['published_gib']:.2f}",
                    _percent(r["memory_error"]),
                    "" if r["predicted_s"] is None else f"{r['predicted_s']:.1f}",
                    f"{r['published_s']:.1f}",
                    _percent(r["time_error"]),
                )
                for r in rows
            ),
        )  # fmt: skip
    yield "### Mean absolute error of memory\n"
    yield _summary(found)
    yield "### Times\n"
    time = found["time"]
    yield _table(
        ("source", "median error", "Kendall's tau of the ranking"),
        (
            (s, f"{time['median_by_source'][s]:.1%}", f"{time['kendall_tau_by_source'][s]:.2f}")
            for s in time["median_by_source"]
        ),
    )
    yield f"All rows together: median error {time['median']:.1%}.\n"
    yield "### What one change does\n"
    yield _table(
        ("change", "GiB predicted", "published", "time predicted", "published"),
        (
            (
                f"{c['what']} ({c['source'].rpartition('/')[2].partition(' README')[0]}, "
                f"batch {c['batch']})",
                f"{c['predicted_gib']:+.2f}",
                f"{c['published_gib']:+.2f}",
                "" if c["predicted_factor"] is None else f"{c['predicted_factor']:.2f}x",
                f"{c['published_factor']:.2f}x",
            )
            for c in found["changes"]
        ),
    )
    yield "### What one change does to the time, where the GPU is not known\n"
    yield _table(
        ("model", "denoiser alone, GiB predicted", "published", "change", "time predicted",
         "published", "evidence", "source"),
        (
            (
                r["model"],
                "" if r["before_gib"] is None else f"{r['before_gib']:.2f}",
                "" if r["before_gib"] is None else f"{r['published_before_gib']:.2f}",
                r["what"],
                f"{r['factor']:.2f}x",
                f"{r['published_factor']:.2f}x",
                r["evidence"],
                r["source"],
            )
            for r in found["ratios"]
        ),
    )  # fmt: skip
    yield "### Decodes of Qwen-Image's VAE alone (InvokeAI #9305, RTX 4090, float16)\n"
    yield _table(
        ("pixels", "allocated GiB predicted", "published", "error",
         "reserved beyond the weights predicted", "published", "error"),
        (
            (
                d["pixels"],
                f"{d['allocated_gib']:.3f}",
                f"{d['published_allocated_gib']:.3f}",
                _percent(d["allocated_gib"] / d["published_allocated_gib"] - 1),
                f"{d['reserved_gib']:.2f}",
                f"{d['published_reserved_gib']:.2f}",
                _percent(d["reserved_gib"] / d["published_reserved_gib"] - 1),
            )
            for d in found["decodes"]
        ),
    )  # fmt: skip
    yield "### Denoise steps per second (diffusers' torch2.0 benchmark, float16, channels-last)\n"
    yield _table(
        ("GPU", "model", "batch", "predicted", "published", "error"),
        (
            (
                d["gpu"],
                d["model"],
                str(d["batch"]),
                f"{d['steps_per_s']:.2f}",
                f"{d['published']:.2f}",
                _percent(d["steps_per_s"] / d["published"] - 1),
            )
            for d in found["steps"]
        ),
    )
    left_out = ", ".join(f"{n} {what}" for what, n in found["inexpressible"].items())
    yield f"Not expressible yet: {sum(found['inexpressible'].values())} rows ({left_out}).\n"


def _summary(found: dict[str, Any]) -> str:
    rules = list(found["naive"])

    def line(name: str, value: float, naive: Iterable[float], count: int) -> tuple[str, ...]:
        return name, str(count), f"{value:.1%}", *(f"{n:.0%}" for n in naive)

    lines = []
    for field, key in (("by_metric", "metric"), ("by_source", "source")):
        for name, value in found["mape"][field].items():
            count = sum(r[key] == name and r["counted"] for r in found["rows"])
            naive = (found["naive"][rule][field][name] for rule in rules)
            lines.append(line(name, value, naive, count))
    naive = (found["naive"][rule]["all"] for rule in rules)
    counted = sum(r["counted"] for r in found["rows"])
    lines.append(line("**all**", found["mape"]["all"], naive, counted))
    return _table(("rows of", "rows", "predicted", *rules), lines) + (
        f"\nTaken as they stand, without what a script left over: "
        f"{found['mape']['all_as_published']:.1%}.\n"
    )


def _table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    head = list(head)
    body = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in body)


def _percent(error: float | None) -> str:
    return "" if error is None else f"{error:+.1%}"


def main() -> int:
    """Prints or writes the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", help="only rows whose source or model contains one")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--write", action="store_true", help=f"rewrite {DOCUMENT.name}'s tables")
    options = parser.parse_args()
    words = options.words
    rows = [r for r in read_rows() if not words or any(w in f"{r.source} {r.model}" for w in words)]
    found = report(rows) | evidence()
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    text = "\n".join(tables(found))
    if options.write:
        _write(text)
    else:
        print(text)
    return 0


def _write(text: str) -> None:
    document = between(DOCUMENT.read_text(encoding="utf-8"), BEGIN, END, text)
    DOCUMENT.write_text(document, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
