"""What every call of every component of a real pipeline really allocates on the CPU.

The profiler tells when PyTorch's allocator gives memory out and takes it back, and inside which
operator. Each call of a component is a window over these events. Scratch is told apart, because it
depends on the device and no trace of tensors has it: what is given out and taken back inside one
operator (oneDNN's reordered operands, im2col buffers, the flash kernel's accumulators), and Python
numbers, which are tensors on the host for a moment wherever the others are.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autotune.runtime.measure import _quiet_stderr

METHODS = ("forward", "encode", "decode")

_MARK = "truth:"

_NUMBER_BYTES = 8
"""Of ``tensor / 2.0``'s number: a double or a long, made before the operator is called."""


@dataclass(frozen=True)
class Call:
    """One call of one component.

    Attributes:
        component: Its name in the pipeline.
        method: One of ``METHODS``.
        peak_bytes: The most that was alive at once of what the call allocated, plus its inputs.
        peak_without_scratch_bytes: The same, without operators' scratch and without numbers.
        input_bytes: The storages of the tensors it was given, weights apart.
        held_bytes: What the pipeline had allocated and not freed when the call began, the inputs
            among it, except for what the caller made before.
        outputs: Shapes of the tensors it returned.
        arguments: What it was given, by position and by name, tensors on the meta device.
    """

    component: str
    method: str
    peak_bytes: int
    peak_without_scratch_bytes: int
    input_bytes: int
    held_bytes: int
    outputs: tuple[tuple[int, ...], ...]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]

    @property
    def scratch(self) -> float:
        """By how much of itself the peak without scratch is exceeded."""
        return self.peak_bytes / self.peak_without_scratch_bytes - 1


def truth(pipe: Any, call: Callable[[], Any], rounding: int = 1) -> list[Call]:
    """Run ``call`` under the profiler and tell what the components' calls took, in their order.

    A component's call from within itself (an autoencoder's forward decodes) is part of the outer.

    Args:
        pipe: A loaded pipeline on the CPU.
        call: Runs it.
        rounding: Every allocation is counted as a multiple of this (512 is CUDA's).
    """
    calls: list[Call] = []
    with ExitStack() as stack:
        for name, module in pipe.components.items():
            if isinstance(module, nn.Module):
                stack.enter_context(_recorded(name, module, calls, rounding))
        roots = _profile(call)
    windows: dict[int, tuple[int, int]] = {}
    events = _events(roots, rounding, windows)
    scratch = _scratch(events)
    measured = []
    for i, made in enumerate(calls):
        start, end = windows[i]
        inside = [j for j, e in enumerate(events) if start <= e.time <= end]
        peak = _peak(events[j].bytes for j in inside)
        tensors = _peak(events[j].bytes for j in inside if j not in scratch)
        measured.append(
            replace(
                made,
                peak_bytes=made.input_bytes + peak,
                peak_without_scratch_bytes=made.input_bytes + tensors,
                held_bytes=sum(e.bytes for e in events if e.time < start),
            )
        )
    return measured


def peaks(call: Callable[[], Any], rounding: int = 1) -> tuple[int, int]:
    """Peaks of whatever ``call`` allocates: without and with the operators' scratch."""
    events = _events(_profile(call), rounding)
    scratch = _scratch(events)
    tensors = [e for i, e in enumerate(events) if i not in scratch]
    return _peak(e.bytes for e in tensors), _peak(e.bytes for e in events)


# ---- watching the components --------------------------------------------------------------------


