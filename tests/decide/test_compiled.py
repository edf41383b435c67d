"""What a compiler leaves of elementwise operators, and how long it takes."""

from __future__ import annotations

import pytest

from autotune.decide.compiled import PER_OPERATOR_S, START_S, compile_s, fused
from autotune.optimizations.execution import Execution
from tests.decide.operators import elementwise, linear, trace_of

EAGER, REGIONAL, WHOLE = (Execution(), Execution(compiled="regional"), Execution(compiled="whole"))
IN_BLOCK = elementwise(values=1000, count=4, fused_calls=1, region="block")
OUTSIDE = elementwise(values=1000, count=4, fused_calls=1)


def test_one_kernel_of_four_is_left_and_its_traffic() -> None:
    left, calls = fused(IN_BLOCK, WHOLE)
    assert (left.bytes * left.count, calls * left.count) == (4000, 1)
    assert IN_BLOCK.bytes * IN_BLOCK.count == 16000


def test_eager_operators_stay_as_they_are() -> None:
    assert fused(IN_BLOCK, EAGER) == (IN_BLOCK, 1.0)


def test_compiling_blocks_reaches_what_is_in_them() -> None:
    assert fused(IN_BLOCK, REGIONAL) == fused(IN_BLOCK, WHOLE)
    assert fused(OUTSIDE, REGIONAL) == (OUTSIDE, 1.0)
    assert fused(OUTSIDE, WHOLE) != (OUTSIDE, 1.0)


def test_products_stay_with_their_library() -> None:
    product = linear(tokens=8, wide=16, narrow=32, region="block")
    assert fused(product, WHOLE) == (product, 1.0)


def test_the_whole_is_compiled_operator_by_operator_and_blocks_once(rtx_3080) -> None:
    trace = trace_of(IN_BLOCK, OUTSIDE, linear(8, 16, 32, count=10, region="attention"))
    assert compile_s(rtx_3080, trace, EAGER) == 0
    assert compile_s(rtx_3080, trace, WHOLE) == START_S + 18 * PER_OPERATOR_S
    assert compile_s(rtx_3080, trace, REGIONAL) == START_S + 2 * PER_OPERATOR_S


def test_latencies_of_flux_as_published(traced, rtx_3080) -> None:
    """Both constants come from these two figures: 67.4 s and 9.6 s on an H100."""
    workload = traced("flux-dev", dtype="bfloat16")
    runs = (run for phase in workload.phases for run in phase.runs)
    trace = next(run.trace for run in runs if run.role == "denoiser")
    assert compile_s(rtx_3080, trace, WHOLE) == pytest.approx(67.4, rel=0.01)
    assert compile_s(rtx_3080, trace, REGIONAL) == pytest.approx(9.6, rel=0.01)
