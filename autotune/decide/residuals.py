"""What verified runs say about later predictions of the same phase on the same machine.

Each run is compared with what is predicted of its set *without* any correction, so that no
correction feeds on itself: the next prediction is the raw one times what the runs have shown, and
repeating a run changes nothing but the noise of its mean.

A set that looks the same from a phase as one that was run is corrected by what that one showed.
Every other set gets what all of them showed together, so that alternatives are compared by the same
yardstick: a factor on its seconds, and one on those of compiling; of memory only what was needed on
top, never what was saved.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from autotune.decide.history import History, Observation, Observed
from autotune.decide.prediction import PhasePrediction
from autotune.errors import OptimizationError
from autotune.optimizations import execution_of
from autotune.optimizations.execution import Execution
from autotune.units import GIB, MIB, format_bytes

LATEST = 5
"""Runs of a look that count: as many as make a median that two disturbed ones cannot move."""

OBSERVATIONS = 40
"""Runs that are looked at: each costs a prediction."""

FACTORS = (0.25, 4.0)
"""What a factor on seconds is kept within. A phase of a few milliseconds can be further off, and
then decides nothing."""

ONCE_FACTORS = (0.02, 20.0)
"""The same of what is done once: compilers keep what they have made, and take long on few cores."""

BELIEVED = (0.5, 2.0)
"""A generation that took less or more than this times what was predicted of it, then and now, ran
on a machine that was busy, then or when its operators were timed."""

BELIEVED_PEAK = (4.0, GIB)
"""Of a phase that held more than this times the peak predicted of it and so many bytes on top,
nothing was measured that is its own. Believed, it might never run again to show otherwise."""


class Look(NamedTuple):
    """What of an execution can be seen from a phase: what it computes, and where weights are."""

    work: object
    where: object


class Correction(NamedTuple):
    """What is made of a raw prediction of a phase.

    Attributes:
        factor: On seconds, each share of them.
        active_bytes: More (or fewer) activations than traced: part of what must be free.
        workspace_bytes: More (or less) workspace: only part of the peak.
        once_factor: On what is done once.
    """

    factor: float = 1.0
    active_bytes: int = 0
    workspace_bytes: int = 0
    once_factor: float = 1.0

    def of(self, raw: PhasePrediction) -> PhasePrediction:
        """The corrected prediction; margins and other GPUs stay."""
        shares = {name: getattr(raw, name) * self.factor for name in _SHARES}
        return msgspec.structs.replace(
            raw,
            seconds=sum(shares.values()),
            activation_bytes=raw.activation_bytes + self.active_bytes,
            workspace_bytes=raw.workspace_bytes + self.workspace_bytes,
            peak_bytes=raw.peak_bytes + self.active_bytes + self.workspace_bytes,
            needed_bytes=raw.needed_bytes + self.active_bytes,
            once_s=raw.once_s * self.once_factor,
            **shares,
        )


_SHARES = ("compute_s", "memory_s", "transfer_s", "launch_s")


class Seen(NamedTuple):
    """A phase of a verified run, and what is predicted of it without correction."""

    look: Look
    raw: PhasePrediction
    observed: Observed

    @property
    def factor(self) -> float:
        """Seconds measured over seconds predicted."""
        low, high = FACTORS
        return min(max(self.observed.seconds / self.raw.seconds, low), high)

    @property
    def once_factor(self) -> float | None:
        """The same of what is done once, where anything is."""
        first_s, low, high = self.observed.first_s, *ONCE_FACTORS
        if first_s is None or self.raw.once_s <= 0:
            return None
        return min(max((first_s - self.observed.seconds) / self.raw.once_s, low), high)

    @property
    def more_bytes(self) -> int | None:
        """Of the allocator's peak than predicted; negative: less."""
        peak = self.observed.peak_bytes
        return None if peak is None else peak - self.raw.peak_bytes


