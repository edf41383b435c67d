from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from autotune.probe.deadline import left_out_finding
from autotune.probe.kernels import BARE
from autotune.probe.machine import AttentionRate, Figure, Link, Machine, OperatorTime
from autotune.probe.parts import EVERYTHING, composed
from autotune.profile.merging import (
    MAX_OPERATORS,
    MAX_RUNS,
    bounded,
    latest,
    merged,
    with_machine,
    with_operators,
    with_records,
)
from autotune.profile.profile import Profile, RunRecord

NOW = "2027-01-01T00:00:00+00:00"


def link(rate: float) -> Link:
    figure = Figure(rate)
    return Link(figure, figure, figure, figure, figure, figure)


def attention(implementation: str, rate: float) -> AttentionRate:
    return AttentionRate(implementation, "float16", 1, 8, 64, 64, 40, Figure(rate))


def faster(machine: Machine, **fields: Any) -> Machine:
    """Another measurement of the machine: every kernel has another rate."""
    kernels = replace(machine.kernels, matmul_flops_per_s={"float32": Figure(3e13)})
    return replace(machine, kernels=kernels, **fields)


def another_driver(machine: Machine) -> Machine:
    return replace(machine, device=replace(machine.device, driver="590.44"))


@pytest.fixture
def full(machine: Machine) -> Machine:
    host = replace(machine.host, disk_read_bytes_per_s=Figure(1.0))
    return replace(
        machine,
        host=host,
        link=link(1.0),
        attention=(attention("sdpa", 1.0), attention("xformers", 1.0)),
        operators={"a": OperatorTime(1.0)},
        context_bytes=1,
    )


def test_parts_are_put_together(full: Machine) -> None:
    host = replace(full.host, ram_available_bytes=1, disk_read_bytes_per_s=None)
    fresh = faster(full, host=host, link=link(2.0), attention=(), context_bytes=2, operators={})
    assert composed(full, fresh, EVERYTHING) == fresh
    kept = composed(full, fresh, ())
    assert kept == replace(full, host=replace(full.host, ram_available_bytes=1))
    moved = composed(full, fresh, {"modules"}).link
    assert moved is not None
    assert moved.module_h2d_bytes_per_s.value == 2.0
    assert moved.h2d_pinned_bytes_per_s.value == 1.0


def test_a_measurement_loses_no_operators_and_no_records(profile: Profile, full: Machine) -> None:
    stored = replace(profile, machine=full)
    fresh = faster(full, operators={})
    found = with_machine(stored, profile.key, fresh, NOW)
    assert found.machine.operators == full.operators
    assert found.machine.kernels.matmul_flops_per_s["float32"].value == 3e13
    assert found.runs == profile.runs
    assert (found.created_at, found.updated_at) == (profile.created_at, NOW)
    assert found.changed_at is None


def test_operators_of_another_driver_go(profile: Profile, full: Machine) -> None:
    stored = replace(profile, machine=full)
    fresh = another_driver(faster(full, operators={}))
    found = with_machine(stored, profile.key, fresh, NOW)
    assert found.machine.operators == {}
    assert set(found.machine.kernels.matmul_flops_per_s) == {"float32"}
    assert found.changed_at == NOW
    assert found.is_outdated(found.runs[0])


def test_who_comes_second_after_a_change_drops_nothing(profile: Profile, full: Machine) -> None:
    """Two processes found the driver changed; the first has timed operators meanwhile."""
    stored = replace(profile, machine=another_driver(full), changed_at="2026-06-01")
    fresh = another_driver(faster(full, operators={}))
    found = with_machine(stored, profile.key, fresh, NOW)
    assert found.machine.operators == full.operators
    assert found.changed_at == "2026-06-01"


def test_what_was_not_measured_stays_as_it_is_stored(full: Machine) -> None:
    """Not as it was when the measurement began: another process has measured the link since."""
    stored = replace(full, link=link(7.0))
    found = merged(stored, faster(full, link=link(1.0)), {"kernels"})
    assert found.link == link(7.0)
    assert found.kernels.matmul_flops_per_s["float32"].value == 3e13


def test_what_is_stored_of_another_driver_is_not_mixed_in(full: Machine) -> None:
    stored = replace(another_driver(full), link=link(7.0))
    fresh = faster(full)
    found = merged(stored, fresh, {"dispatch"})
    assert found.kernels == fresh.kernels
    assert found.operators == fresh.operators
    assert found.link is not None
    assert found.link.h2d_pinned_bytes_per_s.value == 7.0


def test_what_time_did_not_suffice_for_is_filled_in(full: Machine) -> None:
    left_out = ("float16 kernels", "an offload hook")
    stored = replace(full, left_out=left_out[1:])
    fresh = faster(
        full,
        attention=(attention("sdpa", 2.0),),
        left_out=left_out,
        findings=("news", left_out_finding(left_out)),
    )
    found = merged(stored, fresh)
    assert found.kernels.matmul_flops_per_s["float16"].value == 5e13
    assert found.attention == (attention("sdpa", 2.0), attention("xformers", 1.0))
    assert found.left_out == left_out[1:]
    assert found.findings == ("news", left_out_finding(left_out[1:]))


