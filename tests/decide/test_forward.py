"""One forward: what of an execution reaches which operators."""

from __future__ import annotations

import msgspec
import pytest

from autotune.decide.attention import Kernel
from autotune.decide.forward import ForwardModel
from autotune.optimizations.execution import Execution
from autotune.probe.machine import Machine
from autotune.workload.workload import Operator, Trace
from tests.workloads import workload_of

PLAIN, CHANNELS_LAST = Execution(), Execution(channels_last=True)


def convolutions(kind: str, dimensions: int) -> Trace:
    """The decode of a small pipeline, without all but its convolutions of so many dimensions."""
    (run,) = workload_of(kind).phases[-1].runs
    found = tuple(o for o in run.trace.operators if _dimensions(o) == dimensions)
    assert found
    return msgspec.structs.replace(run.trace, operators=found, activation_bytes=0)


def _dimensions(operator: Operator) -> int | None:
    if operator.kind != "convolution":
        return None
    _, weight, *_ = msgspec.json.decode(operator.signature)[1]
    return len(weight["s"]) - 2


@pytest.mark.parametrize(
    ("kind", "dimensions", "is_faster"), [("sd", 2, True), ("wan", 2, True), ("wan", 3, False)]
)
def test_channels_last_is_a_layout_of_images(
    kind: str, dimensions: int, is_faster: bool, rtx_3080: Machine
) -> None:
    model = ForwardModel(rtx_3080, workload_of(kind))
    trace = convolutions(kind, dimensions)
    # Operators so small are bound by memory: the rates would not show.
    large = tuple(msgspec.structs.replace(o, flops=1e12) for o in trace.operators)
    trace = msgspec.structs.replace(trace, operators=large)
    plain, changed = (model.cost(trace, e, Kernel("sdpa")) for e in (PLAIN, CHANNELS_LAST))
    assert (changed.compute_s < plain.compute_s) == is_faster
    assert (changed.workspace_bytes < plain.workspace_bytes) == is_faster
    if not is_faster:
        assert changed == plain
