"""What the pipelines configured in this process have been promised, and whose turn it is.

Each is promised the memory that its plan needs. What it does not hold at the moment, such as the
activations of an image that is not being drawn, looks free and is not: the next pipeline is planned
for what remains. Locks make calls of one pipeline queue, and configuring, which touches state of
the whole process, happen once at a time. Pipelines made of the same modules queue, too, and only
one of them is configured at a time.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from autotune.workload.live import modules_of, parts_of


class Claim:
    """What one configured pipeline has been promised.

    Attributes:
        owner: The ``Tuned`` pipeline, held weakly: with it goes the claim.
        pipe: The diffusers pipeline, likewise.
        device: Where it runs, ``"cuda:0"``.
        device_bytes: Of the device's memory, that it will need besides what it holds.
        host_bytes: Of host RAM, likewise; 0 where the device computes in it.
        reserve_bytes: To be left free for others on the device.
        most_bytes: That its tensors may take of the device; ``None``: no limit of its own.
    """

    def __init__(
        self,
        owner: Any,
        pipe: Any,
        device: str,
        *,
        device_bytes: int = 0,
        host_bytes: int = 0,
        reserve_bytes: int = 0,
        most_bytes: int | None = None,
    ) -> None:
        self.owner = weakref.ref(owner)
        self.pipe = weakref.ref(pipe)
        self.device = device
        self.device_bytes = max(0, device_bytes)
        self.host_bytes = max(0, host_bytes)
        self.reserve_bytes = reserve_bytes
        self.most_bytes = most_bytes


_claims: list[Claim] = []
_drawing: dict[int, int] = {}
"""Pipelines that draw, by their identity, those that began first first → bytes in use then."""

_overlapped: set[int] = set()
"""Of those that draw, the ones beside which another has drawn."""

_register = threading.RLock()
"""Reentrant: what collects garbage or handles a signal meanwhile may undo a pipeline."""

_configuring = threading.RLock()
_turns: dict[int, threading.RLock] = {}


def stake(claim: Claim) -> None:
    """Enter a claim, in the place of its pipeline's last one."""
    pipe = claim.pipe()
    with _register:
        _claims[:] = [c for c in _living() if c.pipe() is not pipe]
        _claims.append(claim)


def release(pipe: Any) -> None:
    """The pipeline needs nothing any more."""
    with _register:
        _claims[:] = [c for c in _living() if c.pipe() is not pipe]


def claims_on(device: str) -> tuple[Claim, ...]:
    """The claims on a device."""
    with _register:
        return tuple(c for c in _living() if c.device == device)


@contextmanager
def drawing(pipe: Any, used_bytes: int) -> Iterator[None]:
    """While a pipeline draws: what was promised to it, it is taking.

    Args:
        pipe: Whose turn it is.
        used_bytes: That this process uses of the device before.
    """
    with _register:
        _drawing[id(pipe)] = used_bytes
        if len(_drawing) > 1:
            _overlapped.update(_drawing)
    try:
        yield
    finally:
        with _register:
            _drawing.pop(id(pipe), None)
            _overlapped.discard(id(pipe))


def draws_alone(pipe: Any) -> bool:
    """Whether no other pipeline has drawn since this one began: what it took is its own."""
    with _register:
        return id(pipe) not in _overlapped


def promised_beside(pipe: Any, device: str, used_bytes: int = 0) -> tuple[int, int]:
    """Memory that looks free, but is promised to other pipelines.

    Of those that draw at the moment, that which they have not taken yet.

    Args:
        pipe: Whose budget is asked for; ``None``: of one that is not loaded yet.
        device: Where it will run.
        used_bytes: That this process uses of the device now.

    Returns:
        Bytes of the device's memory, and of host RAM.
    """
    with _register:
        others = _standing_beside(pipe)
        begun = {id(c.pipe()): c for c in others if c.device == device}
        at_start = [used for key, used in _drawing.items() if key in begun]
        at_work = [claim for key, claim in begun.items() if key in _drawing]
    taken = max(0, used_bytes - at_start[0]) if at_start else 0
    busy = sum(c.device_bytes for c in at_work)
    idle = sum(c.device_bytes for c in begun.values()) - busy
    return idle + max(0, busy - taken), sum(c.host_bytes for c in others)


