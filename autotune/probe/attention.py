"""Each attention implementation really called: time, extra memory, and whether it is right.

Availability flags lie (xFormers is installed far more often than it works), so every
implementation runs at the shapes of real models, and one that raises, or computes something else,
is recorded with its message.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from msgspec import structs
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from autotune.probe.deadline import Deadline, import_by, quiet
from autotune.probe.kernels import random
from autotune.probe.machine import AttentionRate
from autotune.probe.samples import rate
from autotune.probe.software import is_importable
from autotune.probe.timing import Timer

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

XFORMERS_ABSENT = "xformers is not installed: pip install diffusers-autotune[xformers]"

WRONG = "wrong result"

_NEEDED = ("sdpa", "xformers", "vanilla")  # what decisions are made between

_LONGEST_CALL_S = 0.1
_SLOWNESS = 0.2  # of the rate of large products, in the slowest implementations

_REFERENCE_ROWS = 64
_MESSAGE_LENGTH = 240

# Relative error that rounding explains, with room: about ten units in the last place of the dtype,
# where float32 may be computed in TF32 (ten bits, as float16).
_TOLERANCE = {torch.float32: 1e-2, torch.float16: 1e-2, torch.bfloat16: 8e-2}
_TOLERANCE_OF_8_BITS = 0.2


@dataclass(frozen=True)
class Shape:
    """One attention call. Queries are ``[batch, heads, q_tokens, head_dim]``."""

    batch: int
    heads: int
    q_tokens: int
    kv_tokens: int
    head_dim: int

    @property
    def flops(self) -> int:
        """Two matrix products, two operations per multiply-add."""
        return 4 * self.batch * self.heads * self.q_tokens * self.kv_tokens * self.head_dim

    def score_bytes(self, itemsize: int) -> int:
        """Size of the score matrix that the vanilla implementation writes out."""
        return self.batch * self.heads * self.q_tokens * self.kv_tokens * itemsize

    def fitted(
        self, memory_bytes: int, itemsize: int, most_flops: float = math.inf
    ) -> Shape | None:
        """The same with fewer batches or heads, until it fits.

        Args:
            memory_bytes: What scores and probabilities may take together.
            itemsize: Bytes per score.
            most_flops: What a call may compute; one head of one batch always may.

        Returns:
            ``None`` where the scores of a single head are too large.
        """
        shape = self
        while (too_large := 2 * shape.score_bytes(itemsize) > memory_bytes) or (
            shape.flops > most_flops
        ):
            if shape.batch > 1:
                shape = replace(shape, batch=shape.batch // 2)
            elif shape.heads > 1:
                shape = replace(shape, heads=shape.heads // 2)
            else:
                return None if too_large else shape
        return shape


# The most telling first: a spent budget cuts the list off.
GPU_SHAPES = (
    Shape(2, 8, 4096, 4096, 40),  # SD 1.5, 512², first resolution
    Shape(2, 10, 4096, 4096, 64),  # SDXL, 1024²
    Shape(2, 20, 1024, 1024, 64),  # SDXL, 1024², middle
    Shape(1, 24, 4608, 4608, 128),  # a diffusion transformer such as Flux, 1024²
    Shape(2, 8, 1024, 1024, 80),
    Shape(2, 10, 4096, 77, 64),  # cross-attention
    Shape(2, 8, 256, 256, 160),
)
CPU_SHAPES = (
    Shape(2, 4, 256, 256, 16),
    Shape(2, 8, 256, 256, 40),
    Shape(2, 4, 64, 64, 32),
    Shape(2, 4, 1024, 1024, 40),
    Shape(2, 8, 1024, 77, 40),
    Shape(1, 4, 2048, 2048, 64),
)


def measure_attention(
    timer: Timer,
    *,
    memory_bytes: int,
    flops_per_s: float = math.inf,
    quick: bool = False,
) -> tuple[AttentionRate, ...]:
    """Every implementation at every shape that fits into the time and memory given.

    Args:
        timer: Where to run. When its deadline passes, the shapes not reached are left out; of the
            first at least SDPA, vanilla and xFormers run.
        memory_bytes: Device memory that one call may take; larger shapes lose batch and heads.
        flops_per_s: What the device computes in large matrix products: where a shape would take
            it much longer than a blink, the shape loses batch and heads.
        quick: Run SDPA and xFormers alone, at the first shape.
    """
    dtype = torch.float32 if timer.device.type == "cpu" else torch.float16
    shapes: tuple[Shape, ...] = CPU_SHAPES if timer.device.type == "cpu" else GPU_SHAPES
    implementations = implementations_on(timer.device)
    if quick:
        shapes = shapes[:1]
        implementations = {name: IMPLEMENTATIONS[name] for name in ("sdpa", "xformers")}
    most_flops = flops_per_s * _SLOWNESS * min(_LONGEST_CALL_S, timer.deadline.left_s / 10)
    fitted = [shape.fitted(memory_bytes, dtype.itemsize, most_flops) for shape in shapes]
    # Each call of each shape may take an equal part of the time, half of it for what goes before.
    calls = 2 * len(shapes) * len(implementations)
    timer = replace(timer, budget_s=min(timer.budget_s, timer.deadline.left_s / calls))
    rates: list[AttentionRate] = []
    for shape in dict.fromkeys(shape for shape in fitted if shape):
        if rates and not timer.deadline.leaves(f"attention over {shape.q_tokens} tokens and more"):
            break
        # The math backend widens its scores to float32: twice what the others may need.
        wide = 2 * shape.score_bytes(4) > memory_bytes
        called = {n: c for n, c in implementations.items() if not (wide and n == "sdpa_math")}
        measured = measure_shape(timer, shape, dtype, called)
        rates += measured
        # What refused once is not asked again: its reason does not depend on the shapes listed
        # here.
        for failed in (
            item for item in measured if item.implementation == "xformers" and item.error
        ):
            implementations.pop(failed.implementation)
    return tuple(rates)


def implementations_on(device: torch.device) -> dict[str, Attention]:
    """Those to call: with each kernel that SDPA chooses from, where it lets itself be told."""
    backends = {"cuda": tuple(BACKENDS), "cpu": ("sdpa_flash", "sdpa_math")}
    named = dict.fromkeys(backends.get(device.type, ()), sdpa)
    has_sage = device.type == "cuda" and is_importable("sageattention")
    return IMPLEMENTATIONS | named | ({"sage": sage} if has_sage else {})


def measure_shape(
    timer: Timer, shape: Shape, dtype: torch.dtype, implementations: dict[str, Attention]
) -> list[AttentionRate]:
    """All implementations on the same tensors; when time runs out, the needed ones alone."""
    query, key, value = _inputs(shape, timer.device, dtype)
    reference = _reference(query, key, value)
    rates = []
    for name, call in implementations.items():
        some = f"some kinds of attention over {shape.q_tokens} tokens"
        if name not in _NEEDED and not timer.deadline.leaves(some):
            continue
        if name == "xformers" and not _xformers_imported(timer.deadline):
            timer.deadline.leave_out("xFormers, which takes too long to import")
            continue
        try:
            rates.append(_measure(timer, name, call, shape, (query, key, value), reference))
        except torch.OutOfMemoryError:  # of the part of the memory that the probe takes
            timer.deadline.leave_out(f"{some}, which need more memory than a probe may take")
    return rates


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """PyTorch's own choice of kernel, for ``[batch, heads, tokens, head_dim]`` as all here."""
    return functional.scaled_dot_product_attention(query, key, value)


