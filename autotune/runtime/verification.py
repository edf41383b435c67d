"""What two short passes showed against the prediction, and what explains the difference."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from autotune.decide.prediction import PhasePrediction
from autotune.probe.machine import Value
from autotune.profile.profile import PhaseMeasurement
from autotune.units import MIB, format_bytes, format_seconds


class PhaseCheck(Value, frozen=True):
    """One phase: predicted, measured, and the difference in parts.

    What the device held at most is the predicted tensors, the workspace, the fragmentation and the
    rest of the process together. What is not measured on a device is ``None``.

    Attributes:
        name: ``"encode"``, ``"denoise"``, ``"decode"``.
        predicted: Seconds, and the allocator's peak.
        measured: The second pass, scaled to the whole generation; the first one apart.
        tensors_bytes: Weights and activations, as predicted.
        workspace_bytes: Allocated beyond these tensors; negative where not even they were.
        workspace_predicted_bytes: The same as predicted.
        fragmentation_bytes: Reserved by the allocator and not given out.
        other_bytes: Held by the process beside that: context and libraries. On a CPU the
            interpreter too, less the weights that are still pages of their files.
        first_run_s: What the first pass took more than the second: kernels are loaded, algorithms
            chosen, graphs compiled.
        rest_s: What the second pass took more than predicted.
        rest_bytes: What was allocated more than predicted.
        text: The same in words.
    """

    name: str
    predicted: PhaseMeasurement
    measured: PhaseMeasurement
    tensors_bytes: int
    workspace_bytes: int | None
    workspace_predicted_bytes: int
    fragmentation_bytes: int | None
    other_bytes: int | None
    first_run_s: float
    rest_s: float
    rest_bytes: int | None
    text: str


class Verification(Value, frozen=True):
    """Two short passes with a plan applied.

    Attributes:
        phases: In order.
        steps: Denoise steps of each pass.
        planned_steps: Of a generation.
        passes: How many: one more where memory is measured apart, since that slows a call down.
        seconds: All passes together.
        notes: What is scaled, or not measured.
        disturbed: Another pipeline of this process drew meanwhile: seconds, and what a GPU's
            allocator counts, are of both. Nothing is learnt from it.
    """

    phases: tuple[PhaseCheck, ...]
    steps: int
    planned_steps: int
    passes: int
    seconds: float
    notes: tuple[str, ...] = ()
    disturbed: bool = False

    @property
    def measured(self) -> tuple[PhaseMeasurement, ...]:
        """What the profile remembers."""
        return tuple(phase.measured for phase in self.phases)

    @property
    def lines(self) -> tuple[str, ...]:
        """How it was verified, then each phase, then the notes."""
        steps = "step" if self.steps == 1 else "steps"
        how = f"{self.passes} passes of {self.steps} {steps} in {format_seconds(self.seconds)}"
        return (how, *(f"{p.name}: {p.text}" for p in self.phases), *self.notes)


def passes_on(device: str) -> int:
    """How many passes are made: on a CPU memory takes one of its own."""
    return 3 if device == "cpu" else 2


def check_phase(prediction: PhasePrediction, measured: PhaseMeasurement) -> PhaseCheck:
    """Take the difference between a phase's prediction and its measurement apart."""
    tensors = prediction.resident_bytes + prediction.activation_bytes
    allocated, first = measured.peak_bytes, measured.first_seconds
    given_out = measured.reserved_bytes if measured.reserved_bytes is not None else allocated
    check = PhaseCheck(
        name=measured.name,
        predicted=PhaseMeasurement(prediction.name, prediction.seconds, prediction.peak_bytes),
        measured=measured,
        tensors_bytes=tensors,
        workspace_bytes=_less(allocated, tensors),
        workspace_predicted_bytes=prediction.peak_bytes - tensors,
        fragmentation_bytes=_less(measured.reserved_bytes, allocated),
        other_bytes=_less(measured.device_bytes, given_out),
        first_run_s=0.0 if first is None else first - measured.seconds,
        rest_s=measured.seconds - prediction.seconds,
        rest_bytes=_less(allocated, prediction.peak_bytes),
        text="",
    )
    return _with_text(check)


def joined(
    image: tuple[PhaseMeasurement, ...], verification: Verification
) -> tuple[PhaseMeasurement, ...]:
    """A generation that came after the passes: its own seconds, and the most memory of all."""
    checks = {check.name: check for check in verification.phases}
    return tuple(_joined(m, checks[m.name]) if m.name in checks else m for m in image)


def _joined(image: PhaseMeasurement, check: PhaseCheck) -> PhaseMeasurement:
    def most(field: str) -> int | None:
        found = (getattr(m, field) for m in (image, check.measured))
        return max((b for b in found if b is not None), default=None)

    return PhaseMeasurement(
        name=image.name,
        seconds=image.seconds,
        peak_bytes=most("peak_bytes"),
        reserved_bytes=most("reserved_bytes"),
        device_bytes=most("device_bytes"),
        first_seconds=max(0.0, image.seconds + check.first_run_s),
    )


def _less(whole: int | None, part: int | None) -> int | None:
    return None if whole is None or part is None else whole - part


def _with_text(check: PhaseCheck) -> PhaseCheck:
    text = "; ".join((_time(check), *_memory(check)))
    return msgspec.structs.replace(check, text=text)


def _time(check: PhaseCheck) -> str:
    seconds, predicted = check.measured.seconds, check.predicted.seconds
    written = format_seconds(predicted, seconds)
    text = f"{format_seconds(seconds, predicted)} {_against(seconds, predicted, written)}"
    if check.first_run_s < 0.01 * seconds:
        return f"{text}, no more the first time"
    return f"{text}, {format_seconds(check.first_run_s)} more the first time"


def _against(measured: float, predicted: float, written: str) -> str:
    """``"for 1.20 s predicted (4% less)"``."""
    if predicted <= 0:
        return f"for {written} predicted"
    share = measured / predicted - 1
    if abs(share) < 0.005:
        return "as predicted"
    if share > 1:
        return f"for {written} predicted ({measured / predicted:.1f} times)"
    return f"for {written} predicted ({abs(share):.0%} {'more' if share > 0 else 'less'})"


def _memory(check: PhaseCheck) -> Iterator[str]:
    allocated, predicted = check.measured.peak_bytes, check.predicted.peak_bytes or 0
    if allocated is not None:
        against = _against(allocated, predicted, format_bytes(predicted))
        yield f"{format_bytes(allocated)} allocated {against}{_parts(check)}"
    if check.fragmentation_bytes is not None:
        yield f"{format_bytes(check.fragmentation_bytes)} lost to fragmentation"
    if check.other_bytes is not None and check.other_bytes >= 0:
        yield f"{format_bytes(check.other_bytes)} held by the process besides"
    elif check.other_bytes is not None:
        yield f"{format_bytes(-check.other_bytes)} of it are still pages of the weights' files"


def _parts(check: PhaseCheck) -> str:
    workspace = check.workspace_bytes or 0
    if workspace < 0:
        return f": {format_bytes(-workspace)} less than the weights and activations predicted"
    predicted = check.workspace_predicted_bytes
    if max(workspace, predicted) < MIB:
        return ""
    tensors = f": {format_bytes(check.tensors_bytes)} weights and activations"
    return f"{tensors}, {format_bytes(workspace)} beyond ({format_bytes(predicted)} predicted)"
