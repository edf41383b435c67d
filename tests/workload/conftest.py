"""Requests and workloads of the small pipelines, and the real allocator to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from autotune.runtime.measure import _quiet_stderr
from autotune.workload.workload import Request

KERNELS = ("aten::convolution", "aten::scaled_dot_product_attention")
"""Operators that a trace sees as one, and that take scratch memory inside on the CPU."""


@pytest.fixture
def request_of() -> Callable[..., Request]:
    def make(side: int = 64, batch: int = 1, **fields: Any) -> Request:
        values: dict[str, Any] = {"steps": 3, "guidance_scale": 7.5, "dtype": "float32"} | fields
        return Request(height=side, width=side, batch=batch, **values)

    return make


@pytest.fixture
def allocated_peaks() -> Callable[[Callable[[], Any]], tuple[int, int]]:
    """Runs a call under the profiler: (peak of the tensors, peak with the kernels' scratch)."""
    return measure_allocations


def measure_allocations(call: Callable[[], Any]) -> tuple[int, int]:
    """Peaks in bytes of what the CPU's allocator gave out meanwhile, the call's output included.

    Scratch is what was both given out and taken back inside one kernel: oneDNN's reordered copies
    of a convolution's operands, an im2col buffer, a flash kernel's accumulators. It depends on
    the processor and belongs to an operator's workspace, not to its tensors.
    """
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    with _quiet_stderr(), torch.no_grad():
        profile = torch.profiler.profile(activities=activities, profile_memory=True)
        profile.start()
        output = call()
        profile.stop()
    del output
    profiler: Any = profile.profiler
    events = sorted(_allocations(profiler.kineto_results.experimental_event_tree(), None))
    scratch = _inside_one_kernel(events)
    tensors = [e for i, e in enumerate(events) if i not in scratch]
    return _peak(tensors), _peak(events)


_Event = tuple[int, int, int, int]  # when, pointer, bytes (negative when freed), kernel's id or 0


def _allocations(nodes: Any, kernel: int | None) -> list[_Event]:
    found: list[_Event] = []
    for node in nodes:
        inside = kernel or (node.id if node.name in KERNELS else None)
        if node.name == "[memory]":
            fields = node.extra_fields
            found.append((node.start_time_ns, fields.ptr, fields.alloc_size, inside or 0))
        found += _allocations(node.children, inside)
    return found


def _inside_one_kernel(events: list[_Event]) -> set[int]:
    given: dict[int, tuple[int, int]] = {}
    scratch = set()
    for i, (_, pointer, size, kernel) in enumerate(events):
        if size > 0:
            given[pointer] = (i, kernel)
        elif pointer in given:
            start, owner = given.pop(pointer)
            if owner and owner == kernel:
                scratch |= {start, i}
    return scratch


def _peak(events: list[_Event]) -> int:
    held = peak = 0
    for _, _, size, _ in events:
        held += size
        peak = max(peak, held)
    return peak
