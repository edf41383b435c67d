"""How fast the device computes, moves its memory, and is told what to do."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from autotune.probe.machine import Figure, Kernels
from autotune.probe.replay import host_seconds_per_operator
from autotune.probe.timing import rate, time_call
from autotune.units import GIB, MIB

Progress = Callable[[str], None]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_OFFLOADED_LEAVES = 48


def measure_kernels(
    device: torch.device,
    *,
    memory_bytes: int,
    budget_s: float = 0.1,
    progress: Progress | None = None,
) -> Kernels:
    """Every rate that the device has, in about ``12 · budget_s`` plus the start of its libraries.

    Args:
        device: Where to measure.
        memory_bytes: Device memory that the buffers may take.
        budget_s: About how long each figure is measured.
        progress: Told what is being measured.
    """
    say = progress or (lambda text: None)
    matmul, convolution, channels_last = {}, {}, {}
    for name, dtype in dtypes(device).items():
        say(f"{name} kernels")
        try:
            product = matmul_rate(device, dtype, memory_bytes, budget_s)
            plain = convolution_rate(device, dtype, budget_s)
            last = convolution_rate(device, dtype, budget_s, torch.channels_last)
        except (RuntimeError, TypeError):
            if dtype is torch.float32:
                raise
            continue  # a dtype that some kernel of this device lacks is a dtype it does not have
        matmul[name], convolution[name], channels_last[name] = product, plain, last
    say("memory bandwidth and dispatch cost")
    return Kernels(
        matmul_flops_per_s=matmul,
        convolution_flops_per_s=convolution,
        convolution_channels_last_flops_per_s=channels_last,
        memory_bytes_per_s=memory_rate(device, memory_bytes, budget_s),
        dispatch_s=host_seconds_per_operator(device),
        offload_hook_s=None if device.type == "cpu" else offload_hook_cost(device, budget_s),
    )


def dtypes(device: torch.device) -> dict[str, torch.dtype]:
    """The dtypes worth measuring: those that the device multiplies, not those it merely emulates.

    float16 on a CPU is left out: almost no processor has it, and the rest are slower than in
    float32.
    """
    runs = {"float32", "float16"} if device.type != "cpu" else {"float32"}
    if _has_bfloat16(device):
        runs.add("bfloat16")
    return {name: dtype for name, dtype in _DTYPES.items() if name in runs}


def random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Standard normal values from a generator of their own: the global one is left alone."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def matmul_rate(
    device: torch.device, dtype: torch.dtype, memory_bytes: int, budget_s: float
) -> Figure:
    """FLOP/s of a square matrix product, large enough to fill the device."""
    size = 1024 if device.type == "cpu" else 4096
    while 4 * size**2 * 4 > memory_bytes and size > 512:  # two made in float32, two operands
        size //= 2
    left, right = (random((size, size), device, dtype) for _ in range(2))
    seconds = time_call(lambda: left @ right, device, budget_s=budget_s)
    return rate(seconds, 2 * size**3)


def convolution_rate(
    device: torch.device,
    dtype: torch.dtype,
    budget_s: float,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Figure:
    """FLOP/s of a 3×3 convolution as in a UNet's middle resolutions, batch 2 (guidance)."""
    channels, side = (128, 32) if device.type == "cpu" else (640, 64)
    image = random((2, channels, side, side), device, dtype).contiguous(memory_format=memory_format)
    weight = random((channels, channels, 3, 3), device, dtype).contiguous(
        memory_format=memory_format
    )
    seconds = time_call(
        lambda: functional.conv2d(image, weight, padding=1), device, budget_s=budget_s
    )
    return rate(seconds, 2 * 2 * channels * channels * 9 * side * side)


def memory_rate(device: torch.device, memory_bytes: int, budget_s: float) -> Figure:
    """Bytes per second, read plus written, of copying a buffer that no cache holds."""
    largest = 128 * MIB if device.type == "cpu" else GIB // 2
    size = max(16 * MIB, min(largest, memory_bytes // 2))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = time_call(lambda: target.copy_(source), device, budget_s=budget_s)
    return rate(seconds, 2 * size)


def offload_hook_cost(device: torch.device, budget_s: float) -> Figure | None:
    """Seconds per leaf module of accelerate's sequential offload, beyond its bytes.

    Layers of a few KiB: what remains is the hook, two small copies and the allocations. ``None``
    where accelerate is not installed.
    """
    if importlib.util.find_spec("accelerate") is None:
        return None
    accelerate: Any = importlib.import_module("accelerate")
    layers = [nn.Linear(64, 64, device="meta") for _ in range(_OFFLOADED_LEAVES)]
    model = accelerate.cpu_offload(_still(nn.Sequential(*layers), torch.device("cpu")), device)
    values = random((1, 64), device, torch.float32)
    return _divided(time_call(lambda: model(values), device, budget_s=budget_s), _OFFLOADED_LEAVES)


def _still(module: nn.Module, device: torch.device) -> nn.Module:
    """A module made on meta, with zero weights: initializing would draw from the global state."""
    module = module.to_empty(device=device).requires_grad_(False)
    for parameter in module.parameters():
        parameter.zero_()
    return module


def _divided(seconds: Figure, count: float) -> Figure:
    samples = tuple(sample / count for sample in seconds.samples)
    return Figure(value=seconds.value / count, samples=samples)


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        # torch.cuda.is_bf16_supported() counts emulation, as on a T4, and asks the current device
        # only.
        return bool(torch.version.hip) or torch.cuda.get_device_properties(device).major >= 8
    try:
        product = random((16, 16), device, torch.bfloat16) @ random(
            (16, 16), device, torch.bfloat16
        )
    except (RuntimeError, TypeError):
        return False
    return bool(product.isfinite().all())
