"""From raw samples to a figure: the median, the spread, and what got in the way. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from autotune.probe.machine import Figure

DISTURBED_SPREAD = 0.15
"""Middle half of the samples wider than this fraction of the median: something got in the way."""

UNSTEADY = "unsteady"

_SPREAD_NEEDS = 3


def figure_of(
    samples: Sequence[float], source: str = "measured", disturbances: tuple[str, ...] = ()
) -> Figure:
    """The figure that raw samples (at least one, in the unit of the figure) come to."""
    return Figure(
        value=statistics.median(samples),
        samples=tuple(samples),
        source=source,
        spread=round(spread(samples), 4) if len(samples) >= _SPREAD_NEEDS else None,
        disturbances=disturbances,
    )


def spread(samples: Figure | Sequence[float]) -> float:
    """Width of the samples' middle half over their median; 0 for fewer than three samples."""
    values = samples.samples if isinstance(samples, Figure) else samples
    if len(values) < _SPREAD_NEEDS:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle if middle else 0.0


def flagged(samples: Sequence[float], disturbances: tuple[str, ...] = ()) -> Figure:
    """The same, called unsteady where the samples' spread says that something got in the way."""
    unsteady = (UNSTEADY,) if spread(samples) > DISTURBED_SPREAD else ()
    return figure_of(samples, disturbances=(*disturbances, *unsteady))


def rate(seconds: Figure, amount: float) -> Figure:
    """``amount`` (FLOPs, bytes) per call, from the seconds of a call: amount per second."""
    samples = [amount / sample for sample in seconds.samples]
    return figure_of(samples, seconds.source, seconds.disturbances)
