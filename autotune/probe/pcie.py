"""What a PCI Express link carries: published line rates, to hold measured ones against."""

from __future__ import annotations

# Bytes per second and lane after line coding (8b/10b up to generation 2, 128b/130b up to 5, FLITs
# in 6), from the PCI-SIG specifications' transfer rates of 2.5, 5, 8, 16, 32 and 64 GT/s.
_LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}


def line_rate(generation: int | None, width: int | None) -> float | None:
    """Bytes per second in one direction; ``None`` when the link is not known.

    >>> line_rate(4, 16)
    31504000000.0
    """
    lane = _LANE_BYTES_PER_S.get(generation or 0)
    return None if lane is None or not width else lane * width
