"""What chips could do, against what their makers publish."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from msgspec.structs import replace

from autotune.probe.machine import Device, Figure
from autotune.probe.peak import matmul_peak, memory_peak
from autotune.probe.reference import load_machine

ROOT = Path(__file__).resolve().parents[2]
GPUS = [
    name
    for name in sorted(path.stem for path in (ROOT / "profiles").glob("*.json"))
    if load_machine(name).device.kind == "cuda"
]


def published(figure: Figure) -> float:
    """The peak that the figure's source quotes."""
    number = re.search(r"([\d.]+) (TFLOP/s|GB/s)", figure.source)
    assert number is not None
    return float(number[1]) * (1e12 if number[2] == "TFLOP/s" else 1e9)


@pytest.mark.parametrize("name", GPUS)
def test_peaks_are_those_that_are_published(name: str) -> None:
    """To a tenth: some documents assume another clock than the driver allows."""
    machine = load_machine(name)
    assert memory_peak(machine.device) == pytest.approx(
        published(machine.kernels.memory_bytes_per_s), rel=0.1
    )
    for dtype, figure in machine.kernels.matmul_flops_per_s.items():
        assert matmul_peak(machine.device, dtype) == pytest.approx(published(figure), rel=0.1)
        assert figure.value < (matmul_peak(machine.device, dtype) or 0)


def test_tf32_is_half_of_float16_and_float8_twice() -> None:
    device = load_machine("h100-80gb").device
    half = matmul_peak(device, "float16")
    assert half is not None
    assert matmul_peak(device, "tensorfloat32") == half / 2
    assert matmul_peak(device, "float8_e4m3fn") == half * 2


def test_what_is_not_known_has_no_peak() -> None:
    device = load_machine("rtx-3080-10gb").device
    assert matmul_peak(device, "int3") is None
    assert matmul_peak(replace(device, compute_capability="99.9"), "float16") is None
    assert matmul_peak(replace(device, compute_capability="99.9"), "float32") is None
    assert matmul_peak(replace(device, sm_clock_max_mhz=None), "float32") is None
    assert memory_peak(replace(device, memory_bus_bits=None)) is None
    cpu = Device(kind="cpu", name="CPU", total_bytes=1, free_bytes=1)
    assert matmul_peak(cpu, "float32") is memory_peak(cpu) is None
    gtx = load_machine("gtx-1660-6gb").device
    assert matmul_peak(gtx, "float16") is None, "it has no tensor cores"
