"""What group offload and layerwise casting are predicted to cost and to save."""

from __future__ import annotations

import math

import msgspec
import pytest

from autotune.decide.choose import execution_of, predict
from autotune.decide.placement import PROCESS_BYTES, UNKNOWN_DISK_BYTES_PER_S
from autotune.decide.predict import Predictor
from autotune.decide.rules import broken_rule
from autotune.optimizations import parse_settings
from autotune.probe.machine import Figure


def predicted(machine, workload, text=""):
    return Predictor(machine, workload).predict(execution_of(parse_settings(text)))


def phase(prediction, name):
    return next(p for p in prediction.phases if p.name == name)


def test_two_blocks_and_what_is_in_none_are_on_the_device(traced, rtx_3080):
    workload = traced("sdxl")
    unet = workload.component("unet")
    rest = unet.weight_bytes - sum(unet.block_bytes)
    *_, last_down, first_up, _, _ = unet.block_bytes
    assert first_up == max(unet.block_bytes)
    denoise = phase(predicted(rtx_3080, workload, "group_offload"), "denoise")
    assert denoise.resident_bytes == rest + last_down + first_up
    alone = phase(predicted(rtx_3080, workload, "group_offload:stream=False"), "denoise")
    assert alone.resident_bytes == rest + max(unet.block_bytes)
    leaf = phase(predicted(rtx_3080, workload, "group_offload:level=leaf"), "denoise")
    convolution, embedding = 9 * 2560 * 1280 + 1280, 1280 * 1280 + 1280
    assert leaf.resident_bytes == 2 * (convolution + embedding), "in 16 bits"


def test_copies_hide_behind_computing_as_far_as_they_are_shorter(traced, rtx_3080):
    workload = traced("sdxl")
    unet, calls = workload.component("unet"), 50
    plain = phase(predicted(rtx_3080, workload), "denoise")
    link = rtx_3080.link

    def transfer_s(bytes_per_s):
        slower = msgspec.structs.replace(link, h2d_pinned_bytes_per_s=Figure(bytes_per_s))
        machine = msgspec.structs.replace(rtx_3080, link=slower)
        return phase(predicted(machine, workload, "group_offload:level=leaf"), "denoise").transfer_s

    enough = 100 * unet.weight_bytes * calls / plain.seconds
    first = unet.largest_leaf_bytes * calls / enough
    assert transfer_s(enough) == pytest.approx(first, rel=0.01)
    scarce = 0.1 * unet.weight_bytes * calls / plain.seconds
    waits = unet.weight_bytes * calls / scarce - plain.seconds
    assert transfer_s(scarce) == pytest.approx(waits, rel=0.05)


def test_the_vae_is_not_copied_ahead(traced, rtx_3080):
    """SDXL's pipelines widen it first: a stream's copies would still be narrow."""
    workload = traced("sdxl")
    vae = workload.component("vae")
    decode = phase(predicted(rtx_3080, workload, "group_offload:level=leaf"), "decode")
    assert decode.resident_bytes == 2 * vae.largest_leaf_bytes  # one layer, in float32
    assert decode.transfer_s > 0


def test_weights_lie_in_ram_or_on_the_disk(traced, rtx_3080):
    workload = traced("sdxl")
    weights = Predictor(rtx_3080, workload).weights(execution_of(()))

    def host_bytes(text):
        return weights.host_bytes(execution_of(parse_settings(f"group_offload:{text}")))

    in_ram, on_disk = PROCESS_BYTES + workload.weight_bytes, PROCESS_BYTES
    on_disk += workload.component("vae").weight_bytes
    assert host_bytes("stream=False") == in_ram
    assert host_bytes("disk=True,stream=False") == on_disk
    # What a stream copies is pinned in passing: the largest block, or layer, and to powers of two.
    block = max(workload.component("unet").block_bytes)
    layer = 2 ** math.ceil(math.log2(workload.component("text_encoder_2").largest_leaf_bytes))
    for text, before in (("low_ram=True", in_ram), ("disk=True", on_disk)):
        assert before + block < host_bytes(text) < before + 1.5 * block
        assert host_bytes(f"level=leaf,{text}") == before + layer


