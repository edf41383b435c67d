"""Where nothing fits: what is offered helps, in the numbers that are given."""

from __future__ import annotations

import itertools
import math

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autotune.decide.choose import QUALITIES, Limits, choose
from autotune.decide.plan import Plan, WayOut
from autotune.decide.ways_out import MOST_TRACES, MOST_WAYS
from autotune.errors import RequestError
from autotune.probe.machine import GpuProcess, Machine
from autotune.units import GIB, MIB, format_bytes
from autotune.workload.workload import Request, Trace, Workload
from tests.decide.strategies import machines, workloads
from tests.thorough import examples
from tests.workloads import all_cast


def small(machine: Machine, free_bytes: int, *processes: GpuProcess) -> Machine:
    device = msgspec.structs.replace(machine.device, free_bytes=free_bytes, processes=processes)
    return msgspec.structs.replace(machine, device=device)


def reworked(workload: Workload, request: Request) -> Workload:
    """Activations follow pixels, images and bytes per number; weights only the last."""
    before = workload.request
    width = {"float32": 4}.get(request.dtype, 2) / {"float32": 4}.get(before.dtype, 2)
    pixels = request.height * request.width * request.batch * request.frames
    share = width * pixels / (before.height * before.width * before.batch * before.frames)

    def scaled(trace: Trace) -> Trace:
        return msgspec.structs.replace(
            trace,
            activation_bytes=math.ceil(trace.activation_bytes * share),
            operators=tuple(
                msgspec.structs.replace(o, live_bytes=math.ceil(o.live_bytes * share))
                for o in trace.operators
            ),
        )

    phases = tuple(
        msgspec.structs.replace(
            phase,
            runs=tuple(
                msgspec.structs.replace(
                    run,
                    trace=scaled(run.trace),
                    variants={k: scaled(v) for k, v in run.variants.items()},
                )
                for run in phase.runs
            ),
        )
        for phase in workload.phases
    )
    return msgspec.structs.replace(workload, request=request, phases=phases)


def followed(way: WayOut, machine: Machine, workload: Workload, limits: Limits) -> Plan:
    """The plan after doing what the way out says."""
    change = way.change
    device, host = machine.device, machine.host
    closed = [p for p in device.processes if p.pid in change.get("pids", ())]
    free = min(device.total_bytes, device.free_bytes + sum(p.used_bytes or 0 for p in closed))
    free += change.get("device_bytes", 0)
    more = host.ram_available_bytes + change.get("host_bytes", 0)
    host = msgspec.structs.replace(host, ram_available_bytes=more)
    machine = small(msgspec.structs.replace(machine, host=host), free)
    fields = {f: change[f] for f in Limits.__struct_fields__ if f in change}
    asked = {f: change[f] for f in Request.__struct_fields__ if f in change}
    beside = {"pids", "device_bytes", "host_bytes"}
    assert set(change) <= {*fields, *asked, *beside}
    if asked:
        workload = reworked(workload, msgspec.structs.replace(workload.request, **asked))
    return choose(machine, workload, msgspec.structs.replace(limits, **fields))


memory_limits = st.none() | st.integers(100, 4000).map(lambda mib: mib * MIB)


@examples(usually=40, thoroughly=400)
@given(
    machine=machines(),
    workload=workloads(),
    quality=st.sampled_from(QUALITIES),
    free=st.integers(100, 4000),
    only=st.sampled_from(((), (), ("xformers",))),
    vram_limit=memory_limits,
    ram_limit=memory_limits,
)
def test_every_way_out_leads_out(machine, workload, quality, free, only, vram_limit, ram_limit):
    machine = small(machine, free * MIB, *machine.device.processes)
    limits = Limits(quality=quality, only=only, vram_limit=vram_limit, ram_limit=ram_limit)
    traced = []

    def rework(request: Request) -> Workload:
        traced.append(request)
        return reworked(workload, request)

    plan = choose(machine, workload, limits, rework=rework)
    assume(not plan.fits)
    assert 1 <= len(plan.remedies) <= MOST_WAYS
    assert len(traced) <= MOST_TRACES
    changes = [way.change for way in plan.remedies]
    assert all(a != b for a, b in itertools.combinations(changes, 2))
    for way in plan.remedies:
        after = followed(way, machine, workload, limits)
        assert after.fits
        assert after.optimizations == way.optimizations
        assert after.prediction.mean_seconds == way.seconds
        assert after.prediction.needed_bytes == way.needed_bytes
        assert after.prediction.host_bytes == way.host_bytes
        # Of two things, none would do alone.
        for name in ("device_bytes", "host_bytes"):
            if name in way.change and len(way.change) > 1:
                less = msgspec.structs.replace(way, change={**way.change, name: 0})
                assert not followed(less, machine, workload, limits).fits
    assert plan.ways_out == tuple(way.text for way in plan.remedies)


