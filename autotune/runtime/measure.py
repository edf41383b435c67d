"""Measure a real generation phase by phase: seconds, and the allocator's peak."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from autotune.profile.profile import PhaseMeasurement
from autotune.workload.workload import Workload

_MARK = "autotune:"


class PhaseMeter:
    """Times the phases of one call of a pipeline.

    A phase begins with the first call of one of its components and ends where the next begins, so
    that hooks moving weights and the scheduler's arithmetic are counted where they happen.

    Args:
        pipe: A loaded pipeline.
        workload: Says which component belongs to which phase.
        device: Where it runs.
    """

    def __init__(self, pipe: Any, workload: Workload, device: str) -> None:
        self._order = [p.name for p in workload.phases]
        self._phases: dict[tuple[str, str], list[str]] = {}
        for phase in workload.phases:
            for run in phase.runs:
                self._phases.setdefault((run.component, run.entry), []).append(phase.name)
        self._pipe = pipe
        self._device = torch.device(device)
        self._current: str | None = None
        self._started = 0.0
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, int] = {}

    @property
    def measured(self) -> tuple[PhaseMeasurement, ...]:
        """One entry per phase that ran, in order."""
        return tuple(
            PhaseMeasurement(name, seconds, self._peaks.get(name))
            for name, seconds in self._seconds.items()
        )

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Measure the calls inside; the pipeline is as before afterwards."""
        with ExitStack() as stack:
            for (component, entry), phases in self._phases.items():
                module = getattr(self._pipe, component)
                stack.enter_context(_called(module, entry, functools.partial(self._call, phases)))
            try:
                yield
                self._leave()
            finally:
                self._current = None  # a call that raised leaves no phase open

    def _call(self, phases: list[str]) -> None:
        """A component begins that runs in these phases: no generation goes back to an earlier."""
        now = self._order.index(self._current) if self._current else 0
        later = (p for p in phases if self._order.index(p) >= now)
        self._enter(next(later, phases[0]))

    def _enter(self, phase: str) -> None:
        if phase == self._current:
            return
        self._leave()
        with torch.profiler.record_function(_MARK + phase):
            self._current = phase
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._started = time.perf_counter()

    def _leave(self) -> None:
        if self._current is None:
            return
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        elapsed = time.perf_counter() - self._started
        self._seconds[self._current] = self._seconds.get(self._current, 0.0) + elapsed
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            self._peaks[self._current] = max(self._peaks.get(self._current, 0), peak)
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


def cpu_peaks(call: Callable[[], Any], weight_bytes: int) -> dict[str, int]:
    """Peak bytes per phase on the CPU, from the allocator's events while ``call`` runs.

    The profiler slows the call down, so it must not be the one that is timed.

    Args:
        call: Runs the pipeline under ``PhaseMeter.watch``.
        weight_bytes: What is resident already: the events only tell what comes and goes.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    profile = torch.profiler.profile(activities=activities, profile_memory=True)
    with _quiet_stderr():
        profile.start()
    try:
        call()
    finally:
        with _quiet_stderr():
            profile.stop()
    profiler: Any = profile.profiler
    peaks: dict[str, int] = {}
    phase, held = "", 0
    for event in sorted(profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        name = event.name()
        if name.startswith(_MARK):
            phase = name.removeprefix(_MARK)
        elif name == "[memory]":
            held += event.nbytes()
            if phase:
                peaks[phase] = max(peaks.get(phase, 0), weight_bytes + held)
    return peaks
