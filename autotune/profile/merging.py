"""How what several processes find out about one machine becomes one profile.

Every function is a change for ``store.update_profile``: from the profile as it is stored at that
moment to the one with something added. So nothing that another process has stored is lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Final, Protocol, TypeVar

from msgspec.structs import asdict, replace

from autotune.probe.machine import AttentionRate, Figure, Machine, OperatorTime, Value
from autotune.probe.parts import EVERYTHING, Part, composed, leaving_out, part_of
from autotune.profile.profile import MisfitRecord, PlanRecord, Profile, RunRecord, moment
from autotune.profile.staleness import changes, facts_of, stale_parts

MAX_RUNS: Final = 50
MAX_PLANS: Final = 50
MAX_MISFITS: Final = 50
MAX_OPERATORS: Final = 10_000
"""A model has some hundreds; so many take a few hundredths of a second to read."""


class _Record(Protocol):
    @property
    def workload(self) -> str: ...


Record = TypeVar("Record", bound=_Record)
_Dated = TypeVar("_Dated", RunRecord, PlanRecord, MisfitRecord)


def new_profile(key: str, machine: Machine, now: str) -> Profile:
    """The profile of a machine that has none yet."""
    return Profile(key=key, machine=machine, created_at=now, updated_at=now)


def with_machine(
    profile: Profile | None,
    key: str,
    machine: Machine,
    now: str,
    parts: Collection[Part] = EVERYTHING,
) -> Profile:
    """A profile with a fresh measurement.

    Args:
        profile: As stored; ``None``: there is none.
        key: The profile's.
        machine: As measured now.
        now: As ISO 8601.
        parts: What was measured; the rest was carried over.
    """
    if profile is None:
        return new_profile(key, machine, now)
    stale = _stale(profile.machine, machine)
    return replace(
        profile,
        machine=merged(profile.machine, machine, parts),
        updated_at=now,
        changed_at=now if stale else profile.changed_at,
    )


def with_operators(
    profile: Profile | None,
    key: str,
    machine: Machine,
    found: dict[str, OperatorTime],
    now: str,
) -> Profile:
    """A profile with operators timed on a machine.

    Where another process has meanwhile measured the machine with other software, those times are
    not of the machine that the profile is about any more: it stays as it is.
    """
    if profile is None:
        return new_profile(key, replace(machine, operators=machine.operators | found), now)
    if "operators" in _stale(profile.machine, machine):
        return profile
    known = _newest(profile.machine.operators, found)
    return replace(profile, machine=replace(profile.machine, operators=known), updated_at=now)


def with_records(
    profile: Profile,
    now: str,
    *,
    runs: Iterable[RunRecord] = (),
    plans: Iterable[PlanRecord] = (),
    misfits: Iterable[MisfitRecord] = (),
) -> Profile:
    """A profile with more records, each once, oldest first."""
    return replace(
        profile,
        runs=_in_order((*profile.runs, *runs)),
        plans=_in_order((*profile.plans, *plans)),
        misfits=_in_order((*profile.misfits, *misfits)),
        updated_at=now,
    )


def with_profile(base: Profile, other: Profile, machine: Machine, now: str) -> Profile:
    """A profile with the records of another one of the same machine.

    Left out are those that ``changed_at`` would put on the wrong side of the last change: what was
    recorded before one, or with other software, must not count as of the machine as it is.

    Args:
        base: All of its records stay.
        other: Whose are added.
        machine: Merged from both.
        now: As ISO 8601.
    """
    differs = bool(_stale(other.machine, base.machine))

    def told(records: Iterable[_Dated]) -> Iterator[_Dated]:
        for record in records:
            if base.is_outdated(record) == (differs or other.is_outdated(record)):
                yield record

    return with_records(
        replace(base, machine=machine),
        now,
        runs=told(other.runs),
        plans=told(other.plans),
        misfits=told(other.misfits),
    )


def bounded(profile: Profile) -> Profile:
    """A profile with the latest of everything; see ``latest``."""
    operators = profile.machine.operators
    if len(operators) > MAX_OPERATORS:
        kept = dict(list(operators.items())[-MAX_OPERATORS:])
        profile = replace(profile, machine=replace(profile.machine, operators=kept))
    return replace(
        profile,
        runs=latest(profile.runs, MAX_RUNS),
        plans=latest(profile.plans, MAX_PLANS),
        misfits=latest(profile.misfits, MAX_MISFITS),
    )


def latest(records: Sequence[Record], most: int) -> tuple[Record, ...]:
    """The latest records, oldest first, none of a workload before each other has one, and so on.

    A workload that is run a hundred times does not push the others out.

    Args:
        records: Oldest first.
        most: How many to keep.
    """
    seen: Counter[str] = Counter()
    ranked = []
    for age, record in enumerate(reversed(records)):
        ranked.append((seen[record.workload], age))
        seen[record.workload] += 1
    kept = {age for _, age in sorted(ranked)[:most]}
    last = len(records) - 1
    return tuple(record for at, record in enumerate(records) if last - at in kept)


def merged(stored: Machine, fresh: Machine, parts: Collection[Part] = EVERYTHING) -> Machine:
    """One machine from two measurements, whichever process stored its own first.

    What a change has made stale is the fresh one's. Of what was measured now, it has every figure
    that is worth more than the stored one: see ``_better``. The rest is as stored.
    """
    stale = _stale(stored, fresh)
    mixed = _mixed(stored, fresh, stale)
    both = composed(stored, mixed, {*parts, "operators"})
    return composed(both, fresh, stale) if stale else both


def _stale(before: Machine, now: Machine) -> frozenset[Part]:
    return stale_parts(changes(facts_of(before), facts_of(now)))


def _mixed(stored: Machine, fresh: Machine, stale: Collection[Part]) -> Machine:
    """The best of both.

    Args:
        stored: One of them.
        fresh: The other, later one.
        stale: What the stored one did not leave out of these does not hold any more.
    """
    beside = _overlap(stored, fresh)
    disk = _mix(stored.host.disk_read_bytes_per_s, fresh.host.disk_read_bytes_per_s, beside)
    machine = replace(
        fresh,
        host=replace(fresh.host, disk_read_bytes_per_s=disk),
        kernels=_mix(stored.kernels, fresh.kernels, beside),
        link=_mix(stored.link, fresh.link, beside),
        attention=_attention(stored.attention, fresh.attention),
        context_bytes=fresh.context_bytes or stored.context_bytes,
        operators=_newest(stored.operators, fresh.operators),
    )
    still = (n for n in fresh.left_out if n in stored.left_out or part_of(n) in {*stale, None})
    return leaving_out(machine, tuple(still))


def _mix(stored: Any, fresh: Any, beside: bool) -> Any:
    """Field by field and key by key: what only one has, the better of two figures, else fresh."""
    if stored is None or fresh is None:
        return stored if fresh is None else fresh
    if isinstance(fresh, Figure):
        return _better(stored, fresh, beside)
    if isinstance(fresh, dict):
        both = {key: _mix(stored.get(key), value, beside) for key, value in fresh.items()}
        return both | {key: value for key, value in stored.items() if key not in fresh}
    if isinstance(fresh, Value):
        before = asdict(stored)
        return replace(
            fresh, **{name: _mix(before[name], v, beside) for name, v in asdict(fresh).items()}
        )
    return fresh or stored


def _better(stored: Figure, fresh: Figure, beside: bool) -> Figure:
    """An estimate replaces no measurement; of two taken at once, the one less disturbed counts."""
    if stored.source == "measured" != fresh.source:
        return stored
    if beside and len(stored.disturbances) < len(fresh.disturbances):
        return stored
    return fresh


def _attention(
    stored: tuple[AttentionRate, ...], fresh: tuple[AttentionRate, ...]
) -> tuple[AttentionRate, ...]:
    """The fresh rates, and those of implementations that time did not suffice for."""
    reached = {rate.implementation for rate in fresh}
    return (*fresh, *(rate for rate in stored if rate.implementation not in reached))


def _overlap(stored: Machine, fresh: Machine) -> bool:
    """Whether both were measured at once, and so disturbed each other."""
    end, now = moment(stored.measured_at or ""), moment(fresh.measured_at or "")
    if end is None or now is None:
        return False
    return end >= now - timedelta(seconds=fresh.measured_in_s or 0)


def _newest(
    stored: dict[str, OperatorTime], found: dict[str, OperatorTime]
) -> dict[str, OperatorTime]:
    """Both, those of ``found`` last: the first ones go first where there are too many."""
    return {key: time for key, time in stored.items() if key not in found} | found


def _in_order(records: Sequence[Any]) -> tuple[Any, ...]:
    kept: list[Any] = []
    for record in records:
        if record not in kept:
            kept.append(record)
    return tuple(sorted(kept, key=lambda record: record.at))
