"""A trace's timeline tells the same as its sums: what is alive, and who takes memory meanwhile."""

from __future__ import annotations

from collections import Counter
from typing import Any

from autotune.workload.architecture import describe_pipeline
from autotune.workload.phases import trace_workload
from autotune.workload.trace import ALLOCATION_BYTES
from autotune.workload.workload import Trace


def traces(pipe: Any, request_of: Any) -> list[Trace]:
    workload = trace_workload(describe_pipeline(pipe), request_of(batch=1))
    runs = [r for p in workload.phases for r in p.runs]
    return [t for r in runs for t in (r.trace, *r.variants.values())]


def peak_bytes(trace: Trace) -> int:
    sizes: list[int] = []
    alive = peak = 0
    for event in trace.timeline:
        if event > 0:
            sizes.append(-(-event // ALLOCATION_BYTES) * ALLOCATION_BYTES)
            alive += sizes[-1]
        elif event < 0:
            alive -= sizes[-event - 1]
        peak = max(peak, alive)
    assert alive >= 0
    return peak


def test_the_peak_is_the_same(pipe: Any, request_of: Any) -> None:
    for trace in traces(pipe, request_of):
        assert peak_bytes(trace) == trace.activation_bytes


def test_nothing_is_freed_twice(pipe: Any, request_of: Any) -> None:
    for trace in traces(pipe, request_of):
        freed = [-e for e in trace.timeline if e < 0]
        assert len(freed) == len(set(freed))
        assert max(freed) <= sum(e > 0 for e in trace.timeline)


def test_every_convolution_and_attention_has_its_place(pipe: Any, request_of: Any) -> None:
    for trace in traces(pipe, request_of):
        assert trace.timeline.count(0) == len(trace.timed)
        called = Counter(trace.operators[i].kind for i in trace.timed)
        counted = Counter[str]()
        for operator in trace.operators:
            counted[operator.kind] += operator.count
        for kind in ("convolution", "attention"):
            assert called[kind] == counted[kind]
        assert called.total() == called["convolution"] + called["attention"]
