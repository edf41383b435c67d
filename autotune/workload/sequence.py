"""A sequence of calls in few words: what repeats itself is written once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

T = TypeVar("T", bound=Hashable)

LONGEST = 64
"""Calls of a step at most; a longer pattern is written out."""


def repeats_in(calls: Sequence[T]) -> list[tuple[int, tuple[T, ...]]]:
    """The calls as patterns and how often each is repeated, in order.

    At each place the pattern is taken whose repetitions reach farthest, of those the shortest.

    >>> repeats_in("xyabababc")
    [(1, ('x', 'y')), (3, ('a', 'b')), (1, ('c',))]
    """
    found: list[tuple[int, tuple[T, ...]]] = []
    start = 0
    while start < len(calls):
        times, length = max(
            ((_times(calls, start, n), n) for n in range(1, LONGEST + 1)),
            key=lambda r: (r[0] * r[1] if r[0] > 1 else 0, -r[1]),
        )
        pattern = tuple(calls[start : start + length])
        if found and times == found[-1][0] == 1:
            pattern = found.pop()[1] + pattern
        found.append((times, pattern))
        start += times * length
    return found


def _times(calls: Sequence[T], start: int, length: int) -> int:
    """How often the next ``length`` calls come in a row."""
    pattern, times = calls[start : start + length], 1
    while calls[start + times * length : start + (times + 1) * length] == pattern:
        times += 1
    return times
