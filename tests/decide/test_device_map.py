"""Components on several GPUs, as predicted and chosen."""

from __future__ import annotations

import ast

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autotune.decide.choose import TOLERANCE, Limits, choose, predict
from autotune.decide.metrics import expected
from autotune.decide.predict import Predictor
from autotune.decide.prediction import Bottleneck, budget_of
from autotune.decide.search import execution_of
from autotune.errors import OptimizationError
from autotune.optimizations import find, parse_settings
from autotune.probe.machine import Machine, OtherGpu
from autotune.probe.reference import load_machine
from autotune.runtime.account import explain_plan, shortage
from autotune.units import GIB, MIB
from autotune.workload.workload import Workload
from tests.decide.strategies import machines, workloads

BOTH = parse_settings("device_map:encoders=1,autoencoder=1")


@pytest.fixture
def pair() -> Machine:
    return load_machine("rtx-4090-24gb-x2")


def with_others(machine: Machine, *free_bytes: int) -> Machine:
    """The machine beside twins of its own with so much memory free."""
    device = machine.device
    others = tuple(
        OtherGpu(
            index=index,
            name=device.name,
            total_bytes=1 << 40,
            free_bytes=free,
            compute_capability=device.compute_capability,
        )
        for index, free in enumerate(free_bytes, 1)
    )
    return msgspec.structs.replace(machine, others=others)


def with_free(machine: Machine, free_bytes: int) -> Machine:
    device = msgspec.structs.replace(machine.device, free_bytes=free_bytes)
    return msgspec.structs.replace(machine, device=device)


# ---- predicted ----------------------------------------------------------------------------------


def test_each_gpu_holds_its_own_weights_only(traced, pair):
    workload = traced("flux-dev", dtype="bfloat16")
    prediction = Predictor(pair, workload).predict(execution_of(BOTH))
    transformer = workload.component("transformer").weight_bytes
    for phase in prediction.phases:
        (other,) = phase.elsewhere
        assert phase.resident_bytes == transformer
        assert other.resident_bytes == workload.weight_bytes - transformer
        computes_here = phase.name == "denoise"
        assert bool(phase.activation_bytes) == computes_here
        assert bool(other.activation_bytes) != computes_here
    assert prediction.load.peak_bytes == transformer


def test_no_weight_crosses_only_what_is_handed_on(traced, pair):
    workload = traced("flux-dev", dtype="bfloat16")
    predictor = Predictor(pair, workload)
    mapped, plain = (predictor.predict(execution_of(s)) for s in (BOTH, ()))
    assert 0 < mapped.seconds - plain.seconds < 0.01 * plain.seconds
    assert mapped.phases[1].transfer_s == 0
    assert mapped.host_bytes == plain.host_bytes


def test_the_allocator_is_asked_for_what_is_on_the_device_alone(traced, pair):
    workload = traced("flux-dev", dtype="bfloat16")
    predictor, execution = Predictor(pair, workload), execution_of(BOTH)
    prediction = predictor.predict(execution)
    found = expected(predictor, execution)
    assert found.allocated_bytes == pytest.approx(prediction.peak_bytes, rel=0.01)
    assert found.reserved_bytes <= prediction.needed_bytes


def test_what_stays_at_home_is_counted_there(traced, pair):
    workload = traced("sdxl")
    (setting,) = parse_settings("device_map:encoders=1,autoencoder=0")
    prediction = Predictor(pair, workload).predict(execution_of((setting,)))
    encode, denoise, decode = prediction.phases
    assert decode.activation_bytes and not encode.activation_bytes
    assert decode.elsewhere[0].activation_bytes == 0
    assert denoise.elsewhere == decode.elsewhere


def test_a_gpu_that_is_not_there_is_refused(traced, pair):
    with pytest.raises(OptimizationError, match="no GPU cuda:5"):
        predict(pair, traced("sdxl"), parse_settings("device_map:encoders=5,autoencoder=0"))


# ---- chosen -------------------------------------------------------------------------------------


