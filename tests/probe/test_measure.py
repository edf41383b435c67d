"""The whole probe on the CPU."""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from msgspec.structs import replace

from autotune.errors import MachineError
from autotune.probe import devices
from autotune.probe.host import read_host
from autotune.probe.live import profile_key
from autotune.probe.machine import Device, GpuProcess, Machine, OperatorTime
from autotune.probe.measure import (
    _CONTEXT_ESTIMATE_BYTES,
    QUICK,
    _Context,
    machine_name,
    measure_machine,
)
from autotune.probe.reference import load_machine
from autotune.profile.staleness import STALE
from tests.probe.pretend import SlowDevice, pretend, shrink

GIB = 1 << 30


@pytest.fixture(scope="module")
def measured() -> tuple[Machine, float, list[str]]:
    pytest.importorskip("diffusers")  # imported once per process, and not what is measured here
    said: list[str] = []
    torch.manual_seed(3)
    state, precision = torch.get_rng_state(), torch.get_float32_matmul_precision()
    start = time.perf_counter()
    # With time enough for everything, however busy this machine is; test_budget.py is about time.
    machine = measure_machine("cpu", progress=said.append, budget_s=120)
    seconds = time.perf_counter() - start
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_float32_matmul_precision() == precision
    assert torch.is_grad_enabled()
    return machine, seconds, said


def test_it_says_what_it_does_and_how_long_it_took(
    measured: tuple[Machine, float, list[str]],
) -> None:
    machine, seconds, said = measured
    assert machine.measured_in_s == pytest.approx(seconds, abs=1)
    assert {"memory", "float32 kernels", "attention", "disk"} <= set(said)
    assert machine.left_out == ()


def test_the_machine_is_complete(measured: tuple[Machine, float, list[str]]) -> None:
    machine = measured[0]
    assert machine.source == "measured"
    assert machine.device.kind == "cpu"
    assert machine.link is None
    assert machine.context_bytes == 0
    assert machine.name == f"{profile_key(machine)}-cores"
    assert machine.software["torch"]
    assert {rate.implementation for rate in machine.attention} == {
        "sdpa",
        "xformers",
        "vanilla",
        "sliced",
        "sdpa_flash",
        "sdpa_math",
    }
    disk = machine.host.disk_read_bytes_per_s
    assert disk is None or disk.value > 0


def test_a_quick_look_is_a_whole_machine() -> None:
    machine = measure_machine("cpu", quick=True)
    assert machine.findings[-1] == QUICK
    assert machine.kernels.matmul_flops_per_s["float32"].value > 0
    assert {rate.implementation for rate in machine.attention} == {"sdpa", "xformers"}
    assert msgspec.json.decode(msgspec.json.encode(machine), type=Machine) == machine


def test_it_survives_a_file(measured: tuple[Machine, float, list[str]]) -> None:
    machine = measured[0]
    assert msgspec.json.decode(msgspec.json.encode(machine), type=Machine) == machine


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "cpu:7", ""])
def test_an_impossible_device_lists_those_that_exist(name: str) -> None:
    with pytest.raises(MachineError, match=r"choose from: .*cpu"):
        measure_machine(name)


def test_too_little_memory_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sys.modules["autotune.probe.measure"], "measure_kernels", full)
    with pytest.raises(MachineError, match="too little free memory"):
        measure_machine("cpu")


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ("CUDA error: no kernel image is available for execution on the device\nmore", "built for"),
        ("CUDA error: unspecified launch failure", "nvidia-smi"),
    ],
)
def test_a_gpu_that_fails_is_said_plainly(
    monkeypatch: pytest.MonkeyPatch, message: str, remedy: str
) -> None:
    def fail(*_: object, **__: object) -> object:
        raise RuntimeError(message)

    monkeypatch.setattr(sys.modules["autotune.probe.measure"], "measure_kernels", fail)
    with pytest.raises(RuntimeError):
        measure_machine("cpu")
    with pretend(monkeypatch, "cuda"):
        monkeypatch.setattr(torch.cuda, "empty_cache", fail)
        with pytest.raises(MachineError, match="cuda:0 fails while it is measured") as raised:
            measure_machine("cuda:0")
    assert "more" not in raised.value.message
    assert remedy in raised.value.hint


