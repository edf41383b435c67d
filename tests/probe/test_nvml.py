"""NVML through the real binding, against a driver that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.probe.nvml import throttle_words, visible_uuids

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30
FIRST, SECOND = (
    f"GPU-{digit * 8}-{letter * 4}-0000-0000-000000000000" for digit, letter in ("1a", "2b")
)
SLICE = "MIG-33333333-cccc-0000-0000-000000000000"
OTHER_SLICE = "MIG-44444444-dddd-0000-0000-000000000000"

GPUS = """
import sys, msgspec
from autotune.probe import nvml
gpus = msgspec.to_builtins(nvml.gpus())
visible = [gpu.uuid for gpu in nvml.visible_gpus()]
reason = nvml.unavailable_reason()
answer = {"gpus": gpus, "visible": visible, "reason": reason, "torch": "torch" in sys.modules}
sys.stdout.buffer.write(msgspec.json.encode(answer))
"""


def test_desktop_with_other_processes(under_driver: Any) -> None:
    answer = under_driver("desktop", GPUS)
    (gpu,) = answer["gpus"]
    assert answer["reason"] is None
    assert not answer["torch"]
    assert gpu["name"] == "NVIDIA GeForce RTX 3080"
    assert gpu["uuid"] == FIRST
    assert (gpu["total_bytes"], gpu["free_bytes"]) == (10 * GIB, 7 * GIB)
    assert (gpu["driver"], gpu["compute_capability"]) == ("575.51.03", "8.6")
    assert (gpu["pcie_generation"], gpu["pcie_generation_max"]) == (1, 4)
    assert (gpu["pcie_width"], gpu["pcie_width_max"]) == (16, 16)
    assert gpu["used_bytes"] == 3 * GIB - (200 << 20), "as the driver says, not total less free"
    assert (gpu["power_limit_watts"], gpu["power_limit_default_watts"]) == (300.0, 320.0)
    assert gpu["bar1_bytes"] == 256 << 20
    assert (gpu["sm_clock_mhz"], gpu["sm_clock_max_mhz"]) == (210, 2100)
    assert (gpu["memory_clock_max_mhz"], gpu["memory_bus_bits"]) == (9501, 320)
    assert gpu["throttle_reasons"] == ["software thermal slowdown"]
    assert "mig_enabled" not in gpu


def test_processes_are_merged_largest_first_and_named(under_driver: Any) -> None:
    processes = under_driver("desktop", GPUS)["gpus"][0]["processes"]
    assert [process["pid"] for process in processes] == [1, 4194302, 4194303]
    assert processes[0]["used_bytes"] == 2 * GIB
    assert processes[0]["name"]
    assert processes[1] == {"pid": 4194302, "used_bytes": GIB // 2}
    assert processes[2] == {"pid": 4194303}, "an unknown size is absent, not huge"


def test_laptop_whose_idle_link_rests_at_generation_1(under_driver: Any) -> None:
    code = """
import sys, msgspec
from autotune.probe import nvml
(gpu,) = nvml.gpus()
awake = nvml.link_state(gpu.uuid)
idle = (gpu.pcie_generation, gpu.pcie_width)
most = (gpu.pcie_generation_max, gpu.pcie_width_max)
sys.stdout.buffer.write(msgspec.json.encode({"name": gpu.name, "links": [idle, awake, most]}))
"""
    answer = under_driver("laptop", code)
    assert answer["name"] == "NVIDIA GeForce RTX 3050 Laptop GPU"
    assert answer["links"] == [[1, 8], [4, 8], [4, 8]]


def test_h100_split_by_mig_shows_one_instance(under_driver: Any) -> None:
    answer = under_driver("mig", GPUS)
    (gpu,) = answer["gpus"]
    assert gpu["mig_enabled"] is True
    assert gpu["mig_instances"] == [SLICE, OTHER_SLICE]
    assert answer["visible"] == [SLICE]
    assert under_driver("mig", GPUS, CUDA_VISIBLE_DEVICES=OTHER_SLICE)["visible"] == [OTHER_SLICE]


def test_a_mig_instance_has_its_own_memory(under_driver: Any) -> None:
    (whole,) = under_driver("mig", GPUS)["gpus"]
    assert (whole["compute_capability"], whole["pcie_generation_max"]) == ("9.0", 5)
    assert whole["total_bytes"] == 80 * GIB
    code = f"""
