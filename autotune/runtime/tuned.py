"""``Tuned``: a configured pipeline, its plan, and the way back."""

from __future__ import annotations

import inspect
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
from autotune.workload.arguments import copies_name, guidance_name
from autotune.workload.workload import Workload


class Tuned:
    """A pipeline configured for this machine. Call it like the pipeline itself.

    Attributes:
        pipe: The diffusers pipeline, configured in place.
        plan: What was decided, and why.
        device: Where it runs, ``"cuda:0"``.
    """

    def __init__(self, pipe: Any, plan: Plan, workload: Workload, device: str) -> None:
        self.pipe = pipe
        self.plan = plan
        self.device = device
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
        options = self._defaults(prompts) | options
        if prompt is None:  # some pipelines draw from images alone
            return self.pipe(**options)
        return self.pipe(prompt=prompt, **options)

    def explain(self) -> str:
        """The account of the plan: machine, bottleneck, what was chosen and left out, and why."""
        return explain_plan(self.plan)

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
        """Peak bytes per phase on the CPU, from one short extra pass of two steps."""
        meter = PhaseMeter(self.pipe, self._workload, self.device)

        def short() -> None:
            with meter.watch():
                self(prompt, **(options | {"num_inference_steps": 2}))

        return cpu_peaks(short, self._workload.weight_bytes)

    def _defaults(self, prompts: int) -> dict[str, Any]:
        """What was planned for, as far as this pipeline takes it."""
        w = self.plan.workload
        parameters = inspect.signature(self.pipe.__call__).parameters
        planned: dict[str, Any] = {
            "height": w.height,
            "width": w.width,
            "num_frames": w.frames,
            "num_inference_steps": w.steps,
            guidance_name(parameters): w.guidance_scale,
            **w.options,
        }
        copies = copies_name(parameters)
        if copies is not None:
            planned[copies] = max(1, w.batch // prompts)
        return {k: v for k, v in planned.items() if k in parameters}

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
        return int(embeddings.shape[0])
    return len(prompt) if isinstance(prompt, (list, tuple)) else 1


def with_peaks(
    measured: tuple[PhaseMeasurement, ...], peaks: dict[str, int]
) -> tuple[PhaseMeasurement, ...]:
    """The measurements with peaks that were taken in another pass."""
    return tuple(msgspec.structs.replace(m, peak_bytes=peaks.get(m.name)) for m in measured)
