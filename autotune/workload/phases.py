"""From an architecture and a request to a ``Workload``: what runs when, and what it needs.

The calls of a rehearsal are grouped: what comes before the first call of a denoiser is *encode*,
what comes after the last is *decode*.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from autotune.errors import ModelError, RequestError, first_line
from autotune.units import format_bytes
from autotune.workload.architecture import Architecture
from autotune.workload.arguments import require_steps
from autotune.workload.assumed import ASSUMED, usual_calls
from autotune.workload.components import describe, is_packed, meta_module, weight_bytes
from autotune.workload.estimate import estimated_call
from autotune.workload.groups import take_apart
from autotune.workload.live import is_denoiser, modules_of
from autotune.workload.rehearsal import Call, rehearse
from autotune.workload.sequence import repeats_in
from autotune.workload.stage import RehearsalError, meta_pipeline, pipeline_class
from autotune.workload.tiny import traced_tiny
from autotune.workload.variants import switched, variants_of
from autotune.workload.workload import ComponentRun, Phase, Repeat, Request, Role, Trace, Workload

_SLICES_TRACED = 2
"""A sliced decode repeats itself: so many images are traced, the others are counted."""


def trace_workload(architecture: Architecture, request: Request, pipe: Any = None) -> Workload:
    """Trace every phase of one generation.

    What cannot be traced is estimated, and a pipeline that cannot be rehearsed is taken to do what
    most do; the workload's notes say so.

    Args:
        architecture: The model's classes and configurations.
        request: A complete request (see ``complete_request``).
        pipe: The loaded pipeline, where there is one: modules that their configuration does not
            describe are copied from it, without their data.

    Raises:
        ModelError: a class is not installed, or there is no denoiser at all.
        RequestError: the pipeline refuses the request.
    """
    live = {} if pipe is None else modules_of(pipe)
    modules = {
        name: meta_module(name, component, getattr(torch, component.dtype or request.dtype), live)
        for name, component in architecture.components.items()
    }
    cls = pipeline_class(architecture, pipe)
    assumed = []
    try:
        rehearsed = meta_pipeline(architecture, cls, modules, pipe)
        modules = modules_of(rehearsed)  # AnimateDiff's constructor makes another UNet
        runs = _Runs(modules, request)
        phases = _phases(_calls(rehearsed, request, runs), runs)
    except RehearsalError as error:
        runs = _Runs(modules, request)
        phases = _usual_phases(usual_calls(architecture, modules, request), runs)
        if not any(p.name == "denoise" for p in phases):
            raise ModelError(
                f"cannot rehearse {cls.__name__} ({error}), and it has nothing like a denoiser",
                "give a diffusion pipeline",
            ) from error
        assumed = [f"{cls.__name__} cannot be rehearsed ({error}); {ASSUMED}"]
    denoisers = {r.component for p in phases for r in p.runs if r.role == "denoiser"}
    components = tuple(
        take_apart(describe(n, m, live.get(n)), m, casts=n in denoisers) for n, m in modules.items()
    )
    chained, apart = _offload_order(cls, modules)
    return Workload(
        model=architecture.name,
        pipeline=architecture.pipeline,
        request=request,
        components=components,
        phases=phases,
        offload_order=chained,
        offload_apart=apart,
        latent_tokens=runs.latent_tokens,
        notes=(*assumed, *runs.notes(phases), *_packed(live), *_never_called(components, phases)),
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
        self._notes: dict[tuple[str, str], str] = {}

    def trace(self, call: Call) -> Any:
        """Add the run of a call that is new, and return what the call returns."""
        role = _role(call)
        if role == "denoiser" and not self.latent_tokens:
            self.latent_tokens = _latent_tokens(call)
        note = ""
        paths = _Paths({}, {})
        try:
            trace, out, guesses = call.trace()
            paths = _paths(call, trace, out, self._request)
            if guesses:
                note = _on_zeros(call, guesses)
        except Exception as error:  # any operator, any control flow that asks for values
            trace, out = estimated_call(call, role)
            note = _guessed(call, error)
        if note:
            self._notes.setdefault((call.component, call.entry), note)
        self.found.append(
            ComponentRun(
                component=call.component,
                role=role,
                calls=0,
                trace=trace,
                entry=call.entry,
                variants=paths.variants,
                refused=paths.refused,
                upcast_bytes=max(0, weight_bytes(call.module) - self._weights[call.component]),
                is_estimated=bool(note),
            )
        )
        return out

    def notes(self, phases: tuple[Phase, ...]) -> Iterator[str]:
        """What is estimated, in which phase and why; each component once."""
        for phase in phases:
            for key in dict.fromkeys((r.component, r.entry) for r in phase.runs if r.is_estimated):
                if key in self._notes:
                    yield f"{phase.name}: {self._notes[key]}"


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
    return "denoiser" if is_denoiser(call.component, call.module) else "encoder"


def _latent_tokens(call: Call) -> int:
    """Height times width of what a UNet is given."""
    latents = next((t for t in call.tensors if t.dim() >= 4), None)
    return 0 if latents is None else latents.shape[-1] * latents.shape[-2]


def _calls(pipe: Any, request: Request, traced: _Runs) -> list[Key]:
    """Every call of a rehearsal, in order.

    Raises:
        RequestError: the pipeline refuses the request, or has no step to draw it in.
        RehearsalError: it cannot be rehearsed.
    """
    try:
        calls = rehearse(pipe, request, traced.trace)
    except RequestError:
        require_steps(pipe, request)  # names the arguments by which it would work
        raise
    if not any(run.role == "denoiser" for run in traced.found):
        require_steps(pipe, request)
    return calls


def _phases(calls: list[Key], traced: _Runs) -> tuple[Phase, ...]:
    """Runs by phase, with how often and in what order they were called."""
    order = list(dict.fromkeys(calls))
    runs = dict(zip(order, traced.found, strict=True))
    if not any(run.role == "denoiser" for run in runs.values()):
        key = _busiest(calls, runs)
        runs[key] = msgspec.structs.replace(runs[key], role="denoiser")
    denoising = [i for i, key in enumerate(calls) if runs[key].role == "denoiser"]
    first, last = denoising[0], denoising[-1] + 1
    parts = {"encode": calls[:first], "denoise": calls[first:last], "decode": calls[last:]}
    return tuple(_phase(name, part, runs) for name, part in parts.items() if part)


def _busiest(calls: list[Key], runs: dict[Key, ComponentRun]) -> Key:
    """What is called most often, where nothing says that it denoises."""
    counts = Counter(key for key in calls if runs[key].role == "encoder")
    if not counts:
        raise RehearsalError("it never called a denoiser")
    return max(counts, key=lambda key: (counts[key], runs[key].trace.flops))


def _phase(name: str, calls: list[Key], runs: dict[Key, ComponentRun]) -> Phase:
    counts = Counter(calls)
    indices = {key: index for index, key in enumerate(counts)}
    return Phase(
        name,
        tuple(msgspec.structs.replace(runs[key], calls=counts[key]) for key in counts),
        tuple(Repeat(*repeat) for repeat in repeats_in([indices[key] for key in calls])),
    )


_PHASE_OF: dict[Role, str] = {"encoder": "encode", "denoiser": "denoise", "autoencoder": "decode"}


def _usual_phases(calls: Iterable[tuple[Role, Call, int]], traced: _Runs) -> tuple[Phase, ...]:
    """Phases of calls that were not seen, but assumed."""
    parts: dict[str, list[ComponentRun]] = {name: [] for name in _PHASE_OF.values()}
    for role, call, times in calls:
        traced.trace(call)
        run = traced.found[-1]
        run = msgspec.structs.replace(run, role=role, calls=times, is_estimated=True)
        parts[_PHASE_OF[role]].append(run)
    return tuple(Phase(name, tuple(runs)) for name, runs in parts.items() if runs)


def _packed(live: Mapping[str, nn.Module]) -> Iterator[str]:
    """A note for each component whose weights are stored in fewer bits than it computes in."""
    for name, module in live.items():
        if any(is_packed(p) for p in module.parameters()):
            yield f"{name}: its weights are packed; what it takes to unpack them is not counted"


def _never_called(components: Iterable[Any], phases: tuple[Phase, ...]) -> Iterator[str]:
    """A note for each component that is loaded, but runs in no phase."""
    called = {r.component for p in phases for r in p.runs}
    for component in components:
        if component.name not in called and component.weight_bytes:
            size = format_bytes(component.weight_bytes)
            yield f"{component.name}: its weights ({size}) are counted, it runs in no phase"


def _offload_order(
    cls: type, modules: dict[str, nn.Module]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What ``enable_model_cpu_offload`` chains, and what it hooks alone."""
    sequence = (getattr(cls, "model_cpu_offload_seq", None) or "").split("->")
    chained = tuple(n for n in sequence if n in modules)
    excluded = set(getattr(cls, "_exclude_from_cpu_offload", ()))
    return chained, tuple(n for n in modules if n not in chained and n not in excluded)


