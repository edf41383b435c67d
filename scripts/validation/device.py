"""The device that is measured: everything that only CUDA answers is in this file."""

from __future__ import annotations

import contextlib
import gc
import os
import time
import types
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from autotune.probe.machine import Machine
from autotune.units import GIB, MIB
from validation.cases import CPU_SHARES, GPU_CARDS_GB


class Memory(NamedTuple):
    """Peaks of this process in bytes: reserved by the allocator, and taken from the device."""

    reserved_bytes: int | None = None
    device_bytes: int | None = None


class Cpu:
    """Memory limits are only reckoned with: a peak is compared with them."""

    kind = "cpu"
    simulates = True
    device = torch.device("cpu")

    def clean(self) -> None:
        """Give back what nothing refers to."""
        gc.collect()

    def cards(self, plain_bytes: int, machine: Machine) -> tuple[int, ...]:
        """Limits around what the plain pipeline is predicted to need."""
        return tuple(int(share * plain_bytes) // MIB * MIB for share in CPU_SHARES)

    @contextlib.contextmanager
    def card(self, size_bytes: int | None, machine: Machine) -> Iterator[None]:
        """The CPU's memory cannot be made smaller."""
        yield

    def forget_peaks(self) -> None:
        """There are none."""

    def peaks(self) -> Memory:
        """Nobody tells."""
        return Memory()


class Cuda:
    """One GPU, the current one; smaller ones are made of it by the allocator's limit."""

    kind = "cuda"
    simulates = False

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def clean(self) -> None:
        """Give back what nothing refers to, to the driver."""
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

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
        try:
            with self._told(size_bytes, usable):
                yield
        finally:
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

    def forget_peaks(self) -> None:
        """What comes counts, not what was."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def peaks(self) -> Memory:
        """Since they were forgotten; the device's is that of now."""
        free, total = torch.cuda.mem_get_info(self.device)
        return Memory(torch.cuda.max_memory_reserved(self.device), total - free)


Device = Cpu | Cuda


def chosen(name: str | None) -> Device:
    """The GPU where there is one, unless another is named."""
    return Cuda() if (name or "cuda") != "cpu" and torch.cuda.is_available() else Cpu()


_OUT_OF_MEMORY = (
    "out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "cannot allocate memory",
)


def ran_out(error: BaseException) -> bool:
    """Whether it is for want of memory; libraries say so in words only."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    causes = (error, error.__cause__, error.__context__)
    return any(isinstance(e, kinds) or any(w in str(e) for w in _OUT_OF_MEMORY) for e in causes)


def is_lost(error: BaseException) -> bool:
    """Whether CUDA's context is of no use afterwards: only another process helps."""
    words = ("CUDA error", "device-side assert", "illegal memory access")
    return not ran_out(error) and any(w in str(error) for w in words)


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
