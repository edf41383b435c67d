"""Devices as torch shows them, joined with NVML's facts, and devices other than NVIDIA's.

No device is here: torch is told of some (``pretend``), NVML is the real binding on a stub driver.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from autotune.errors import MachineError
from autotune.probe import devices, live
from autotune.probe.host import read_host
from autotune.probe.machine import Machine
from autotune.probe.measure import measure_machine
from tests.probe.pretend import SlowDevice, pretend, shrink
from tests.thorough import thoroughly

GIB = 1 << 30
FIRST = "GPU-11111111-aaaa-0000-0000-000000000000"
SECOND = "GPU-22222222-bbbb-0000-0000-000000000000"
SLICE = "MIG-33333333-cccc-0000-0000-000000000000"
OTHER_SLICE = "MIG-44444444-dddd-0000-0000-000000000000"

CHOSEN = """
import json, msgspec, pytest, torch
from autotune.errors import MachineError
from autotune.probe import devices, software
from autotune.probe.host import read_host
from autotune.probe.live import identity
from tests.probe.pretend import pretend

software.torch_build = lambda: {{"cuda": "13.0"}}
with pytest.MonkeyPatch.context() as patch, pretend(patch, "cuda", {names}, {uuids}{more}):
    answers = []
    for name in {devices}:
        device = devices.choose_device(name)
        facts = msgspec.to_builtins(devices.describe(device, read_host()))
        try:
            answers.append([str(device), identity(name), facts])
        except MachineError as error:
            answers.append([str(device), str(error), facts])
print(json.dumps(answers))
"""


def chosen(
    under_driver: Any,
    scenario: str,
    uuids: tuple[str, ...],
    *names: str | None,
    more: str = "",
    **environment: str,
) -> list[tuple[str, str, dict[str, Any]]]:
    """For each name, the device among those that CUDA shows, its profile's key, and its facts."""
    bare = tuple(uuid.partition("-")[2] for uuid in uuids)
    shown = ("NVIDIA GeForce RTX 3080",) * len(uuids)
    code = CHOSEN.format(names=shown, uuids=bare, devices=names or (None,), more=more)
    return [tuple(answer) for answer in under_driver(scenario, code, **environment)]


def test_the_default_is_the_gpu_with_most_free_memory(under_driver: Any) -> None:
    """The second by bus has 9 GiB, the first 7; CUDA may number them either way."""
    ((name, key, facts),) = chosen(under_driver, "two", (FIRST, SECOND))
    assert (name, key, facts["uuid"]) == ("cuda:1", SECOND, SECOND)
    assert facts["free_bytes"] == 9 * GIB
    ((name, key, facts),) = chosen(under_driver, "two", (SECOND, FIRST), CUDA_VISIBLE_DEVICES="1,0")
    assert (name, key, facts["uuid"]) == ("cuda:0", SECOND, SECOND)


@pytest.mark.parametrize(
    ("visible", "order"),
    [
        ("1,0", (SECOND, FIRST)),
        ("1", (SECOND,)),
        (f"{SECOND},{FIRST}", (SECOND, FIRST)),
    ],
)
def test_a_device_asked_for_is_the_same_to_cuda_to_nvml_and_to_the_profile(
    under_driver: Any, visible: str, order: tuple[str, ...]
) -> None:
    names = [f"cuda:{index}" for index in range(len(order))]
    found = chosen(under_driver, "two", order, *names, CUDA_VISIBLE_DEVICES=visible)
    for index, (uuid, (name, key, facts)) in enumerate(zip(order, found, strict=True)):
        assert (name, key, facts["uuid"]) == (f"cuda:{index}", uuid, uuid)
        assert facts["free_bytes"] == (9 if uuid == SECOND else 7) * GIB


def test_everything_that_nvml_knows_is_told_of_the_device(under_driver: Any) -> None:
    ((_, _, facts),) = chosen(under_driver, "desktop", (FIRST,))
    assert facts["processes"][0]["pid"] == 1
    told = {key: facts[key] for key in facts if key not in ("processes", "name", "kind")}
    assert told == {
        "uuid": FIRST,
        "total_bytes": 10 * GIB,
        "free_bytes": 7 * GIB,
        "used_bytes": 3 * GIB - (200 << 20),
        "compute_capability": "8.6",
        "driver": "575.51.03",
        "power_limit_watts": 300.0,
        "power_limit_default_watts": 320.0,
        "sm_clock_max_mhz": 2100,
        "memory_clock_max_mhz": 9501,
        "memory_bus_bits": 320,
        "multiprocessors": 68,
        "throttle_reasons": ["software thermal slowdown"],
        "bar1_bytes": 256 << 20,
    }


