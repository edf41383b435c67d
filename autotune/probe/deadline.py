"""When measuring must end: whatever is measured asks before it goes on. No torch."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import sys
import threading
import time
import warnings
from collections.abc import Iterator


class Deadline:
    """A moment on the clock.

    Args:
        seconds: From now.
        skipped: Where to note what was left out; deadlines of parts share their whole's.
    """

    def __init__(self, seconds: float, skipped: list[str] | None = None) -> None:
        self._end = time.perf_counter() + seconds
        self._skipped = [] if skipped is None else skipped

    @property
    def left_s(self) -> float:
        """Seconds until then; 0 once it has passed."""
        return max(0.0, self._end - time.perf_counter())

    @property
    def has_passed(self) -> bool:
        """Whether nothing more may be begun that can be done without."""
        return self.left_s == 0.0

    def part(self, seconds: float) -> Deadline:
        """A deadline for a part: so many seconds from now, and never after this one."""
        return Deadline(min(seconds, self.left_s), self._skipped)

    def leaves(self, what: str, seconds: float = 0.0) -> bool:
        """Whether there is time for something; where there is not, it counts as left out.

        Args:
            what: In words, for people.
            seconds: What it is known to take at least.
        """
        if self.left_s > seconds:
            return True
        self.leave_out(what)
        return False

    def leave_out(self, what: str) -> None:
        """Notes that something was not measured, or only once and small, for want of time."""
        if what not in self._skipped:
            self._skipped.append(what)

    @property
    def left_out(self) -> tuple[str, ...]:
        """What was left out so far, in words."""
        return tuple(self._skipped)


def left_out_finding(names: tuple[str, ...]) -> str:
    """What a person should know about it."""
    return (
        f"Left out for want of time: {'; '.join(names)}. Estimates stand in; "
        "`autotune probe` on a quiet machine may reach them."
    )


def never() -> Deadline:
    """For measuring with all the time in the world."""
    return Deadline(math.inf)


def import_by(deadline: Deadline, name: str) -> bool:
    """Imports a module, and waits for it until the deadline; the import goes on behind that.

    Read for the first time from a slow disk, a library may take longer than all measurements.

    Returns:
        Whether the import is over. Where it failed, importing it again says why.
    """
    if name in sys.modules:
        return True

    def load() -> None:
        with contextlib.suppress(Exception):
            importlib.import_module(name)

    thread = threading.Thread(target=load, daemon=True)
    with quiet():
        thread.start()
        thread.join(None if deadline.left_s == math.inf else deadline.left_s)
    return not thread.is_alive()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No notes of libraries that something is missing or old: what calling them says is enough."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
