"""What layerwise casting costs at every call, by hand."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from autotune.decide.casting import HOST_CALLS_PER_LAYER, host_s, memory_s
from autotune.probe.reference import load_machine
from tests.decide.operators import attention, elementwise, linear, trace_of
from tests.workloads import workload_of


def test_weights_are_read_and_written_in_both_widths_twice() -> None:
    """1,000 weights: one byte read and two written before the call, the other way round after."""
    machine = load_machine("h100-80gb")
    component = replace(workload_of("flux").component("transformer"), casting_saves_bytes=1000)
    traffic = memory_s(machine, component, "bfloat16") * machine.kernels.memory_bytes_per_s.value
    assert traffic == pytest.approx(6000)


def test_the_host_works_for_layers_that_are_stored_narrow() -> None:
    machine = load_machine("h100-80gb")
    trace = trace_of(linear(8, 16, 32, count=7), elementwise(8, 3, 1), attention(6, 2, 4))
    calls = host_s(machine, trace) / machine.kernels.dispatch_s.value
    assert calls == pytest.approx(7 * HOST_CALLS_PER_LAYER)
