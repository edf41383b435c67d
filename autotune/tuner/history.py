"""What the profile knows of a workload, as decisions take it: read; and what did not fit: kept."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import msgspec

from autotune.decide.history import History, Misfit, Observation, Observed
from autotune.decide.limits import Limits, budget_within
from autotune.decide.misfits import counting, is_outgrown
from autotune.decide.prediction import Budget
from autotune.decide.residuals import can_be_peak
from autotune.errors import AutotuneError, ProfileError, first_line
from autotune.optimizations import parse_setting
from autotune.optimizations.base import Setting
from autotune.probe.machine import Machine
from autotune.profile.profile import MisfitRecord, Profile, RunRecord, is_before
from autotune.profile.store import load_profile, update_profile
from autotune.tuner.here import Measured, new_profile, timestamp
from autotune.workload.workload import Workload

log = logging.getLogger("autotune")


def history_here(key: str, workload: Workload, machine: Machine, limits: Limits) -> History:
    """What this machine taught about a workload, as far as it decides with the memory free now.

    Args:
        key: The profile's.
        workload: Traced.
        machine: With the memory that is free now.
        limits: Of that memory.
    """
    profile = load_profile(key)
    if profile is None:
        return History()
    history = History(
        observations=tuple(observations_in(profile, workload)),
        misfits=tuple(misfits_in(profile, workload)),
    )
    return counting(history, budget_within(machine, limits))


def verified_runs(profile: Profile, workload: Workload) -> Iterator[RunRecord]:
    """Runs of a workload since the machine was measured whose first pass was measured apart.

    Others hold what a first run takes: kernels being loaded, algorithms chosen. One with a peak
    that cannot be has verified nothing.
    """
    for run in profile.runs:
        is_steady = run.measured and all(m.first_seconds is not None for m in run.measured)
        is_old = profile.is_outdated(run) or is_before(run.at, profile.machine.measured_at)
        is_same = (run.workload, run.weight_bytes) == (workload.key, workload.weight_bytes)
        if is_same and is_steady and not is_old and _can_be(run):
            yield run


def _can_be(run: RunRecord) -> bool:
    peaks = {p.name: p.peak_bytes or 0 for p in run.predicted}
    return all(
        can_be_peak(m.peak_bytes or 0, peaks[m.name]) for m in run.measured if m.name in peaks
    )


def observations_in(profile: Profile, workload: Workload) -> Iterator[Observation]:
    """What verified runs showed of this workload; sets with unknown members are passed over."""
    for run in verified_runs(profile, workload):
        settings = _parsed(run.optimizations)
        if settings is not None:
            phases = (
                Observed(m.name, m.seconds, m.peak_bytes, m.first_seconds) for m in run.measured
            )
            expected = sum(p.seconds for p in run.predicted)
            yield Observation(settings, tuple(phases), expected)


def misfits_in(profile: Profile, workload: Workload) -> Iterator[Misfit]:
    """What ran out of memory with this workload on the machine as it is.

    Sets with unknown members are passed over.
    """
    for record in profile.misfits:
        if profile.is_outdated(record) or not _is_of(record, workload):
            continue
        settings = _parsed(record.optimizations)
        if settings is not None:
            yield Misfit(settings, record.available_bytes, record.of_host, record.phase)


def _parsed(optimizations: Iterable[str]) -> tuple[Setting, ...] | None:
    try:
        return tuple(map(parse_setting, optimizations))
    except AutotuneError:  # of a package that is gone, or edited by hand
        return None


def _is_of(record: MisfitRecord, workload: Workload) -> bool:
    same_weights = record.weight_bytes in (None, workload.weight_bytes)
    return record.workload == workload.memory_key and same_weights


def remember_misfit(
    measured: Measured, workload: Workload, record: MisfitRecord, available: Budget
) -> None:
    """Keep in the profile what did not fit; a profile that cannot be written costs a warning.

    Args:
        measured: Whose profile.
        workload: What ran.
        record: What ran out of memory.
        available: What is free now: what ran out when there was less is forgotten.
    """

    def change(profile: Profile | None) -> Profile:
        base = profile or new_profile(measured.key, measured.machine)
        others = without_outgrown(base, workload, available)
        kept = tuple(m for m in others if not _is_of_the_same(m, record))
        return msgspec.structs.replace(base, misfits=(*kept, record), updated_at=timestamp())

    try:
        update_profile(measured.key, change)
    except (ProfileError, MemoryError) as error:  # there may be no memory to read it either
        log.warning("what ran out of memory is not remembered: %s", first_line(error))


def without_outgrown(
    profile: Profile, workload: Workload, available: Budget
) -> tuple[MisfitRecord, ...]:
    """Misfits of other workloads, and of this one those that still count."""

    def counts(record: MisfitRecord) -> bool:
        settings: tuple[Setting, ...] = ()
        misfit = Misfit(settings, record.available_bytes, record.of_host)
        is_over = profile.is_outdated(record) or is_outgrown(misfit, available)
        return not (is_over and _is_of(record, workload))

    return tuple(filter(counts, profile.misfits))


def _is_of_the_same(one: MisfitRecord, other: MisfitRecord) -> bool:
    return _identity(one) == _identity(other)


def _identity(record: MisfitRecord) -> tuple[object, ...]:
    set_ = (record.optimizations, record.of_host, record.phase)
    return record.workload, record.weight_bytes, *set_
