"""Whose memory is whose: free memory as it will be once this process's own share is counted in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import psutil
import torch

from autotune.decide.prediction import PROCESS_BYTES
from autotune.optimizations.modules import modules_of
from autotune.probe.machine import Machine, OtherGpu
from autotune.runtime.claims import promised_beside
from autotune.workload.components import tensor_bytes

_CPU = torch.device("cpu")


class Held(NamedTuple):
    """Bytes of a pipeline's weights: on the device, in host RAM, on other GPUs by CUDA's index."""

    device_bytes: int
    ram_bytes: int
    elsewhere_bytes: dict[int, int]


def held_by(pipe: Any, device: str, machine: Machine) -> Held:
    """Where the pipeline's weights are now; it looks at every tensor, once."""
    held = _bytes_by_place(pipe)
    here = torch.device(device)
    return Held(
        held[here.type, here.index or 0],
        held["cpu", 0],
        {gpu.index: held["cuda", gpu.index] for gpu in machine.others},
    )


def with_own_memory(
    machine: Machine, device: str, pipe: Any = None, held: Held | None = None
) -> Machine:
    """The machine with the memory that planning counts anew given back to what is free.

    A plan counts the pipeline's weights, this process and the runtime's context. Where the pipeline
    is loaded and the context is there, the memory just read is already without them. What other
    pipelines of this process have been promised is not free.

    Args:
        machine: Its free memory read now.
        device: Where the pipeline will run, ``"cuda:0"``.
        pipe: The loaded pipeline; ``None`` when its weights are still to be read.
        held: Where its weights are, when that is known.
    """
    where = torch.device(device)
    held = held or held_by(pipe, device, machine)
    private = _private_bytes()
    own = min(held.ram_bytes, private) if where.type == "cpu" else held.device_bytes
    if where.type == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        own += _unused_bytes(where) + machine.context_bytes
    promised, promised_ram = promised_beside(pipe, device, used_bytes(device))
    free = min(machine.device.free_bytes + own, machine.device.total_bytes)
    others = tuple(_with_own(gpu, held) for gpu in machine.others)
    given = min(held.ram_bytes + PROCESS_BYTES, private)
    available = min(machine.host.ram_available_bytes + given, machine.host.ram_total_bytes)
    return msgspec.structs.replace(
        machine,
        others=others,
        device=msgspec.structs.replace(machine.device, free_bytes=max(0, free - promised)),
        host=msgspec.structs.replace(
            machine.host, ram_available_bytes=max(0, available - promised_ram)
        ),
    )


def used_bytes(device: str) -> int:
    """Of a device's memory, by this process's tensors; 0 where nobody tells."""
    where = torch.device(device)
    if where.type == "cpu":
        return _private_bytes()
    if where.type == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.memory_allocated(where)
    return 0


def _unused_bytes(where: torch.device) -> int:
    """Reserved and unused: the allocator gives it to the next tensor that asks."""
    return torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)


def _with_own(gpu: OtherGpu, held: Held) -> OtherGpu:
    """The same for another GPU; whether it has a context already is not known, and not counted."""
    own = held.elsewhere_bytes.get(gpu.index, 0)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        own += _unused_bytes(torch.device("cuda", gpu.index))
    return msgspec.structs.replace(gpu, free_bytes=min(gpu.free_bytes + own, gpu.total_bytes))


def _private_bytes() -> int:
    """RAM that this process alone holds.

    Weights read from safetensors files are pages of these files until they are cast or moved: the
    system can drop those, and counts them as available.
    """
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def bytes_on(device: torch.device, pipe: Any) -> int:
    """Bytes of a pipeline's weights on a device."""
    return _bytes_by_place(pipe)[device.type, device.index or 0]


def resident_bytes(pipe: Any) -> int:
    """All weights as they are now, with what optimizations have added to them or taken off."""
    return _bytes_by_place(pipe).total()


def _bytes_by_place(pipe: Any) -> Counter[tuple[str, int]]:
    """By type and index of device; packed weights as they are stored."""
    held: Counter[tuple[str, int]] = Counter()
    for tensor in _tensors(pipe):
        # What sequential offload has put away is on the meta device, and its data in RAM.
        where = _CPU if tensor.is_meta else tensor.device
        held[where.type, where.index or 0] += tensor_bytes(tensor)
    return held


def _tensors(pipe: Any) -> Iterator[torch.Tensor]:
    for module in modules_of(pipe).values() if pipe is not None else ():
        yield from module.parameters()
        yield from module.buffers()
