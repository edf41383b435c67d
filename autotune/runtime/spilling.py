"""Spilling: on Windows the driver lends host RAM to a full GPU instead of failing.

Nothing is raised; the image takes several times as long. That is seen from figures alone.
"""

from __future__ import annotations

import platform
import sys
from typing import NamedTuple

FULL = 0.05
"""Share of the device that is free, at most, when it spills: the driver keeps some for itself."""

SLOWER = 3.0
"""Times the predicted seconds. A generation whose operators were timed here takes between half and
twice that (``tuner.remember``); over the link, memory is ten times slower and more."""


class Load(NamedTuple):
    """A device's memory after a call, in bytes; ``reserved_bytes`` by this process's allocator."""

    total_bytes: int
    free_bytes: int
    reserved_bytes: int


def is_spilling(seconds: float, predicted_s: float, load: Load, system: str) -> bool:
    """Whether a call was so slow because device memory was in host RAM.

    Args:
        seconds: That it took.
        predicted_s: That it was predicted to take, what is done once included.
        load: The device's memory at its end, before caches are emptied.
        system: As ``spilling_system`` says.
    """
    if system != "wddm" or seconds <= SLOWER * predicted_s:
        return False
    is_over = load.reserved_bytes > load.total_bytes
    return is_over or load.free_bytes <= FULL * load.total_bytes


def spilling_system(name: str = sys.platform, release: str | None = None) -> str:
    """``"wddm"`` where the driver spills: on Windows, and on Linux inside it; else empty."""
    release = platform.release() if release is None else release
    inside = name == "linux" and "microsoft" in release.lower()
    return "wddm" if name == "win32" or inside else ""