def test_what_was_left_out_of_parts_that_are_kept_is_still_said(full: Machine) -> None:
    left_out = ("bfloat16 kernels", "copies beside a kernel")
    stored = replace(full, left_out=left_out, findings=(left_out_finding(left_out),))
    fresh = faster(full, left_out=("some kinds of attention over 64 tokens",))
    notes = (left_out[1], *fresh.left_out)
    measured = composed(stored, fresh, {"kernels", "attention"})
    assert (measured.left_out, measured.findings) == (notes, (left_out_finding(notes),))
    changed = replace(another_driver(measured), findings=("news", left_out_finding(notes)))
    found = merged(stored, changed, {"kernels", "attention"})
    assert found.left_out == notes
    assert found.findings == changed.findings


def test_an_estimate_replaces_no_measurement(full: Machine) -> None:
    estimate = Figure(9.0, source=BARE)
    fresh = replace(full, kernels=replace(full.kernels, dispatch_s=estimate))
    assert merged(full, fresh).kernels.dispatch_s == full.kernels.dispatch_s
    assert merged(fresh, full).kernels.dispatch_s == full.kernels.dispatch_s
    assert merged(full, another_driver(fresh)).kernels.dispatch_s == estimate


def test_of_two_measured_at_once_the_quieter_figure_counts(full: Machine) -> None:
    def measured(value: float, at: str, *disturbances: str) -> Machine:
        figure = Figure(value, disturbances=disturbances)
        kernels = replace(full.kernels, memory_bytes_per_s=figure)
        return replace(full, kernels=kernels, measured_at=at, measured_in_s=9.0)

    quiet = measured(1.0, "2027-01-01T00:00:00+00:00")
    beside = measured(2.0, "2027-01-01T00:00:05+00:00", "other processes on the GPU")
    later = measured(2.0, "2027-01-01T00:01:00+00:00", "other processes on the GPU")
    assert merged(quiet, beside).kernels.memory_bytes_per_s.value == 1.0
    assert merged(quiet, later).kernels.memory_bytes_per_s.value == 2.0


def test_operators_are_added(profile: Profile, full: Machine) -> None:
    stored = replace(profile, machine=full)
    found = with_operators(stored, profile.key, full, {"b": OperatorTime(2.0)}, NOW)
    assert set(found.machine.operators) == {"a", "b"}
    new = with_operators(None, "new", full, {"b": OperatorTime(2.0)}, NOW)
    assert (new.key, set(new.machine.operators)) == ("new", {"a", "b"})
    other = another_driver(full)
    assert with_operators(stored, profile.key, other, {"b": OperatorTime(2.0)}, NOW) is stored


def test_records_are_kept_once_and_in_order(profile: Profile, run: RunRecord) -> None:
    early, late = replace(run, at="2025-01-01"), replace(run, at="2027-01-01")
    found = with_records(profile, NOW, runs=[late, early, run])
    assert found.runs == (early, run, late)


def test_one_workload_does_not_push_the_others_out(profile: Profile, run: RunRecord) -> None:
    others = [replace(run, workload=str(n), at=f"2025-01-{n + 1:02}") for n in range(10)]
    busy = [replace(run, workload="busy", at=f"2026-01-01T00:{n:02}") for n in range(60)]
    kept = bounded(replace(profile, runs=(*others, *busy, *busy))).runs
    assert len(kept) == MAX_RUNS
    assert kept == (*others, *busy[-40:])


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 12))
def test_the_latest_of_every_workload(workloads: list[int], most: int) -> None:
    runs = [RunRecord(str(w), (), (), (), str(at)) for at, w in enumerate(workloads)]
    kept = latest(runs, most)
    assert len(kept) == min(most, len(runs))
    assert list(kept) == [run for run in runs if run in kept]
    counts = {w: sum(run.workload == str(w) for run in kept) for w in set(workloads)}
    for run in set(runs) - set(kept):
        own = [r for r in kept if r.workload == run.workload]
        assert all(int(r.at) > int(run.at) for r in own)
        assert counts[int(run.workload)] >= max(counts.values()) - 1


def test_operators_are_bounded(profile: Profile) -> None:
    time = OperatorTime(1.0)
    many = {str(n): time for n in range(MAX_OPERATORS + 5)}
    stored = replace(profile, machine=replace(profile.machine, operators=many))
    again = with_operators(stored, profile.key, profile.machine, {"0": time}, NOW)
    kept = bounded(again).machine.operators
    assert len(kept) == MAX_OPERATORS
    assert "0" in kept  # timed again just now
    assert "1" not in kept
