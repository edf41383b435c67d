"""A prediction taken apart adds up to the whole."""

from __future__ import annotations

from typing import get_args

import pytest

from autotune.decide.breakdown import break_down, most_demanding
from autotune.decide.predict import Predictor
from autotune.optimizations.execution import Execution, Placement
from tests.thorough import THOROUGH

MODELS = ("sdxl", "sd15-controlnet", *(("wan21-1.3b",) if THOROUGH else ()))


@pytest.mark.parametrize("placement", get_args(Placement))
@pytest.mark.parametrize("model", MODELS)
def test_components_add_up_to_their_phase(traced, rtx_3080, model, placement):
    workload, execution = traced(model), Execution(placement=placement)
    parts = break_down(rtx_3080, workload, execution)
    for phase in Predictor(rtx_3080, workload).predict(execution).phases:
        within = [p for p in parts if p.prediction.name == phase.name]
        assert sum(p.prediction.seconds for p in within) == pytest.approx(phase.seconds)
        assert max(p.prediction.peak_bytes for p in within) == phase.peak_bytes
        most = most_demanding(parts, phase.name).prediction
        for field in ("resident_bytes", "activation_bytes", "margin_bytes", "needed_bytes"):
            assert getattr(most, field) == getattr(phase, field)


@pytest.mark.parametrize("placement", get_args(Placement))
@pytest.mark.parametrize("model", MODELS)
def test_what_is_resident_is_named_to_the_byte(traced, rtx_3080, model, placement):
    workload = traced(model)
    for part in break_down(rtx_3080, workload, Execution(placement=placement)):
        assert sum(r.bytes for r in part.resident) == part.prediction.resident_bytes
        for held in part.resident:
            component = workload.component(held.component)
            whole = component.weight_bytes
            if held.component != part.component and placement == "sequential_offload":
                assert (held.bytes, held.is_whole) == (component.unmoved_bytes, False)
            elif held.component != part.component:
                assert (held.bytes, held.is_whole) == (whole, True)
            elif placement in ("device", "model_offload"):
                assert held.is_whole
                assert held.bytes in (whole, 2 * whole)  # a VAE may compute in a wider dtype
            elif placement == "sequential_offload":
                layer = component.largest_leaf_bytes
                assert held.bytes - component.unmoved_bytes in (layer, 2 * layer)


def test_each_component_is_one_entry(traced, rtx_3080):
    parts = break_down(rtx_3080, traced("sd15-controlnet"), Execution())
    labels = [(p.prediction.name, p.label) for p in parts]
    assert labels == [
        ("encode", "text_encoder"),
        ("denoise", "controlnet"),
        ("denoise", "unet"),
        ("decode", "vae.decode"),
    ]


def test_the_peak_of_vanilla_attention_is_its_scores(traced, rtx_3080, rtx_3080_torch1):
    workload = traced("sd15", height=1024, width=1024)

    def peak(machine):
        parts = break_down(machine, workload, Execution())
        return next(p for p in parts if p.component == "unet")

    assert peak(rtx_3080_torch1).peak.name == "attention"
    for machine in (rtx_3080, rtx_3080_torch1):
        unet = peak(machine)
        assert unet.peak.live_bytes <= unet.prediction.activation_bytes
        assert unet.peak.shape


@pytest.mark.parametrize("placement", ("device", "model_offload"))
def test_narrow_weights_are_told_as_such(traced, rtx_3080, placement):
    execution = Execution(placement=placement, storage_dtype="float8_e4m3fn")
    workload = traced("sdxl")
    held = [r for part in break_down(rtx_3080, workload, execution) for r in part.resident]
    assert all(r.is_whole and r.bytes > 0 for r in held)
    unet = {r.bytes for r in held if r.component == "unet"}
    assert max(unet) < 0.6 * workload.component("unet").weight_bytes


def test_only_the_called_component_stays_under_model_offload(traced, rtx_3080):
    parts = break_down(rtx_3080, traced("sdxl"), Execution(placement="model_offload"))
    assert {p.label: [r.component for r in p.resident] for p in parts} == {
        "text_encoder": ["text_encoder"],
        "text_encoder_2": ["text_encoder_2"],
        "unet": ["unet"],
        "vae.decode": ["vae"],
    }
