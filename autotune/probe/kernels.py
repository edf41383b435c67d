"""How fast the device computes, moves its memory, and is told what to do."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from msgspec import structs
from torch import nn
from torch.nn import functional

from autotune.probe.deadline import import_by
from autotune.probe.dispatch import UNET_MODULE, host_seconds_per_operator
from autotune.probe.machine import Figure, Kernels, Link
from autotune.probe.samples import figure_of, rate
from autotune.probe.software import is_importable
from autotune.probe.timing import Call, Timer
from autotune.units import GIB, MIB

Progress = Callable[[str], None]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_OFFLOADED = ((640, 640), (1280, 1280), (1280, 1280), (1280, 5120))  # widths of linear layers
_OFFLOADED_ROUNDS = 2
_CPU_SIDES, _GPU_SIDES = (256, 512, 1024), (512, 1024, 2048, 4096)  # of square matrices
_CPU_IMAGES, _GPU_IMAGES = (128, (8, 16, 32)), (640, (16, 32, 64))  # channels, and sides
_SMALLEST_BUFFER, _CPU_BUFFER, _GPU_BUFFER = 16 * MIB, 128 * MIB, GIB // 2
_MODEL_OPERATORS = 4000  # in building and running a narrow UNet a few times
_HOOK_OPERATORS = 1000  # in running the offloaded layers three times

BARE = "measured on bare operators; in a model they cost more"


def measure_kernels(
    timer: Timer,
    *,
    memory_bytes: int,
    quick: bool = False,
    progress: Progress | None = None,
) -> Kernels:
    """Every rate that the device has; what it costs the host to start an operator is one of them.

    What every prediction needs comes first: float32, memory, launching. When the deadline passes
    the rest is left out.

    Args:
        timer: Where to measure, and how long.
        memory_bytes: Device memory that the buffers may take.
        quick: Measure no more than a first look needs: float32, float16 on a GPU, memory, launches.
        progress: Told what is being measured.
    """
    say = progress or (lambda text: None)
    say("float32 kernels")
    needed = _rates_in(timer, torch.float32, memory_bytes, with_channels_last=False)
    matmul, convolution = {"float32": needed.matmul}, {"float32": needed.convolution}
    channels_last: dict[str, Figure] = {}
    say("memory bandwidth and launches")
    memory, launch = memory_rate(timer, memory_bytes), launch_cost(timer)
    for name, dtype in dtypes(timer.device).items():
        if dtype is torch.float32 or (quick and dtype is torch.bfloat16):
            continue
        if not timer.deadline.leaves(f"{name} kernels"):
            continue
        say(f"{name} kernels")
        try:
            rates = _rates_in(timer, dtype, memory_bytes, with_channels_last=not quick)
        except (RuntimeError, TypeError):
            continue  # a dtype that some kernel of this device lacks is a dtype it does not have
        matmul[name], convolution[name] = rates.matmul, rates.convolution
        if rates.channels_last is not None:
            channels_last[name] = rates.channels_last
    if not quick and timer.deadline.leaves("channels-last convolutions in float32"):
        last = convolution_rate(timer, torch.float32, torch.channels_last)
        channels_last = {"float32": last} | channels_last
    if not quick:
        matmul |= narrow_products(timer, memory_bytes)
    return Kernels(
        matmul_flops_per_s=matmul,
        convolution_flops_per_s=convolution,
        convolution_channels_last_flops_per_s=channels_last,
        memory_bytes_per_s=memory,
        dispatch_s=structs.replace(launch, source=BARE),
        launch_s=launch,
    )


def with_launch_cost(timer: Timer, kernels: Kernels) -> Kernels:
    """Rates measured before, with what the host spends on a bare operator now, and on no other."""
    launch = launch_cost(timer)
    return structs.replace(
        kernels,
        dispatch_s=structs.replace(launch, source=BARE),
        launch_s=launch,
        offload_hook_s=None,
    )


def measure_host_costs(
    timer: Timer, kernels: Kernels, link: Link | None, progress: Progress | None = None
) -> Kernels:
    """The rates with what the host spends on a model's operators and on offloaded layers.

    Without a link nothing is offloaded.
    Both need libraries that take seconds to import. Where that, or the measurement, would last
    beyond the deadline, the cost of a bare operator stays in, and says so.
    """
    say = progress or (lambda text: None)
    bare = kernels.dispatch_s.value
    # A UNet of 700 operators is built, traced and called three times or more.
    what = "the host's cost per operator in a model"
    if not timer.deadline.leaves(what, seconds=_MODEL_OPERATORS * bare):
        return kernels
    say("loading diffusers")
    if not import_by(timer.deadline, UNET_MODULE):
        timer.deadline.leave_out(what)
        return kernels
    say("dispatch cost")
    if timer.deadline.leaves(what, seconds=_MODEL_OPERATORS * bare):
        found = host_seconds_per_operator(timer)
        if found is None:
            timer.deadline.leave_out(what)
        else:
            kernels = structs.replace(kernels, dispatch_s=found)
    if link is None or not timer.deadline.leaves(
        "the cost of an offload hook", seconds=_HOOK_OPERATORS * bare
    ):
        return kernels
    say("offload hooks")
    hook = offload_hook_cost(timer, link.h2d_pageable_bytes_per_s.value)
    return structs.replace(kernels, offload_hook_s=hook)


class _Rates(NamedTuple):
    matmul: Figure
    convolution: Figure
    channels_last: Figure | None


def _rates_in(
    timer: Timer, dtype: torch.dtype, memory_bytes: int, *, with_channels_last: bool
) -> _Rates:
    product = matmul_rate(timer, dtype, memory_bytes)
    plain = convolution_rate(timer, dtype)
    last = convolution_rate(timer, dtype, torch.channels_last) if with_channels_last else None
    return _Rates(product, plain, last)


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


def matmul_rate(timer: Timer, dtype: torch.dtype, memory_bytes: int) -> Figure:
    """FLOP/s of a square matrix product, large enough to fill the device."""
    left, right = square_operands(timer, dtype, memory_bytes)
    return rate(timer.time(lambda: left @ right), 2 * len(left) ** 3)


def square_operands(
    timer: Timer, dtype: torch.dtype, memory_bytes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two random matrices, as large as is telling, fits, and is multiplied in no time."""

    def operands(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (size, size)
        return random(shape, timer.device, dtype), random(shape, timer.device, dtype)

    def product(size: int) -> Call:
        left, right = operands(size)
        return lambda: left @ right

    sizes = _CPU_SIDES if timer.device.type == "cpu" else _GPU_SIDES
    # Two made in float32, two operands.
    fitting = tuple(size for size in sizes if 4 * size**2 * 4 <= memory_bytes) or sizes[:1]
    return operands(timer.largest(fitting, product, power=3))


def narrow_products(timer: Timer, memory_bytes: int) -> dict[str, Figure]:
    """FLOP/s in what only some GPUs multiply: TF32 (Ampere and later), float8 (Ada and later)."""
    if timer.device.type != "cuda" or torch.version.hip:
        return {}
    properties = torch.cuda.get_device_properties(timer.device)
    capability = (properties.major, properties.minor)
    found = {}
    if capability >= (8, 0) and timer.deadline.leaves("TF32 products"):
        with contextlib.suppress(RuntimeError), float32_precision("high"):
            found["tensorfloat32"] = matmul_rate(timer, torch.float32, memory_bytes)
    if capability >= (8, 9) and timer.deadline.leaves("float8 products"):
        with contextlib.suppress(RuntimeError, TypeError):
            found["float8_e4m3fn"] = float8_rate(timer, memory_bytes)
    return found


def float8_rate(timer: Timer, memory_bytes: int) -> Figure:
    """FLOP/s of a scaled float8 product with bfloat16 results, as quantized transformers call it.

    Raises:
        RuntimeError: the device or its library does not multiply float8.
    """
    left, right = (
        operand.to(torch.float8_e4m3fn)
        for operand in square_operands(timer, torch.bfloat16, memory_bytes)
    )
    # The hardware takes the second operand column by column.
    column_major, scale = right.t(), torch.ones((), device=timer.device)

    def multiply() -> object:
        return torch._scaled_mm(
            left, column_major, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16
        )

    return rate(timer.time(multiply), 2 * len(left) ** 3)


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
    timer: Timer,
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Figure:
    """FLOP/s of a 3×3 convolution as in a UNet's middle resolutions, batch 2 (guidance)."""
    device = timer.device
    channels, sides = _CPU_IMAGES if device.type == "cpu" else _GPU_IMAGES

    def convolve(side: int) -> Call:
        image = random((2, channels, side, side), device, dtype)
        image = image.contiguous(memory_format=memory_format)
        return lambda: functional.conv2d(image, weight, padding=1)

    weight = random((channels, channels, 3, 3), device, dtype)
    weight = weight.contiguous(memory_format=memory_format)
    side = timer.largest(sides, convolve, power=2)
    return rate(timer.time(convolve(side)), 2 * 2 * channels * channels * 9 * side * side)


def memory_rate(timer: Timer, memory_bytes: int) -> Figure:
    """Bytes per second, read plus written, of copying a buffer that no cache holds."""

    def copy(size: int) -> Call:
        source = torch.zeros(size, dtype=torch.uint8, device=timer.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    largest = _CPU_BUFFER if timer.device.type == "cpu" else _GPU_BUFFER
    size = max(_SMALLEST_BUFFER, min(largest, memory_bytes // 2))
    size = timer.largest((min(_SMALLEST_BUFFER, size), size), copy, power=1)
    return rate(timer.time(copy(size)), 2 * size)


def launch_cost(timer: Timer) -> Figure:
    """Seconds from one small operator to the next, called alone and in a row."""
    value = torch.zeros(1, device=timer.device)
    return timer.time(lambda: value.add(1), share=0.2)


def offload_hook_cost(timer: Timer, bytes_per_s: float) -> Figure | None:
    """Seconds per layer of accelerate's sequential offload, beyond those that its bytes take.

    accelerate empties the allocator's cache for every tensor that it places, so that memory is
    asked of the driver again: what that takes depends on sizes, which are therefore a UNet's.

    Args:
        timer: Of a device with a link.
        bytes_per_s: Of pageable copies to the device: what predictions take for the bytes.

    Returns:
        ``None`` where accelerate is not installed.
    """
    if not is_importable("accelerate"):
        return None
    accelerate: Any = importlib.import_module("accelerate")
    layers = offloaded_layers()
    copying_s = sum(parameter.nbytes for parameter in layers.parameters()) / bytes_per_s
    offloaded = accelerate.cpu_offload(layers, timer.device)
    calls = [functools.partial(layer, _input_of(layer, timer.device)) for layer in offloaded]
    took = timer.time(lambda: [call() for call in calls])
    samples = [max(0.0, sample - copying_s) / len(calls) for sample in took.samples]
    return figure_of(samples, took.source, took.disturbances)


def offloaded_layers() -> nn.ModuleList:
    """Half-precision layers in host memory, in the sizes of a UNet's: 3 MB as median, 4 as mean.

    Those of SD 1.5's 391 layers are 0.8 and 4.4 MB, of SDXL's 1048 3.3 and 4.9 MB.
    """
    kind: dict[str, Any] = {"device": "meta", "dtype": torch.float16}
    layers = nn.ModuleList()
    for _ in range(_OFFLOADED_ROUNDS):
        layers.append(nn.LayerNorm(1280, **kind))
        layers.extend(nn.Linear(inputs, outputs, **kind) for inputs, outputs in _OFFLOADED)
    # Made on meta, with zero weights: initializing would draw from the global random state.
    layers.to_empty(device="cpu").requires_grad_(False)
    for parameter in layers.parameters():
        parameter.zero_()
    return layers


def _input_of(layer: nn.Module, device: torch.device) -> torch.Tensor:
    """One token: computing takes nothing beside the copies."""
    weight: Any = layer.weight
    return random((1, weight.shape[-1]), device, torch.float16)


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
