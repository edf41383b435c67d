"""From an architecture and a request to a ``Workload``: what runs when, and what it needs.

The calls of a rehearsal are grouped: what comes before the first call of a denoiser is *encode*,
what comes after the last is *decode*.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from autotune.errors import ModelError, first_line
from autotune.units import format_bytes
from autotune.workload.architecture import Architecture
from autotune.workload.components import describe, meta_module, weight_bytes
from autotune.workload.estimate import estimated_call
from autotune.workload.rehearsal import Call, meta_pipeline, rehearse
from autotune.workload.variants import switched, variants_of
from autotune.workload.workload import ComponentRun, Phase, Request, Role, Trace, Workload

_SLICES_TRACED = 4
"""A sliced decode repeats itself: so many images are traced, the others are counted."""


def trace_workload(architecture: Architecture, request: Request, pipe: Any = None) -> Workload:
    """Trace every phase of one generation.

    Args:
        architecture: The model's classes and configurations.
        request: A complete request (see ``complete_request``).
        pipe: The loaded pipeline, where there is one: modules that their configuration does not
            describe are copied from it, without their data.

    Raises:
        ModelError: a component's class is not installed, or the pipeline's own code fails.
        RequestError: the pipeline refuses the request.
    """
    live = getattr(pipe, "components", {})
    modules = {
        name: meta_module(name, component, getattr(torch, component.dtype or request.dtype), live)
        for name, component in architecture.components.items()
    }
    rehearsed = meta_pipeline(architecture, modules, type(pipe) if pipe is not None else None)
    modules = {n: m for n, m in rehearsed.components.items() if isinstance(m, nn.Module)}
    components = tuple(describe(n, m) for n, m in modules.items())
    runs = _Runs(modules, request)
    calls = rehearse(rehearsed, request, runs.trace)
    phases = _phases(calls, runs.found)
    chained, apart = _offload_order(rehearsed)
    return Workload(
        model=architecture.name,
        pipeline=architecture.pipeline,
        request=request,
        components=components,
        phases=phases,
        offload_order=chained,
        offload_apart=apart,
        latent_tokens=runs.latent_tokens,
        notes=(*runs.notes, *_never_called(components, phases)),
    )


Key = tuple[str, str, str]
"""Component, entry and signature of a call."""


class _Runs:
    """Traces each call that a rehearsal comes to."""

    def __init__(self, modules: dict[str, nn.Module], request: Request) -> None:
        self._weights = {n: weight_bytes(m) for n, m in modules.items()}
        self._request = request
        self.found: list[ComponentRun] = []
        self.latent_tokens = 0
        self.notes: list[str] = []

    def trace(self, call: Call) -> Any:
        """Add the run of a call that is new, and return what the call returns."""
        role = _role(call)
        if role == "denoiser" and not self.latent_tokens:
            self.latent_tokens = _latent_tokens(call)
        try:
            trace, out, guesses = call.trace()
            note = _on_zeros(call, guesses) if guesses else ""
        except Exception as error:  # any operator, any control flow that asks for values
            trace, out = estimated_call(call, role)
            note = _guessed(call, error)
        if note:
            self.notes.append(note)
        self.found.append(
            ComponentRun(
                component=call.component,
                role=role,
                calls=0,
                trace=trace,
                entry=call.entry,
                variants={} if note else dict(_variants(call, trace, self._request)),
                upcast_bytes=max(0, weight_bytes(call.module) - self._weights[call.component]),
                is_estimated=bool(note),
            )
        )
        return out


def _guessed(call: Call, error: Exception) -> str:
    return (
        f"{call.component} ({type(call.module).__name__}) cannot be traced: {first_line(error)}; "
        "its time and memory are estimated from its weights, with a wide margin"
    )


def _on_zeros(call: Call, operators: tuple[str, ...]) -> str:
    return (
        f"{call.component} ({type(call.module).__name__}) does what values tell it, and was traced "
        f"on zeros ({', '.join(operators)}); its time and memory are estimates, with a wide margin"
    )


def _role(call: Call) -> Role:
    if call.entry in ("encode", "decode"):
        return "autoencoder"
    parameters = inspect.signature(type(call.module).forward).parameters
    is_denoiser = any(p == "t" or p.startswith("timestep") for p in parameters)
    return "denoiser" if is_denoiser else "encoder"


def _latent_tokens(call: Call) -> int:
    """Height times width of what a UNet is given."""
    latents = next((t for t in call.tensors if t.dim() >= 4), None)
    return 0 if latents is None else latents.shape[-1] * latents.shape[-2]


def _phases(calls: list[Key], found: list[ComponentRun]) -> tuple[Phase, ...]:
    """Runs by phase, in the order of their first call, with how often each was called."""
    order = list(dict.fromkeys(calls))
    runs = dict(zip(order, found, strict=True))
    denoising = [i for i, key in enumerate(calls) if runs[key].role == "denoiser"]
    if not denoising:
        raise ModelError(
            "the pipeline never called a denoiser (a UNet or transformer with a timestep)",
            "give a diffusion pipeline",
        )
    first, last = denoising[0], denoising[-1] + 1
    parts = {"encode": calls[:first], "denoise": calls[first:last], "decode": calls[last:]}
    return tuple(Phase(name, tuple(_counted(part, runs))) for name, part in parts.items() if part)


def _counted(calls: list[Key], runs: dict[Key, ComponentRun]) -> Iterator[ComponentRun]:
    for key in dict.fromkeys(calls):
        yield msgspec.structs.replace(runs[key], calls=calls.count(key))


def _never_called(components: Iterable[Any], phases: tuple[Phase, ...]) -> Iterator[str]:
    """A note for each component that is loaded, but runs in no phase."""
    called = {r.component for p in phases for r in p.runs}
    for component in components:
        if component.name not in called and component.weight_bytes:
            size = format_bytes(component.weight_bytes)
            yield f"{component.name}: its weights ({size}) are counted, it runs in no phase"


def _offload_order(pipe: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What ``enable_model_cpu_offload`` chains, and what it hooks alone."""
    modules = [n for n, m in pipe.components.items() if isinstance(m, nn.Module)]
    sequence = (getattr(pipe, "model_cpu_offload_seq", None) or "").split("->")
    chained = tuple(n for n in sequence if n in modules)
    excluded = set(getattr(pipe, "_exclude_from_cpu_offload", ()))
    return chained, tuple(n for n in modules if n not in chained and n not in excluded)