def test_the_default_is_the_gpu_with_most_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda:0": 3, "cuda:1": 9, "cuda:2": 9}
    monkeypatch.setattr(devices, "existing_devices", lambda: (*free, "cpu"))
    monkeypatch.setattr(devices, "cuda_uuid", str)
    gpu = devices.nvml.Gpu
    monkeypatch.setattr(
        devices.nvml,
        "gpu",
        lambda uuid: gpu(index=0, uuid=uuid, name="", free_bytes=free[uuid]),
    )
    assert str(devices.choose_device(None)) == "cuda:1"
    assert str(devices.choose_device("cuda:2")) == "cuda:2"
    assert str(devices.choose_device("cuda")) == "cuda:0"


def test_the_cpu_is_described_by_its_host() -> None:
    host = read_host()
    device = devices.describe(torch.device("cpu"), host)
    assert (device.total_bytes, device.free_bytes) == (
        host.ram_total_bytes,
        host.ram_available_bytes,
    )


CUDA = torch.device("cuda:0")


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What torch and NVML would say of a GPU; the test changes it."""
    properties = SimpleNamespace(
        name="NVIDIA RTX", major=8, minor=6, is_integrated=0, uuid="1-2-3", total_memory=9 * GIB
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 9 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: GIB // 2)
    gpu = devices.nvml.Gpu(
        index=0, uuid="GPU-1-2-3", name="RTX", total_bytes=10 * GIB, free_bytes=8 * GIB
    )
    world = SimpleNamespace(properties=properties, gpu=gpu)
    monkeypatch.setattr(devices.nvml, "gpu", lambda uuid: world.gpu)
    return world


def test_a_gpu_is_described_by_nvml_where_it_answers(fake_cuda: Any) -> None:
    device = devices.describe(CUDA, read_host())
    assert (device.uuid, device.compute_capability) == ("GPU-1-2-3", "8.6")
    assert (device.free_bytes, device.total_bytes) == (8 * GIB, 10 * GIB)
    assert not device.unified_memory


def test_a_gpu_without_nvml_is_described_by_torch(fake_cuda: Any) -> None:
    fake_cuda.gpu = None
    device = devices.describe(CUDA, read_host())
    assert (device.uuid, device.name) == ("GPU-1-2-3", "NVIDIA RTX")
    assert (device.free_bytes, device.total_bytes) == (5 * GIB, 9 * GIB)


def test_unified_memory_is_the_hosts(fake_cuda: Any) -> None:
    fake_cuda.properties.is_integrated = 1
    fake_cuda.gpu = replace(fake_cuda.gpu, total_bytes=None, free_bytes=None)
    host = read_host()
    device = devices.describe(CUDA, host)
    assert device.unified_memory
    assert device.free_bytes == host.ram_available_bytes


def test_the_context_is_what_went_missing_beside_tensors(fake_cuda: Any) -> None:
    context = _Context(CUDA)
    context.free_before = 8 * GIB
    fake_cuda.gpu = replace(fake_cuda.gpu, free_bytes=7 * GIB)
    assert context.bytes_now() == GIB // 2


def test_a_context_from_before_is_read_from_our_own_entry(fake_cuda: Any) -> None:
    context = _Context(CUDA)
    context.free_before = None
    own = GpuProcess(pid=os.getpid(), used_bytes=GIB)
    fake_cuda.gpu = replace(fake_cuda.gpu, processes=(own,))
    assert context.bytes_now() == GIB // 2


def test_an_implausible_context_gives_way_to_the_estimate(fake_cuda: Any) -> None:
    context = _Context(CUDA)
    context.free_before = 8 * GIB + 1
    assert context.bytes_now() == _CONTEXT_ESTIMATE_BYTES
    assert _Context(torch.device("cpu")).bytes_now() == 0


def test_names() -> None:
    gpu = Device(kind="cuda", name="NVIDIA H100 80GB HBM3", total_bytes=1, free_bytes=1)
    cpu = Device(kind="cpu", name="Intel(R) Xeon(R)", total_bytes=1, free_bytes=1)
    assert machine_name(gpu, 8) == "nvidia-h100-80gb-hbm3"
    assert machine_name(cpu, 2) == "cpu-intel-xeon-2-cores"


def test_parts_of_a_known_machine(measured: tuple[Machine, float, list[str]]) -> None:
    """What is asked for is measured, and nothing else."""
    known = replace(
        measured[0],
        operators={"a": OperatorTime(1.0)},
        context_bytes=7,
        left_out=("bfloat16 kernels", "attention over 7 tokens and more"),
    )
    said: list[str] = []
    machine = measure_machine(
        "cpu", progress=said.append, known=known, parts={"attention"}, budget_s=0.5
    )
    assert said == ["memory", "attention"]
    assert machine.attention != known.attention
    assert machine.kernels == known.kernels
    assert machine.host.disk_read_bytes_per_s == known.host.disk_read_bytes_per_s
    assert (machine.operators, machine.context_bytes) == (known.operators, 7)
    assert known.left_out[0] in machine.left_out
    assert known.left_out[1] not in machine.left_out
    assert any(known.left_out[0] in finding for finding in machine.findings)
    assert machine.measured_at != known.measured_at or machine.device != known.device


def test_what_the_host_spends_is_a_part(measured: tuple[Machine, float, list[str]]) -> None:
    known = replace(measured[0], attention=())
    said: list[str] = []
    machine = measure_machine(
        "cpu", progress=said.append, known=known, parts={"dispatch"}, budget_s=120
    )
    assert said == ["memory", "loading diffusers", "dispatch cost"]
    rates = (k.matmul_flops_per_s for k in (machine.kernels, known.kernels))
    assert len({str(rate) for rate in rates}) == 1
    assert machine.kernels.launch_s != known.kernels.launch_s
    assert machine.kernels.dispatch_s.source == "measured"
    assert machine.attention == ()


def test_another_device_is_measured_whole() -> None:
    known = replace(load_machine("rtx-3080-10gb"), source="measured")
    said: list[str] = []
    machine = measure_machine("cpu", progress=said.append, known=known, parts=(), budget_s=0.01)
    assert machine.device.kind == "cpu"
    assert "float32 kernels" in said


def test_a_new_driver_leaves_the_link_as_it_was_measured(
    monkeypatch: pytest.MonkeyPatch, slow_clock: Any
) -> None:
    """What ``module.to()`` reaches is measured again, what pinned copies reach is not."""
    shrink(monkeypatch)
    recorded = load_machine("rtx-3080-10gb")
    known = replace(recorded, device=replace(recorded.device, uuid=None))
    monkeypatch.setattr(torch.version, "hip", "6.4")  # NVML is not asked
    said: list[str] = []
    parts = STALE["driver"]
    with pretend(monkeypatch, "cuda", ("Some GPU",)), SlowDevice(slow_clock.advance, 5e-3):
        machine = measure_machine("cuda:0", progress=said.append, known=known, parts=parts)
    before, link = known.link, machine.link
    assert before is not None
    assert link is not None
    assert link.h2d_pinned_bytes_per_s == before.h2d_pinned_bytes_per_s
    assert link.h2d_pageable_bytes_per_s == before.h2d_pageable_bytes_per_s
    assert link.module_h2d_bytes_per_s.source == "measured"
    assert link.module_h2d_bytes_per_s != before.module_h2d_bytes_per_s
    assert machine.kernels.matmul_flops_per_s != known.kernels.matmul_flops_per_s
    assert machine.kernels.offload_hook_s != known.kernels.offload_hook_s
    assert machine.attention != known.attention
    assert "disk" not in said