def test_pinned_weights_take_powers_of_two(traced, rtx_3080):
    """But for the autoencoder's, which are not copied ahead."""
    workload = traced("sdxl")
    text = "group_offload:level=leaf"
    pinned = predicted(rtx_3080, workload, text).host_bytes - PROCESS_BYTES
    vae = workload.component("vae").weight_bytes
    sizes = [s for c in workload.components if c.name != "vae" for s in c.tensor_bytes]
    assert pinned == vae + sum(max(4096, 2 ** math.ceil(math.log2(size))) for size in sizes)


def test_what_is_in_no_block_is_not_pinned_and_waited_for(traced, rtx_3080):
    """diffusers gives it no stream, and copies it back."""
    workload, link = traced("sdxl"), rtx_3080.link
    block, leaf = (
        predicted(rtx_3080, workload, f"group_offload:level={level}") for level in ("block", "leaf")
    )
    assert PROCESS_BYTES + workload.weight_bytes < block.host_bytes < leaf.host_bytes
    unet, (run,) = workload.component("unet"), workload.runs_as("denoiser")
    both_ways = 1 / link.h2d_pageable_bytes_per_s.value + 1 / link.d2h_pageable_bytes_per_s.value
    waits = run.calls * both_ways * (unet.weight_bytes - sum(unet.block_bytes))
    assert waits < phase(block, "denoise").transfer_s < 1.05 * waits, "blocks hide behind computing"


def test_what_has_no_blocks_moves_layer_by_layer(traced, rtx_3080):
    """Text encoders would be on the device as a whole; and are where a disk cannot hold layers."""
    workload = traced("flux-dev")
    t5 = workload.component("text_encoder_2")
    tied = msgspec.structs.replace(t5, abilities=("tied_layers",))
    others = tuple(c for c in workload.components if c is not t5)
    with_ties = msgspec.structs.replace(workload, components=(*others, tied))

    def resident(text, given=workload):
        prediction = predicted(rtx_3080, given, f"group_offload:{text}")
        return phase(prediction, "encode").resident_bytes

    layers = resident("level=leaf")
    assert layers == resident("level=block") == resident("disk=True") < 2 * t5.largest_leaf_bytes
    assert resident("disk=True", with_ties) == t5.weight_bytes
    assert resident("level=leaf", with_ties) == layers


def test_a_disk_of_unknown_speed_is_slower_than_ram(traced, rtx_3080):
    workload = traced("sdxl")
    assert rtx_3080.host.disk_read_bytes_per_s is None
    ram = phase(predicted(rtx_3080, workload, "group_offload:level=leaf"), "denoise")
    text = "group_offload:level=leaf,disk=True"
    disk, decode = (phase(predicted(rtx_3080, workload, text), n) for n in ("denoise", "decode"))
    read_s = 50 * workload.component("unet").weight_bytes / UNKNOWN_DISK_BYTES_PER_S
    assert disk.seconds == pytest.approx(read_s, rel=0.01)
    assert disk.seconds > 5 * ram.seconds
    # The autoencoder stays in RAM.
    assert decode == phase(predicted(rtx_3080, workload, "group_offload:level=leaf"), "decode")
    (note,) = predict(rtx_3080, workload, parse_settings(text)).notes
    assert "500 MB/s" in note


def test_casting_saves_memory_where_the_denoiser_is(traced, rtx_3080):
    workload = traced("sdxl")
    unet = workload.component("unet")
    assert 0.4 * unet.weight_bytes < unet.casting_saves_bytes < 0.5 * unet.weight_bytes
    plain, cast = (predicted(rtx_3080, workload, t) for t in ("", "layerwise_casting"))
    for name in ("encode", "denoise", "decode"):
        saved = phase(plain, name).resident_bytes - phase(cast, name).resident_bytes
        assert saved == unet.casting_saves_bytes
    assert phase(cast, "denoise").seconds > phase(plain, "denoise").seconds
    assert phase(cast, "decode").seconds == phase(plain, "decode").seconds


@pytest.mark.parametrize(
    ("names", "rule"),
    [
        (("group_offload", "model_cpu_offload"), "one-offload"),
        (("group_offload", "sequential_cpu_offload"), "one-offload"),
    ],
)
def test_what_does_not_go_together(names, rule):
    found = broken_rule(names)
    assert found is not None
    assert found.id == rule
    assert broken_rule(("group_offload", "layerwise_casting")) is None