# ---- code paths of an autoencoder ---------------------------------------------------------------


def _variants(call: Call, whole: Trace, request: Request) -> Iterator[tuple[str, Trace]]:
    if call.entry not in ("encode", "decode"):
        return
    for variant in variants_of(call.module, request):
        try:
            trace = _variant(call, variant)
        except Exception:  # this autoencoder cannot do it at this size
            continue
        if trace != whole:
            yield variant, trace


def _variant(call: Call, variant: str) -> Trace:
    batched = next((t for t in call.tensors if t.dim() >= 4), None)
    batch = 1 if batched is None else batched.shape[0]
    traced = min(batch, _SLICES_TRACED) if variant.startswith("sliced") else batch
    few = call if traced == batch else _with_batch(call, batch, traced)
    with switched(call.module, variant):
        found, out, _ = few.trace()
    if traced == batch:
        return found
    out_bytes = sum(t.numel() * t.element_size() for t in _tensors(out)) // traced
    return _repeated(found, batch, traced, out_bytes)


def _tensors(out: Any) -> Iterator[Tensor]:
    items = (
        out if isinstance(out, tuple) else vars(out).values() if hasattr(out, "__dict__") else ()
    )
    return (t for t in items if isinstance(t, Tensor))


def _with_batch(call: Call, batch: int, fewer: int) -> Call:
    def cut(value: Any) -> Any:
        is_batched = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch
        return value[:fewer].clone() if is_batched else value

    args = tuple(cut(a) for a in call.args)
    return call._replace(args=args, kwargs={k: cut(v) for k, v in call.kwargs.items()})


def _repeated(trace: Trace, batch: int, traced: int, image_bytes: int) -> Trace:
    """The trace of a few images as that of a batch: as much more work, and the images that wait."""
    waiting = (batch - traced) * image_bytes
    operators = tuple(
        msgspec.structs.replace(
            o, count=o.count * batch // traced, live_bytes=o.live_bytes + waiting
        )
        for o in trace.operators
    )
    return Trace(
        operators=operators,
        # At the end the images are joined: all of them, twice.
        activation_bytes=max(trace.activation_bytes + waiting, 2 * batch * image_bytes),
        dispatches=sum(o.count for o in operators),
        timeline=trace.timeline,  # what is reserved for a few images serves all that follow
        timed=trace.timed,
    )
