"""Several plans side by side, and the price of memory in time."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.decide.choose import QUALITIES, Limits, choose
from autotune.decide.limits import budget_within
from autotune.decide.predict import Predictor
from autotune.decide.rules import OFFLOADS
from autotune.decide.search import execution_of
from autotune.decide.whatif import FrontierPoint, compare, frontier
from tests.decide.strategies import machines, workloads
from tests.decide.test_search import plainly


@settings(max_examples=60, deadline=None)
@given(machine=machines(), workload=workloads(), quality=st.sampled_from(QUALITIES))
def test_the_frontier_is_that_of_all_coherent_sets(machine, workload, quality):
    limits = Limits(quality=quality)
    points = frontier(machine, workload, limits)
    found = {(p.seconds, p.needed_bytes) for p in points}
    everything = {(c.seconds, c.needed_bytes) for c in plainly(machine, workload, limits)}
    assert found == {
        (seconds, needed)
        for seconds, needed in everything
        if not any(
            s <= seconds and n <= needed and (s, n) != (seconds, needed) for s, n in everything
        )
    }
    budget, predictor = budget_within(machine, limits), Predictor(machine, workload)
    for point in points:
        prediction = predictor.predict(execution_of(point.optimizations))
        assert (point.seconds, point.needed_bytes, point.host_bytes) == (
            *(prediction.mean_seconds, prediction.needed_bytes, prediction.host_bytes),
        )
        assert point.fits == budget.holds(prediction)


def test_memory_is_bought_with_time(traced, rtx_3080):
    points = frontier(rtx_3080, traced("sdxl"), Limits(quality="high"))
    assert [p.seconds for p in points] == sorted(p.seconds for p in points)
    assert [p.needed_bytes for p in points] == sorted(
        (p.needed_bytes for p in points), reverse=True
    )
    assert not OFFLOADS & {s.name for s in points[0].optimizations}
    assert OFFLOADS & {s.name for s in points[-1].optimizations}
    assert (
        msgspec.json.decode(msgspec.json.encode(points), type=tuple[FrontierPoint, ...]) == points
    )


def test_plans_side_by_side(traced, rtx_3080, cpu_machine):
    plans = [choose(m, traced(n)) for m in (rtx_3080, cpu_machine) for n in ("sd15", "sdxl")]
    rows = compare(plans)
    assert [(r.machine, r.model) for r in rows] == [
        ("rtx-3080-10gb", "sd15"),
        ("rtx-3080-10gb", "sdxl"),
        ("cpu-16-cores", "sd15"),
        ("cpu-16-cores", "sdxl"),
    ]
    for row, plan in zip(rows, plans, strict=True):
        assert (row.seconds, row.fits) == (plan.prediction.seconds, plan.fits)
        assert row.optimizations == plan.optimizations
