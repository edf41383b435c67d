"""How much is tried: a part at every change, all of it where ``AUTOTUNE_THOROUGH`` is set.

``scripts/test_thoroughly`` sets it. The part is always the same one, so that failures repeat.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import pytest
from hypothesis import settings

THOROUGH = bool(os.environ.get("AUTOTUNE_THOROUGH"))

T = TypeVar("T")


def examples(usually: int, thoroughly: int) -> settings:
    """So many invented cases."""
    return settings(max_examples=thoroughly if THOROUGH else usually, deadline=None)


def part(cases: Sequence[T], every: int, start: int = 0) -> list[T]:
    """One of so many cases, from ``start`` on; or all."""
    return list(cases) if THOROUGH else list(cases)[start % every :: every]


thoroughly = pytest.mark.skipif(not THOROUGH, reason="left to scripts/test_thoroughly")
"""Marks a test whose like is tried at every change, only in a shorter form."""
