"""Optimizations that other packages bring, and the catalogue that has them all.

A package registers one by an entry point of the group ``autotune.optimizations``: a subclass of
``Optimization``, or an instance.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from autotune.errors import AutotuneError, OptimizationError, first_line
from autotune.optimizations.base import EXACTNESS, QUALITIES, Optimization, quality_of

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "autotune.optimizations"
BUILT_IN = "built in"

log = logging.getLogger("autotune")


class _Member(NamedTuple):
    optimization: Optimization
    source: str


class Catalogue(Mapping[str, Optimization]):
    """Name → handler: the built-in ones in the order given, then those of other packages.

    The others are looked for once, when the catalogue is first read.
    """

    def __init__(self, built_in: Iterable[Optimization]) -> None:
        self._built_in = {o.name: _Member(o, BUILT_IN) for o in built_in}

    @functools.cached_property
    def _members(self) -> dict[str, _Member]:
        # What another package finds here while it is imported.
        members = vars(self)["_members"] = dict(self._built_in)
        for member in _installed(members):
            members[member.optimization.name] = member
        return members

    def __getitem__(self, name: str) -> Optimization:
        return self._members[name].optimization

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def source(self, name: str) -> str:
        """``"built in"``, or the package and version that it comes from."""
        return self._members[name].source


def flaw_of(optimization: Any) -> str | None:
    """What is wrong with the declaration of an optimization, ``None`` where nothing is."""
    if not isinstance(optimization, Optimization):
        return "it is no autotune.optimizations.base.Optimization"
    o = optimization
    for attribute in ("name", "summary", "relieves"):
        text = getattr(o, attribute, None)
        if not isinstance(text, str) or not text.strip():
            return f"it has no {attribute}"
    if not re.fullmatch(r"[a-z][a-z0-9_]*", o.name):
        return f"its name {o.name!r} is not of lower-case letters, digits and underscores"
    if o.name in QUALITIES:
        return f"its name {o.name!r} is that of a quality level"
    if o.exactness not in EXACTNESS:
        return f"its exactness {o.exactness!r} is none of {', '.join(EXACTNESS)}"
    if not all(isinstance(v, (bool, int, float, str)) for v in o.defaults.values()):
        return "its defaults are not numbers, texts and switches"
    stray = next((r.id for r in o.rules if o.name not in r.first | r.second), None)
    if stray is not None:
        return f"its rule {stray} is not about it"
    quality = o.quality(o.setting().parameters)
    strictest = quality_of(o.exactness)
    if quality not in QUALITIES[QUALITIES.index(strictest) :]:
        return f"its quality {quality!r} is not {strictest!r} or looser, though it is {o.exactness}"
    return None


def failure_of(optimization: Optimization, error: Exception) -> str:
    """What is said of another package's optimization that raises while it is asked for advice.

    Raises:
        Exception: the error itself, where the optimization is one of ours: that is a defect here.
    """
    package = type(optimization).__module__.partition(".")[0]
    if package == __name__.partition(".")[0]:
        raise error
    return f"its package {package} fails: {type(error).__name__}: {first_line(error)}"


def _installed(taken: Collection[str]) -> Iterator[_Member]:
    """What other packages register under names that are still free; the rest is said, and left."""
    from importlib.metadata import entry_points  # slow to import

    names = set(taken)
    for entry in sorted(entry_points(group=GROUP), key=lambda e: (_source(e), e.name)):
        try:
            optimization = _load(entry, names)
        except (Exception, SystemExit) as error:  # another's module may raise anything
            ours = isinstance(error, AutotuneError)
            reason = str(error) if ours else f"{type(error).__name__}: {first_line(error)}"
            log.warning("optimization %s of %s is left out: %s", entry.name, _source(entry), reason)
            continue
        names.add(optimization.name)
        yield _Member(optimization, _source(entry))


def _load(entry: EntryPoint, taken: Collection[str]) -> Optimization:
    """The optimization of an entry point.

    Raises:
        OptimizationError: it is declared wrongly, or its name is taken.
    """
    loaded = entry.load()
    optimization = loaded() if isinstance(loaded, type) else loaded
    flaw = flaw_of(optimization)
    if flaw is not None:
        raise OptimizationError(flaw)
    assert isinstance(optimization, Optimization)
    if optimization.name in taken:
        raise OptimizationError(f"there is an optimization {optimization.name!r} already")
    return optimization


def _source(entry: EntryPoint) -> str:
    return "an unnamed package" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
