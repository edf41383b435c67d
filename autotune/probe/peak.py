"""What a GPU could do at its highest clocks, to hold measured rates against. Pure arithmetic."""

from __future__ import annotations

from autotune.probe.machine import Device

# Operations per clock and multiprocessor, dense, a multiply-add counted as two: from the arithmetic
# throughput table of NVIDIA's CUDA C++ Programming Guide, and the architecture whitepapers.
_FLOAT32 = {
    **dict.fromkeys(("7.0", "7.5", "8.0"), 128),
    **dict.fromkeys(("8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1"), 256),
}
# Tensor cores with float32 accumulation, as PyTorch multiplies float16 and bfloat16.
_TENSOR = {
    **dict.fromkeys(("7.0", "7.5", "8.6", "8.9", "12.0", "12.1"), 1024),
    **dict.fromkeys(("8.0", "8.7"), 2048),
    "9.0": 4096,
    **dict.fromkeys(("10.0", "10.3"), 8192),
}
_RELATIVE = {"float16": 1.0, "bfloat16": 1.0, "tensorfloat32": 0.5, "float8_e4m3fn": 2.0}
_NO_TENSOR_CORES = "GTX 16"
_HALF_RATE = "GeForce"  # accumulates in float32 at half the rate of its professional kin


def matmul_peak(device: Device, dtype: str) -> float | None:
    """FLOP/s of dense matrix products; ``None`` where the chip is not known.

    Args:
        device: With its compute capability, multiprocessors and highest clock.
        dtype: A key of ``Kernels.matmul_flops_per_s``.
    """
    capability, clock = device.compute_capability or "", device.sm_clock_max_mhz
    if device.multiprocessors is None or clock is None:
        return None
    per_clock: float | None
    if dtype == "float32":
        per_clock = _FLOAT32.get(capability)
    elif _NO_TENSOR_CORES in device.name or capability not in _TENSOR:
        return None
    else:
        per_clock = _TENSOR[capability] * _RELATIVE.get(dtype, 0.0)
        per_clock *= 0.5 if _HALF_RATE in device.name else 1.0
    return per_clock * device.multiprocessors * clock * 1e6 if per_clock else None


def memory_peak(device: Device) -> float | None:
    """Bytes per second, read plus written: two transfers per clock over the whole bus."""
    if device.memory_clock_max_mhz is None or device.memory_bus_bits is None:
        return None
    return 2 * device.memory_clock_max_mhz * 1e6 * device.memory_bus_bits / 8
