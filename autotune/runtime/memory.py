"""Whose memory is whose: free memory as it will be once this process's own share is counted in."""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from autotune.probe.machine import Machine


def with_own_memory(machine: Machine, device: str, pipe: Any = None) -> Machine:
    """The machine with the memory that planning counts anew given back to ``free_bytes``.

    A plan counts the pipeline's weights and the runtime's context. Where the pipeline is loaded and
    the context is there, the free memory just read is already without them.

    Args:
        machine: Its free memory read now.
        device: Where the pipeline will run, ``"cuda:0"``.
        pipe: The loaded pipeline; ``None`` when its weights are still to be read.
    """
    where = torch.device(device)
    own = _weights_on(where, pipe) if pipe is not None else 0
    if where.type == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        # Reserved and unused: the allocator gives it to the next tensor that asks.
        own += torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
        own += machine.context_bytes
    free = min(machine.device.free_bytes + own, machine.device.total_bytes)
    return msgspec.structs.replace(
        machine, device=msgspec.structs.replace(machine.device, free_bytes=free)
    )


def _weights_on(device: torch.device, pipe: Any) -> int:
    modules = [m for m in pipe.components.values() if hasattr(m, "parameters")]
    parameters = (p for m in modules for p in m.parameters())
    return sum(p.numel() * p.element_size() for p in parameters if _same(p.device, device))


def _same(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (one.index or 0) == (other.index or 0)
