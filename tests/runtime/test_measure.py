"""The phase meter: phases in order, and no trace left on the modules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from autotune.runtime.measure import Gauge, Level, PhaseMeter, cpu_peaks

PlanOf = Callable[..., Any]


@pytest.fixture
def meter(pipe: Any, plan_of: PlanOf) -> PhaseMeter:
    return PhaseMeter(pipe, plan_of(pipe)[1], "cpu")


def test_phases_come_in_order(pipe: Any, meter: PhaseMeter, draw: Any) -> None:
    assert not meter.measured
    with meter.watch():
        draw(pipe)
    assert [m.name for m in meter.measured] == ["encode", "denoise", "decode"]


def test_several_calls_add_up(pipe: Any, meter: PhaseMeter, draw: Any) -> None:
    with meter.watch():
        draw(pipe)
    first = {phase.name: phase.seconds for phase in meter.measured}
    with meter.watch():
        draw(pipe)
    assert all(m.seconds > first[m.name] for m in meter.measured)
    assert len(meter.measured) == 3


def test_a_component_of_two_phases_is_counted_in_the_one_that_runs(
    sd_pipe: Any, plan_of: PlanOf, draw: Any
) -> None:
    """Nothing goes back to an earlier phase, until another image begins."""
    workload = plan_of(sd_pipe)[1]
    encode, denoise, decode = workload.phases
    both = msgspec.structs.replace(denoise, runs=(*encode.runs, *denoise.runs))
    odd = msgspec.structs.replace(workload, phases=(encode, both, decode))
    meter = PhaseMeter(sd_pipe, odd, "cpu")
    with meter.watch():
        draw(sd_pipe)
        first = {m.name: m.seconds for m in meter.measured}
        draw(sd_pipe)
    assert [m.name for m in meter.measured] == ["encode", "denoise", "decode"]
    assert meter.measured[0].seconds > first["encode"]


def test_watching_changes_no_image_and_leaves_nothing(
    pipe: Any, meter: PhaseMeter, draw: Any, snapshot: Any
) -> None:
    plain = draw(pipe)
    before = snapshot(pipe)
    with meter.watch():
        assert snapshot(pipe) != before
        assert torch.equal(draw(pipe), plain)
    assert snapshot(pipe) == before


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
def test_a_call_that_raises_leaves_nothing_either(
    pipe: Any, meter: PhaseMeter, draw: Any, snapshot: Any, error: BaseException
) -> None:
    draw(pipe)
    before = snapshot(pipe)

    def fail(*_: Any) -> None:
        raise error

    with pytest.raises(type(error)), meter.watch():
        handle = pipe.unet.conv_out.register_forward_pre_hook(fail)
        try:
            draw(pipe)
        finally:
            handle.remove()
    assert snapshot(pipe) == before
    interrupted = {phase.name for phase in meter.measured}
    assert "denoise" not in interrupted
    with meter.watch():
        draw(pipe)
    assert [m.name for m in meter.measured] == ["encode", "denoise", "decode"]


def test_a_decode_set_by_hand_is_kept(sd_pipe: Any, plan_of: PlanOf, draw: Any) -> None:
    calls = []
    original = sd_pipe.vae.decode

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    sd_pipe.vae.decode = mine
    with PhaseMeter(sd_pipe, plan_of(sd_pipe)[1], "cpu").watch():
        draw(sd_pipe)
    assert sd_pipe.vae.__dict__["decode"] is mine
    assert len(calls) == 1


def test_it_measures_through_offload_hooks(sd_pipe: Any, plan_of: PlanOf, draw: Any) -> None:
    meter = PhaseMeter(sd_pipe, plan_of(sd_pipe)[1], "cpu")
    sd_pipe.enable_model_cpu_offload(device="cpu")
    with meter.watch():
        draw(sd_pipe)
    assert [m.name for m in meter.measured] == ["encode", "denoise", "decode"]


class _Log(Gauge):
    """Writes down when it is asked, beside what else happens."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def begin(self) -> None:
        self.events.append("begin")

    def read(self) -> Level:
        self.events.append("read")
        return Level()


def test_a_peak_is_not_of_what_the_phase_before_left(
    sd_pipe: Any, plan_of: PlanOf, draw: Any
) -> None:
    """Model offload moves the denoiser away only as the autoencoder is called."""
    gauge = _Log()
    meter = PhaseMeter(sd_pipe, plan_of(sd_pipe)[1], "cpu", gauge)
    sd_pipe.enable_model_cpu_offload(device="cpu")
    hooks = [m._hf_hook for m in (sd_pipe.text_encoder, sd_pipe.unet, sd_pipe.vae)]
    for hook in hooks:
        hook.pre_forward = functools.partial(_logged, gauge.events, hook.pre_forward)
    mine = [hook.pre_forward for hook in hooks]
    with meter.watch():
        sd_pipe("a", num_inference_steps=2, height=64, width=64, guidance_scale=1.0)
    assert " ".join(gauge.events).split(" read") == [
        "begin moved begin",
        " begin moved begin moved",  # two steps
        " begin moved begin",
        "",
    ]
    assert [hook.pre_forward for hook in hooks] == mine


def test_what_is_no_hook_of_accelerates_is_left_alone(
    sd_pipe: Any, plan_of: PlanOf, draw: Any
) -> None:
    """mmgp marks its modules with an object of that name."""
    sd_pipe.unet._hf_hook = mark = object()
    meter = PhaseMeter(sd_pipe, plan_of(sd_pipe)[1], "cpu")
    with meter.watch():
        draw(sd_pipe)
    assert len(meter.measured) == 3
    assert sd_pipe.unet._hf_hook is mark


def _logged(events: list[str], move: Any, *args: Any, **kwargs: Any) -> Any:
    events.append("moved")
    return move(*args, **kwargs)


def test_cpu_peaks_count_tensors_on_top_of_the_weights(sd_pipe: Any, plan_of: PlanOf) -> None:
    meter = PhaseMeter(sd_pipe, plan_of(sd_pipe)[1], "cpu")
    tensor = torch.randn(2, 4, 16, 16)

    def call() -> None:
        with meter.watch(), torch.no_grad():
            sd_pipe.text_encoder(torch.zeros(1, 16, dtype=torch.long))
            sd_pipe.vae.decode(tensor)
            kept = torch.empty(10 << 20, dtype=torch.uint8)
            del kept

    peaks = cpu_peaks(call, weight_bytes=1 << 40)
    assert set(peaks) == {"encode", "decode"}
    assert (1 << 40) < peaks["encode"] < (1 << 40) + (1 << 20)
    assert (10 << 20) <= peaks["decode"] - (1 << 40) < (11 << 20)


def test_cpu_peaks_end_the_profiler_when_the_call_raises(capfd: Any) -> None:
    def call() -> None:
        raise KeyError("prompt")

    for _ in range(2):  # a profiler left running would refuse the second
        with pytest.raises(KeyError):
            cpu_peaks(call, 0)
    assert capfd.readouterr().err == ""
