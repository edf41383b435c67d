"""What is read at every start: free memory, who holds the rest, which machine this is."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from autotune.errors import MachineError
from autotune.probe import nvml, software
from autotune.probe.absence import why_no_gpu
from autotune.probe.host import cpu_name, ram, usable_cores
from autotune.probe.machine import Device, GpuProcess, Machine, OtherGpu

# What a driver shows of itself: on Linux, on a Jetson, on Windows' Linux.
_DRIVER_NODES = tuple(map(Path, ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/dxg")))


def refresh(machine: Machine) -> Machine:
    """The same machine with the memory that is free right now, and CUDA's number for its device.

    Reads NVML and the operating system; torch only where nothing else knows (ROCm, XPU, MPS, CUDA
    without NVML). A reference machine is not here and comes back as it is.
    """
    if machine.source == "datasheet":
        return machine
    total, available = ram()
    host = replace(machine.host, ram_total_bytes=total, ram_available_bytes=available)
    device = _refresh_device(machine.device, total, available)
    return replace(machine, host=host, device=device, others=other_gpus(device))


def refresh_free(machine: Machine) -> Machine:
    """The same machine with the memory that is free right now, and nothing else read.

    Takes less than a millisecond where ``refresh`` takes several: it is asked before every image.
    """
    if machine.source == "datasheet":
        return machine
    total, available = ram()
    device = machine.device
    host = replace(machine.host, ram_total_bytes=total, ram_available_bytes=available)
    others = tuple(
        replace(gpu, free_bytes=gpu.free_bytes if free is None else free)
        for gpu, free in ((gpu, nvml.free_bytes(gpu.uuid)) for gpu in machine.others)
    )
    if device.kind == "cpu" or device.unified_memory:
        free = available
    else:
        told = nvml.free_bytes(device.uuid)
        free = _free_by_torch(device, available) if told is None else told
    return replace(machine, host=host, others=others, device=replace(device, free_bytes=free))


def other_gpus(device: Device) -> tuple[OtherGpu, ...]:
    """The NVIDIA GPUs beside this one that the process sees, with what is free now.

    Nothing is asked of CUDA where all are of one model: it would start a context on each.
    """
    if device.kind != "cuda" or device.uuid is None or device.unified_memory:
        return ()
    gpus = _visible_gpus(by_index=True) if len(nvml.visible_gpus()) > 1 else ()
    return tuple(
        OtherGpu(
            index=index,
            name=gpu.name,
            total_bytes=gpu.total_bytes,
            free_bytes=gpu.free_bytes,
            uuid=gpu.uuid,
            compute_capability=gpu.compute_capability,
        )
        for index, gpu in enumerate(gpus)
        if gpu.uuid != device.uuid and gpu.total_bytes is not None and gpu.free_bytes is not None
    )


def identity(device: str | None = None) -> str:
    """The stable key of this machine's profile, found without importing torch.

    The UUID of the GPU (of the default one when ``device`` is ``None``), else the processor's name
    and the cores this process may use.

    Args:
        device: ``"cuda:1"``, ``"cpu"``, …, as CUDA numbers what it shows to this process.

    Raises:
        MachineError: ``device`` names a GPU that is not there.
    """
    kind, _, index = (device or _default_kind()).partition(":")
    if kind == "cuda" and "hip" not in software.torch_build():
        return _gpu_identity(device, index)
    suffix = f"{slug(cpu_name())}-{usable_cores()}"
    return f"cpu-{suffix}" if kind == "cpu" else f"{kind}-{index or 0}-{suffix}"


def profile_key(machine: Machine) -> str:
    """The key of a measured machine's profile: what :func:`identity` says where it was measured."""
    device = machine.device
    name = "cpu" if device.kind == "cpu" else f"{device.kind}:{device.index}"
    return device.uuid or identity(name)