def test_flux_on_two_cards_needs_no_offload_and_can_be_compiled(traced, pair):
    plan = choose(pair, traced("flux-dev", dtype="bfloat16"), Limits(images=500))
    assert [s.name for s in plan.optimizations] == ["device_map", "compile"]
    assert plan.fits
    assert "on cuda:1" in plan.reasons[0].text
    assert "on cuda:1" in explain_plan(plan)


def test_it_replaces_an_offload_where_host_memory_is_scarce(traced, pair):
    """Streamed weights would have to be pinned in RAM."""
    limits = Limits(only=("device_map", "model_cpu_offload", "sequential_cpu_offload"))
    plan = choose(pair, traced("flux-dev", dtype="bfloat16"), limits)
    assert [s.name for s in plan.optimizations] == ["device_map"]


def test_it_must_fit_on_every_gpu_and_which_one_lacks_is_said(traced, pair):
    machine = with_others(with_free(pair, 26 * GIB), int(9.5 * GIB))
    plan = choose(machine, traced("flux-dev", dtype="bfloat16"), Limits(only=("device_map",)))
    assert plan.prediction.needed_bytes <= plan.budget_bytes
    assert not plan.fits
    assert plan.bottleneck.after == Bottleneck("vram", "encode")
    assert "encode needs" in shortage(plan) and "on cuda:1" in shortage(plan)


def test_the_fewest_gpus_do(traced, pair):
    machine = with_others(pair, 20 * GIB, 20 * GIB)
    plan = choose(machine, traced("flux-dev", dtype="bfloat16"), Limits(only=("device_map",)))
    assert set(plan.prediction.elsewhere_bytes) == {1}


def test_the_lines_name_every_gpu(traced, pair):
    home = msgspec.structs.replace(pair.device, index=1)
    other = msgspec.structs.replace(pair.others[0], index=0)
    machine = msgspec.structs.replace(pair, device=home, others=(other,))
    plan = choose(machine, traced("flux-dev", dtype="bfloat16"), Limits(only=("device_map",)))
    text = plan.code()
    ast.parse(text)
    assert 'there |= dict.fromkeys([pipe.vae], "cuda:0")' in text
    assert 'module.to(there.get(module, "cuda:1"))' in text
    assert "pipe.to(" not in text and "{" not in text.replace("{}", "").replace("{name:", "")


# ---- on machines and workloads of any kind ------------------------------------------------------

sizes = st.integers(0, 24_000).map(lambda mib: mib * MIB)
only = Limits(only=("device_map", "vae_tiling"), quality="high")


@settings(max_examples=60, deadline=None)
@given(machines(), workloads(), st.lists(sizes, min_size=1, max_size=3))
def test_nothing_is_placed_where_it_does_not_fit(
    machine: Machine, workload: Workload, free: list[int]
) -> None:
    assume(machine.link is not None)
    machine = with_others(machine, *free)
    plan = choose(machine, workload, only)
    budget = budget_of(machine)
    for gpu, needed in plan.prediction.elsewhere_bytes.items():
        assert not plan.fits or needed <= budget.elsewhere_bytes[gpu]
        assert plan.elsewhere_budget_bytes[gpu] == budget.elsewhere_bytes[gpu]


@settings(max_examples=60, deadline=None)
@given(machines(), workloads(), st.lists(sizes, min_size=1, max_size=3), sizes, st.data())
def test_more_memory_elsewhere_is_never_slower(
    machine: Machine, workload: Workload, free: list[int], more: int, data: st.DataObject
) -> None:
    assume(machine.link is not None)
    at = data.draw(st.integers(0, len(free) - 1))
    roomier = [size + more * (index == at) for index, size in enumerate(free)]
    little, much = (choose(with_others(machine, *f), workload, only) for f in (free, roomier))
    assert much.fits or not little.fits
    if little.fits:
        assert much.prediction.seconds <= little.prediction.seconds * (1 + TOLERANCE)


def test_it_is_not_offered_to_a_machine_whose_gpus_share_the_hosts_memory(traced, pair):
    machine = msgspec.structs.replace(pair, link=None)
    assert "share their memory" in (find("device_map").unavailable(machine, traced("sdxl")) or "")
