"""Whose memory is whose: free memory as it will be once this process's own share is counted in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import psutil
import torch

from autotune.decide.prediction import PROCESS_BYTES
from autotune.optimizations.modules import modules_of
from autotune.probe.machine import Machine, OtherGpu

_CPU = torch.device("cpu")


def with_own_memory(machine: Machine, device: str, pipe: Any = None) -> Machine:
    """The machine with the memory that planning counts anew given back to what is free.

    A plan counts the pipeline's weights, this process and the runtime's context. Where the pipeline
    is loaded and the context is there, the memory just read is already without them.

    Args:
        machine: Its free memory read now.
        device: Where the pipeline will run, ``"cuda:0"``.
        pipe: The loaded pipeline; ``None`` when its weights are still to be read.
    """
    where = torch.device(device)
    in_ram = _bytes_on(_CPU, pipe)
    own = min(in_ram, _private_bytes()) if where.type == "cpu" else _bytes_on(where, pipe)
    if where.type == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        # Reserved and unused: the allocator gives it to the next tensor that asks.
        own += torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
        own += machine.context_bytes
    free = min(machine.device.free_bytes + own, machine.device.total_bytes)
    others = tuple(_with_own(gpu, pipe) for gpu in machine.others)
    held = min(in_ram + PROCESS_BYTES, _private_bytes())
    available = min(machine.host.ram_available_bytes + held, machine.host.ram_total_bytes)
    return msgspec.structs.replace(
        machine,
        others=others,
        device=msgspec.structs.replace(machine.device, free_bytes=free),
        host=msgspec.structs.replace(machine.host, ram_available_bytes=available),
    )


def _with_own(gpu: OtherGpu, pipe: Any) -> OtherGpu:
    """The same for another GPU; whether it has a context already is not known, and not counted."""
    where = torch.device("cuda", gpu.index)
    own = _bytes_on(where, pipe)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        own += torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
    return msgspec.structs.replace(gpu, free_bytes=min(gpu.free_bytes + own, gpu.total_bytes))


def _private_bytes() -> int:
    """RAM that this process alone holds.

    Weights read from safetensors files are pages of these files until they are cast or moved: the
    system can drop those, and counts them as available.
    """
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def _bytes_on(device: torch.device, pipe: Any) -> int:
    return sum(t.nbytes for t in _tensors(pipe) if _is_on(device, t))


def _tensors(pipe: Any) -> Iterator[torch.Tensor]:
    for module in modules_of(pipe).values() if pipe is not None else ():
        yield from module.parameters()
        yield from module.buffers()


def _is_on(device: torch.device, tensor: torch.Tensor) -> bool:
    """What sequential offload has put away is on the meta device, and its data in RAM."""
    where = _CPU if tensor.is_meta else tensor.device
    return where.type == device.type and (where.index or 0) == (device.index or 0)