@pytest.mark.parametrize(
    ("visible", "shown", "uuid"),
    [
        # CUDA gives an instance its own UUID, or (older) that of the whole GPU.
        (None, SLICE, SLICE),
        (None, FIRST, SLICE),
        (OTHER_SLICE, OTHER_SLICE, OTHER_SLICE),
        (OTHER_SLICE, FIRST, OTHER_SLICE),
    ],
)
def test_an_instance_of_a_split_gpu_is_what_is_measured(
    under_driver: Any, visible: str | None, shown: str, uuid: str
) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    ((_, key, facts),) = chosen(under_driver, "mig", (shown,), **environment)
    assert (key, facts["uuid"]) == (uuid, uuid)
    assert (facts["total_bytes"], facts["free_bytes"]) == (10 * GIB, 7 * GIB)
    assert facts["mig_enabled"] is True
    assert "power_limit_watts" not in facts


def test_unified_memory_is_the_hosts(under_driver: Any) -> None:
    ((_, _, facts),) = chosen(under_driver, "gb10", (FIRST,), more=", is_integrated=1")
    assert facts["unified_memory"] is True
    assert facts["total_bytes"] == read_host().ram_total_bytes
    assert not {"used_bytes", "bar1_bytes", "power_limit_watts"} & facts.keys()


def test_a_gpu_that_is_lost_is_described_by_torch(under_driver: Any) -> None:
    lost = {"NVML_STUB_LOST_AFTER": "2"}
    ((_, key, facts),) = chosen(under_driver, "desktop", (FIRST,), "cuda:0", **lost)
    assert key.startswith("there is no device 'cuda:0' here")
    assert "the driver counts 1 GPU that cannot be reached" in key
    assert (facts["uuid"], facts["total_bytes"]) == (FIRST, 8 * GIB)
    assert "driver" not in facts


# --- the whole probe of a pretended GPU, under the stub driver ------------------------------------

WHOLE = """
import sys, time, msgspec, pytest
from autotune.probe import software
from tests.probe.pretend import SlowClock, SlowDevice, pretend, shrink

software.torch_build = lambda: {"cuda": "13.0"}
with pytest.MonkeyPatch.context() as patch:
    shrink(patch)
    clock = SlowClock()
    patch.setattr(time, "perf_counter", clock)
    shown = pretend(patch, "cuda", ("NVIDIA GeForce RTX 3080",), (UUID.removeprefix("GPU-"),))
    with shown, SlowDevice(clock.advance, SECONDS):
        from autotune.probe.measure import measure_machine
        machine = measure_machine()
sys.stdout.buffer.write(msgspec.json.encode(machine))
"""


def whole(under_driver: Any, scenario: str, per_operator_s: float = 2e-3) -> Machine:
    answer = under_driver(scenario, f"UUID, SECONDS = {FIRST!r}, {per_operator_s}\n{WHOLE}")
    return msgspec.convert(answer, Machine)


def test_the_whole_probe_of_a_quiet_laptop(under_driver: Any) -> None:
    machine = whole(under_driver, "laptop", 2e-4)
    assert machine.name == "nvidia-geforce-rtx-3080"
    assert machine.device.uuid == FIRST
    assert machine.link is not None
    link = machine.link
    assert (link.pcie_generation_max, link.pcie_width_max) == (4, 8)
    assert (link.pcie_generation_in_copy, link.pcie_width_in_copy) == (4, 8), "at rest it is at 1"
    assert machine.link.overlap_fraction is not None
    assert {point.pinned for point in machine.link.sweep} == {True, False}
    kernels = machine.kernels
    assert {"float32", "tensorfloat32", "float16", "bfloat16"} == set(kernels.matmul_flops_per_s)
    assert set(kernels.convolution_channels_last_flops_per_s) == {"float32", "float16", "bfloat16"}
    assert kernels.offload_hook_s is not None
    assert kernels.dispatch_s.source == "measured"
    assert machine.left_out == ()
    assert kernels.memory_bytes_per_s.disturbances == ()
    assert {"sdpa", "vanilla", "sliced", "sdpa_flash", "xformers"} <= {
        rate.implementation for rate in machine.attention
    }
    refused = [rate for rate in machine.attention if rate.implementation == "sdpa_cudnn"]
    assert all(rate.error for rate in refused), "kept with what it said"
    assert not any("busy" in text or "slowed" in text for text in machine.findings)


