"""Predictions against what is known: published counts, the formulas' own limits, directions."""

from __future__ import annotations

import msgspec
import pytest

from autotune.decide.attention import Kernel, transient_bytes
from autotune.decide.choose import execution_of, predict
from autotune.decide.placement import PROCESS_BYTES
from autotune.decide.predict import Predictor
from autotune.decide.prediction import Budget, budget_of, find_bottleneck
from autotune.errors import OptimizationError
from autotune.optimizations import parse_settings
from autotune.optimizations.execution import Execution
from autotune.probe.machine import Figure
from autotune.probe.reference import load_machine
from autotune.units import GIB, MIB
from autotune.workload.workload import AttentionShape
from tests.workloads import workload_of


def predicted(machine, workload, text=""):
    return Predictor(machine, workload).predict(execution_of(parse_settings(text)))


def phase(prediction, name):
    return next(p for p in prediction.phases if p.name == name)


def test_vanilla_scores_of_sd15_at_1024():
    """Batch 2 with guidance: 32 GiB of scores; two heads at a time (auto: half of 8) far less."""
    shape = AttentionShape(4, 8, 128 * 128, 128 * 128, 40)
    assert transient_bytes(Kernel("vanilla"), shape, "float16") == 32 * GIB
    assert transient_bytes(Kernel("sliced", "auto"), shape, "float16") == 4 * GIB
    assert transient_bytes(Kernel("sliced", "max"), shape, "float16") == 1 * GIB
    assert transient_bytes(Kernel("sdpa"), shape, "float16") < 0.01 * GIB


def test_weights_are_resident(traced, rtx_3080):
    workload = traced("sdxl")
    plain = predicted(rtx_3080, workload)
    assert phase(plain, "denoise").resident_bytes == workload.weight_bytes
    assert workload.weight_bytes == pytest.approx(6.46 * GIB, rel=0.01)


def test_sdxl_vae_decodes_in_float32(traced, rtx_3080):
    """3.00 GiB of activations at 1024², as a real run shows; the VAE's weights twice."""
    workload = traced("sdxl")
    decode = phase(predicted(rtx_3080, workload), "decode")
    assert decode.activation_bytes == pytest.approx(3.0 * GIB, rel=0.001)
    vae = workload.component("vae")
    assert decode.resident_bytes == workload.weight_bytes + vae.weight_bytes


@pytest.mark.parametrize("moved", ["model_cpu_offload", "sequential_cpu_offload", "group_offload"])
def test_nothing_is_widened_where_it_decodes_in_bfloat16(traced, rtx_3080, moved):
    """However little of the autoencoder is on the device."""
    workload = traced("sdxl")
    vae = workload.component("vae")
    wide, narrow = (
        phase(predicted(rtx_3080, workload, text), "decode").resident_bytes
        for text in (moved, f"{moved},vae_bfloat16")
    )
    held = vae.weight_bytes if moved == "model_cpu_offload" else vae.largest_leaf_bytes
    assert wide - narrow == held
    left = sum(c.unmoved_bytes for c in workload.components)  # the encoders' positions
    assert narrow == held + (left if moved == "sequential_cpu_offload" else 0)


def test_sd15_vae_stays_in_float16(traced, rtx_3080):
    workload = traced("sd15")
    decode = phase(predicted(rtx_3080, workload), "decode")
    assert decode.resident_bytes == workload.weight_bytes
    assert decode.activation_bytes == pytest.approx(0.375 * GIB, rel=0.01)


def test_model_offload_leaves_one_component(traced, rtx_3080):
    workload = traced("sdxl")
    offloaded = predicted(rtx_3080, workload, "model_cpu_offload")
    unet = workload.component("unet").weight_bytes
    assert phase(offloaded, "denoise").resident_bytes == unet
    link = rtx_3080.link
    inward, outward = link.module_h2d_bytes_per_s.value, link.module_d2h_bytes_per_s.value
    # The UNet comes and sends the second text encoder back; it goes itself when the VAE comes.
    encoder = workload.component("text_encoder_2").weight_bytes
    moved = unet / inward + encoder / outward
    assert phase(offloaded, "denoise").transfer_s == pytest.approx(moved)
    vae = workload.component("vae").weight_bytes
    moved = 2 * vae / inward + (unet + vae) / outward  # it comes in float32 and goes in float16
    assert phase(offloaded, "decode").transfer_s == pytest.approx(moved)


