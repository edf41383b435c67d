"""Which devices torch can compute on here, and the facts of the chosen one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from msgspec import structs

from autotune.errors import MachineError
from autotune.probe import nvml
from autotune.probe.absence import why_no_gpu
from autotune.probe.host import cpu_name
from autotune.probe.live import other_processes
from autotune.probe.machine import Device, DeviceKind, Host
from autotune.probe.software import installed_versions

_KINDS = ("cuda", "xpu", "mps")


def existing_devices() -> tuple[str, ...]:
    """Names of all devices, the CPU last: ``("cuda:0", "cuda:1", "cpu")``."""
    accelerator = _accelerator()
    if accelerator is None:
        return ("cpu",)
    return (*(f"{accelerator}:{index}" for index in range(torch.accelerator.device_count())), "cpu")


def choose_device(name: str | None) -> torch.device:
    """The device called ``name``; by default the GPU with most free memory, else the CPU.

    Raises:
        MachineError: there is no such device; the message lists those that exist.
    """
    existing = existing_devices()
    if name is None:
        return torch.device(_default(existing))
    wanted = f"{name}:0" if name in _KINDS else name
    if wanted not in existing:
        no_gpu = name.startswith("cuda") and not existing[0].startswith("cuda")
        why = f". No GPU: {why_no_gpu(installed_versions())}" if no_gpu else ""
        raise MachineError(
            f"there is no device {name!r} here", f"choose from: {', '.join(existing)}{why}"
        )
    return torch.device(wanted)


def describe(device: torch.device, host: Host) -> Device:
    """The device's facts now, from NVML where it knows the device, else from torch.

    Asking NVML first matters for the memory: it starts no CUDA context, which would take its own
    share.
    """
    if device.type == "cpu":
        total, free = host.ram_total_bytes, host.ram_available_bytes
        return Device(kind="cpu", name=cpu_name(), total_bytes=total, free_bytes=free)
    if device.type == "cuda":
        return _describe_cuda(device, nvml_view(device), host)
    total, free = _memory_by_torch(device, host)
    return Device(
        kind=cast("DeviceKind", device.type),
        name="Apple GPU" if device.type == "mps" else str(_module(device).get_device_name(device)),
        total_bytes=total,
        free_bytes=free,
        index=device.index or 0,
        unified_memory=device.type == "mps",
    )


def nvml_view(device: torch.device) -> nvml.Gpu | None:
    """NVML's facts on a CUDA device; on a split GPU those of the MIG instance that CUDA shows."""
    gpu = nvml.gpu(cuda_uuid(device))
    if gpu is not None and gpu.mig_instances:
        return next(iter(nvml.visible_gpus()), gpu)
    return gpu


def _describe_cuda(device: torch.device, gpu: nvml.Gpu | None, host: Host) -> Device:
    properties = torch.cuda.get_device_properties(device)
    unified = bool(properties.is_integrated)
    total, free = (gpu.total_bytes, gpu.free_bytes) if gpu is not None else (None, None)
    if unified:
        total, free = host.ram_total_bytes, host.ram_available_bytes
    if total is None or free is None:
        total, free = _memory_by_torch(device, host)
    facts = Device(
        kind="cuda",
        name=properties.name,
        total_bytes=total,
        free_bytes=free,
        index=device.index or 0,
        uuid=_prefixed(cuda_uuid(device)),
        compute_capability=None if torch.version.hip else f"{properties.major}.{properties.minor}",
        unified_memory=unified,
        multiprocessors=getattr(properties, "multi_processor_count", None),
    )
    return facts if gpu is None else _with_nvml(facts, gpu)


def _with_nvml(device: Device, gpu: nvml.Gpu) -> Device:
    return structs.replace(
        device,
        uuid=gpu.uuid,
        driver=gpu.driver,
        used_bytes=gpu.used_bytes,
        power_limit_watts=gpu.power_limit_watts,
        power_limit_default_watts=gpu.power_limit_default_watts,
        sm_clock_max_mhz=gpu.sm_clock_max_mhz,
        memory_clock_max_mhz=gpu.memory_clock_max_mhz,
        memory_bus_bits=gpu.memory_bus_bits,
        throttle_reasons=gpu.throttle_reasons,
        mig_enabled=True if gpu.uuid.startswith("MIG-") else gpu.mig_enabled,
        bar1_bytes=gpu.bar1_bytes,
        processes=other_processes(gpu.processes),
    )


def cuda_uuid(device: torch.device) -> str | None:
    """NVML's UUID of a CUDA device, without its prefix; ``None`` on ROCm, which NVML does not know.

    Reading the properties starts no context on the device.
    """
    if device.type != "cuda" or torch.version.hip:
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return None if uuid is None else str(uuid)


def empty_cache(device: torch.device) -> None:
    """Gives cached memory back to the driver: tensors, matrix workspaces, pinned host buffers."""
    if device.type == "cpu":
        return
    if device.type == "cuda":
        clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        if clear is not None:
            clear()
        empty_host_cache()
    _module(device).empty_cache()


def empty_host_cache() -> None:
    """Gives pinned host buffers that nothing uses back to the system."""
    clear = getattr(torch._C, "_host_emptyCache", None)
    if clear is not None:
        clear()


@contextlib.contextmanager
def at_most(device: torch.device, memory_bytes: int) -> Iterator[None]:
    """For a while torch may take so many bytes more on the device, libraries' workspaces included.

    What asks for more runs out of memory, as on a smaller device. On CUDA alone; elsewhere sizes
    are chosen to fit, and nothing enforces it.
    """
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    before = _memory_fraction(device)
    allowed = (torch.cuda.memory_reserved(device) + memory_bytes) / total
    torch.cuda.set_per_process_memory_fraction(min(before, allowed), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def _memory_fraction(device: torch.device) -> float:
    """What the user allowed this process; everything in a torch that cannot tell."""
    tell = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return 1.0 if tell is None else float(tell(device))


def _accelerator() -> str | None:
    if not torch.accelerator.is_available():
        return None
    current = torch.accelerator.current_accelerator()
    return current.type if current is not None and current.type in _KINDS else None


def _default(existing: tuple[str, ...]) -> str:
    """Free memory by NVML: asking CUDA would start a context on every GPU."""

    def free(name: str) -> int:
        gpu = nvml.gpu(cuda_uuid(torch.device(name)))
        return gpu.free_bytes or 0 if gpu is not None else 0

    return max((name for name in existing if name != "cpu"), key=free, default="cpu")


def _memory_by_torch(device: torch.device, host: Host) -> tuple[int, int]:
    """Total and free bytes as the device's own runtime counts them."""
    if device.type == "mps":
        total = int(torch.mps.recommended_max_memory())
        return total, min(host.ram_available_bytes, total - torch.mps.driver_allocated_memory())
    free, total = _module(device).mem_get_info(device)
    return int(total), int(free)


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _prefixed(uuid: str | None) -> str | None:
    return None if uuid is None or uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
