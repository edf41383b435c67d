"""The allocator's limit: what makes a reserve, or a limit of the user's, really hold.

A plan only predicts. PyTorch's allocator can be told how much it may take from the device, and
then runs out of memory instead of taking what was to be left for others.
"""

from __future__ import annotations

from typing import Any

from autotune.runtime.claims import claims_on
from autotune.runtime.spilling import Load

_before: dict[str, float] = {}
"""What was set before, by device, while a limit of ours is."""


def hold_limits(device: str) -> int | None:
    """Set the allocator's limit to what the claims on the device allow now, or lift it.

    Where others have come, less is left to this process; where they have gone, more: so this is
    asked again before every call.

    Returns:
        The limit in bytes; ``None`` where there is none, or no allocator that takes one.
    """
    claims = claims_on(device)
    reserve = max((c.reserve_bytes for c in claims), default=0)
    limits = [c.most_bytes for c in claims if c.most_bytes is not None]
    # One without a limit may take what it likes, and the allocator is that of all.
    most = sum(limits) if limits and len(limits) == len(claims) else None
    if not reserve and most is None:
        if device in _before:
            _set_share(device, _before.pop(device))
        return None
    return _limit(device, reserve, most)


def device_load(device: str) -> Load | None:
    """The device's memory now; ``None`` where PyTorch does not tell."""
    backend = _backend(device)
    if backend is None:
        return None
    free, total = backend.mem_get_info(device)
    return Load(total, free, backend.memory_reserved(device))


def _limit(device: str, reserve: int, most: int | None) -> int | None:
    backend = _backend(device)
    if backend is None:
        return None
    free, total = backend.mem_get_info(device)
    if device not in _before:
        # PyTorch 2.6 cannot be asked.
        asked = getattr(backend, "get_per_process_memory_fraction", None)
        _before[device] = asked(device) if asked is not None else 1.0
    allowed = free + backend.memory_reserved(device) - reserve
    # A limit that was set by hand holds too.
    allowed = min(allowed, int(total * _before[device]), allowed if most is None else most)
    allowed = max(0, allowed)
    if backend.memory_reserved(device) > allowed:  # unused, it would be kept all the same
        backend.empty_cache()
    _set_share(device, min(1.0, allowed / total))
    return int(allowed)


def _set_share(device: str, share: float) -> None:
    backend = _backend(device)
    if backend is not None:
        backend.set_per_process_memory_fraction(share, device)


def _backend(device: str) -> Any:
    """PyTorch's module of the device, where its allocator can be limited."""
    import torch

    if device.startswith("cpu"):
        return None
    backend = torch.get_device_module(device)
    needed = ("mem_get_info", "memory_reserved", "empty_cache", "set_per_process_memory_fraction")
    return backend if all(hasattr(backend, name) for name in needed) else None
