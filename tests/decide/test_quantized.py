"""Linear layers in fewer bits: weights, traffic, launches, by hand."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from autotune.decide.attention import Kernel
from autotune.decide.casting import Storage, stored_in
from autotune.decide.forward import ForwardModel
from autotune.decide.quantized import (
    SCHEMES,
    added_bytes,
    saved_bytes,
    scheme_of,
    shared_bytes,
)
from autotune.optimizations.execution import Execution
from autotune.probe.reference import load_machine
from tests.decide.operators import attention, elementwise, linear, trace_of
from tests.workloads import workload_of

LAYER = linear(tokens=10, wide=100, narrow=200)
"""Reads 1,000 values and 20,000 weights, writes 2,000 values."""


@pytest.mark.parametrize(
    ("scheme", "saved"), [("", 0), ("int8", 20000), ("float8", 20000), ("nf4", 29682)]
)
def test_bytes_saved_of_weights_in_sixteen_bits(scheme: str, saved: int) -> None:
    """4.127 bits instead of 16 leave 0.2579 of 40,000 bytes."""
    assert saved_bytes(scheme, LAYER.weight_bytes, 2) == pytest.approx(saved, abs=1)


@pytest.mark.parametrize(
    ("scheme", "added"),
    [
        ("int8", 3 * 20000 + 8 * 2000),  # weights widened, the result scaled and added to
        ("float8", 19 * 20000),  # weights widened by way of float32
        ("float8_dynamic", 25 * 1000),  # the input narrowed
        ("nf4", 2.5 * 20000),  # weights unpacked
    ],
)
def test_traffic_added_while_nothing_fuses_it(scheme: str, added: float) -> None:
    assert added_bytes(SCHEMES[scheme], LAYER, 2) == added


def test_linear_layers_alone_are_quantized() -> None:
    execution = Execution(quantization="int8")
    assert scheme_of(execution, LAYER) == SCHEMES["int8"]
    assert scheme_of(execution, elementwise(8, 1, 1)) is None
    assert scheme_of(execution, replace(LAYER, bytes=6000)) is None  # two activations
    assert scheme_of(Execution(), LAYER) is None


def test_fused_projections_share_their_narrowed_input() -> None:
    """48 values, of 6 tokens and 2 heads of 4, are narrowed once and not three times."""
    trace = trace_of(attention(tokens=6, heads=2, head_dim=4, count=5))
    assert shared_bytes("float8_dynamic", trace) == 5 * 2 * 48 * 25
    assert shared_bytes("int8", trace) == shared_bytes("", trace) == 0


def test_fused_projections_are_quantized_too() -> None:
    workload = workload_of("flux")
    of = {
        (scheme, fused): stored_in(workload, Storage("", scheme, fused)).weight_bytes
        for scheme in ("", "int8")
        for fused in (False, True)
    }
    added = of["", True] - of["", False]
    assert added > 0
    assert of["int8", True] - of["int8", False] == added // 4  # of float32


@pytest.mark.parametrize("scheme", SCHEMES)
def test_launches_and_traffic_only_without_a_compiler(scheme: str) -> None:
    machine, workload = load_machine("h100-80gb"), workload_of("flux")
    model, trace = ForwardModel(machine, workload), trace_of(LAYER)
    plain, eager, compiled = (
        model.cost(trace, execution, Kernel("sdpa"))
        for execution in (
            Execution(),
            Execution(quantization=scheme),
            Execution(quantization=scheme, compiled="whole"),
        )
    )
    dispatch = machine.kernels.dispatch_s.value
    assert eager.host_s - plain.host_s == pytest.approx(SCHEMES[scheme].launches * dispatch)
    assert compiled.host_s == pytest.approx(plain.host_s)
    unpacking = added_bytes(SCHEMES[scheme], LAYER, 2) / machine.kernels.memory_bytes_per_s.value
    more = eager.compute_s + eager.memory_s - compiled.compute_s - compiled.memory_s
    assert more == pytest.approx(unpacking)


@pytest.mark.parametrize(("name", "factor"), [("h100-80gb", 0.5), ("a100-40gb", 1.0)])
def test_inputs_in_eight_bits_are_multiplied_faster_where_the_hardware_can(
    name: str, factor: float
) -> None:
    machine, workload = load_machine(name), workload_of("flux")
    trace = trace_of(linear(tokens=4096, wide=4096, narrow=4096))
    plain, dynamic = (
        ForwardModel(machine, workload).cost(trace, execution, Kernel("sdpa")).compute_s
        for execution in (
            Execution(compiled="whole"),
            Execution(compiled="whole", quantization="float8_dynamic"),
        )
    )
    assert dynamic / plain == pytest.approx(factor, rel=0.01)
