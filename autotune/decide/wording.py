"""What explanations and accounts call the same things."""

from __future__ import annotations

from autotune.decide.prediction import Budget, Prediction, Resource
from autotune.units import format_bytes

RESOURCES: dict[Resource, str] = {
    "vram": "memory",
    "ram": "host RAM",
    "compute": "compute",
    "memory_bandwidth": "memory bandwidth",
    "transfer": "transfer over the link",
    "launch": "launch overhead of the host",
}
"""What people call them."""


def lack_elsewhere(needs: Prediction, budget: Budget, gpu: int) -> str:
    """``"decode needs 10.1 GiB of 9.16 GiB on cuda:1"``."""
    phase = needs.binding_phase_of(gpu)
    needed, free = phase.elsewhere_bytes[gpu], budget.elsewhere_bytes.get(gpu, 0)
    return f"{phase.name} needs {format_bytes(needed)} of {format_bytes(free)} on cuda:{gpu}"


def as_much_ran_out(needs: Prediction, phase: str) -> str:
    """``"decode needs 10.1 GiB, and no more than that ran out of memory in it"``."""
    needed = format_bytes(needs.phase_needs[phase])
    return f"{phase} needs {needed}, and no more than that ran out of memory in it"