@contextmanager
def _recorded(name: str, module: nn.Module, calls: list[Call], rounding: int) -> Iterator[None]:
    """Mark and note the outermost calls of the component's methods; it is itself afterwards."""
    weights = {
        t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers(True))
    }
    depth = 0

    def watched(method: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if depth:
                return original(*args, **kwargs)
            index = len(calls)
            inputs = _storage_bytes((args, kwargs), weights, rounding)
            calls.append(Call(name, method, 0, 0, inputs, 0, (), _on_meta(args, kwargs)))
            depth += 1
            try:
                with torch.profiler.record_function(f"{_MARK}{index}"):
                    output = original(*args, **kwargs)
            finally:
                depth -= 1
            shapes = tuple(tuple(t.shape) for t in tensors_of(output))
            calls[index] = replace(calls[index], outputs=shapes)
            return output

        return run

    methods = [m for m in METHODS if callable(getattr(module, m, None))]
    own = {m: module.__dict__[m] for m in methods if m in module.__dict__}
    for method in methods:
        setattr(module, method, watched(method, getattr(module, method)))
    try:
        yield
    finally:
        for method in methods:
            delattr(module, method)
        for method, original in own.items():
            setattr(module, method, original)


def tensors_of(value: Any) -> list[Tensor]:
    """Tensors in what a component is given or returns, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif isinstance(getattr(value, "parameters", None), Tensor):  # an encoder's distribution
        value = [value.parameters]
    elif not isinstance(value, (list, tuple)):
        return []
    return [t for item in value for t in tensors_of(item)]


def _storage_bytes(value: Any, weights: set[int], rounding: int) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors_of(value)}
    return sum(_up(s.nbytes(), rounding) for p, s in storages.items() if p not in weights)


def _on_meta(args: Any, kwargs: Any) -> Any:
    """The arguments with tensors on meta, sharing storages as the real ones do."""
    storages: dict[int, Tensor] = {}

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            elements = storage.nbytes() // value.element_size()
            base = storages.setdefault(
                storage.data_ptr(), torch.empty(elements, dtype=value.dtype, device="meta")
            )
            return base.as_strided(value.shape, value.stride(), value.storage_offset())
        if isinstance(value, dict):
            return {k: moved(v) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(moved(v) for v in value)
        return value

    return moved(args), moved(kwargs)


# ---- the allocator's events ---------------------------------------------------------------------


class _Event(NamedTuple):
    """Memory given out, or taken back (its bytes are negative then)."""

    time: int
    pointer: int
    bytes: int
    operator: int  # the one that it happened in, 0 for none
    is_number: bool


def _profile(call: Callable[[], Any]) -> list[Any]:
    """The profiler's trees of events while ``call`` runs, its output included."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    was_collecting = gc.isenabled()
    gc.disable()  # what is freed meanwhile should be of the call's own making
    with torch.no_grad():
        profile = torch.profiler.profile(activities=activities, profile_memory=True)
        with _quiet_stderr():
            profile.start()
        try:
            output = call()
        finally:
            with _quiet_stderr():
                profile.stop()
            if was_collecting:
                gc.enable()
    del output
    profiler: Any = profile.profiler
    return list(profiler.kineto_results.experimental_event_tree())


def _events(
    nodes: list[Any], rounding: int, windows: dict[int, tuple[int, int]] | None = None
) -> list[_Event]:
    """What was given out and taken back, in order; when the marked calls began and ended."""
    found: list[_Event] = []
    _walk(nodes, 0, True, rounding, found, {} if windows is None else windows)
    return sorted(found, key=lambda e: e.time)


def _walk(
    nodes: list[Any],
    operator: int,
    is_free: bool,
    rounding: int,
    found: list[_Event],
    windows: dict[int, tuple[int, int]],
) -> None:
    """Events below ``nodes``, which are inside ``operator``, or free of any, composite or not."""
    for node in nodes:
        name = node.name
        if name == "[memory]":
            fields = node.extra_fields
            size = fields.alloc_size
            is_number = is_free and size == _NUMBER_BYTES
            size = _up(size, rounding) if size > 0 else -_up(-size, rounding)
            found.append(_Event(node.start_time_ns, fields.ptr, size, operator, is_number))
            continue
        if name.startswith(_MARK):
            index = int(name.removeprefix(_MARK))
            windows[index] = (node.start_time_ns, node.end_time_ns)
        inside = operator or (node.id if _is_operator(name) else 0)
        still_free = is_free and not name.startswith("aten::")
        _walk(node.children, inside, still_free, rounding, found, windows)


@functools.cache
def _is_operator(name: str) -> bool:
    """Whether a trace sees this as one operator, and not as the several that it is made of.

    PyTorch registers what is only made of others as ``CompositeImplicitAutograd``. Attention is
    made of others too, but traces keep it whole.
    """
    if name == "aten::scaled_dot_product_attention":
        return True
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None)
    if not name.startswith("aten::") or packet is None:
        return False
    overloads = (name if o == "default" else f"{name}.{o}" for o in packet.overloads())
    dispatched = [o for o in overloads if "out" not in o and torch._C._dispatch_has_kernel(o)]
    composite = "CompositeImplicitAutograd"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return not all(has_kernel(o, composite) for o in dispatched)


def _up(size: int, rounding: int) -> int:
    return -(-size // rounding) * rounding


def _scratch(events: list[_Event]) -> set[int]:
    """Indices of what was both given out and taken back inside one operator, and of numbers."""
    given: dict[int, int] = {}
    scratch = set()
    for i, event in enumerate(events):
        if event.bytes > 0:
            given[event.pointer] = i
        elif (start := given.pop(event.pointer, None)) is not None:
            owner = events[start].operator
            if (owner and owner == event.operator) or events[start].is_number:
                scratch |= {start, i}
    return scratch


def _peak(sizes: Any) -> int:
    held = peak = 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    return peak
