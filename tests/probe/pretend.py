"""Devices that are not there: slow ones, and GPUs whose tensors really live in host memory.

Nothing here tells how fast anything is. It lets the code for a device run where there is none, so
that it is seen to call what exists, in an order that works, and to end.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from autotune.probe import attention, host, kernels, transfers
from autotune.probe.dispatch import UNET_MODULE


class SlowClock:
    """A clock that moves only when told, and a little whenever somebody looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def shrink(monkeypatch: Any) -> None:
    """Makes everything that the probe computes small, and the CPU quiet.

    Where time is that of a clock which a test moves, real seconds are only waited for.
    """
    importlib.import_module(UNET_MODULE)
    importlib.import_module("accelerate")
    monkeypatch.setattr(host, "_read_times", lambda: host._Times(0, 0, 0, 0))
    shapes = tuple(replace(shape, q_tokens=16) for shape in attention.CPU_SHAPES)
    for device in ("CPU", "GPU"):
        monkeypatch.setattr(attention, f"{device}_SHAPES", shapes)
        monkeypatch.setattr(kernels, f"_{device}_SIDES", (8, 16, 32))
        monkeypatch.setattr(kernels, f"_{device}_IMAGES", (8, (4, 8)))
        monkeypatch.setattr(kernels, f"_{device}_BUFFER", 2 << 20)
    monkeypatch.setattr(kernels, "_SMALLEST_BUFFER", 1 << 20)
    monkeypatch.setattr(transfers, "_OVERLAPPED_SIDE", 32)
    monkeypatch.setattr(transfers, "_OVERLAPPED_BYTES", 1 << 20)
    monkeypatch.setattr(transfers, "_SWEEP_BYTES", (1 << 20, 2 << 20, 4 << 20))
    monkeypatch.setattr(transfers, "_QUICK_SWEEP_BYTES", (1 << 20, 2 << 20))
    monkeypatch.setattr(transfers, "_LARGE_BYTES", 2 << 20)
    monkeypatch.setattr(transfers, "_LAYERS", ((256, 256), (256, 512)))


class SlowDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every operator on real memory takes longer, by a clock that the test moves."""

    def __init__(self, advance: Callable[[float], None], seconds: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._advance, self._seconds = advance, seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not (isinstance(out, torch.Tensor) and out.is_meta):
            self._advance(self._seconds)
        return out


class _InHostMemory(TorchFunctionMode):
    """Tensors asked for on one kind of device are made on the CPU."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        kwargs = {k: self._moved(v) for k, v in (kwargs or {}).items() if k != "pin_memory"}
        return func(*map(self._moved, args), **kwargs)

    def _moved(self, value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == self._kind:
            return torch.device("cpu")
        if isinstance(value, str) and value.partition(":")[0] == self._kind:
            return "cpu"
        return value


class _Event:
    """Stamped by the host: nothing here runs beside it."""

    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: _Event) -> float:
        return (end.at - self.at) * 1e3


class _Stream:
    def __init__(self, *_: Any) -> None: ...

    def wait_stream(self, _: _Stream) -> None: ...


class Fractions(list[float]):
    """Every memory limit that was set."""


@contextlib.contextmanager
def pretend(
    monkeypatch: Any,
    kind: str,
    names: tuple[str, ...] = ("Pretended GPU",),
    uuids: tuple[str, ...] = (),
    **properties: Any,
) -> Iterator[Fractions]:
    """While it lasts there are devices of that kind, with 8 GiB each, of which half is free.

    Args:
        monkeypatch: Undoes what is changed of torch.
        kind: ``"cuda"``, ``"xpu"`` or ``"mps"``.
        names: One per device.
        uuids: As torch writes them, without NVML's prefix.
        properties: Of every device, beside name, UUID and size.

    Yields:
        The limits set on the memory that torch may take.
    """
    facts = [
        SimpleNamespace(
            name=name,
            uuid=(*uuids, *[f"{at}" for at in range(8)])[at],
            total_memory=8 << 30,
            major=8,
            minor=6,
            is_integrated=0,
            multi_processor_count=68,
        )
        for at, name in enumerate(names)
    ]
    for fact in facts:
        fact.__dict__.update(properties)
    fractions = Fractions()
    functions: dict[str, Any] = {
        "get_device_properties": lambda device=0: facts[getattr(device, "index", device) or 0],
        "get_device_name": lambda device=0: facts[getattr(device, "index", device) or 0].name,
        "device_count": lambda: len(facts),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "mem_get_info": lambda device=None: (4 << 30, 8 << 30),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 1 << 20,
        "reset_peak_memory_stats": lambda device=None: None,
        "get_per_process_memory_fraction": lambda device=None: 1.0,
        "set_per_process_memory_fraction": lambda share, device=None: fractions.append(share),
        "recommended_max_memory": lambda: 6 << 30,
        "driver_allocated_memory": lambda: 0,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "Event": _Event,
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "_sleep": lambda cycles: None,
    }
    module = getattr(torch, kind)
    for name, function in functions.items():
        monkeypatch.setattr(module, name, function, raising=False)
    for name, function in {
        "is_available": lambda: True,
        "device_count": lambda: len(facts),
        "current_accelerator": lambda: torch.device(kind),
        "synchronize": lambda device=None: None,
    }.items():
        monkeypatch.setattr(torch.accelerator, name, function)
    make = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": make("cpu"))
    fork = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices, device_type="cuda": fork([]))
    with _InHostMemory(kind):
        yield fractions
