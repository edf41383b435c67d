"""What a person is told about a machine."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from autotune.probe import findings
from autotune.probe.attention import XFORMERS_ABSENT
from autotune.probe.findings import find
from autotune.probe.machine import AttentionRate, Figure, GpuProcess, Machine
from autotune.probe.noise import STOLEN, Noise
from autotune.probe.reference import load_machine
from autotune.probe.samples import UNSTEADY, figure_of

GIB = 1 << 30


@pytest.fixture(autouse=True)
def working_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings.nvml, "unavailable_reason", lambda: None)
    monkeypatch.setattr(findings.nvml, "gpus", tuple)


def gpu_machine(**changes: Any) -> Machine:
    return replace(load_machine("rtx-3080-10gb"), source="measured", **changes)


def told(machine: Machine, **arguments: Any) -> str:
    return "\n".join(find(machine, **{"disturbed_above": 0.3} | arguments).findings)


def test_a_healthy_machine_has_nothing_to_say() -> None:
    assert told(gpu_machine()) == ""


@pytest.mark.parametrize(
    ("width", "generation", "cause"),
    [
        (4, 4, "runs at x4, likely in a slot with fewer lanes"),
        (8, 3, "runs at x8"),
        (16, 1, "generation 1 even under load"),
        (16, 3, "generation 3 even under load"),
        (16, 4, "NUMA"),
        (None, None, "NUMA"),
    ],
)
def test_a_slow_link_has_a_likely_cause(
    width: int | None, generation: int | None, cause: str
) -> None:
    machine = gpu_machine()
    assert machine.link is not None
    link = replace(
        machine.link,
        h2d_pinned_bytes_per_s=Figure(value=6.2e9),
        pcie_width_in_copy=width,
        pcie_generation_in_copy=generation,
    )
    text = told(replace(machine, link=link))
    assert "6.2 GB/s to the GPU, of the 31.5 GB/s that PCIe 4 x16 promises" in text
    assert cause in text


def test_a_link_may_be_slow_one_way_only() -> None:
    machine = gpu_machine()
    assert machine.link is not None
    link = replace(machine.link, d2h_pinned_bytes_per_s=Figure(value=3.1e9))
    text = told(replace(machine, link=link))
    assert "Pinned copies reach 3.1 GB/s from the GPU, of the 31.5 GB/s" in text
    assert "to the GPU" not in text
    link = replace(link, h2d_pinned_bytes_per_s=Figure(value=6.2e9))
    text = told(replace(machine, link=link))
    assert "reach 6.2 GB/s to the GPU and 3.1 GB/s from the GPU, of the 31.5 GB/s" in text


def test_a_link_that_carries_what_it_promises_is_healthy_whatever_it_says() -> None:
    """An idle link reports generation 1: the copies, not the state, decide."""
    machine = gpu_machine()
    assert machine.link is not None
    link = replace(machine.link, pcie_generation_in_copy=1, pcie_width_in_copy=4)
    assert told(replace(machine, link=link)) == ""


def test_other_processes_are_named() -> None:
    machine = gpu_machine()
    held = (GpuProcess(pid=42, used_bytes=3 * GIB, name="game"), GpuProcess(pid=43))
    text = told(replace(machine, device=replace(machine.device, processes=held)))
    assert "hold 3.00 GiB" in text
    assert "game (PID 42, 3.00 GiB)" in text


def test_unusable_xformers_says_what_to_install() -> None:
    broken = AttentionRate(
        implementation="xformers",
        dtype="float16",
        batch=1,
        heads=1,
        q_tokens=1,
        kv_tokens=1,
        head_dim=8,
        error="NotImplementedError: xFormers wasn't build with CUDA support",
    )
    versions = {"torch": "2.13.0", "cuda": "13.0", "xformers": "0.0.35"}
    text = told(gpu_machine(attention=(broken,), software=versions))
    assert "xformers 0.0.35 is installed but unusable here" in text
    assert "for torch 2.13.0 and CUDA 13.0: pip install --force-reinstall" in text
    assert "https://download.pytorch.org/whl/cu130" in text
    missing = "OSError: libcudart.so.12: cannot open shared object file: No such file or directory"
    unloaded = (replace(broken, error=missing),)
    text = told(gpu_machine(attention=unloaded, software=versions))
    assert f"unusable here (it is built for CUDA 12: {missing})" in text
    text = told(gpu_machine(attention=(broken,), software={"torch": "2.9.1"}))
    assert "install the xformers release that names torch 2.9.1" in text
    assert told(gpu_machine(attention=(replace(broken, error=XFORMERS_ABSENT),))) == ""
    sdpa = replace(broken, implementation="sdpa", error="wrong result")
    assert "sdpa attention fails at 1 tokens" in told(gpu_machine(attention=(sdpa,)))
    flash = replace(broken, implementation="sdpa_flash", error="RuntimeError: only sm80 and later")
    assert told(gpu_machine(attention=(flash,))) == "", "SDPA then chooses another backend"
    wrong = replace(flash, error="wrong result: 0.5 relative deviation")
    assert "sdpa_flash attention fails" in told(gpu_machine(attention=(wrong,)))


def test_throttling_and_shared_memory() -> None:
    machine = gpu_machine()
    device = replace(
        machine.device,
        throttle_reasons=("power cap", "hardware thermal slowdown"),
        unified_memory=True,
    )
    text = told(replace(machine, device=device))
    assert "hardware thermal slowdown" in text
    assert "power cap" not in text, "a GPU at its power limit is working as it should"
    assert "offloading would save nothing" in text


def test_no_gpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = load_machine("cpu-16-cores")
    monkeypatch.setattr(findings, "why_no_gpu", lambda software: "no NVIDIA driver here")
    text = told(machine)
    assert text.startswith("No usable NVIDIA GPU, so the CPU does the work: no NVIDIA driver here.")


def test_noise_is_admitted() -> None:
    machine = gpu_machine()
    noisy = figure_of([1.0, 2.0, 3.0, 9.0])
    machine = replace(machine, kernels=replace(machine.kernels, memory_bytes_per_s=noisy))
    assert "Unsteady while measured, twice (memory bandwidth)" in told(machine)
    slightly = figure_of([1.0, 1.1, 1.2, 1.3], disturbances=(UNSTEADY,))
    steadier = replace(machine, kernels=replace(machine.kernels, memory_bytes_per_s=slightly))
    assert told(steadier) == "", "flagged in the file, not worth a sentence"
    assert "kept 7.5 of 8 cores busy" in told(machine, noise=Noise(foreign_cores=7.5))
    assert "cores busy" not in told(machine, noise=Noise(foreign_cores=2.0))


def test_what_disturbed_a_figure_is_named_once() -> None:
    machine = gpu_machine()
    hot = ("hardware thermal slowdown",)
    slow = {name: Figure(1.0, disturbances=hot) for name in "abcdef"}
    kernels = replace(machine.kernels, matmul_flops_per_s=slow)
    text = told(replace(machine, kernels=kernels))
    assert text == (
        "Hardware thermal slowdown while measured, twice (matmul a, matmul b, matmul c, matmul d "
        "and 2 more): measure again when it is quiet."
    )
    device = replace(machine.device, throttle_reasons=hot)
    text = told(replace(machine, kernels=kernels, device=device))
    assert text == "The GPU was slowed down while it was measured: hardware thermal slowdown."
    stolen = replace(machine.kernels, dispatch_s=Figure(1.0, disturbances=(STOLEN,)))
    text = told(replace(machine, kernels=stolen), noise=Noise(stolen_cores=1.5))
    assert "twice" not in text
    assert "The hypervisor gave" in text


def test_what_was_left_out_is_named() -> None:
    text = told(gpu_machine(left_out=("float8 products", "copies beside a kernel")))
    assert "Left out for want of time: float8 products; copies beside a kernel." in text


def test_a_shared_machine_is_admitted() -> None:
    machine = gpu_machine()
    assert "gave 1.5 of 8 cores to other virtual" in told(machine, noise=Noise(stolen_cores=1.5))
    assert "GPU busy for up to 35 %" in told(machine, noise=Noise(gpu_percent=35))
    assert told(machine, noise=Noise(stolen_cores=0.1, gpu_percent=4)) == ""