import sys, msgspec
from autotune.probe import nvml
sys.stdout.buffer.write(msgspec.json.encode(nvml.gpu({SLICE!r})))
"""
    part = under_driver("mig", code)
    assert (part["uuid"], part["total_bytes"], part["free_bytes"]) == (SLICE, 10 * GIB, 7 * GIB)
    assert not {"power_limit_watts", "sm_clock_max_mhz", "pcie_width", "mig_enabled"} & set(part)


def test_gb10_leaves_out_what_it_does_not_know(under_driver: Any) -> None:
    (gpu,) = under_driver("gb10", GPUS)["gpus"]
    assert (gpu["name"], gpu["compute_capability"]) == ("NVIDIA GB10", "12.1")
    unknown = {"total_bytes", "free_bytes", "used_bytes", "bar1_bytes", "memory_clock_max_mhz"}
    unknown |= {"pcie_generation", "pcie_generation_max", "pcie_width_max", "power_limit_watts"}
    assert not unknown & set(gpu)
    assert gpu["processes"]


def test_a_driver_that_supports_nothing_leaves_a_name(under_driver: Any) -> None:
    (gpu,) = under_driver("bare", GPUS)["gpus"]
    assert gpu.keys() == {"index", "uuid", "name", "driver"}


def test_old_driver_answers_by_older_names(under_driver: Any) -> None:
    (gpu,) = under_driver("desktop", GPUS, age="old")["gpus"]
    assert gpu["power_limit_watts"] == 320.0
    assert gpu["throttle_reasons"] == ["power cap"]
    assert len(gpu["processes"]) == 3
    assert not {"bar1_bytes", "memory_bus_bits", "mig_enabled"} & set(gpu)
    assert (gpu["total_bytes"], gpu["pcie_width_max"]) == (10 * GIB, 16)


def test_gpu_that_falls_off_the_bus(under_driver: Any) -> None:
    code = f"""
import json
from autotune.probe import nvml
before, after = len(nvml.gpus()), len(nvml.gpus())
print(json.dumps([before, after, nvml.gpu({FIRST!r}), nvml.link_state({FIRST!r})]))
"""
    assert under_driver("lost", code) == [1, 0, None, [None, None]]


def test_gpu_that_falls_off_the_bus_between_any_two_calls(under_driver: Any) -> None:
    """What was told before is kept, nothing raises, and a GPU without a UUID is none."""
    code = f"""
import ctypes, json, os
from autotune.probe import live, nvml
from autotune.probe.noise import Watch
from autotune.probe.reference import load_machine
from msgspec.structs import replace

stub = ctypes.CDLL("libnvidia-ml.so.1")
machine = load_machine("rtx-3080-10gb")
device = replace(machine.device, uuid={FIRST!r}, free_bytes=1)
machine = replace(machine, source="measured", device=device)

def everything():
    gpus = nvml.gpus()
    nvml.visible_gpus(), nvml.gpu({FIRST!r}), nvml.link_state({FIRST!r}), nvml.own_bytes({FIRST!r})
    Watch({FIRST!r}).begin()()
    live.refresh(machine)
    return len(gpus)

os.environ.pop("NVML_STUB_LOST_AFTER", None)
libc = ctypes.CDLL(None)
before = stub.nvmlStubCalls()
seen = [everything()]
calls = stub.nvmlStubCalls() - before
for lost_after in range(calls):
    libc.setenv(b"NVML_STUB_LOST_AFTER", str(stub.nvmlStubCalls() + lost_after).encode(), 1)
    seen.append(everything())
    libc.setenv(b"NVML_STUB_LOST_AFTER", b"999999", 1)
print(json.dumps([calls, seen]))
"""
    calls, seen = under_driver("desktop", code)
    assert calls > 50
    assert seen[0] == 1
    assert sorted(set(seen)) == [0, 1]
    assert seen == sorted(seen[:1]) + sorted(seen[1:]), "lost later, more was told"


def test_driver_without_a_gpu(under_driver: Any) -> None:
    answer = under_driver("none", GPUS)
    assert (answer["gpus"], answer["reason"]) == ([], None)


def test_nvml_starts_at_the_first_question_and_stops_at_the_end(
    under_driver: Any, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    code = f"""
import json, pathlib
from autotune.probe import live, nvml
log = pathlib.Path({str(log)!r})
before = log.exists()
nvml.gpus(), nvml.gpus(), nvml.link_state({FIRST!r})
print(json.dumps([before, log.read_text().split()]))
"""
    assert under_driver("desktop", code, NVML_STUB_LOG=str(log)) == [False, ["start"]]
    assert log.read_text().split() == ["start", "shutdown"]


def test_one_thread_at_a_time_asks(under_driver: Any) -> None:
    code = f"""