def slug(name: str) -> str:
    """A device's name as a file name: ``"NVIDIA H100 80GB HBM3"`` → ``"nvidia-h100-80gb-hbm3"``."""
    plain = re.sub(r"\((?:r|tm|c)\)", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def other_processes(processes: tuple[GpuProcess, ...]) -> tuple[GpuProcess, ...]:
    """The processes on a GPU that are not this one."""
    return tuple(process for process in processes if process.pid != os.getpid())


def freest(gpus: tuple[nvml.Gpu, ...]) -> nvml.Gpu | None:
    """The GPU with most free memory; the first among equals."""
    return max(gpus, key=lambda gpu: gpu.free_bytes or 0, default=None)


def _default_kind() -> str:
    """What torch would compute on, judged by its build and by what is plugged in."""
    build = software.torch_build()
    if "cuda" in build and (nvml.visible_gpus() or _cuda_without_nvml()):
        return "cuda"
    if "hip" in build and os.access("/dev/kfd", os.R_OK | os.W_OK):
        return "cuda"
    if "xpu" in build and _has_xpu():
        return "xpu"
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return "mps"
    return "cpu"


def _has_xpu() -> bool:
    """Only torch knows; only a torch built for Intel's GPUs is imported to ask."""
    import torch

    return torch.xpu.is_available()


def _cuda_without_nvml() -> bool:
    """Whether CUDA works where NVML does not, as in containers without the *utility* capability.

    Only where a driver shows is torch imported to ask.
    """
    if nvml.unavailable_reason() is None or not any(node.exists() for node in _DRIVER_NODES):
        return False
    import torch

    return torch.cuda.is_available()


def _gpu_identity(device: str | None, index: str) -> str:
    gpus = _visible_gpus(by_index=bool(index))
    if device is None or not index:
        chosen = freest(gpus) if device is None else next(iter(gpus), None)
    else:
        chosen = gpus[int(index)] if index.isdigit() and int(index) < len(gpus) else None
    if chosen is None:
        names = "".join(f"cuda:{at} ({gpu.name}), " for at, gpu in enumerate(gpus))
        why = "" if gpus else f". No GPU: {why_no_gpu(software.installed_versions())}"
        raise MachineError(
            f"there is no device {device or 'cuda'!r} here", f"choose from: {names}cpu{why}"
        )
    return chosen.uuid


def _visible_gpus(by_index: bool) -> tuple[nvml.Gpu, ...]:
    """The GPUs as CUDA numbers them, by NVML where that is certain, else by asking CUDA.

    Args:
        by_index: One of them will be chosen by its index. Without that the order is of no
            importance as long as all are visible.
    """
    all_visible = "CUDA_VISIBLE_DEVICES" not in os.environ
    if _cuda_without_nvml():
        return _gpus_by_torch()
    if nvml.numbers_as_cuda() or (all_visible and not by_index):
        return nvml.visible_gpus()
    # A second, on a machine with different GPUs only; starts no context.
    return _gpus_by_torch() or nvml.visible_gpus()


def _gpus_by_torch() -> tuple[nvml.Gpu, ...]:
    """The GPUs in CUDA's own order, with NVML's facts where it has any."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        uuid = str(facts.uuid)
        gpu = nvml.gpu(uuid)
        if gpu is None and nvml.unavailable_reason() is not None:
            gpu = nvml.Gpu(index=index, uuid=f"GPU-{uuid}", name=facts.name)
        found += [] if gpu is None else [gpu]
    return tuple(found)


def _refresh_device(device: Device, ram_total: int, ram_available: int) -> Device:
    if device.kind == "cpu":
        return replace(device, total_bytes=ram_total, free_bytes=ram_available)
    gpu = nvml.gpu(device.uuid)
    if gpu is not None:
        free = ram_available if device.unified_memory else gpu.free_bytes
        return replace(
            device,
            index=_cuda_index(device),
            free_bytes=device.free_bytes if free is None else free,
            used_bytes=gpu.used_bytes,
            processes=other_processes(gpu.processes),
            throttle_reasons=gpu.throttle_reasons,
        )
    if device.uuid is not None and nvml.unavailable_reason() is None:
        return device  # a GPU that does not answer any more
    return replace(device, free_bytes=_free_by_torch(device, ram_available))


def _cuda_index(device: Device) -> int:
    """CUDA's number for it in this process: ``CUDA_VISIBLE_DEVICES`` may be another than then."""
    gpus = nvml.visible_gpus()
    ordered = _visible_gpus(by_index=True) if len(gpus) > 1 else gpus
    found = (at for at, gpu in enumerate(ordered) if gpu.uuid == device.uuid)
    return next(found, device.index)


def _free_by_torch(device: Device, ram_available: int) -> int:
    import torch

    if device.kind == "mps":
        return min(ram_available, device.total_bytes - torch.mps.driver_allocated_memory())
    module: Any = torch.get_device_module(device.kind)
    try:
        return int(module.mem_get_info(device.index)[0])
    except (RuntimeError, AttributeError, AssertionError):
        return device.free_bytes