# ---- code paths of an autoencoder ---------------------------------------------------------------


class _Paths(NamedTuple):
    """What an autoencoder's switches change: traces, and why others are of no use."""

    variants: dict[str, Trace]
    refused: dict[str, str]


def _paths(call: Call, whole: Trace, out: Any, request: Request) -> _Paths:
    found = _Paths({}, {})
    if call.entry not in ("encode", "decode"):
        return found
    tiny = traced_tiny(call, request)
    if tiny is not None:
        found.variants["tiny"] = tiny
    shapes = _shapes(out)
    for variant in variants_of(call.module, request, _batch(call)):
        try:
            trace, parts = _variant(call, variant)
        except Exception as error:  # this autoencoder cannot do it at this size
            found.refused[variant] = f"{type(call.module).__name__} cannot: {first_line(error)}"
            continue
        if _shapes(parts) != shapes:
            found.refused[variant] = _misshapen(call, variant, _shapes(parts), shapes)
        elif trace != whole:
            found.variants[variant] = trace
    return found


def _shapes(out: Any) -> list[tuple[int, ...]]:
    """Of each tensor returned, apart from how many images there are."""
    leaves = tree_flatten(out)[0]
    inner = [v for leaf in leaves for v in getattr(leaf, "__dict__", {}).values()]  # distributions
    return [tuple(t.shape[1:]) for t in (*leaves, *inner) if isinstance(t, Tensor)]