import ctypes, json, threading, pynvml
from autotune.probe import nvml
stub = ctypes.CDLL("libnvidia-ml.so.1")

def together(ask):
    threads = [threading.Thread(target=lambda: [ask() for _ in range(20)]) for _ in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    return stub.nvmlStubOverlapped()

ours = together(lambda: nvml.link_state({FIRST!r}))
print(json.dumps([ours, together(pynvml.nvmlDeviceGetCount), stub.nvmlStubStarted()]))
"""
    ours, without_a_lock, started = under_driver("desktop", code, NVML_STUB_SLOW="1")
    assert ours == 0
    assert without_a_lock == 1, "the stub would have noticed"
    assert started == 1


@pytest.mark.parametrize(
    ("scenario", "remedy"),
    [
        ("unloaded", "reboot"),
        ("mismatch", "differ in version"),
        ("forbidden", "/dev/nvidia"),
        ("unknown", "NVML does not start"),
    ],
)
def test_driver_that_does_not_start_says_what_to_do(
    under_driver: Any, scenario: str, remedy: str
) -> None:
    answer = under_driver(scenario, GPUS)
    assert answer["gpus"] == []
    assert remedy in answer["reason"]


def test_no_driver_at_all_says_what_to_do(under_driver: Any, tmp_path: Path) -> None:
    """Also on a machine that has one: the library found first is none."""
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")
    answer = under_driver("desktop", GPUS, LD_LIBRARY_PATH=str(tmp_path))
    assert (answer["gpus"], answer["visible"]) == ([], [])
    assert "--gpus all" in answer["reason"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("pynvml.py", "def nothing(): ...\n"),
        ("pynvml.py", "print 'written for Python 2'\n"),
        ("pynvml.py", "raise RuntimeError('no')\n"),
        ("pynvml/notes.txt", "a folder of somebody's"),
    ],
    ids=["without the functions", "of Python 2", "that raises", "an empty package"],
)
def test_another_package_called_pynvml(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    # A folder without __init__.py gives way to any module: it shadows only where there is none.
    hide = "" if file.endswith(".py") else f"import sys; sys.path[:] = [{str(tmp_path)!r}] + [p "
    hide += "" if file.endswith(".py") else "for p in sys.path if 'site-packages' not in p]\n"
    code = "import msgspec, packaging.version, psutil\n" + hide + GPUS
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout)
    assert answer["gpus"] == []
    assert "pip uninstall pynvml" in answer["reason"]
    if hide or "def" in text:
        assert str(tmp_path) in answer["reason"]


def test_uuids_are_found_bare_as_torch_writes_them(under_driver: Any) -> None:
    code = f"""
import json
from autotune.probe import nvml
bare = nvml.gpu({FIRST.removeprefix("GPU-")!r})
print(json.dumps([bare.uuid, bare.index, nvml.gpu(None), nvml.gpu("GPU-x")]))
"""
    assert under_driver("two", code) == [FIRST, 0, None, None]


def test_visible_devices_reorder_two_gpus(under_driver: Any) -> None:
    assert under_driver("two", GPUS)["visible"] == [FIRST, SECOND]
    assert under_driver("two", GPUS, CUDA_VISIBLE_DEVICES="1,0")["visible"] == [SECOND, FIRST]
    assert under_driver("two", GPUS, CUDA_VISIBLE_DEVICES="GPU-2")["visible"] == [SECOND]
    assert under_driver("two", GPUS, CUDA_VISIBLE_DEVICES="")["visible"] == []


def test_who_keeps_the_gpu_busy(under_driver: Any) -> None:
    code = f"""
import json
from autotune.probe import nvml
print(json.dumps([nvml.busy_percent({FIRST!r}), nvml.others_percent({FIRST!r}, 0.0)]))
"""
    assert under_driver("desktop", code) == [37, 35]
    assert under_driver("container", code) == [37, None], "nobody there is this process"
    assert under_driver("none", code.replace(FIRST, "GPU-x")) == [None, None]


def test_indices_mean_what_they_mean_to_cuda(under_driver: Any) -> None:
    code = "import json; from autotune.probe import nvml; print(json.dumps(nvml.numbers_as_cuda()))"
    assert under_driver("two", code)
    assert not under_driver("mixed", code)
    assert not under_driver("mixed", code, CUDA_VISIBLE_DEVICES="1")
    assert under_driver("mixed", code, CUDA_DEVICE_ORDER="PCI_BUS_ID")
    assert under_driver("mixed", code, CUDA_VISIBLE_DEVICES="GPU-2")


def test_forked_child_opens_nvml_again(under_driver: Any) -> None:
    code = """
import ctypes, json, os
from autotune.probe import nvml
nvml.gpus()
reader, writer = os.pipe()
if os.fork() == 0:
    inside = nvml._session._library is None
    answer = [inside, len(nvml.gpus()), ctypes.CDLL("libnvidia-ml.so.1").nvmlStubStarted()]
    os.write(writer, json.dumps(answer).encode())
    os._exit(0)
os.wait()
print(json.dumps([json.loads(os.read(reader, 99)), len(nvml.gpus())]))
"""
    assert under_driver("desktop", code) == [[True, 1, 1], 1]


def test_workers_forked_while_other_threads_ask(under_driver: Any) -> None:
    """No worker waits for a lock that a thread of the parent held, nor takes over its session."""
    code = """
import json, multiprocessing, threading
from autotune.probe import nvml

def work(answers):
    answers.put([nvml._session._library is None, nvml.gpus()[0].name, nvml.unavailable_reason()])

done = threading.Event()
def ask():
    while not done.is_set():
        nvml.gpus()

threads = [threading.Thread(target=ask) for _ in range(3)]
for thread in threads:
    thread.start()
context = multiprocessing.get_context("fork")
answers = context.Queue()
workers = [context.Process(target=work, args=(answers,)) for _ in range(8)]
for worker in workers:
    worker.start()
found = [answers.get(timeout=30) for _ in workers]
for worker in workers:
    worker.join(30)
done.set()
print(json.dumps([found, [worker.exitcode for worker in workers]]))
"""
    found, codes = under_driver("desktop", code, NVML_STUB_SLOW="1")
    assert codes == [0] * 8
    assert found == [[True, "NVIDIA GeForce RTX 3080", None]] * 8


# --- what CUDA_VISIBLE_DEVICES means, by CUDA's rules ---------------------------------------------

UUIDS = ("GPU-aa11", "GPU-ab22", "GPU-b333")


@pytest.mark.parametrize(
    ("value", "visible"),
    [
        (None, UUIDS),
        ("", ()),
        ("-1", ()),
        ("2,0", ("GPU-b333", "GPU-aa11")),
        (" 1 , 2", ("GPU-ab22", "GPU-b333")),
        ("1gpu2,+2", ("GPU-ab22", "GPU-b333")),
        ("0,7,1", ("GPU-aa11",)),
        ("0,-1,1", ("GPU-aa11",)),
        ("0,GPU-b333", ("GPU-aa11",)),
        ("1,1", ()),
        ("GPU-b,GPU-aa", ("GPU-b333", "GPU-aa11")),
        ("GPU-a", ()),
        ("GPU-b,1", ("GPU-b333",)),
        ("GPU-b,GPU-b333", ()),
        ("NoDevFiles", ()),
        ("99999999999999999999", ()),
    ],
)
def test_visible_uuids(value: str | None, visible: tuple[str, ...]) -> None:
    assert visible_uuids(value, UUIDS) == visible


def test_mig_forms() -> None:
    instances = {"GPU-ab22": ("MIG-x1", "MIG-x2")}
    assert visible_uuids("MIG-x2", UUIDS, instances) == ("MIG-x2",)
    assert visible_uuids("MIG-x2,MIG-x1", UUIDS, instances) == ("MIG-x2",)
    assert visible_uuids("MIG-x", UUIDS, instances) == ()
    assert visible_uuids("1", UUIDS, instances) == ("MIG-x1",)
    assert visible_uuids("0", UUIDS, instances) == ("GPU-aa11",)


@given(st.permutations(range(3)))
def test_any_order_of_indices_is_kept(order: list[int]) -> None:
    value = ",".join(map(str, order))
    assert visible_uuids(value, UUIDS) == tuple(UUIDS[index] for index in order)


@given(st.text(alphabet="0123456789,-+ GPUMIabx", max_size=24))
def test_no_value_invents_or_repeats_a_device(value: str) -> None:
    visible = visible_uuids(value, UUIDS)
    assert set(visible) <= set(UUIDS)
    assert len(set(visible)) == len(visible)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
def test_uuid_form_and_index_form_agree(order: list[int]) -> None:
    by_uuid = ",".join(UUIDS[index] for index in order)
    assert visible_uuids(by_uuid, UUIDS) == visible_uuids(",".join(map(str, order)), UUIDS)


@given(st.integers(0, 0xFFF))
def test_every_throttle_bit_but_idle_has_a_word(bits: int) -> None:
    assert len(throttle_words(bits)) == bin(bits & 0x7FE).count("1")
