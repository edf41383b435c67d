"""Rehearsals against what the pipelines really do: the calls, their shapes, their memory.

Both are given the same arguments. Scratch that an operator's kernel takes inside is left out of
what was measured: it depends on the device, and no trace of tensors has it.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from autotune.workload.architecture import describe_pipeline
from autotune.workload.arguments import copies_name, guidance_name
from autotune.workload.components import meta_module
from autotune.workload.rehearsal import Call, meta_pipeline, rehearse
from autotune.workload.standins import StandInTokenizer
from autotune.workload.trace import ALLOCATION_BYTES
from autotune.workload.workload import Request
from tests.pipelines import BUILDERS, SIDE, arguments, call
from tests.workload.truth import Call as RealCall
from tests.workload.truth import tensors_of, truth

STEPS = 2

NOT_OPTIONS = {"height", "width", "num_frames", "guidance_scale", "true_cfg_scale"}
"""Arguments that are fields of a request."""

BY_LENGTH = {"sana", "qwen-image", "z-image"}
"""Kinds whose tensors are as long as the prompt. The small pipelines' tokenizers know letters or a
few words; here they count as a stand-in does, which is as large vocabularies do."""

DRAWS_ONE = {"CogVideoXPipeline"}
"""Pipelines that take a number of videos and do not heed it: they are given as many prompts."""

KEEPS = {"z-image", "qwen-image"}
"""Kinds whose modules keep what they made at the first call (tables of positions): the later ones
allocate less, and a trace is of the first."""


class Asked(NamedTuple):
    """The same generation, for the pipeline itself and for its rehearsal."""

    changes: dict[str, Any]
    request: Request


def ask(
    pipe: Any, side: int = SIDE, batch: int = 1, guidance: float | None = None, **options: Any
) -> Asked:
    """A small generation.

    Args:
        pipe: One of ``BUILDERS``.
        side: Of the image, in pixels.
        batch: Images.
        guidance: Instead of the pipeline's usual.
        **options: Further arguments of the pipeline.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    given = arguments(pipe, side) | options
    unusual = {n: parameters[n].default for n, v in given.items() if v is None}
    name = guidance_name(parameters)
    if guidance is None:
        guidance = given.get(name, parameters[name].default if name in parameters else 1.0)
    changes = {"side": side, **options, **unusual}
    if name in parameters:
        changes[name] = guidance
    plain = {
        n: v
        for n, v in given.items()
        if n not in NOT_OPTIONS and isinstance(v, (bool, int, float, str))
    }
    copies = copies_name(parameters)
    if copies is not None and type(pipe).__name__ not in DRAWS_ONE:
        changes[copies] = batch
    elif batch > 1:
        texts = {n: v for n, v in plain.items() if n in ("prompt", "negative_prompt")}
        changes |= {n: [text] * batch for n, text in texts.items()}
    request = Request(
        height=side,
        width=side,
        batch=batch,
        steps=STEPS,
        guidance_scale=guidance,
        dtype=str(next(iter(pipe.vae.parameters())).dtype).removeprefix("torch."),
        frames=given.get("num_frames", 1),
        options=plain,
    )
    return Asked(changes, request)


class Rehearsed(NamedTuple):
    """One call of a rehearsal."""

    call: Call
    out: Any
    activation_bytes: int


def rehearsed(pipe: Any, request: Request) -> list[Rehearsed]:
    """Every call, in order; the trace is that of the first with the same shapes."""
    architecture = describe_pipeline(pipe)
    dtype = getattr(torch, request.dtype)
    modules = {
        name: meta_module(name, component, dtype, pipe.components)
        for name, component in architecture.components.items()
    }
    made: list[Rehearsed] = []

    def tracer(call: Call) -> Any:
        trace, out, guesses = call.trace()
        assert not guesses, call.component
        made.append(Rehearsed(call, out, trace.activation_bytes))
        return out

    meta = meta_pipeline(architecture, type(pipe), modules, pipe)
    calls = rehearse(meta, request, tracer)
    first = dict(zip(dict.fromkeys(calls), made, strict=True))
    return [first[key] for key in calls]


def measured(pipe: Any, changes: dict[str, Any], steps: int = STEPS) -> list[RealCall]:
    return truth(pipe, lambda: call(pipe, steps, **changes), rounding=ALLOCATION_BYTES)


def described(value: Any) -> list[tuple[Any, ...]]:
    tensors = (t for t in tree_flatten(value)[0] if isinstance(t, Tensor))
    return [(*t.shape, t.dtype) for t in tensors]


def returned(out: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(t.shape) for t in tensors_of(out))


def compare(pipe: Any, asked: Asked, keeps: bool = False) -> None:
    """Assert that the rehearsal's calls are those of the real run."""
    real = measured(pipe, asked.changes)
    made = rehearsed(pipe, asked.request)
    assert [(m.call.component, m.call.entry) for m in made] == [
        (r.component, r.method) for r in real
    ]
    seen: set[int] = set()
    for mine, theirs in zip(made, real, strict=True):
        name = f"{theirs.component}.{theirs.method}"
        assert described((mine.call.args, mine.call.kwargs)) == described(theirs.arguments), name
        assert returned(mine.out) == theirs.outputs, name
        peak = theirs.peak_without_scratch_bytes
        if keeps and id(mine) in seen:
            assert peak <= mine.activation_bytes * 1.01, name
        else:
            assert mine.activation_bytes == pytest.approx(peak, rel=0.01), name
        seen.add(id(mine))


@pytest.fixture(params=BUILDERS)
def kind(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """Each kind's name and pipeline, in turn."""
    pipe = BUILDERS[request.param]()
    if request.param in BY_LENGTH:
        pipe.tokenizer = StandInTokenizer(int(pipe.tokenizer.model_max_length))
    return request.param, pipe


def test_calls_and_peaks_are_the_real_ones(kind: tuple[str, Any]) -> None:
    name, pipe = kind
    compare(pipe, ask(pipe), name in KEEPS)


def test_without_guidance_two_at_once_and_larger(kind: tuple[str, Any]) -> None:
    name, pipe = kind
    side = 96 if name in ("sd", "sdxl", "flux", "wan", "sana") else SIDE
    compare(pipe, ask(pipe, side, batch=2, guidance=1.0), name in KEEPS)
