"""The device that is measured: everything that only CUDA answers is in this file."""

from __future__ import annotations

import contextlib
import gc
import os
import time
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch

from autotune.probe.devices import choose_device, empty_cache
from autotune.probe.machine import Machine
from autotune.runtime.measure import CudaGauge, Gauge, Level
from autotune.runtime.out_of_memory import is_out_of_memory
from autotune.units import GIB, MIB
from validation.cases import CPU_SHARES, GPU_CARDS_GB


class Device:
    """What is measured.

    Attributes:
        kind: As PyTorch calls it.
        simulates: Memory limits are only reckoned with: a peak is compared with them.
        device: PyTorch's.
        draws_small: Small pipelines are drawn on it, not full-size ones.
        is_small: It is a small card now: an error that may mean memory does, then.
    """

    kind = "cpu"
    simulates = True
    device = torch.device("cpu")
    is_small = False
    draws_small = True

    def empty(self) -> None:
        """Give cached memory back."""

    def clean(self) -> None:
        """Give back what nothing refers to."""
        gc.collect()
        self.empty()

    def ran_out(self, error: BaseException) -> bool:
        """Whether it is for want of memory."""
        return is_out_of_memory(error, self.is_small)

    def is_lost(self, error: BaseException) -> bool:
        """Whether CUDA's context is of no use afterwards: only another process helps."""
        words = ("CUDA error", "device-side assert", "illegal memory access")
        return not self.ran_out(error) and any(w in str(error) for w in words)

    def cards(self, plain_bytes: int, machine: Machine) -> tuple[int, ...]:
        """Limits on memory that are asked about, in bytes."""
        raise NotImplementedError

    def card(self, size_bytes: int | None, machine: Machine) -> AbstractContextManager[None]:
        """A card of that size for a while; ``None`` for all there is."""
        raise NotImplementedError

    def gauge(self) -> Gauge:
        """Of memory in each phase; where nobody tells, the profiler does in a run of its own."""
        return Gauge()


class Cpu(Device):
    """One of its limits is any number."""

    def cards(self, plain_bytes: int, machine: Machine) -> tuple[int, ...]:
        """Limits around what the plain pipeline is predicted to need."""
        return tuple(int(share * plain_bytes) // MIB * MIB for share in CPU_SHARES)

    @contextlib.contextmanager
    def card(self, size_bytes: int | None, machine: Machine) -> Iterator[None]:
        """The CPU's memory cannot be made smaller."""
        yield


class Cuda(Device):
    """One GPU; smaller ones are made of it by the allocator's limit."""

    kind = "cuda"
    simulates = False
    draws_small = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.set_device(device)  # tools take the current one

    def empty(self) -> None:
        """Give cached memory back, pinned buffers and workspaces of libraries too."""
        torch.cuda.synchronize(self.device)
        empty_cache(self.device)

    def cards(self, plain_bytes: int, machine: Machine) -> tuple[int, ...]:
        """Sizes that there are, as far as this card is larger."""
        return tuple(gb * GIB for gb in GPU_CARDS_GB if gb * GIB < machine.device.free_bytes)

    @contextlib.contextmanager
    def card(self, size_bytes: int | None, machine: Machine) -> Iterator[None]:
        """A card of that size: the allocator stops there, and who asks is told so.

        A context takes its part of a card before the allocator does.
        """
        if size_bytes is None:
            yield
            return
        total = torch.cuda.get_device_properties(self.device).total_memory
        usable = size_bytes - machine.context_bytes
        torch.cuda.set_per_process_memory_fraction(usable / total, self.device)
        self.is_small = True
        try:
            with self._told(size_bytes, usable):
                yield
        finally:
            self.is_small = False
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)

    @contextlib.contextmanager
    def _told(self, size_bytes: int, usable: int) -> Iterator[None]:
        """Tools that choose by the card's size read one of these two."""
        properties = torch.cuda.get_device_properties(self.device)
        named = {n: getattr(properties, n) for n in dir(properties) if not n.startswith("_")}
        small = types.SimpleNamespace(**named | {"total_memory": size_bytes})

        def free(*_: Any, **__: Any) -> tuple[int, int]:
            return max(0, usable - torch.cuda.memory_reserved(self.device)), size_bytes

        with (
            mock.patch.object(torch.cuda, "mem_get_info", free),
            mock.patch.object(torch.cuda, "get_device_properties", lambda *_, **__: small),
        ):
            yield

    def gauge(self) -> Gauge:
        """At all three levels."""
        return _WholeGauge(self.device, asks_driver=True)


class Simulated(Cuda):
    """A GPU that is not there, with the small pipelines of the CPU."""

    draws_small = True

    def __init__(self) -> None:
        super().__init__(torch.device("cuda", 0))

    def cards(self, plain_bytes: int, machine: Machine) -> tuple[int, ...]:
        """As on the CPU."""
        return Cpu().cards(plain_bytes, machine)


class _WholeGauge(CudaGauge):
    """What a driver that does not know this process (in a container) takes for all in use counts.

    That is right on a GPU that nobody else uses.
    """

    def read(self) -> Level:
        """Since ``begin``."""
        level = super().read()
        if level.device is not None or level.reserved is None:
            return level
        free, total = torch.cuda.mem_get_info(self._device)
        beside = max(0, total - free - torch.cuda.memory_reserved(self._device))
        return level._replace(device=level.reserved + beside)


def chosen(name: str | None) -> Device:
    """The named device; by default the GPU with most free memory, where there is one.

    Raises:
        MachineError: there is no such device.
    """
    if name is None and not torch.cuda.is_available():
        return Cpu()
    device = choose_device(name)
    return Cuda(device) if device.type == "cuda" else Cpu()


def keep_clock(clock: str, threads: int | None) -> None:
    """Wall time; or the CPU time of the one thread that computes, which neighbours disturb less."""
    if clock == "cpu":
        torch.set_num_threads(1)
        time.perf_counter = time.thread_time  # what all timing here and in the probe reads
    elif threads is not None:
        torch.set_num_threads(threads)


def load_average() -> float:
    """Of the last minute; -1 where the system does not say."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return -1.0
