"""``Tuned``: a configured pipeline, its plan, and the way back."""

from __future__ import annotations

import inspect
import math
import secrets
from typing import Any

import msgspec

from autotune.decide.plan import Plan
from autotune.errors import RequestError
from autotune.optimizations import find
from autotune.optimizations.base import Undo
from autotune.profile.profile import PhaseMeasurement
from autotune.runtime.account import explain_plan
from autotune.runtime.apply import apply_plan
from autotune.runtime.measure import PhaseMeter, cpu_peaks
from autotune.runtime.verification import Verification
from autotune.runtime.verify import Applied, verify
from autotune.workload.arguments import call_arguments, copies_name
from autotune.workload.workload import Workload


class Tuned:
    """A pipeline configured for this machine. Call it like the pipeline itself.

    Attributes:
        pipe: The diffusers pipeline, configured in place.
        plan: What was decided, and why.
        device: Where it runs, ``"cuda:0"``.
        verification: What ``verify`` measured last; ``None`` before.
    """

    def __init__(self, pipe: Any, plan: Plan, workload: Workload, device: str) -> None:
        self.pipe = pipe
        self.plan = plan
        self.device = device
        self.verification: Verification | None = None
        self._workload = workload
        self._undo: Undo | None = apply_plan(pipe, plan, device)

    def __call__(self, prompt: Any = None, *, seed: int | None = None, **options: Any) -> Any:
        """Draw with the size, steps, batch and guidance that were planned for, unless given here.

        Args:
            prompt: As the pipeline takes it.
            seed: Makes the image repeatable; alternatively pass ``generator``.
            **options: Passed on to the pipeline.

        Returns:
            The pipeline's output.

        Raises:
            RequestError: both ``seed`` and ``generator`` are given.
        """
        if "generator" not in options:
            options["generator"] = self._generator(secrets.randbits(63) if seed is None else seed)
        elif seed is not None:
            raise RequestError("both seed and generator are given", "give one of them")
        if self._undo is not None:
            self._before_image(options["generator"])
        prompts = _count(prompt, options.get("prompt_embeds"))
        planned = self._planned(prompts)
        if options.get("negative_prompt_embeds") is not None:  # they take the place of a text
            planned.pop("negative_prompt", None)
        options = planned | options
        if prompt is None:  # some pipelines draw from images alone
            return self.pipe(**options)
        return self.pipe(prompt=prompt, **options)

    def explain(self) -> str:
        """The account of the plan: machine, bottleneck, what was chosen and left out, and why.

        Where it was verified: what was measured, and what explains the difference.
        """
        return explain_plan(self.plan, self.verification)

    def verify(self) -> Verification:
        """Draw twice in few steps with the arguments that were planned for, and compare.

        Random numbers, schedulers and the progress bar are as before afterwards.

        Raises:
            Exception: whatever the pipeline raises.
        """
        applied = Applied(self.pipe, self.plan, self._workload, self.device, self._few_steps({}))
        self.verification = verify(applied, lambda arguments: self(**arguments))
        return self.verification

    def undo(self) -> None:
        """Put the pipeline back to the state before; a second call does nothing."""
        if self._undo is not None:
            self._undo()  # interrupted, it goes on where it was when called again
            self._undo = None

    def measure(
        self, prompt: Any = None, **options: Any
    ) -> tuple[Any, tuple[PhaseMeasurement, ...]]:
        """Draw, and time every phase; on CUDA with its peak memory.

        Returns:
            The pipeline's output, and one measurement per phase.
        """
        meter = PhaseMeter(self.pipe, self._workload, self.device)
        with meter.watch():
            output = self(prompt, **options)
        return output, meter.measured

    def measure_peaks(self, prompt: Any = None, **options: Any) -> dict[str, int]:
        """Peak bytes per phase on the CPU, from one short extra pass of few steps."""
        meter = PhaseMeter(self.pipe, self._workload, self.device)

        def short() -> None:
            with meter.watch():
                self(prompt, **(options | {"num_inference_steps": self._few_steps(options)}))

        return cpu_peaks(short, self._workload.weight_bytes)

    def _planned(self, prompts: int) -> dict[str, Any]:
        """The arguments that were rehearsed, but for the texts and pictures."""
        rehearsed = call_arguments(self.pipe, self._workload.request)
        planned = {
            name: value
            for name, value in rehearsed.items()
            if isinstance(value, (bool, int, float, str)) and name not in ("prompt", "output_type")
        }
        copies = copies_name(planned)
        if copies is not None:
            planned[copies] = max(1, self._workload.request.batch // prompts)
        return planned | self._workload.request.options

    def _few_steps(self, options: dict[str, Any]) -> int:
        """So many that two are taken: pipelines that start from a picture skip a share of them."""
        planned = self._workload.request
        taken = inspect.signature(self.pipe.__call__).parameters
        default = taken["strength"].default if "strength" in taken else None
        strength = options.get("strength", planned.options.get("strength", default))
        if not isinstance(strength, (int, float)) or strength <= 0:
            return 2
        return min(math.ceil(2 / strength), max(2, planned.steps))

    def _generator(self, seed: int) -> Any:
        import torch

        # On the CPU, so that a seed draws the same noise wherever the pipeline runs.
        return torch.Generator("cpu").manual_seed(seed)

    def _before_image(self, generator: Any) -> None:
        first = generator[0] if isinstance(generator, list) else generator
        seed = 0 if first is None else first.initial_seed()
        for setting in self.plan.optimizations:
            find(setting.name).before_image(self.pipe, setting.parameters, seed)


def _count(prompt: Any, embeddings: Any) -> int:
    """Prompts in one call, as texts or as embeddings: they share the batch that was planned."""
    if embeddings is not None:
        return len(embeddings)
    return len(prompt) if isinstance(prompt, (list, tuple)) else 1


def with_peaks(
    measured: tuple[PhaseMeasurement, ...], peaks: dict[str, int]
) -> tuple[PhaseMeasurement, ...]:
    """The measurements with peaks that were taken in another pass."""
    return tuple(msgspec.structs.replace(m, peak_bytes=peaks.get(m.name)) for m in measured)