def _misshapen(
    call: Call, variant: str, parts: list[tuple[int, ...]], whole: list[tuple[int, ...]]
) -> str:
    got, wanted = ("x".join(map(str, shapes[0])) for shapes in (parts, whole))
    return f"{type(call.module).__name__} returns {got} instead of {wanted} when {variant}"


def _variant(call: Call, variant: str) -> tuple[Trace, Any]:
    """The trace of another path, and what it returned for as many images as were traced."""
    batch = _batch(call)
    traced = min(batch, _SLICES_TRACED) if variant.startswith("sliced") else batch
    few = call if traced == batch else _with_batch(call, batch, traced)
    with switched(call.module, variant):
        found, out, _ = few.trace()
    if traced == batch:
        return found, out
    image_bytes = _bytes(tree_flatten(out)[0]) // traced
    return _repeated(found, batch, traced, image_bytes, _bytes(few.tensors)), out


def _bytes(values: Iterable[Any]) -> int:
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def _batch(call: Call) -> int:
    """Images, or frames that are decoded as images."""
    return next((t.shape[0] for t in call.tensors if t.dim() >= 4), 1)


def _with_batch(call: Call, batch: int, fewer: int) -> Call:
    def cut(value: Any) -> Any:
        is_batched = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch
        return value[:fewer].clone() if is_batched else value

    args = tuple(cut(a) for a in call.args)
    return call._replace(args=args, kwargs={k: cut(v) for k, v in call.kwargs.items()})


def _repeated(trace: Trace, batch: int, traced: int, image_bytes: int, in_bytes: int) -> Trace:
    """The trace of a few images as that of a batch: more work, and images that wait meanwhile.

    Args:
        trace: Of so many images as were traced.
        batch: How many there are.
        traced: How many were traced.
        image_bytes: Of one image that came out.
        in_bytes: Of all that went in.
    """
    more_inputs = (batch - traced) * in_bytes // traced
    waiting = (batch - traced) * image_bytes + more_inputs
    operators = tuple(
        msgspec.structs.replace(
            o,
            # What is called once, whatever the batch, joins the images.
            count=o.count if o.count % traced else o.count * batch // traced,
            live_bytes=o.live_bytes + waiting,
        )
        for o in trace.operators
    )
    return Trace(
        operators=operators,
        # At the end the images are joined: all of them are there twice.
        activation_bytes=max(
            trace.activation_bytes + waiting, 2 * batch * image_bytes + in_bytes + more_inputs
        ),
        dispatches=sum(o.count for o in operators),
        timeline=trace.timeline,  # what is reserved for a few images serves all that follow
        timed=trace.timed,
        adjacent_layers=trace.adjacent_layers,
    )
