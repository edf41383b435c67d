"""How fast the device computes, moves its memory, and is told what to do."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from msgspec import structs
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
    quick: bool = False,
    progress: Progress | None = None,
) -> Kernels:
    """Every rate that the device has, in about ``14 · budget_s`` plus the start of its libraries.

    Args:
        device: Where to measure.
        memory_bytes: Device memory that the buffers may take.
        budget_s: About how long each figure is measured.
        quick: Measure no more than what every prediction needs: float32, float16 on a GPU, memory.
        progress: Told what is being measured.
    """
    say = progress or (lambda text: None)
    matmul, convolution, channels_last = {}, {}, {}
    for name, dtype in dtypes(device).items():
        if quick and name == "bfloat16":
            continue
        say(f"{name} kernels")
        try:
            product = matmul_rate(device, dtype, memory_bytes, budget_s)
            plain = convolution_rate(device, dtype, budget_s)
            last = None if quick else convolution_rate(device, dtype, budget_s, torch.channels_last)
        except (RuntimeError, TypeError):
            if dtype is torch.float32:
                raise
            continue  # a dtype that some kernel of this device lacks is a dtype it does not have
        matmul[name], convolution[name] = product, plain
        if last is not None:
            channels_last[name] = last
    if not quick:
        matmul |= narrow_products(device, memory_bytes, budget_s)
    say("memory bandwidth and dispatch cost")
    hooks = device.type != "cpu" and not quick
    return Kernels(
        matmul_flops_per_s=matmul,
        convolution_flops_per_s=convolution,
        convolution_channels_last_flops_per_s=channels_last,
        memory_bytes_per_s=memory_rate(device, memory_bytes, budget_s),
        dispatch_s=bare_operator_cost(device) if quick else host_seconds_per_operator(device),
        offload_hook_s=offload_hook_cost(device, budget_s) if hooks else None,
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
    left, right = square_operands(device, dtype, memory_bytes)
    seconds = time_call(lambda: left @ right, device, budget_s=budget_s)
    return rate(seconds, 2 * len(left) ** 3)


def square_operands(
    device: torch.device, dtype: torch.dtype, memory_bytes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two random matrices, as large as is telling and fits."""
    size = 1024 if device.type == "cpu" else 4096
    while 4 * size**2 * 4 > memory_bytes and size > 512:  # two made in float32, two operands
        size //= 2
    return random((size, size), device, dtype), random((size, size), device, dtype)


def narrow_products(device: torch.device, memory_bytes: int, budget_s: float) -> dict[str, Figure]:
    """FLOP/s in what only some GPUs multiply: TF32 (Ampere and later), float8 (Ada and later)."""
    if device.type != "cuda" or torch.version.hip:
        return {}
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    found = {}
    if capability >= (8, 0):
        with contextlib.suppress(RuntimeError), float32_precision("high"):
            found["tensorfloat32"] = matmul_rate(device, torch.float32, memory_bytes, budget_s)
    if capability >= (8, 9):
        with contextlib.suppress(RuntimeError, TypeError):
            found["float8_e4m3fn"] = float8_rate(device, memory_bytes, budget_s)
    return found


def float8_rate(device: torch.device, memory_bytes: int, budget_s: float) -> Figure:
    """FLOP/s of a scaled float8 product with bfloat16 results, as quantized transformers call it.

    Raises:
        RuntimeError: the device or the library has no such kernel.
    """
    left, right = square_operands(device, torch.float8_e4m3fn, memory_bytes)
    column_major, scale = right.t(), torch.ones((), device=device)

    def multiply() -> object:
        return torch._scaled_mm(
            left, column_major, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16
        )

    return rate(time_call(multiply, device, budget_s=budget_s), 2 * len(left) ** 3)


@contextlib.contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """PyTorch's precision of float32 products for a while; afterwards every flag as it was.

    Raises:
        RuntimeError: it cannot be read, since the process has mixed PyTorch's two ways to set it.
    """
    before = torch.get_float32_matmul_precision()
    # Since PyTorch 2.9 the old setting also sets these, and putting it back does not.
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", 0)]
    newer = [(b, b.fp32_precision) for b in backends if hasattr(b, "fp32_precision")]
    try:
        if precision != before:
            torch.set_float32_matmul_precision(precision)
        yield
    finally:
        if precision != before:
            torch.set_float32_matmul_precision(before)
            for backend, value in newer:
                backend.fp32_precision = value


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


def bare_operator_cost(device: torch.device) -> Figure:
    """Seconds the host spends on one small operator called alone: a lower bound of the real cost.

    Milliseconds, where :func:`host_seconds_per_operator` first imports diffusers.
    """
    value = torch.zeros(1, device=device)

    def operators() -> None:
        for _ in range(100):
            value.add(1)

    seconds = _divided(time_call(operators, device, budget_s=0.02), 100)
    return structs.replace(seconds, source="measured on bare operators; in a model they cost more")


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
