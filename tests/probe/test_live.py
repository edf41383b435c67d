"""What is read at every start, on this CPU and under a stub driver."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from autotune.errors import MachineError
from autotune.probe import live
from autotune.probe.live import identity, profile_key, refresh, refresh_free, slug
from autotune.probe.machine import Device, GpuProcess, Machine
from autotune.probe.reference import load_machine

GIB = 1 << 30
FIRST = "GPU-11111111-aaaa-0000-0000-000000000000"
SECOND = "GPU-22222222-bbbb-0000-0000-000000000000"


def cpu_machine() -> Machine:
    device = Device(kind="cpu", name="CPU", total_bytes=1, free_bytes=1)
    return replace(load_machine("cpu-16-cores"), source="measured", device=device)


def test_refresh_reads_the_memory_of_now() -> None:
    fresh = refresh(cpu_machine())
    assert fresh.device.total_bytes > GIB // 4
    assert fresh.host.ram_available_bytes == fresh.device.free_bytes


def test_a_reference_machine_is_not_here() -> None:
    machine = load_machine("rtx-3080-10gb")
    assert refresh(machine) is machine


def test_refresh_under_a_driver_imports_no_torch(under_driver: Any) -> None:
    code = f"""
import json, sys
from msgspec.structs import replace
from autotune.probe.live import refresh
from autotune.probe.reference import load_machine
machine = load_machine("rtx-3080-10gb")
device = replace(machine.device, uuid={FIRST!r}, free_bytes=1)
fresh = refresh(replace(machine, source="measured", device=device))
names = [process.pid for process in fresh.device.processes]
print(json.dumps([fresh.device.free_bytes, names, "torch" in sys.modules]))
"""
    assert under_driver("desktop", code) == [7 * GIB, [1, 4194302, 4194303], False]
    assert under_driver("gb10", code)[0] == 1, "what NVML does not say stays as it was"


OTHERS = f"""
import json, sys
from msgspec.structs import replace
from autotune.probe.live import refresh
from autotune.probe.reference import load_machine
machine = load_machine("t4-16gb-x2")
device = replace(machine.device, uuid={SECOND!r}, index=1)
fresh = refresh(replace(machine, source="measured", device=device))
others = [[gpu.index, gpu.uuid, gpu.name, gpu.free_bytes] for gpu in fresh.others]
print(json.dumps([others, fresh.device.index, "torch" in sys.modules]))
"""


def test_other_gpus_are_read_at_every_start(under_driver: Any) -> None:
    others, index, has_torch = under_driver("two", OTHERS)
    assert others == [[0, FIRST, "NVIDIA GeForce RTX 3080", 7 * GIB]]
    assert index == 1
    assert not has_torch
    assert under_driver("desktop", OTHERS) == [[], 1, False], "what was there before is gone"
    only = under_driver("two", OTHERS, CUDA_VISIBLE_DEVICES="1")
    assert only == [[], 0, False], "the only one that this process sees is CUDA's first"


IDENTITY = """
import json
from autotune.errors import MachineError
from autotune.probe import live, software
software.torch_build = lambda: {build}
try:
    print(json.dumps(live.identity({device!r})))
except MachineError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.parametrize(
    ("device", "key"), [(None, SECOND), ("cuda", FIRST), ("cuda:0", FIRST), ("cuda:1", SECOND)]
)
def test_identity_is_the_uuid(under_driver: Any, device: str | None, key: str) -> None:
    code = IDENTITY.format(build={"cuda": "13.0"}, device=device)
    assert under_driver("two", code) == key


def test_identity_follows_visible_devices(under_driver: Any) -> None:
    code = IDENTITY.format(build={"cuda": "13.0"}, device="cuda:0")
    assert under_driver("two", code, CUDA_VISIBLE_DEVICES="1") == SECOND


FASTEST_FIRST = (
    """
import sys
from types import SimpleNamespace
uuids = [{second!r}, {first!r}][:{count}]
facts = [SimpleNamespace(uuid=uuid.removeprefix("GPU-")) for uuid in uuids]
cuda = SimpleNamespace(device_count=lambda: len(facts), get_device_properties=facts.__getitem__)
sys.modules["torch"] = SimpleNamespace(cuda=cuda)
"""
    + IDENTITY
)


