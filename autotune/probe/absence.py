"""Why no NVIDIA GPU can be used here, and what to do about it. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from autotune.probe import nvml


def why_no_gpu(software: Mapping[str, str]) -> str:
    """The first thing in the way, from the driver up to torch, and its remedy.

    Args:
        software: As ``software.installed_versions``: torch's version and what it was built for.
    """
    reason = nvml.unavailable_reason()
    if reason is not None:
        return reason
    plugged, silent = nvml.gpus(), nvml.silent_gpus()
    if not plugged and silent:
        return (
            f"the driver counts {silent} GPU{'s' * (silent > 1)} that cannot be reached, likely "
            "fallen off the bus: see dmesg, and reboot"
        )
    if not plugged:
        return (
            "the NVIDIA driver is here and finds no GPU: check that one is plugged in, or given to "
            "this virtual machine or container"
        )
    gpu, torch = plugged[0], f"torch {software.get('torch', '')}".strip()
    if "cuda" not in software:
        return (
            f"{torch} is built for the CPU only, and cannot use this machine's {gpu.name}: install "
            "a CUDA build of torch, see pytorch.org/get-started"
        )
    if not nvml.visible_gpus():
        return f"CUDA_VISIBLE_DEVICES hides the {gpu.name}: unset or correct it"
    return (
        f"{torch} for CUDA {software['cuda']} cannot use the {gpu.name} with driver "
        f"{gpu.driver}: update the driver"
    )