def _standing_beside(pipe: Any) -> list[Claim]:
    """The claims of other pipelines: of those made of the same modules, which take turns, one."""
    found: list[Claim] = []
    seen = _shareable(pipe)
    for claim in sorted(_living(), key=lambda c: c.device_bytes, reverse=True):
        modules = _shareable(claim.pipe())
        if claim.pipe() is not pipe and seen.isdisjoint(modules):
            found.append(claim)
            seen |= modules
    return found


def _living() -> Iterator[Claim]:
    return (c for c in _claims if c.owner() is not None and c.pipe() is not None)


# ---- whose pipeline it is ------------------------------------------------------------------------

_OWNER = "_autotune"


class _Owner:
    """Keeps a ``Tuned`` with its pipeline while anything is on, whoever drops it.

    Else nobody could undo that, and it would look as if the user had set it. A copy of the pipeline
    has no owner. The modules are those of the pipeline before anything was put on.
    """

    def __init__(self, pipe: Any, tuned: Any, modules: tuple[Any, ...]) -> None:
        self.pipe = weakref.ref(pipe)
        self.tuned = tuned
        self.modules = modules

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def own(pipe: Any, tuned: Any, modules: Iterable[Any]) -> None:
    """Note whose optimizations are on a pipeline.

    Args:
        pipe: The pipeline.
        tuned: The ``Tuned``.
        modules: What the pipeline was made of before: optimizations may replace some.
    """
    vars(pipe)[_OWNER] = _Owner(pipe, tuned, tuple(modules))


def disown(pipe: Any) -> None:
    """None are any more."""
    vars(pipe).pop(_OWNER, None)


def owner_of(pipe: Any) -> Any:
    """The ``Tuned`` that has configured a pipeline; ``None`` where there is none."""
    owner = _owner(pipe)
    if owner is not None:
        return owner.tuned
    with _register:  # where nothing is on at the moment
        return next((c.owner() for c in _living() if c.pipe() is pipe), None)


def _owner(pipe: Any) -> _Owner | None:
    owner = getattr(pipe, "__dict__", {}).get(_OWNER)
    return owner if owner is not None and owner.pipe() is pipe else None


def owners_beside(pipe: Any) -> list[Any]:
    """The ``Tuned`` of other pipelines that are made of some of the same modules."""
    mine = _shareable(pipe)
    with _register:
        others = [(c.owner(), c.pipe()) for c in _living() if c.pipe() is not pipe]
    return [o for o, p in others if o is not None and not mine.isdisjoint(_shareable(p))]


def _shareable(pipe: Any) -> set[int]:
    """The identities of all that ``_modules`` finds."""
    return set(map(id, _modules(pipe)))


def _modules(pipe: Any) -> tuple[Any, ...]:
    """The modules that a pipeline is made of, and those that optimizations have replaced."""
    owner = _owner(pipe)
    return (*modules_of(pipe).values(), *(owner.modules if owner else ()))


def are_configured() -> bool:
    """Whether this process holds a pipeline that it has configured."""
    with _register:
        return next(_living(), None) is not None


# ---- turns ---------------------------------------------------------------------------------------


@contextmanager
def turn_of(pipe: Any) -> Iterator[None]:
    """One at a time with this pipeline, and with others made of some of the same parts.

    Drawing, configuring and undoing queue: pipelines keep the state of a call on themselves and on
    their scheduler, and what is on is on the modules.
    """
    held = {id(part): part for part in (pipe, *parts_of(pipe).values(), *_modules(pipe))}
    with ExitStack() as turns:
        for key in sorted(held):  # always in the same order, or two would wait for each other
            turns.enter_context(_turn(held[key]))
        yield


@contextmanager
def configuring() -> Iterator[None]:
    """One at a time in this process: tracing replaces functions, and the random state meanwhile.

    Who needs a pipeline's turn too takes it before.
    """
    with _configuring:
        yield


def _turn(part: Any) -> threading.RLock:
    with _register:
        lock = _turns.get(id(part))
        if lock is None:
            lock = threading.RLock()
            with suppress(TypeError):  # nothing like a pipeline: that is said elsewhere
                weakref.finalize(part, _turns.pop, id(part), None).atexit = False
                _turns[id(part)] = lock
        return lock


def _start_anew() -> None:
    """In a forked child: other threads, who may hold locks, are not there to give them back."""
    global _register, _configuring
    _register, _configuring = threading.RLock(), threading.RLock()
    _turns.clear()
    _drawing.clear()
    _overlapped.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
