"""Kernel rates on the CPU, and that measuring leaves no trace."""

from __future__ import annotations

import math
import statistics
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autotune.probe import kernels
from autotune.probe.kernels import (
    dtypes,
    float8_rate,
    float32_precision,
    matmul_rate,
    measure_kernels,
    memory_rate,
    narrow_products,
    offload_hook_cost,
    offloaded_layers,
    random,
)
from autotune.probe.timing import Timer

CPU = torch.device("cpu")
BRIEF = Timer(CPU, 0.001)
MIB = 1 << 20


def test_every_figure_of_the_cpu() -> None:
    torch.manual_seed(7)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with torch.no_grad():
        measured = measure_kernels(Timer(CPU, 0.005), memory_bytes=64 * MIB)
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
    def refuse(timer: Timer, dtype: torch.dtype, *_: object) -> object:
        if dtype is torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return matmul_rate(timer, dtype, 64 * MIB)

    both = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    monkeypatch.setattr(kernels, "dtypes", lambda device: both)
    monkeypatch.setattr(kernels, "matmul_rate", refuse)
    with torch.no_grad():
        measured = measure_kernels(BRIEF, memory_bytes=32 * MIB)
    assert set(measured.matmul_flops_per_s) == {"float32"}


def test_a_quick_look_measures_what_every_prediction_needs() -> None:
    with torch.no_grad():
        measured = measure_kernels(BRIEF, memory_bytes=32 * MIB, quick=True)
    assert set(measured.matmul_flops_per_s) == set(measured.convolution_flops_per_s) == {"float32"}
    assert measured.convolution_channels_last_flops_per_s == {}
    assert 0 < measured.dispatch_s.value < 1e-3
    assert "bare" in measured.dispatch_s.source


def precisions() -> list[Any]:
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    return [torch.get_float32_matmul_precision(), *(b.fp32_precision for b in backends)]


@pytest.mark.parametrize("before", ["highest", "high"])
def test_the_precision_of_float32_comes_back(before: str) -> None:
    untouched = precisions()
    with float32_precision(before):
        inside = precisions()
        with float32_precision("high"):
            assert torch.get_float32_matmul_precision() == "high"
        assert precisions() == inside
        with pytest.raises(ZeroDivisionError), float32_precision("highest"):
            raise ZeroDivisionError
        assert precisions() == inside
    assert precisions() == untouched


@pytest.mark.parametrize(
    ("capability", "names"),
    [
        ((7, 5), set()),
        ((8, 0), {"tensorfloat32"}),
        ((8, 9), {"tensorfloat32", "float8_e4m3fn"}),
        ((12, 0), {"tensorfloat32", "float8_e4m3fn"}),
    ],
)
def test_narrow_products_follow_the_hardware(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], names: set[str]
) -> None:
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    used: list[str] = []

    def product(*_: object) -> str:
        used.append(torch.get_float32_matmul_precision())
        return "figure"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(kernels, "matmul_rate", product)
    monkeypatch.setattr(kernels, "float8_rate", lambda *_: "figure")
    assert set(narrow_products(Timer(torch.device("cuda:0")), MIB)) == names
    assert used == ["high"] * (capability >= (8, 0))
    assert narrow_products(BRIEF, MIB) == {}


def test_a_library_without_float8_has_no_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    properties = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(kernels, "matmul_rate", refuse)
    monkeypatch.setattr(kernels, "float8_rate", refuse)
    untouched = precisions()
    assert narrow_products(Timer(torch.device("cuda:0")), MIB) == {}
    assert precisions() == untouched


def test_float8_products_are_called_as_the_hardware_wants_them() -> None:
    """A CPU emulates the call: its operands and their layout are the same."""
    with torch.no_grad():
        assert float8_rate(BRIEF, 4 * MIB).value > 0


def test_the_offload_hook_is_what_the_bytes_do_not_explain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("accelerate")
    state = torch.get_rng_state()
    size = sum(parameter.nbytes for parameter in offloaded_layers().parameters())
    with torch.no_grad():
        instant = offload_hook_cost(BRIEF, math.inf)
        explained = offload_hook_cost(BRIEF, size / 60.0)  # a minute for the bytes alone
    assert instant is not None
    assert explained is not None
    assert 0 < instant.value < 1
    assert explained.value == 0.0
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(kernels, "is_importable", lambda name: False)
    assert offload_hook_cost(BRIEF, math.inf) is None


def test_the_offloaded_layers_are_as_large_as_a_unets() -> None:
    sizes = [sum(p.nbytes for p in layer.parameters()) for layer in offloaded_layers()]
    assert 0.8e6 < statistics.median(sizes) < 4e6
    assert 3e6 < statistics.mean(sizes) < 6e6


def test_buffers_respect_the_allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    empty_like = torch.empty_like

    def watch(source: torch.Tensor) -> torch.Tensor:
        sizes.append(source.nbytes)
        return empty_like(source)

    monkeypatch.setattr(torch, "empty_like", watch)
    memory_rate(BRIEF, 48 * MIB)
    assert sizes == [16 * MIB, 24 * MIB]


def test_random_repeats_itself() -> None:
    first, second = (random((3, 4), CPU, torch.float32) for _ in range(2))
    assert torch.equal(first, second)
