"""The guard: what is put back when memory runs out, and what is tried then.

A call that ran out leaves half a generation behind. It is begun again as if it had never been: with
the same random numbers, the scheduler as it was, and the next plan that needs less.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from autotune.decide.limits import Limits
from autotune.decide.plan import Plan
from autotune.errors import AutotuneError, MemoryShortageError
from autotune.optimizations.base import Setting
from autotune.runtime.account import ways_out
from autotune.runtime.out_of_memory import Failure
from autotune.units import format_bytes
from autotune.workload.live import has_own_code, parts_of
from autotune.workload.workload import Request, Workload

if TYPE_CHECKING:  # it imports torch, and plans are made without
    from autotune.runtime.memory import Held

RETRIES = 3
"""Smaller plans that are tried after one has run out of memory."""


class Decided(Protocol):
    """A plan and the workload it is for."""

    @property
    def plan(self) -> Plan:
        """What to do."""

    @property
    def workload(self) -> Workload:
        """For what."""


class Planner(Protocol):
    """Plans again for one pipeline in this process; ``autotune.tuner`` has it."""

    limits: Limits

    @property
    def held(self) -> Held:
        """Where the pipeline's weights are, as noted last."""

    @property
    def context_bytes(self) -> int:
        """Of the runtime, which no plan counts."""

    def look(self) -> None:
        """Note where they are: whenever they have been moved."""

    def holds(self, plan: Plan) -> bool:
        """Whether the memory that is free now suffices; takes less than a millisecond."""

    def is_current(self, plan: Plan) -> bool:
        """The same, and whether nothing better is waiting or has come to fit."""

    def is_scarce(self) -> bool:
        """Whether hardly any device memory is left."""

    def must_trace(self, request: Request) -> bool:
        """Whether planning for a request takes the pipeline as the user made it."""

    def plan(self, request: Request, applied: tuple[Setting, ...] | None = None) -> Decided:
        """The plan for a request, which keeps what is on where changing it does not pay yet."""

    def step_down(
        self, plan: Plan, workload: Workload, failure: Failure, is_on: bool = False
    ) -> Decided:
        """Remember what did not fit, and plan with what needs less; ``is_on``: it still is."""


_LEAVES_MODULES = frozenset(
    ("vae_slicing", "vae_tiling", "model_cpu_offload", "sequential_cpu_offload")
)
"""Optimizations with which a pipeline of diffusers' own is traced as without them."""


def traces_as_loaded(pipe: Any, applied: tuple[Setting, ...]) -> bool:
    """Whether tracing the pipeline finds the same as without what is applied."""
    return all(s.name in _LEAVES_MODULES for s in applied) and not has_own_code(pipe)


class Before:
    """What a call changes besides its output, as it was before: to begin again.

    Args:
        pipe: The pipeline; its schedulers keep the state of a call.
        generators: Given to the call: the random numbers of one, or of each image.
        device: Whose own random numbers are kept, too.
    """

    def __init__(self, pipe: Any, generators: Any, device: str) -> None:
        import numpy
        import torch

        self._schedulers = [(s, _copied(vars(s))) for s in _schedulers(pipe)]
        self._generators = [(g, g.get_state()) for g in _each(generators)]
        self._python, self._arrays = random.getstate(), numpy.random.get_state()
        self._torch = torch.get_rng_state()
        self._device = device
        self._on_device = _device_state(device)

    def restore(self) -> None:
        """Put it all back."""
        import numpy
        import torch

        for scheduler, state in self._schedulers:
            vars(scheduler).clear()
            vars(scheduler).update(_copied(state))
        for generator, state in self._generators:
            generator.set_state(state)
        random.setstate(self._python)
        numpy.random.set_state(self._arrays)
        torch.set_rng_state(self._torch)
        if self._on_device is not None:
            torch.get_device_module(self._device).set_rng_state(self._on_device, self._device)


def _schedulers(pipe: Any) -> Iterator[Any]:
    return (part for part in parts_of(pipe).values() if hasattr(part, "set_timesteps"))


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """Lists are filled in place; tensors are replaced."""
    return {k: list(v) if isinstance(v, list) else v for k, v in state.items()}


def _each(generators: Any) -> list[Any]:
    found = generators if isinstance(generators, (list, tuple)) else [generators]
    return [g for g in found if hasattr(g, "get_state")]


def _device_state(device: str) -> Any:
    """Of the device's own random numbers, where it has begun to draw any."""
    import torch

    if not device.startswith("cuda") or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    return torch.cuda.get_rng_state(device)


# ---- what is said --------------------------------------------------------------------------------


def describe_failure(failure: Failure, plan: Plan) -> str:
    """``"decode ran out of memory with vae_slicing (CUDA out of memory. …)"``."""
    where = failure.phase or "the pipeline"
    memory = "host RAM" if failure.of_host and plan.host_budget_bytes is not None else "memory"
    return f"{where} ran out of {memory} with {describe_set(plan)} ({failure.text})"


def describe_next(plan: Plan, before: Plan, failure: Failure) -> str:
    """``"vae_slicing, predicted to need 1.20 GiB in decode instead of 2.40 GiB"``."""
    needs, needed = plan.prediction, before.prediction
    if failure.of_host and plan.host_budget_bytes is not None:
        pair, where = (needs.host_bytes, needed.host_bytes), " of host RAM"
    elif failure.phase in needs.phase_needs and failure.phase in needed.phase_needs:
        pair = (needs.phase_needs[failure.phase], needed.phase_needs[failure.phase])
        where = f" in {failure.phase}"
    else:
        pair, where = (needs.needed_bytes, needed.needed_bytes), ""
    less, more = map(format_bytes, pair)
    return f"{describe_set(plan)}, predicted to need {less}{where} instead of {more}"


def describe_set(plan: Plan) -> str:
    """The chosen optimizations by name."""
    return ", ".join(map(str, plan.optimizations)) or "no optimization"


def shortage_after(failure: Failure, ran_out: Plan, smaller: Plan, tried: int) -> Exception:
    """The last error: what happened, and what would help.

    Args:
        failure: The last one.
        ran_out: With which plan.
        smaller: What would be tried next, or does not fit.
        tried: Plans that ran out of memory in this call.
    """
    text = describe_failure(failure, ran_out)
    if not smaller.fits:
        return MemoryShortageError(f"{text}, and nothing smaller is left", ways_out(smaller))
    return MemoryShortageError(
        f"{text}, as did {tried - 1} larger plans before",
        f"draw again to try {describe_next(smaller, ran_out, failure)}",
    )


def shortage_without_plan(failure: Failure, plan: Plan, why: AutotuneError) -> Exception:
    """The error where what was asked for could not be planned for, and ran out.

    Args:
        failure: What ran out.
        plan: What was on.
        why: It had no plan of its own.
    """
    text = describe_failure(failure, plan)
    hint = why.hint or "ask for a size that can be planned for"
    return MemoryShortageError(f"{text}, drawn without a plan of its own: {why.message}", hint)
