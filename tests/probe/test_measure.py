"""The whole probe on the CPU."""

from __future__ import annotations

import time

import msgspec
import pytest
import torch

from autotune.errors import MachineError
from autotune.probe import devices
from autotune.probe.host import read_host
from autotune.probe.live import profile_key
from autotune.probe.machine import Device, Machine
from autotune.probe.measure import machine_name, measure_machine


@pytest.fixture(scope="module")
def measured() -> tuple[Machine, float, list[str]]:
    said: list[str] = []
    torch.manual_seed(3)
    state, precision = torch.get_rng_state(), torch.get_float32_matmul_precision()
    start = time.perf_counter()
    machine = measure_machine("cpu", progress=said.append)
    seconds = time.perf_counter() - start
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_float32_matmul_precision() == precision
    assert torch.is_grad_enabled()
    return machine, seconds, said


def test_it_takes_seconds(measured: tuple[Machine, float, list[str]]) -> None:
    machine, seconds, said = measured
    assert seconds <= 10
    assert machine.measured_in_s == pytest.approx(seconds, abs=1)
    assert "attention" in said


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
    }


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

    monkeypatch.setattr("autotune.probe.measure.measure_kernels", full)
    with pytest.raises(MachineError, match="too little free memory"):
        measure_machine("cpu")


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


def test_names() -> None:
    gpu = Device(kind="cuda", name="NVIDIA H100 80GB HBM3", total_bytes=1, free_bytes=1)
    cpu = Device(kind="cpu", name="Intel(R) Xeon(R)", total_bytes=1, free_bytes=1)
    assert machine_name(gpu, 8) == "nvidia-h100-80gb-hbm3"
    assert machine_name(cpu, 2) == "cpu-intel-xeon-2-cores"