def xformers(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Calls xFormers with batch and heads folded into one, as diffusers calls it."""
    with quiet():
        operators: Any = importlib.import_module("xformers.ops")
    folded = (tensor.flatten(0, 1) for tensor in (query, key, value))
    scale = query.shape[-1] ** -0.5
    attended: torch.Tensor = operators.memory_efficient_attention(*folded, scale=scale)
    return attended.reshape(query.shape)


def _xformers_imported(deadline: Deadline) -> bool:
    """Whether calling it now tells something: it is absent, or its import is over."""
    return not is_importable("xformers") or import_by(deadline, "xformers.ops")


def vanilla(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The whole score matrix written out, operator by operator as diffusers' plain processor."""
    folded = (tensor.flatten(0, 1) for tensor in (query, key, value))
    return _scores_and_sum(*folded).reshape(query.shape)


def sliced(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Vanilla, half the heads at a time: what diffusers' slice size ``"auto"`` comes to."""
    folded = [tensor.flatten(0, 1) for tensor in (query, key, value)]
    output = torch.zeros_like(folded[0])
    half = max(1, query.shape[1] // 2)
    for start in range(0, len(output), half):
        part = slice(start, start + half)
        output[part] = _scores_and_sum(*(tensor[part] for tensor in folded))
    return output.reshape(query.shape)


def sage(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """SageAttention 2: products of 8 bits, for ``[batch, heads, tokens, head_dim]``."""
    with quiet():
        package: Any = importlib.import_module("sageattention")
    attended: torch.Tensor = package.sageattn(query, key, value, tensor_layout="HND")
    return attended


IMPLEMENTATIONS: dict[str, Attention] = {
    "sdpa": sdpa,
    "xformers": xformers,
    "vanilla": vanilla,
    "sliced": sliced,
}

BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
"""The kernels that SDPA chooses from; each is :func:`sdpa` with the others switched off."""

_HEADINGS = {"sdpa_flash": "flash", "sdpa_efficient": "memory", "sdpa_cudnn": "cudnn"}


def brief(error: BaseException) -> str:
    """An exception in one line: xFormers' pages of refusals shrink to their distinct reasons."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    marks = [at for at, line in enumerate(lines) if line.endswith("is not supported because:")]
    if marks:
        reasons = [
            line for line in lines[marks[0] :] if not line.endswith("is not supported because:")
        ]
        text = f"{lines[0].removesuffix(' with inputs:')}: {'; '.join(dict.fromkeys(reasons))}"
    else:
        text = lines[0] if lines else ""
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _MESSAGE_LENGTH else text[: _MESSAGE_LENGTH - 1] + "…"


def _scores_and_sum(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``softmax(q·kᵀ/√d)·v`` of ``[batch·heads, tokens, head_dim]``.

    The unused first operand is allocated because diffusers does so too, and its memory counts.
    """
    unused = torch.empty(
        query.shape[0], query.shape[1], key.shape[1], dtype=query.dtype, device=query.device
    )
    scale = query.shape[-1] ** -0.5
    scores = torch.baddbmm(unused, query, key.transpose(-1, -2), beta=0, alpha=scale)
    del unused
    probabilities = scores.softmax(dim=-1)
    del scores
    return torch.bmm(probabilities, value)


def _measure(
    timer: Timer,
    name: str,
    call: Attention,
    shape: Shape,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    reference: torch.Tensor,
) -> AttentionRate:
    query = tensors[0]
    result = AttentionRate(
        implementation=name,
        dtype=str(query.dtype).removeprefix("torch."),
        batch=shape.batch,
        heads=shape.heads,
        q_tokens=shape.q_tokens,
        kv_tokens=shape.kv_tokens,
        head_dim=shape.head_dim,
    )
    if name == "xformers" and not is_importable("xformers"):
        return structs.replace(result, error=XFORMERS_ABSENT)
    told: list[warnings.WarningMessage] = []
    try:
        with _backend(name, told):
            extra, deviation = _first_call(timer.device, call, tensors, reference)
            tolerance = _TOLERANCE_OF_8_BITS if name == "sage" else _TOLERANCE[query.dtype]
            if not deviation <= tolerance:
                wrong = f"{WRONG}: {deviation:.1e} relative deviation from a float64 reference"
                return structs.replace(
                    result, extra_bytes=extra, deviation=_finite(deviation), error=wrong
                )
            seconds = timer.time(lambda: call(*tensors))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a third party's kernel raises is the finding
        failure = _load_failure() if name == "xformers" else None
        said = brief(failure) if failure is not None else _refusal(name, told) or brief(error)
        return structs.replace(result, error=said)
    return structs.replace(
        result, flops_per_s=rate(seconds, shape.flops), extra_bytes=extra, deviation=deviation
    )


@contextlib.contextmanager
def _backend(name: str, told: list[warnings.WarningMessage]) -> Iterator[None]:
    """SDPA restricted to the backend of that name, if there is one; warnings go to ``told``."""
    if name not in BACKENDS:
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with sdpa_kernel(BACKENDS[name]):
                yield
        finally:
            told.extend(caught)


def _load_failure() -> BaseException | None:
    """What kept xFormers' kernels from loading: it goes on without, and its refusals say less."""
    library = sys.modules.get("xformers._cpp_lib")
    failure: BaseException | None = getattr(library, "_cpp_library_load_exception", None)
    return failure and (failure.__cause__ or failure)


def _refusal(name: str, told: list[warnings.WarningMessage]) -> str | None:
    """Why SDPA refused a backend: its error says nothing, its warnings go through all of them.

    ``"Flash attention kernel not used because:"``, the reason, then the next backend.
    """
    backend = ""
    for warning in told:
        text = str(warning.message).partition(" (Triggered internally")[0].strip()
        if text.endswith("not used because:"):
            backend = text.lower()
        elif backend.startswith(_HEADINGS.get(name, "?")):
            return brief(RuntimeError(text))
    return None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _first_call(
    device: torch.device,
    call: Attention,
    tensors: tuple[torch.Tensor, ...],
    reference: torch.Tensor,
) -> tuple[int | None, float]:
    """Extra bytes (peak less inputs and output; ``None`` off CUDA) and relative deviation."""
    if device.type != "cuda":
        return None, _deviation(call(*tensors), reference)
    call(*tensors)  # the first call may take library workspaces that stay
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    output = call(*tensors)
    extra = torch.cuda.max_memory_allocated(device) - before - output.nbytes
    return max(0, extra), _deviation(output, reference)


def _inputs(
    shape: Shape, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query = random((shape.batch, shape.heads, shape.q_tokens, shape.head_dim), device, dtype)
    key = random((shape.batch, shape.heads, shape.kv_tokens, shape.head_dim), device, dtype)
    return query, key, key.flip(-2).contiguous()


def _reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A few rows of the first and the last head, in float64 by the CPU: many a GPU has none."""
    ends = ((0, 0), (-1, -1))
    rows = _wide([query[end][:_REFERENCE_ROWS] for end in ends])
    keys, values = (_wide([side[end] for end in ends]) for side in (key, value))
    scores = torch.softmax(rows @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5, dim=-1)
    return scores @ values


def _wide(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(parts).cpu().double()


def _deviation(output: torch.Tensor, reference: torch.Tensor) -> float:
    rows = _wide([output[end][:_REFERENCE_ROWS] for end in ((0, 0), (-1, -1))])
    return float((rows - reference).norm() / reference.norm())