class _OfALook(NamedTuple):
    """What the latest runs of one look have shown; ``None`` where none tells."""

    factor: float
    once_factor: float | None
    more_bytes: int | None
    raw: PhasePrediction

    def more_of(self, raw: PhasePrediction) -> int:
        """Bytes that another set may need on top: as many, but no larger a share of its need."""
        more = max(0, self.more_bytes or 0)
        # In integers: what is predicted to need as much must not lose the tie to a rounded byte.
        return min(more, more * raw.needed_bytes // max(self.raw.needed_bytes, 1))


class OfAPhase:
    """What was seen of one phase.

    Args:
        seen: Oldest first.
    """

    def __init__(self, seen: Sequence[Seen]) -> None:
        self.runs = len(seen)
        by_look: dict[Look, list[Seen]] = defaultdict(list)
        for one in seen:
            by_look[one.look].append(one)
        self._looks = {look: _summed_up(runs[-LATEST:]) for look, runs in by_look.items()}
        # Each set counts once, however often it was run.
        self._factor = statistics.median(found.factor for found in self._looks.values())
        self._once_factor = _median(found.once_factor for found in self._looks.values())
        self._ranks = {work: i for i, work in enumerate(dict.fromkeys(k.work for k in by_look), 1)}

    def correction(self, look: Look, raw: PhasePrediction) -> Correction:
        """For an execution that looks so from here, and is predicted so without correction."""
        own = self._looks.get(look)
        factor = self._factor if own is None else own.factor
        once = self._once_factor if own is None else own.once_factor
        if own is None or own.more_bytes is None:
            active, workspace = max(found.more_of(raw) for found in self._looks.values()), 0
        else:
            active, workspace = _memory(own.more_bytes, raw)
        return Correction(factor, active, workspace, 1.0 if once is None else once)

    def rank(self, work: object) -> int:
        """Not 0 where this work was run, in any place: then it has a correction of its own."""
        return self._ranks.get(work, 0)


def _memory(more: int, raw: PhasePrediction) -> tuple[int, int]:
    """More activations, and more workspace, than predicted.

    What was needed on top must be free, whatever it was. What was not needed is first taken off the
    workspace that libraries do without anyway; the rest was no activation either.
    """
    if more >= 0:
        return more, 0
    fixed = raw.needed_bytes - raw.resident_bytes - raw.activation_bytes - raw.margin_bytes
    spared = min(-more, max(0, raw.workspace_bytes - max(0, fixed)))
    return max(more + spared, -raw.activation_bytes), -spared


def _summed_up(runs: Sequence[Seen]) -> _OfALook:
    """Seconds scatter around their median; of memory the most is what must be had."""
    more = [run.more_bytes for run in runs if run.more_bytes is not None]
    factor = statistics.median(run.factor for run in runs)
    once = _median(run.once_factor for run in runs)
    return _OfALook(factor, once, max(more, default=None), runs[-1].raw)


def _median(values: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


RawPhases = Callable[[Execution], Iterable[tuple[Look, PhasePrediction]]]
"""The phases of an execution, each with its look, predicted without correction."""


def residuals_of(history: History, predict: RawPhases) -> dict[str, OfAPhase]:
    """What the runs of a history have shown, by phase.

    Runs of optimizations that are no longer there, or of code paths that are not traced, are left
    out, and so are those of a busy machine, or with a peak that cannot be.
    """
    by_phase: dict[str, list[Seen]] = defaultdict(list)
    for observation in history.observations[-OBSERVATIONS:]:
        for seen in _compared(observation, predict):
            by_phase[seen.raw.name].append(seen)
    return {name: OfAPhase(seen) for name, seen in by_phase.items()}


def _compared(observation: Observation, predict: RawPhases) -> list[Seen]:
    try:
        phases = list(predict(execution_of(observation.settings)))
    except OptimizationError:
        return []
    observed = {phase.name: phase for phase in observation.phases}
    seen = [
        Seen(look, raw, observed[raw.name])
        for look, raw in phases
        if raw.name in observed and raw.seconds > 0
    ]
    if not all(can_be_peak(s.observed.peak_bytes or 0, s.raw.peak_bytes) for s in seen):
        return []
    raw_s = sum(s.raw.seconds for s in seen)
    measured = sum(s.observed.seconds for s in seen)
    if _is_within(BELIEVED, measured, raw_s):
        return seen
    was_expected = _is_within(BELIEVED, measured, observation.expected_s or 0.0)
    return seen if was_expected and _is_within(FACTORS, measured, raw_s) else []


def can_be_peak(measured: int, predicted: int) -> bool:
    """Whether a phase can have held so many bytes: see ``BELIEVED_PEAK``."""
    times, more = BELIEVED_PEAK
    return 0 <= measured <= times * predicted + more


def _is_within(factors: tuple[float, float], measured: float, predicted: float) -> bool:
    low, high = factors
    return low * predicted <= measured <= high * predicted


def explain(found: Mapping[str, OfAPhase], corrections: Mapping[str, Correction]) -> Iterator[str]:
    """One line on what runs have changed in the prediction of a set.

    Args:
        found: By phase.
        corrections: Of the set, by phase.
    """
    if not found:
        return
    runs = max(phase.runs for phase in found.values())
    changes = ", ".join(f"{name} {_words(corrections[name])}" for name in found)
    yield f"predictions are corrected by {runs} verified run{'s' if runs > 1 else ''}: {changes}"


def _words(correction: Correction) -> str:
    more = correction.active_bytes + correction.workspace_bytes
    memory = f" {'+' if more > 0 else '-'}{format_bytes(abs(more))}" if abs(more) >= MIB else ""
    once = correction.once_factor
    compiling = f" (compiling ×{once:.2f})" if once != 1 else ""
    return f"×{correction.factor:.2f}{compiling}{memory}"
