"""Peaks by metric: consistent among themselves, and with what the predictor says."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from autotune.decide.allocator import DeviceMemoryError
from autotune.decide.metrics import expected, fits
from autotune.decide.predict import Predictor
from autotune.optimizations.execution import Execution
from autotune.units import GIB

EXECUTIONS = [
    Execution(),
    Execution(attention="vanilla"),
    Execution(channels_last=True),
    Execution(placement="model_offload"),
    Execution(placement="sequential_offload"),
]


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_the_allocator_counts_what_the_predictor_predicts(traced, rtx_3080, model, execution):
    machine = replace(rtx_3080, device=replace(rtx_3080.device, free_bytes=64 * GIB))
    predictor = Predictor(machine, traced(model))
    peaks = expected(predictor, execution)
    predicted = predictor.predict(execution).peak_bytes
    assert peaks.allocated_bytes == pytest.approx(predicted, rel=0.02)
    assert peaks.allocated_bytes <= peaks.reserved_bytes
    assert peaks.device_bytes == peaks.reserved_bytes + machine.context_bytes


def test_slicing_the_decode_reserves_less(traced, rtx_3080):
    machine = replace(rtx_3080, device=replace(rtx_3080.device, free_bytes=64 * GIB))
    predictor = Predictor(machine, traced("sdxl", batch=4))
    whole, sliced = (expected(predictor, Execution(decode_sliced=s)) for s in (False, True))
    assert sliced.reserved_bytes < whole.reserved_bytes / 2


def test_a_decode_reserves_far_more_than_it_allocates(traced, rtx_3080):
    """ComfyUI reckons with 2178 values per pixel for an SD VAE's decode: 1.06 GiB at 512²."""
    workload = traced("sd15")
    peaks = expected(Predictor(rtx_3080, workload), Execution())
    beyond_weights = peaks.reserved_bytes - workload.weight_bytes
    assert beyond_weights == pytest.approx(2178 * 512 * 512 * 2, rel=0.2)


def test_what_does_not_fit_is_said(traced, rtx_3080):
    predictor = Predictor(rtx_3080, traced("sdxl"))
    with pytest.raises(DeviceMemoryError):
        expected(predictor, Execution(), 4 * GIB)
    assert not fits(predictor, Execution(), 4 * GIB)
    assert fits(predictor, Execution(placement="sequential_offload"), 4 * GIB)


def test_a_workspace_is_done_without(traced, rtx_3080):
    """Less room than the peak: cuDNN's plan without copies is taken."""
    predictor = Predictor(rtx_3080, traced("sd15", batch=4))
    wanted = expected(predictor, Execution()).allocated_bytes
    scarce = expected(predictor, Execution(), wanted - GIB // 8)
    assert scarce.allocated_bytes <= scarce.reserved_bytes <= wanted - GIB // 8


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_no_less_fits_than_weights_and_activations(traced, rtx_3080, execution):
    predictor = Predictor(rtx_3080, traced("sd15"))
    phases = predictor.predict(execution).phases
    least = max(p.resident_bytes + p.activation_bytes for p in phases)
    assert not fits(predictor, execution, least - GIB // 16)
    assert fits(predictor, execution, 2 * least)
