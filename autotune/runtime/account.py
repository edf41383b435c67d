"""The account of a plan in plain text: for ``tuned.explain()`` and the command line alike."""

from __future__ import annotations

from collections.abc import Iterator

from autotune.decide.plan import Plan, PredictionReport
from autotune.decide.prediction import Bottleneck, Prediction
from autotune.decide.wording import RESOURCES, lacking, said_once
from autotune.profile.profile import PhaseMeasurement
from autotune.runtime.verification import Verification
from autotune.units import format_bytes, format_seconds


def explain_plan(plan: Plan, verification: Verification | None = None) -> str:
    """Machine, workload, bottleneck before and after, the set and the reasons, line by line."""
    return "\n".join((*_lines(plan), *_verified(verification)))


def describe_bottleneck(bottleneck: Bottleneck) -> str:
    """``"compute in denoise"``."""
    if bottleneck.resource == "ram":
        return "host RAM"
    return f"{RESOURCES[bottleneck.resource]} in {bottleneck.phase}"


def describe_workload(plan: Plan | PredictionReport) -> str:
    """``"sdxl 1024x1024, 30 steps, batch 1, float16, 6.5 GiB of weights"``."""
    w = plan.workload
    images = f", batch {w.batch}" if w.batch > 1 else ""
    frames = f", {w.frames} frames" if w.frames > 1 else ""
    options = "".join(f", {k}={v}" for k, v in w.options.items())
    return (
        f"{w.model} {w.width}x{w.height}{frames}, {w.steps} steps{images}{options}, {w.dtype}, "
        f"{format_bytes(w.weight_bytes)} of weights"
    )


def describe_machine(plan: Plan | PredictionReport) -> str:
    """``"rtx-3080-10gb (datasheet), 9.50 GiB free of 10.0 GiB"``."""
    m = plan.machine
    return (
        f"{m.name} ({m.source}), {format_bytes(m.free_bytes)} free of {format_bytes(m.total_bytes)}"
    )


def describe_prediction(prediction: Prediction, beside: Prediction | None = None) -> str:
    """``"30.9 s, needs 5.15 GiB (denoise)"``; with its share of compiling where there is any.

    Beside another, its time is in a unit that suits both.
    """
    binding = prediction.binding_phase
    needed = f"needs {format_bytes(binding.needed_bytes)} ({binding.name})"
    other = None if beside is None else beside.mean_seconds
    seconds = format_seconds(prediction.mean_seconds, other)
    once_s = prediction.mean_seconds - prediction.seconds
    if prediction.once_s:
        drawing = format_seconds(prediction.seconds, other)
        seconds += f" ({drawing} + {format_seconds(once_s)} of compiling)"
    return f"{seconds}, {needed}"


def describe_other_gpus(plan: Plan | PredictionReport) -> Iterator[str]:
    """``"9.80 GiB of 14.4 GiB on cuda:1 (encode)"`` for each of the others that is used."""
    prediction = plan.prediction
    for gpu, needed in prediction.elsewhere_bytes.items():
        free = format_bytes(plan.elsewhere_budget_bytes.get(gpu, 0))
        phase = prediction.binding_phase_of(gpu).name
        yield f"{format_bytes(needed)} of {free} on cuda:{gpu} ({phase})"


def describe_start(plan: Plan | PredictionReport) -> str:
    """``"loading 12.0 s; first image 3.00 s more; 7.10 GiB of host RAM"``, as far as is known."""
    prediction = plan.prediction
    what = "video" if plan.workload.frames > 1 else "image"
    facts = []
    if prediction.load.seconds is not None:
        facts.append(f"loading {format_seconds(prediction.load.seconds)}")
    if prediction.first_image_extra_s is not None:
        facts.append(f"first {what} {format_seconds(prediction.first_image_extra_s)} more")
    if prediction.once_s:
        over = f", spread over {prediction.images} {what}s" if prediction.images > 1 else ""
        facts.append(f"compiling {format_seconds(prediction.once_s)}{over}")
    if plan.host_budget_bytes is not None:  # else the device's memory is the host's
        facts.append(f"{format_bytes(prediction.host_bytes)} of host RAM")
    return "; ".join(facts)


def _lines(plan: Plan) -> Iterator[str]:
    yield f"machine     {describe_machine(plan)}"
    yield f"workload    {describe_workload(plan)}"
    yield f"bottleneck  {describe_bottleneck(plan.bottleneck.before)}"
    yield f"after       {describe_bottleneck(plan.bottleneck.after)}"
    yield f"plain       {describe_prediction(plan.baseline, plan.prediction)}"
    yield f"planned     {describe_prediction(plan.prediction, plan.baseline)}"
    yield from (f"elsewhere   {text}" for text in describe_other_gpus(plan))
    start = describe_start(plan)
    if start:
        yield f"start       {start}"
    if not plan.fits:
        yield f"{shortage(plan)}; try {ways_out(plan)}"
    chosen = (
        ", ".join(map(str, plan.optimizations)) or "nothing: no optimization is worth having here"
    )
    yield f"chosen      {chosen}"
    yield from (f"  + {r.optimization}: {r.text}" for r in plan.reasons)
    yield "left out"
    yield from (f"  - {', '.join(names)}: {text}" for text, names in left_out(plan).items())
    yield from (f"note        {n}" for n in plan.notes)


def _verified(verification: Verification | None) -> Iterator[str]:
    if verification is None:
        return
    how, *rest = verification.lines
    yield f"verified    {how}"
    yield from (f"  = {text}" for text in rest)


def left_out(plan: Plan) -> dict[str, list[str]]:
    """Reason → the optimizations that were left out for it."""
    names: dict[str, list[str]] = {}
    texts = said_once(r.text for r in plan.rejected)
    for rejection, text in zip(plan.rejected, texts, strict=True):
        names.setdefault(text, []).append(rejection.optimization)
    return names


def shortage(plan: Plan) -> str:
    """The numbers when nothing fits."""
    lacks = (m.text for m in lacking(plan.prediction, plan.budget))
    return f"does not fit: {' and '.join(lacks)}"


def ways_out(plan: Plan) -> str:
    """What would help, in one line."""
    return " or ".join(plan.ways_out) or "a much smaller request: nothing else would do"


def compare(
    prediction: Prediction, measured: tuple[PhaseMeasurement, ...]
) -> list[tuple[str, ...]]:
    """Rows of phase, predicted and measured seconds, predicted and measured peak."""
    found = {m.name: m for m in measured}
    rows: list[tuple[str, ...]] = []
    for phase in prediction.phases:
        real = found.get(phase.name)
        peak = real.peak_bytes if real else None
        rows.append(
            (
                phase.name,
                format_seconds(phase.seconds, real.seconds if real else None),
                format_seconds(real.seconds, phase.seconds) if real else "-",
                format_bytes(phase.peak_bytes),
                format_bytes(peak) if peak is not None else "-",
            )
        )
    return rows
