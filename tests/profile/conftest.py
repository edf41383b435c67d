"""A small machine, and a cache folder of its own for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotune.probe.machine import Device, Figure, Host, Kernels, Machine
from autotune.profile.profile import PhaseMeasurement, Profile, RunRecord


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of this test; not made yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("AUTOTUNE_CACHE", str(folder))
    return folder


@pytest.fixture
def machine() -> Machine:
    """A GPU machine with round figures."""
    return Machine(
        name="test-gpu",
        source="measured",
        device=Device(
            kind="cuda",
            name="Test GPU",
            total_bytes=10 << 30,
            free_bytes=9 << 30,
            uuid="GPU-0",
            driver="580.82",
        ),
        host=Host(
            cpu="Test CPU",
            cores=8,
            ram_total_bytes=32 << 30,
            ram_available_bytes=20 << 30,
            os="Linux 6.1.0-28-amd64",
        ),
        kernels=Kernels(
            matmul_flops_per_s={
                "float32": Figure(value=2e13),
                "float16": Figure(value=5e13, samples=(4e13, 5e13, 6e13)),
            },
            convolution_flops_per_s={
                "float32": Figure(value=2e13),
                "float16": Figure(value=4e13),
            },
            memory_bytes_per_s=Figure(value=7e11),
            dispatch_s=Figure(value=5e-6),
        ),
        software={"torch": "2.12.0", "diffusers": "0.42.1", "python": "3.11.7"},
    )


@pytest.fixture
def run() -> RunRecord:
    """One remembered run of two phases."""
    return RunRecord(
        workload="sd15 512x512 batch 1, 30 steps, float16",
        optimizations=("xformers", "tome:ratio=0.3"),
        predicted=(PhaseMeasurement(name="denoise", seconds=1.5, peak_bytes=3 << 30),),
        measured=(
            PhaseMeasurement(name="denoise", seconds=1.6, peak_bytes=3 << 30),
            PhaseMeasurement(name="decode", seconds=0.2, peak_bytes=4 << 30),
        ),
        at="2026-01-02T03:04:05+00:00",
    )


@pytest.fixture
def profile(machine: Machine, run: RunRecord) -> Profile:
    """The test machine's profile with one run."""
    return Profile(
        key="GPU-0",
        machine=machine,
        runs=(run,),
        created_at="2026-01-01T00:00:00+00:00",
        updated_at="2026-01-02T03:04:05+00:00",
    )
