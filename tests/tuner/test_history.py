"""What ran out of memory is kept in the profile, read again, and forgotten with more memory."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import pytest

from autotune.decide.history import Misfit
from autotune.decide.limits import Limits, budget_within
from autotune.optimizations.base import Setting
from autotune.probe.machine import Machine
from autotune.profile.profile import MisfitRecord
from autotune.profile.store import load_profile
from autotune.tuner import Ask, Measured, Planned, make_plan, remember_run
from autotune.tuner.history import history_here, misfits_in, remember_misfit, without_outgrown

MIB = 1 << 20
SLICING = ("vae_slicing",)


@pytest.fixture
def planned(cpu_machine: Machine) -> Planned:
    return make_plan("demo", cpu_machine, Ask(batch=4))


def ran_out(planned: Planned, *optimizations: str, available: int = 100 * MIB) -> MisfitRecord:
    return MisfitRecord(
        workload=planned.workload.memory_key,
        optimizations=optimizations,
        available_bytes=available,
        predicted_bytes=90 * MIB,
        phase="decode",
        error="out of memory",
        at="2026-01-01T00:00:00+00:00",
    )


def kept(planned: Planned, machine: Machine, *records: MisfitRecord) -> tuple[MisfitRecord, ...]:
    """What the profile has after each of these was remembered with so much memory free."""
    for record in records:
        budget = budget_within(machine, Limits())._replace(device_bytes=record.available_bytes)
        workload = planned.workload
        if record.workload == "another":
            workload = msgspec.structs.replace(workload, model="another")
        remember_misfit(Measured("k", machine, ()), workload, record, budget)
    profile = load_profile("k")
    assert profile is not None
    return profile.misfits


def test_what_ran_out_comes_back_as_decisions_take_it(
    planned: Planned, cpu_machine: Machine
) -> None:
    kept(planned, cpu_machine, ran_out(planned, *SLICING))
    limits = Limits(ram_limit=100 * MIB)
    history = history_here("k", planned.workload, cpu_machine, limits)
    assert history.misfits == (Misfit((Setting("vae_slicing"),), 100 * MIB, phase="decode"),)
    more = Limits(ram_limit=110 * MIB)
    assert history_here("k", planned.workload, cpu_machine, more).misfits == ()
    other = msgspec.structs.replace(planned.workload, model="another")
    assert history_here("k", other, cpu_machine, limits).misfits == ()


def test_with_more_memory_it_is_dropped_at_the_next_write(
    planned: Planned, cpu_machine: Machine
) -> None:
    first, second = ran_out(planned), ran_out(planned, *SLICING, available=200 * MIB)
    other = msgspec.structs.replace(first, workload="another")
    assert kept(planned, cpu_machine, first, other, second) == (other, second)


def test_a_run_with_more_memory_drops_it_too(planned: Planned, cpu_machine: Machine) -> None:
    other = msgspec.structs.replace(ran_out(planned), workload="another")
    kept(planned, cpu_machine, ran_out(planned), other)
    remember_run(Measured("k", cpu_machine, ()), planned, ())
    profile = load_profile("k")
    assert profile is not None
    assert profile.misfits == (other,)


def test_of_one_set_only_the_latest_is_kept(planned: Planned, cpu_machine: Machine) -> None:
    first, again = ran_out(planned, available=101 * MIB), ran_out(planned)
    assert kept(planned, cpu_machine, first, again) == (again,)


def test_only_what_is_as_it_was_counts(planned: Planned, cpu_machine: Machine) -> None:
    kept(planned, cpu_machine, ran_out(planned))
    profile = load_profile("k")
    assert profile is not None
    workload = planned.workload
    request = msgspec.structs.replace(workload.request, steps=99)
    slower = msgspec.structs.replace(workload, request=request)
    assert slower.key != workload.key
    assert len(list(misfits_in(profile, slower))) == 1, "steps take no memory"
    (misfit,) = profile.misfits
    of_another = msgspec.structs.replace(misfit, weight_bytes=workload.weight_bytes + 1)
    namesake = msgspec.structs.replace(profile, misfits=(of_another,))
    assert list(misfits_in(namesake, workload)) == []
    changed = msgspec.structs.replace(profile, changed_at="2026-02-01T00:00:00+00:00")
    assert list(misfits_in(changed, workload)) == []
    later = msgspec.structs.replace(ran_out(planned, *SLICING), at="2026-03-01T00:00:00+00:00")
    plenty = budget_within(cpu_machine, Limits())._replace(device_bytes=1)
    assert without_outgrown(changed, workload, plenty) == (), "nor is it kept for ever"
    both = msgspec.structs.replace(changed, misfits=(misfit, later))
    assert without_outgrown(both, workload, plenty) == (later,)


def test_sets_with_unknown_members_are_passed_over(planned: Planned, cpu_machine: Machine) -> None:
    kept(planned, cpu_machine, ran_out(planned, "no_such_thing"), ran_out(planned))
    profile = load_profile("k")
    assert profile is not None
    assert list(misfits_in(profile, planned.workload)) == [Misfit((), 100 * MIB, phase="decode")]


def test_a_profile_that_cannot_be_written_is_a_warning(
    planned: Planned,
    cpu_machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    monkeypatch.setenv("AUTOTUNE_CACHE", str(file))
    with caplog.at_level(logging.WARNING, "autotune"):
        remember_misfit(
            Measured("k", cpu_machine, ()),
            planned.workload,
            ran_out(planned),
            budget_within(cpu_machine, Limits()),
        )
    assert "not remembered" in caplog.text
