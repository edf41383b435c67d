"""Kernel rates on the CPU, and that measuring leaves no trace."""

from __future__ import annotations

import pytest
import torch

from autotune.probe import kernels
from autotune.probe.kernels import (
    dtypes,
    matmul_rate,
    measure_kernels,
    memory_rate,
    offload_hook_cost,
    random,
)

CPU = torch.device("cpu")
MIB = 1 << 20


def test_every_figure_of_the_cpu() -> None:
    torch.manual_seed(7)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with torch.no_grad():
        measured = measure_kernels(CPU, memory_bytes=64 * MIB, budget_s=0.005)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert set(measured.matmul_flops_per_s) == set(dtypes(CPU))
    assert set(measured.convolution_flops_per_s) == set(measured.matmul_flops_per_s)
    assert measured.offload_hook_s is None
    figures = (
        *measured.matmul_flops_per_s.values(),
        *measured.convolution_channels_last_flops_per_s.values(),
        measured.memory_bytes_per_s,
        measured.dispatch_s,
    )
    assert all(figure.value > 0 and figure.samples for figure in figures)


def test_the_cpu_is_measured_in_float32_and_never_in_float16() -> None:
    assert "float32" in dtypes(CPU)
    assert "float16" not in dtypes(CPU)


def test_a_dtype_that_a_kernel_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device, dtype: torch.dtype, *_: object) -> object:
        if dtype is torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return matmul_rate(device, dtype, 64 * MIB, 0.001)

    both = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    monkeypatch.setattr(kernels, "dtypes", lambda device: both)
    monkeypatch.setattr(kernels, "matmul_rate", refuse)
    with torch.no_grad():
        measured = measure_kernels(CPU, memory_bytes=32 * MIB, budget_s=0.001)
    assert set(measured.matmul_flops_per_s) == {"float32"}


def test_the_offload_hook_runs_where_accelerate_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    state = torch.get_rng_state()
    with torch.no_grad():
        figure = offload_hook_cost(CPU, 0.01)
    assert figure is not None
    assert 0 < figure.value < 1
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert offload_hook_cost(CPU, 0.01) is None


def test_buffers_respect_the_allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    empty_like = torch.empty_like

    def watch(source: torch.Tensor) -> torch.Tensor:
        sizes.append(source.nbytes)
        return empty_like(source)

    monkeypatch.setattr(torch, "empty_like", watch)
    memory_rate(CPU, 48 * MIB, 0.001)
    assert sizes == [24 * MIB]


def test_random_repeats_itself() -> None:
    first, second = (random((3, 4), CPU, torch.float32) for _ in range(2))
    assert torch.equal(first, second)
