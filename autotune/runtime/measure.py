"""Measure a real generation phase by phase: seconds, and peaks of memory at three levels.

Allocated is what the allocator had given out, weights included; reserved what it had taken from the
device for that; the device level all that this process held there, whatever for.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import msgspec
import psutil
import torch

from autotune.probe import nvml
from autotune.profile.profile import PhaseMeasurement
from autotune.workload.workload import Workload

_MARK, _PASS = "autotune:", "autotune pass"


class Level(NamedTuple):
    """Peaks in bytes; ``None`` where nothing tells."""

    allocated: int | None = None
    reserved: int | None = None
    device: int | None = None

    def or_more(self, other: Level) -> Level:
        """The larger of each."""
        return Level(*(max(p, default=None) for p in map(_known, zip(self, other, strict=True))))


def _known(values: Iterable[int | None]) -> list[int]:
    return [v for v in values if v is not None]


class Gauge:
    """Peaks of memory between ``begin`` and ``read``; this one knows of no memory at all."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it is used."""
        yield

    def begin(self) -> None:
        """From here on."""

    def read(self) -> Level:
        """Since ``begin``."""
        return Level()


class CudaGauge(Gauge):
    """The caching allocator's own counters.

    Args:
        device: Of CUDA.
        asks_driver: Whether to ask NVML for the device level too, which takes milliseconds.
    """

    def __init__(self, device: torch.device, asks_driver: bool = False) -> None:
        self._device = device
        self._uuid = _uuid(device) if asks_driver else None

    def begin(self) -> None:
        """From here on."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def read(self) -> Level:
        """Since ``begin``."""
        reserved = torch.cuda.max_memory_reserved(self._device)
        allocated = torch.cuda.max_memory_allocated(self._device)
        held = nvml.own_bytes(self._uuid) if self._uuid is not None else None
        if held is None:  # in a container, where processes are numbered otherwise
            return Level(allocated, reserved)
        # What is held beside the allocator's segments (context, kernels, handles) only grows.
        beside = max(0, held - torch.cuda.memory_reserved(self._device))
        return Level(allocated, reserved, reserved + beside)


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


class RamGauge(Gauge):
    """The RAM that this process alone holds, sampled: the device level of a CPU.

    Files mapped into memory (safetensors, libraries) are not its own.
    """

    INTERVAL_S = 0.005

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._most = 0
        self._done = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it is used: a thread looks every few milliseconds."""
        thread = threading.Thread(target=self._sample, name="autotune-ram", daemon=True)
        self._done.clear()
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def begin(self) -> None:
        """From here on."""
        self._most = 0
        self._see()

    def read(self) -> Level:
        """Since ``begin``."""
        self._see()
        return Level(device=self._most)

    def _sample(self) -> None:
        while not self._done.wait(self.INTERVAL_S):
            self._see()

    def _see(self) -> None:
        memory = self._process.memory_info()
        self._most = max(self._most, int(memory.rss - getattr(memory, "shared", 0)))


def device_gauge(device: str) -> Gauge:
    """The gauge that knows most of a device, ``"cuda:0"``."""
    where = torch.device(device)
    if where.type == "cuda":
        return CudaGauge(where, asks_driver=True)
    return RamGauge() if where.type == "cpu" else Gauge()