@pytest.mark.parametrize(
    ("device", "environment", "count", "key"),
    [
        ("cuda:0", {}, 2, SECOND),
        ("cuda:1", {}, 2, FIRST),
        (None, {}, 2, SECOND),
        ("cuda:0", {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, 2, FIRST),
        ("cuda:0", {"CUDA_VISIBLE_DEVICES": "0"}, 1, SECOND),
        (None, {"CUDA_VISIBLE_DEVICES": "0"}, 1, SECOND),
        ("cuda:0", {"CUDA_VISIBLE_DEVICES": FIRST}, 1, FIRST),
        ("cuda:0", {}, 0, FIRST),
    ],
)
def test_identity_among_different_gpus_is_cudas(
    under_driver: Any, device: str | None, environment: dict[str, str], count: int, key: str
) -> None:
    """The second by bus is the faster one, so that CUDA calls it the first."""
    code = FASTEST_FIRST.format(
        build={"cuda": "13.0"}, device=device, first=FIRST, second=SECOND, count=count
    )
    assert under_driver("mixed", code, **environment) == key


@pytest.mark.parametrize("environment", [{}, {"CUDA_VISIBLE_DEVICES": "1"}])
def test_identity_among_equal_gpus_imports_no_torch(
    under_driver: Any, environment: dict[str, str]
) -> None:
    code = IDENTITY.format(build={"cuda": "13.0"}, device="cuda:0")
    code += "import sys; assert 'torch' not in sys.modules"
    assert under_driver("two", code, **environment)


def test_identity_of_a_gpu_that_is_not_there(under_driver: Any) -> None:
    code = IDENTITY.format(build={"cuda": "13.0"}, device="cuda:7")
    message = under_driver("two", code)
    assert "'cuda:7'" in message
    assert "cuda:0 (NVIDIA GeForce RTX 3080)" in message


def test_a_torch_built_for_the_cpu_makes_it_a_cpu(under_driver: Any) -> None:
    assert under_driver("two", IDENTITY.format(build={}, device=None)).startswith("cpu-")


@pytest.mark.parametrize(("there", "key"), [(True, "xpu-0-"), (False, "cpu-")])
def test_identity_of_an_intel_gpu_is_what_torch_finds(
    monkeypatch: pytest.MonkeyPatch, there: bool, key: str
) -> None:
    """The profile of a measured one is found again, and none is looked for where there is none."""
    monkeypatch.setattr(live.software, "torch_build", lambda: {"xpu": "2025"})
    monkeypatch.setattr(torch.xpu, "is_available", lambda: there)
    assert identity().startswith(key)
    if there:
        device = Device(kind="xpu", name="Arc", total_bytes=1, free_bytes=1)
        assert profile_key(replace(cpu_machine(), device=device)) == identity()


def test_identity_of_the_cpu() -> None:
    assert identity("cpu").startswith("cpu-")
    assert identity("cpu") == identity("cpu") == profile_key(cpu_machine())


def test_an_impossible_device_is_refused() -> None:
    with pytest.raises(MachineError, match="no device 'cuda:99'"):
        identity("cuda:99")


def test_this_process_is_not_another_one() -> None:
    mine, other = GpuProcess(pid=os.getpid()), GpuProcess(pid=1)
    assert live.other_processes((mine, other)) == (other,)


@given(st.text())
def test_slugs_are_file_names(name: str) -> None:
    text = slug(name)
    assert slug(text) == text
    assert set(text) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_slugs_of_real_names() -> None:
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert slug("Intel(R) Xeon(R) CPU @ 2.20GHz") == "intel-xeon-cpu-2-20ghz"


# ---- free memory alone ---------------------------------------------------------------------------

REFRESHED = """
import json, msgspec, os
from autotune.probe import nvml
from autotune.probe.live import refresh_free
from autotune.probe.reference import load_machine
machine = load_machine("rtx-3080-10gb")
(gpu,) = nvml.gpus()
device = msgspec.structs.replace(machine.device, uuid=gpu.uuid)
machine = msgspec.structs.replace(machine, source="measured", device=device)
before = nvml.free_bytes(gpu.uuid)
found = [refresh_free(machine).device.free_bytes]
os.environ["NVML_STUB_TAKEN"] = str(3 << 30)
found.append(refresh_free(machine).device.free_bytes)
print(json.dumps([before, *found]))
"""


def test_free_memory_alone_is_read_quickly(under_driver: Any) -> None:
    before, first, second = under_driver("desktop", REFRESHED)
    assert before == first == 7 * GIB
    assert second == 4 * GIB


def test_a_recorded_machine_is_not_here(rtx_3080: Machine) -> None:
    assert refresh_free(rtx_3080) is rtx_3080