def test_sequential_offload_moves_every_weight_at_every_step(traced, rtx_3080):
    few, many = traced("sd15", steps=10), traced("sd15", steps=20)
    text = "sequential_cpu_offload"
    ten, twenty = (phase(predicted(rtx_3080, w, text), "denoise") for w in (few, many))
    # SD 1.5's own scheduler, PNDM, runs the UNet once more than it has steps.
    assert twenty.transfer_s / 21 == pytest.approx(ten.transfer_s / 11)
    left = few.component("text_encoder").unmoved_bytes  # numbers of positions
    assert ten.resident_bytes == few.component("unet").largest_leaf_bytes + left


def test_sequential_offload_leaves_buffers_on_the_device(traced, rtx_3080):
    """accelerate moves parameters alone; SD 3's table of positions is a buffer."""
    workload = traced("sd3-medium")
    table = 192 * 192 * 1536 * 2
    assert workload.component("transformer").unmoved_bytes == table
    prediction = predicted(rtx_3080, workload, "sequential_cpu_offload")
    for name, component in (("encode", "text_encoder_3"), ("decode", "vae")):
        layer = workload.component(component).largest_leaf_bytes
        assert phase(prediction, name).resident_bytes == pytest.approx(layer + table, rel=0.001)
    weights = Predictor(rtx_3080, workload).weights(execution_of(()))
    in_ram = weights.host_bytes(execution_of(parse_settings("sequential_cpu_offload")))
    left = sum(c.unmoved_bytes for c in workload.components)
    assert in_ram == PROCESS_BYTES + workload.weight_bytes - left


def test_slicing_the_decode_binds_less(traced, rtx_3080):
    """The published SDXL run at batch 4: VAE slicing saves what model offload does not."""
    workload = traced("sdxl", batch=4)
    plain, sliced, offloaded = (
        predicted(rtx_3080, workload, text) for text in ("", "vae_slicing", "model_cpu_offload")
    )
    assert plain.binding_phase.name == "decode"
    assert phase(plain, "decode").activation_bytes == pytest.approx(12 * GIB, rel=0.001)
    assert phase(sliced, "decode").activation_bytes == pytest.approx(3.04 * GIB, rel=0.02)
    assert sliced.peak_bytes < offloaded.peak_bytes < plain.peak_bytes
    assert sliced.seconds < offloaded.seconds


def test_tiling_counts_its_overlap(traced, rtx_3080):
    workload = traced("sdxl")
    plain, tiled = (predicted(rtx_3080, workload, t) for t in ("", "vae_tiling:tile=512"))
    assert phase(tiled, "decode").activation_bytes == pytest.approx(0.76 * GIB, rel=0.01)
    assert phase(tiled, "decode").compute_s > 1.3 * phase(plain, "decode").compute_s


def test_tile_larger_than_the_image_changes_nothing(traced, rtx_3080):
    workload = traced("sd15")
    assert predicted(rtx_3080, workload, "vae_tiling:tile=1024") == predicted(rtx_3080, workload)
    with pytest.raises(OptimizationError, match="not traced"):
        predicted(rtx_3080, workload, "vae_tiling:tile=128")


def test_each_call_of_an_autoencoder_takes_the_switches_that_change_it(rtx_3080):
    """Image-to-image encodes one picture, which tiles cut, and decodes two, one after the other."""
    workload = workload_of("sd-img2img")
    predicted(rtx_3080, workload, "vae_slicing,vae_tiling:tile=64")
    encode, decode = (workload.phases[i].runs[-1] for i in (0, 2))
    assert encode.switched("sliced+tiled:64") == encode.variants["tiled:64"]
    assert encode.switched("sliced") == encode.trace
    assert decode.switched("sliced+tiled:64") == decode.variants["sliced+tiled:64"]


def test_tome_needs_depth_on_sdxl(traced, rtx_3080):
    """SDXL has no self-attention at the latent's resolution: max_downsample 1 merges nothing."""
    workload = traced("sdxl")
    plain = predicted(rtx_3080, workload)
    times = [
        phase(
            predicted(rtx_3080, workload, f"tome:ratio=0.5:max_downsample={d}"), "denoise"
        ).seconds
        for d in (1, 2, 4)
    ]
    assert times[0] == phase(plain, "denoise").seconds
    assert times[2] < times[0]


def test_tome_flops_as_measured_by_a_flop_counter(traced, rtx_3080):
    """SD 1.5, ratio 0.5: 1.607 to 1.449 TFLOP at 512², 9.348 to 7.026 at 1024² (as counted)."""
    for side, before, after in ((512, 1.607, 1.449), (1024, 9.348, 7.026)):
        workload = traced("sd15", height=side, width=side)
        denoise = next(p for p in workload.phases if p.name == "denoise").runs[0].trace
        assert denoise.flops / 1e12 == pytest.approx(before, rel=0.002)
        from autotune.decide.merging import matching, merged
        from autotune.optimizations.execution import TokenMerge

        merge = TokenMerge(0.5, 1)
        total = 0.0
        for operator in denoise.operators:
            if operator.block_tokens != workload.latent_tokens:
                total += operator.flops * operator.count
                continue
            total += merged(merge, operator).flops * operator.count
            if operator.attention is not None:
                extra = matching(operator.attention, operator.block_tokens, 2)
                total += extra.flops * operator.count
        assert total / 1e12 == pytest.approx(after, rel=0.02)


