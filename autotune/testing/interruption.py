"""A failure in the middle of things: the n-th call into the pipeline's libraries raises."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

LIBRARIES = ("diffusers.", "transformers.", "accelerate.", "tomesd.", "torch.nn.")
"""Modules whose functions change pipelines."""

_NEVER = ("__exit__", "__del__")
"""What cleans up has to be let finish: no program survives a failure there."""


class OnPurpose(RuntimeError):  # noqa: N818
    """The failure."""


class Interruption:
    """Counts calls into the libraries, and fails at one of them; a context manager.

    Every other place fails as Ctrl-C does.

    Args:
        at: The call that fails, from 1; 0 for none.
        modules: How the names of the modules begin whose functions are counted.
    """

    def __init__(self, at: int = 0, modules: tuple[str, ...] = LIBRARIES) -> None:
        self.calls = 0
        self._at = at
        self._modules = modules

    def __enter__(self) -> Interruption:
        self._before = sys.getprofile()
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)

    def _see(self, frame: FrameType, event: str, _: Any) -> None:
        is_step = event == "call" and frame.f_code.co_name not in _NEVER
        if is_step and str(frame.f_globals.get("__name__", "")).startswith(self._modules):
            self.calls += 1
            if self.calls == self._at:
                sys.setprofile(None)  # what puts things back is not to fail
                raise OnPurpose if self._at.bit_length() % 2 else KeyboardInterrupt


def places(calls: int) -> Iterator[int]:
    """The first calls and the last, and ever fewer in between."""
    place = 1
    while place < calls:
        yield place
        place *= 3
    if calls:
        yield calls
