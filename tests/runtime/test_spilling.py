"""A slowdown that betrays spilling, from figures."""

from __future__ import annotations

import pytest

from autotune.runtime.spilling import Load, is_spilling, spilling_system
from autotune.units import GIB, MIB

FULL = Load(total_bytes=8 * GIB, free_bytes=100 * MIB, reserved_bytes=7 * GIB)
ROOMY = FULL._replace(free_bytes=2 * GIB)


@pytest.mark.parametrize(
    ("seconds", "load", "system", "spills"),
    [
        (31.0, FULL, "wddm", True),
        (29.0, FULL, "wddm", False),  # no more than three times as long: the prediction may be off
        (31.0, ROOMY, "wddm", False),  # slow for another reason
        (31.0, ROOMY._replace(reserved_bytes=9 * GIB), "wddm", True),  # more than there is
        (31.0, FULL, "", False),  # elsewhere a full device fails
    ],
)
def test_slow_and_full_on_windows(seconds: float, load: Load, system: str, spills: bool) -> None:
    assert is_spilling(seconds, 10.0, load, system) == spills


@pytest.mark.parametrize(
    ("name", "release", "system"),
    [
        ("win32", "10", "wddm"),
        ("linux", "5.15.167.4-microsoft-standard-WSL2", "wddm"),
        ("linux", "6.8.0-45-generic", ""),
        ("darwin", "24.1.0", ""),
    ],
)
def test_where_the_driver_spills(name: str, release: str, system: str) -> None:
    assert spilling_system(name, release) == system