def test_a_plan_that_fits_needs_no_other_trace(traced, rtx_3080):
    def rework(request: Request) -> Workload:
        raise AssertionError

    plan = choose(rtx_3080, traced("sdxl"), rework=rework)
    assert plan.fits
    assert plan.remedies == ()


def test_programs_that_hold_memory_are_named(traced, rtx_3080):
    game = GpuProcess(4242, 5 * GIB, "game")
    machine = small(rtx_3080, GIB, GpuProcess(7, 200 * MIB, "Xorg"), game)
    plan = choose(machine, traced("sdxl"), Limits(only=("model_cpu_offload",)))
    way = plan.remedies[0]
    assert way.kind == "processes"
    assert way.change == {"pids": (4242,)}
    assert way.text.startswith("closing game (PID 4242), which holds 5.00 GiB (model_cpu_offload")


def test_smaller_images_and_batches_are_traced(traced, rtx_3080):
    """The published run at batch 4: fewer at once costs nothing but calls."""
    workload = traced("sdxl", batch=4)

    def rework(request: Request) -> Workload:
        return traced("sdxl", batch=request.batch, height=request.height, width=request.width)

    machine = small(rtx_3080, 9 * GIB)
    plan = choose(machine, workload, Limits(without=("vae_slicing",)), rework=rework)
    assert not plan.fits
    assert [w.kind for w in plan.remedies] == ["limits", "batch", "quality"]
    batch = plan.remedies[1]
    assert batch.change == {"batch": 2}
    alone = choose(machine, traced("sdxl", batch=2), Limits(without=("vae_slicing",)))
    assert batch.seconds == alone.prediction.seconds


def test_without_a_tracer_only_what_is_checked_is_offered(traced, rtx_3080):
    plan = choose(small(rtx_3080, GIB), traced("sdxl", batch=4))
    assert not plan.fits
    assert {w.kind for w in plan.remedies} <= {"quality", "ram", "vram"}


def test_a_request_that_the_model_refuses_is_passed_over(traced, rtx_3080):
    def rework(request: Request) -> Workload:
        raise RequestError("no such size")

    plan = choose(small(rtx_3080, GIB), traced("sdxl", batch=4), rework=rework)
    assert {w.kind for w in plan.remedies} <= {"quality", "ram", "vram"}


@pytest.mark.parametrize("ram", [2 * GIB, 5 * GIB])
def test_missing_host_ram_is_told(traced, rtx_3080, ram):
    host = msgspec.structs.replace(rtx_3080.host, ram_available_bytes=ram)
    machine = msgspec.structs.replace(rtx_3080, host=host)
    plan = choose(machine, all_cast(traced("sdxl")))
    assert not plan.fits
    way = next(w for w in plan.remedies if w.kind == "ram")
    assert f"instead of {format_bytes(ram)}" in way.text
    assert way.host_bytes > ram


def test_what_cannot_help_under_a_limit_is_not_offered(traced, rtx_3080):
    limit = choose(rtx_3080, all_cast(traced("sdxl")), Limits(ram_limit=4 * GIB))
    assert [w.change for w in limit.remedies] == [{"ram_limit": None}]
    tight = choose(rtx_3080, traced("sdxl"), Limits(vram_limit=200 * MIB))
    assert any("leaves nothing for the pipeline" in note for note in tight.notes)
    assert tight.remedies[0].change == {"vram_limit": None}


def test_two_things_together_where_neither_helps_alone(traced, rtx_3080):
    one = traced("sdxl")
    four = reworked(one, msgspec.structs.replace(one.request, batch=4))
    limits = Limits(only=("group_offload", "vae_tiling"))
    machine = small(rtx_3080, 2000 * MIB)
    plan = choose(machine, four, limits, rework=lambda request: reworked(one, request))
    pair = next(w for w in plan.remedies if "batch" in w.change)
    assert pair.change == {"batch": 1, "quality": "high"}
    assert pair.kind == "quality"
    assert pair.text.startswith("a batch of 1 and quality high (group_offload, vae_tiling: ")
