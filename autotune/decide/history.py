"""What was learnt before deciding: what a workload took, what did not fit, what is on."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from autotune.optimizations.base import Setting
from autotune.workload.workload import Operator


class Observed(msgspec.Struct, frozen=True):
    """One phase as it was measured; the peak is the allocator's, weights included.

    ``first_s`` is the first time, with what is done once.
    """

    name: str
    seconds: float
    peak_bytes: int | None = None
    first_s: float | None = None


class Observation(msgspec.Struct, frozen=True):
    """A measured generation, or two short passes of one.

    Attributes:
        settings: The optimizations that were on, those set by hand included.
        phases: In the order in which they ran.
        expected_s: What had been predicted of all phases together, corrections included.
    """

    settings: tuple[Setting, ...]
    phases: tuple[Observed, ...]
    expected_s: float | None = None


class Misfit(msgspec.Struct, frozen=True):
    """A set that ran out of memory.

    Attributes:
        settings: The optimizations that were on, those set by hand included.
        available_bytes: Of the device, for the pipeline, when it ran out: the budget then.
        of_host: It was host RAM that ran out, beside a device with memory of its own, and is meant.
        phase: In which phase it ran out; ``None``: nobody knows, or while loading.
    """

    settings: tuple[Setting, ...]
    available_bytes: int
    of_host: bool = False
    phase: str | None = None


class History(msgspec.Struct, frozen=True):
    """Of one workload on one machine, oldest first.

    ``alike`` are operators of another request of the same model: where they were timed and those of
    the workload were not, they tell how far rates are off.
    """

    observations: tuple[Observation, ...] = ()
    misfits: tuple[Misfit, ...] = ()
    alike: tuple[Operator, ...] = ()


class Applied(NamedTuple):
    """What is on already.

    Attributes:
        settings: The set.
        cost_s: Seconds that keeping it has cost until now, beside the best set for each request.
    """

    settings: tuple[Setting, ...]
    cost_s: float = 0.0