@thoroughly
def test_the_whole_probe_of_a_hot_gpu_that_somebody_else_uses(under_driver: Any) -> None:
    """Every figure is flagged with what disturbed it, and people are told once."""
    machine = whole(under_driver, "desktop")
    disturbed = ("other processes on the GPU", "software thermal slowdown")
    assert machine.kernels.matmul_flops_per_s["float16"].disturbances[:2] == disturbed
    assert machine.link is not None
    assert machine.link.h2d_pinned_bytes_per_s.disturbances[:2] == disturbed
    told = "\n".join(machine.findings)
    assert told.count("slowed down while it was measured: software thermal slowdown") == 1
    assert told.count("kept the GPU busy for up to 35 %") == 1
    assert "Other processes hold 2.50 GiB" in told


# --- CUDA where NVML is missing: a container without its "utility" capability ---------------------


@pytest.mark.parametrize("name", [None, "cuda"])
def test_the_key_of_a_gpu_that_was_lost_says_what_happened(
    under_driver: Any, name: str | None
) -> None:
    code = f"""
import json
from autotune.errors import MachineError
from autotune.probe import live, software
software.torch_build = lambda: {{"cuda": "13.0"}}
try:
    live.identity({name!r})
except MachineError as error:
    print(json.dumps(str(error)))
"""
    said = under_driver("lost", code)
    assert said.startswith("there is no device 'cuda' here")
    assert "dmesg" in said


def test_a_gpu_asked_for_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "why_no_gpu", lambda software: "no NVIDIA driver here")
    monkeypatch.setattr(devices, "existing_devices", lambda: ("cpu",))
    with pytest.raises(MachineError, match="'cuda:1' here") as raised:
        devices.choose_device("cuda:1")
    assert raised.value.hint == "choose from: cpu. No GPU: no NVIDIA driver here"
    with pytest.raises(MachineError, match="'gpu' here") as raised:
        devices.choose_device("gpu")
    assert raised.value.hint == "choose from: cpu"


@pytest.fixture
def cuda_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """A driver shows, CUDA works, NVML does not."""
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(live, "_DRIVER_NODES", (tmp_path / "nvidiactl",))
    monkeypatch.setattr(live.software, "torch_build", lambda: {"cuda": "13.0"})
    for module in (live.nvml, devices.nvml):
        monkeypatch.setattr(module, "unavailable_reason", lambda: "not in this container")
        monkeypatch.setattr(module, "gpus", tuple)
        monkeypatch.setattr(module, "gpu", lambda uuid: None)
    with pretend(monkeypatch, "cuda", ("One", "Two"), ("1-1", "2-2")):
        yield


@pytest.mark.usefixtures("cuda_alone")
def test_the_profile_is_found_again_without_nvml() -> None:
    device = devices.choose_device(None)
    facts = devices.describe(device, read_host())
    assert str(device) == "cuda:0"
    assert facts.uuid == live.identity() == live.identity("cuda:0") == "GPU-1-1"
    assert live.identity("cuda:1") == "GPU-2-2"
    with pytest.raises(MachineError, match="no device 'cuda:2'"):
        live.identity("cuda:2")


@pytest.mark.usefixtures("cuda_alone")
def test_free_memory_without_nvml_is_torchs_of_now() -> None:
    facts = devices.describe(devices.choose_device(None), read_host())
    stale = msgspec.structs.replace(facts, free_bytes=1)
    assert live._refresh_device(stale, 1, 1).free_bytes == 4 * GIB


# --- ROCm, XPU, MPS -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["xpu", "mps", "rocm"])
def test_other_devices_are_the_same_machine(
    monkeypatch: pytest.MonkeyPatch, slow_clock: Any, kind: str
) -> None:
    """Fields that do not exist there are absent, and nothing crashes."""
    shrink(monkeypatch)
    if kind == "rocm":
        monkeypatch.setattr(torch.version, "hip", "6.4")
    with (
        pretend(monkeypatch, "cuda" if kind == "rocm" else kind, ("Some GPU",)),
        SlowDevice(slow_clock.advance, 2e-3),
    ):
        assert devices.existing_devices()[-1] == "cpu"
        machine = measure_machine()
    device = machine.device
    assert device.kind == ("cuda" if kind == "rocm" else kind)
    assert (device.uuid, device.driver, device.compute_capability) == (None, None, None)
    assert device.unified_memory == (kind == "mps")
    assert (machine.link is not None) == (kind == "rocm")
    assert 0 < device.free_bytes <= device.total_bytes
    assert "float16" in machine.kernels.matmul_flops_per_s
    assert {"tensorfloat32", "float8_e4m3fn"}.isdisjoint(machine.kernels.matmul_flops_per_s)
    assert msgspec.json.decode(msgspec.json.encode(machine), type=Machine) == machine


def test_an_accelerator_of_another_kind_leaves_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert devices.existing_devices() == ("cpu",)
    assert str(devices.choose_device(None)) == "cpu"