def test_guidance_off_halves_the_batch(traced, rtx_3080):
    guided, plain = traced("sd15", guidance_scale=7.5), traced("sd15", guidance_scale=1.0)
    ratio = (
        phase(predicted(rtx_3080, guided), "denoise").compute_s
        / phase(predicted(rtx_3080, plain), "denoise").compute_s
    )
    assert ratio == pytest.approx(2, rel=0.02)


def test_cpu_pays_for_every_dispatch(traced, cpu_machine):
    prediction = predicted(cpu_machine, traced("sd15"))
    assert all(p.launch_s > 0 for p in prediction.phases)
    assert all(p.margin_bytes < 4 * MIB + p.activation_bytes // 20 for p in prediction.phases)
    assert prediction.phases[0].workspace_bytes == 0, "nothing is convolved"
    assert all(p.needed_bytes == p.peak_bytes + p.margin_bytes for p in prediction.phases)


def test_offload_without_a_link_is_refused(traced, cpu_machine):
    with pytest.raises(OptimizationError, match="link"):
        predicted(cpu_machine, traced("sd15"), "model_cpu_offload")


def test_launch_bound_only_where_the_host_is_slower(traced, rtx_3080):
    kernels = rtx_3080.kernels
    slow = msgspec.structs.replace(kernels.dispatch_s, value=kernels.dispatch_s.value * 1000)
    host = msgspec.structs.replace(kernels, dispatch_s=slow)
    machine = msgspec.structs.replace(rtx_3080, kernels=host)
    prediction = predicted(machine, traced("sd15"))
    assert find_bottleneck(prediction, Budget(80 * GIB, None)).resource == "launch"
    assert phase(predicted(rtx_3080, traced("sd15")), "denoise").launch_s == 0


@pytest.mark.parametrize("beside", ["", ",compile"])
def test_a_fused_projection_saves_a_bare_launch(traced, beside):
    """Where the host sets the pace; taking the result apart costs what the modules' Python did."""
    workload, h100 = traced("sdxl"), load_machine("h100-80gb")
    plain, fused = (
        phase(predicted(h100, workload, text), "denoise")
        for text in (beside.strip(","), f"fuse_qkv{beside}")
    )
    assert plain.launch_s > 0
    assert fused.seconds == plain.seconds
    kernels = msgspec.structs.replace(h100.kernels, launch_s=Figure(5e-6))
    measured = msgspec.structs.replace(h100, kernels=kernels)
    saved = (
        plain.seconds - phase(predicted(measured, workload, f"fuse_qkv{beside}"), "denoise").seconds
    )
    products = workload.component("unet").fusable_products
    assert saved == pytest.approx(50 * products * 5e-6)


def test_budget_leaves_context_and_reserve(rtx_3080):
    free = rtx_3080.device.free_bytes
    assert budget_of(rtx_3080).device_bytes == free - rtx_3080.context_bytes
    assert budget_of(rtx_3080, reserve=GIB).device_bytes == free - rtx_3080.context_bytes - GIB
    assert budget_of(rtx_3080, vram_limit=GIB).device_bytes == GIB - rtx_3080.context_bytes
    assert budget_of(rtx_3080, vram_limit=1).device_bytes == 0


def test_channels_last_needs_no_layout_copies(traced, rtx_3080):
    workload = traced("sdxl")
    plain, nhwc = (phase(predicted(rtx_3080, workload, t), "decode") for t in ("", "channels_last"))
    assert nhwc.workspace_bytes < plain.workspace_bytes


def test_report_has_the_documented_fields(traced, rtx_3080):
    report = predict(rtx_3080, traced("sd15"), parse_settings("tome:ratio=0.4")).to_dict()
    assert set(report) >= {"machine", "workload", "optimizations", "prediction", "fits", "notes"}
    assert report["optimizations"] == [
        {"name": "tome", "parameters": {"ratio": 0.4, "max_downsample": 1}}
    ]
    first = report["prediction"]["phases"][0]
    assert set(first) >= {"name", "resident_bytes", "activation_bytes", "peak_bytes", "seconds"}


def test_an_execution_left_alone_is_the_baseline(traced, rtx_3080):
    workload = traced("sd15")
    assert predicted(rtx_3080, workload) == Predictor(rtx_3080, workload).predict(Execution())