class PhaseMeter:
    """Times the phases of one call of a pipeline.

    A phase begins with the first call of one of its components and ends where the next begins, so
    that hooks moving weights and the scheduler's arithmetic are counted where they happen. Its peak
    begins once the hook of model offload has moved the weights: until then those of the phase
    before are still on the device.

    Args:
        pipe: A loaded pipeline.
        workload: Says which component belongs to which phase.
        device: Where it runs.
        gauge: Of memory; on CUDA the allocator's by default, else none.
    """

    def __init__(
        self, pipe: Any, workload: Workload, device: str, gauge: Gauge | None = None
    ) -> None:
        self._order = [p.name for p in workload.phases]
        self._phases: dict[tuple[str, str], list[str]] = {}
        for phase in workload.phases:
            for run in phase.runs:
                self._phases.setdefault((run.component, run.entry), []).append(phase.name)
        self._pipe = pipe
        self._device = torch.device(device)
        is_cuda = self._device.type == "cuda"
        self._gauge = gauge or (CudaGauge(self._device) if is_cuda else Gauge())
        self._current: str | None = None
        self._started = 0.0
        self._entering: str | None = None
        self._seconds: dict[str, float] = {}
        self._levels: dict[str, Level] = {}
        self.calls: Counter[tuple[str, str]] = Counter()
        """Phase and component → calls of it that began."""

    @property
    def measured(self) -> tuple[PhaseMeasurement, ...]:
        """One entry per phase that ran, in order."""
        return tuple(
            PhaseMeasurement(name, seconds, *self._levels.get(name, Level()))
            for name, seconds in self._seconds.items()
        )

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Measure the calls inside; the pipeline is as before afterwards."""
        with ExitStack() as stack:
            stack.enter_context(self._gauge.watching())
            for (component, entry), phases in self._phases.items():
                module = getattr(self._pipe, component)
                tell = functools.partial(self._call, component, phases)
                stack.enter_context(_called(module, entry, tell))
                stack.enter_context(_moved(module, functools.partial(self._moved, component)))
            try:
                yield
                self._leave()
            finally:
                self._current = None  # a call that raised leaves no phase open

    def _call(self, component: str, phases: list[str]) -> None:
        """A component begins that runs in these phases: no generation goes back to an earlier."""
        now = self._order.index(self._current) if self._current else 0
        later = (p for p in phases if self._order.index(p) >= now)
        phase = next(later, phases[0])
        is_new = phase != self._current
        self._entering = component if is_new else None
        if is_new:
            self._enter(phase)
        self.calls[phase, component] += 1

    def _moved(self, component: str) -> None:
        """A component's weights are where it computes."""
        if component == self._entering:
            self._entering = None
            self._gauge.begin()

    def _enter(self, phase: str) -> None:
        self._leave()
        with torch.profiler.record_function(_MARK + phase):
            self._current = phase
        self._gauge.begin()
        self._started = time.perf_counter()

    def _leave(self) -> None:
        if self._current is None:
            return
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        elapsed = time.perf_counter() - self._started
        self._seconds[self._current] = self._seconds.get(self._current, 0.0) + elapsed
        before = self._levels.get(self._current, Level())
        self._levels[self._current] = before.or_more(self._gauge.read())
        self._current = None


@contextmanager
def _called(module: Any, entry: str, tell: Callable[[], None]) -> Iterator[None]:
    """Tell when a module's forward, or an autoencoder's encode or decode, begins."""
    if entry == "forward":
        handle = module.register_forward_pre_hook(lambda *_: tell())
        try:
            yield
        finally:
            handle.remove()
        return
    method = getattr(module, entry)
    own = module.__dict__.get(entry)

    @functools.wraps(method)
    def told(*args: Any, **kwargs: Any) -> Any:
        tell()
        return method(*args, **kwargs)

    setattr(module, entry, told)
    try:
        yield
    finally:
        delattr(module, entry)
        if own is not None:
            setattr(module, entry, own)


@contextmanager
def _moved(module: Any, tell: Callable[[], None]) -> Iterator[None]:
    """Tell when accelerate's hook, if the module has one, has done what it does before a call."""
    hook = getattr(module, "_hf_hook", None)
    before = getattr(hook, "pre_forward", None)
    if hook is None or before is None:  # other tools set things of that name, too
        yield
        return
    own = vars(hook).get("pre_forward")

    @functools.wraps(before)
    def told(*args: Any, **kwargs: Any) -> Any:
        found = before(*args, **kwargs)
        tell()
        return found

    hook.pre_forward = told
    try:
        yield
    finally:
        del hook.pre_forward
        if own is not None:
            hook.pre_forward = own


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Kineto announces its start and stop on file descriptor 2, whatever the log level."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def cpu_peaks(call: Callable[[], Any], weight_bytes: int, passes: int = 1) -> dict[str, int]:
    """Peak bytes per phase on the CPU, from the allocator's events while ``call`` runs.

    The profiler slows the call down, so it must not be the one that is timed.

    Args:
        call: Runs the pipeline under ``PhaseMeter.watch``.
        weight_bytes: What is resident already: the events only tell what comes and goes.
        passes: Of the call; the last one counts. Two where weights are made anew on the way (cast
            layer by layer): the end of what was there before the events began is not told.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    profile = torch.profiler.profile(activities=activities, profile_memory=True)
    with _quiet_stderr():
        profile.start()
    try:
        for _ in range(passes):
            with torch.profiler.record_function(_PASS):
                call()
    finally:
        with _quiet_stderr():
            profile.stop()
    profiler: Any = profile.profiler
    peaks: dict[str, int] = {}
    phase, held, before = "", 0, 0
    for event in sorted(profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        name = event.name()
        if name == _PASS:
            phase, before, peaks = "", held, {}
        elif name.startswith(_MARK):
            phase = name.removeprefix(_MARK)
        elif name == "[memory]":
            held += event.nbytes()
            if phase:
                peaks[phase] = max(peaks.get(phase, 0), weight_bytes + held - before)
    return peaks


def with_peaks(
    measured: tuple[PhaseMeasurement, ...], peaks: dict[str, int]
) -> tuple[PhaseMeasurement, ...]:
    """The measurements with peaks that were taken in another pass."""
    return tuple(msgspec.structs.replace(m, peak_bytes=peaks.get(m.name)) for m in measured)
