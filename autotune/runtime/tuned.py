"""``Tuned``: a configured pipeline, its plan, and the way back."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import operator
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from autotune.decide.plan import Plan
from autotune.decide.prediction import PROCESS_BYTES
from autotune.errors import AutotuneError, MemoryShortageError, RequestError
from autotune.optimizations import find
from autotune.optimizations.base import Undo
from autotune.optimizations.file_layers import read_from_files
from autotune.profile.profile import PhaseMeasurement
from autotune.runtime.account import explain_plan, shortage, ways_out
from autotune.runtime.allocator import device_load, hold_limits
from autotune.runtime.apply import apply_plan
from autotune.runtime.asking import asked_for, drawn_by, number_of
from autotune.runtime.claims import (
    Claim,
    disown,
    drawing,
    own,
    owners_beside,
    release,
    stake,
    turn_of,
)
from autotune.runtime.guard import (
    RETRIES,
    Before,
    Decided,
    Planner,
    describe_failure,
    describe_next,
    describe_set,
    shortage_after,
    shortage_without_plan,
    traces_as_loaded,
)
from autotune.runtime.measure import PhaseMeter, cpu_peaks
from autotune.runtime.memory import resident_bytes, used_bytes
from autotune.runtime.out_of_memory import Failure, failure_of, free_memory, is_out_of_memory
from autotune.runtime.spilling import is_spilling, spilling_system
from autotune.runtime.verification import Verification
from autotune.runtime.verify import Configured, verify
from autotune.units import format_bytes, format_seconds
from autotune.workload.arguments import call_arguments, copies_name
from autotune.workload.live import modules_of
from autotune.workload.workload import Request, Workload

log = logging.getLogger("autotune")

T = TypeVar("T")


class Tuned:
    """A pipeline configured for this machine. Call it like the pipeline itself.

    What it is asked for is planned for, each time that it is something else; calls from several
    threads queue. Where memory runs out, the next plan that needs less is tried.

    Attributes:
        pipe: The diffusers pipeline, configured in place.
        plan: What was decided for the latest request, and why.
        device: Where it runs, ``"cuda:0"``.
        verification: What ``verify`` measured of this plan; ``None`` before.

    Args:
        pipe: A loaded pipeline.
        plan: What to apply.
        workload: What the plan is for.
        device: Where to run.
        planner: Plans again; without it, there is this plan and no other.
    """

    def __init__(
        self,
        pipe: Any,
        plan: Plan,
        workload: Workload,
        device: str,
        planner: Planner | None = None,
    ) -> None:
        self.pipe = pipe
        self.plan = plan
        self.device = device
        self.verification: Verification | None = None
        self._request = workload.request
        self._workload = workload
        self._planner = planner
        self._undo: Undo | None = None
        self._is_undoing = False
        self._is_over = False
        self._unplanned: AutotuneError | None = None
        self._images = 0
        with turn_of(pipe):
            self._guarded(lambda: None)

    def __call__(self, prompt: Any = None, *, seed: int | None = None, **options: Any) -> Any:
        """Draw with the size, steps, batch and guidance that were planned for, unless given here.

        Args:
            prompt: As the pipeline takes it.
            seed: Makes the image repeatable; alternatively pass ``generator``.
            **options: Passed on to the pipeline.

        Returns:
            The pipeline's output.

        Raises:
            RequestError: both ``seed`` and ``generator`` are given, or a seed that is none.
            MemoryShortageError: it does not fit, or memory ran out and nothing smaller is left.
        """
        options = self._with_generator(options, seed)
        with turn_of(self.pipe):
            self._meet(prompt, options)
            return self._guarded(lambda: self._timed(prompt, options), options["generator"])

    def explain(self) -> str:
        """The account of the plan: machine, bottleneck, what was chosen and left out, and why.

        Where it was verified: what was measured, and what explains the difference.
        """
        return explain_plan(self.plan, self.verification)

    def verify(self) -> Verification:
        """Draw twice in few steps with the arguments that were planned for, and compare.

        Random numbers, schedulers and the progress bar are as before afterwards.

        Raises:
            MemoryShortageError: memory ran out, and nothing smaller is left.
            Exception: whatever else the pipeline raises.
        """
        with turn_of(self.pipe):
            self._meet(None, {})
            self.verification = self._guarded(self._verified)
            return self.verification

    def undo(self) -> None:
        """Put the pipeline back to the state before; a second call does nothing."""
        with turn_of(self.pipe):
            if self._is_over:
                return
            self._unapply()  # interrupted, it goes on where it was when called again
            read_from_files(self.pipe)
            self._is_over = True
            release(self.pipe)
            hold_limits(self.device)

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Undone, to configure the pipeline anew inside; where that fails, it is back."""
        self.undo()
        try:
            yield
        except BaseException:
            self._is_over = False
            self._guarded(lambda: None)
            raise

    def measure(
        self, prompt: Any = None, *, seed: int | None = None, **options: Any
    ) -> tuple[Any, tuple[PhaseMeasurement, ...]]:
        """Draw, and time every phase; on CUDA with its peak memory.

        Returns:
            The pipeline's output, and one measurement per phase.
        """
        options = self._with_generator(options, seed)
        with turn_of(self.pipe):
            self._meet(prompt, options)
            return self._guarded(lambda: self._metered(prompt, options), options["generator"])

    def measure_peaks(
        self, prompt: Any = None, *, seed: int | None = None, **options: Any
    ) -> dict[str, int]:
        """Peak bytes per phase on the CPU, from one short extra pass of few steps."""
        options = options | {"num_inference_steps": self._few_steps(options)}
        options = self._with_generator(options, seed)

        def short() -> dict[str, int]:
            meter = PhaseMeter(self.pipe, self._workload, self.device)

            def draw() -> None:
                with meter.watch():
                    self._draw(prompt, options)

            is_cast = bool(self.plan.execution.storage_dtype)
            return cpu_peaks(draw, resident_bytes(self.pipe), passes=2 if is_cast else 1)

        with turn_of(self.pipe):
            return self._guarded(short, options["generator"])

    # ---- drawing --------------------------------------------------------------------------------

    def _draw(self, prompt: Any, options: dict[str, Any]) -> Any:
        if self._undo is not None:
            self._before_image(options["generator"])
        prompts = _count(prompt, options.get("prompt_embeds"))
        planned = self._planned(prompts)
        if options.get("negative_prompt_embeds") is not None:  # they take the place of a text
            planned.pop("negative_prompt", None)
        options = planned | options
        if prompt is not None:  # some pipelines draw from images alone
            options = {"prompt": prompt} | options
        return self.pipe(**options)

    def _timed(self, prompt: Any, options: dict[str, Any]) -> Any:
        """Draw, and see whether the driver lent host RAM meanwhile."""
        started = time.perf_counter()
        output = self._draw(prompt, options)
        if _SYSTEM:
            self._look_for_spilling(time.perf_counter() - started)
        return output

    def _metered(
        self, prompt: Any, options: dict[str, Any]
    ) -> tuple[Any, tuple[PhaseMeasurement, ...]]:
        meter = PhaseMeter(self.pipe, self._workload, self.device)
        with meter.watch():
            output = self._draw(prompt, options)
        return output, meter.measured

    def _verified(self) -> Verification:
        configured = Configured(
            self.pipe, self.plan, self._workload, self.device, self._few_steps({})
        )

        def draw(arguments: dict[str, Any]) -> Any:
            options = {n: v for n, v in arguments.items() if n != "prompt"}
            return self._draw(arguments.get("prompt"), {"generator": None} | options)

        return verify(configured, draw)

    # ---- another request, other memory ----------------------------------------------------------

    def _meet(self, prompt: Any, options: dict[str, Any]) -> None:
        """Have a plan for what is asked now, with the memory that there is now.

        Raises:
            MemoryShortageError: nothing fits.
        """
        planner = self._planner
        if planner is None or self._is_over:
            return
        self._finish_undoing()
        if self._undo is None:
            self._set_others_aside()  # or what they hold would look taken
        self._unplanned = None
        hold_limits(self.device)  # others may have come, whatever is planned
        asked = self._asked(prompt, options)
        is_same = asked == self._workload.request
        if is_same and self._undo is not None and planner.is_current(self.plan):
            return
        try:
            found = self._planned_for(planner, asked)
        except MemoryShortageError:
            raise
        except AutotuneError as error:  # the pipeline will say it in its own words, or can do it
            log.info("%s is drawn without a plan of its own: %s", _size(asked), error)
            self._unplanned = AutotuneError(error.message, error.hint)  # without frames: of self
            return
        if found.plan.fits:
            self._take(found)
        elif not is_same or self._undo is None or self.plan.host_budget_bytes is None:
            raise MemoryShortageError(shortage(found.plan), ways_out(found.plan))
        # A device that fails does no harm: margins are wide, and it may yet suffice.

    def _planned_for(self, planner: Planner, asked: Request) -> Decided:
        is_as_loaded = self._undo is None or traces_as_loaded(self.pipe, self.plan.optimizations)
        if not is_as_loaded and planner.must_trace(asked):
            self._unapply()
        applied = self.plan.optimizations if self._undo is not None else None
        return planner.plan(asked, applied)

    def _take(self, found: Decided) -> None:
        """This plan from now on; what has to change is changed before the next call."""
        changes = found.plan.optimizations != self.plan.optimizations
        if changes and self._undo is not None:
            self._unapply()
            log.info("%s: %s", _size(found.workload.request), describe_set(found.plan))
        self._now(found)
        if self._undo is not None:
            self._settle()

    def _now(self, found: Decided) -> None:
        request = self._workload.request
        if (found.plan.optimizations, found.workload.request) != (self.plan.optimizations, request):
            self.verification = None
        self.plan, self._workload = found.plan, found.workload

    def _asked(self, prompt: Any, options: dict[str, Any]) -> Request:
        prompts = _count(prompt, options.get("prompt_embeds"))
        drawn = drawn_by(self._planned(prompts), options, prompts)
        return asked_for(self.pipe, self._request, options, drawn)

    # ---- on and off -----------------------------------------------------------------------------

    def set_aside(self) -> None:
        """Take off what is on until the next call: another pipeline needs the same modules."""
        self._unapply()

    def _set_others_aside(self) -> None:
        for other in owners_beside(self.pipe):
            other.set_aside()

    def _apply(self) -> None:
        self._set_others_aside()
        before = tuple(modules_of(self.pipe).values())
        self._undo = apply_plan(self.pipe, self.plan, self.device)
        own(self.pipe, self, before)
        self._images = 0
        self._settle()

    def _unapply(self) -> None:
        if self._undo is not None:
            self._is_undoing = True
            self._undo()
            self._undo, self._is_undoing = None, False
            disown(self.pipe)
            if self._planner is not None:
                self._planner.look()  # or weights that have left the device would count twice

    def _finish_undoing(self) -> None:
        """Where it was interrupted, or failed: what is half undone cannot draw."""
        if self._is_undoing:
            self._unapply()

    def _settle(self) -> None:
        """Say what this pipeline needs, so that others are planned for the rest."""
        planner, prediction = self._planner, self.plan.prediction
        if planner is None:
            return
        planner.look()
        held, limits = planner.held, planner.limits
        shares = self.plan.host_budget_bytes is None
        most = None if limits.vram_limit is None else limits.vram_limit - planner.context_bytes
        stake(
            Claim(
                self,
                self.pipe,
                self.device,
                device_bytes=prediction.needed_bytes - held.device_bytes,
                host_bytes=0 if shares else prediction.host_bytes - _in_ram(held.ram_bytes),
                reserve_bytes=limits.reserve,
                most_bytes=most,
            )
        )
        hold_limits(self.device)

    # ---- the guard ------------------------------------------------------------------------------

    def _guarded(self, work: Callable[[], T], generators: Any = None) -> T:
        """Apply the plan, if it is not, and work; with smaller plans where memory runs out.

        Raises:
            MemoryShortageError: memory ran out, and nothing smaller is left or enough was tried.
        """
        self._finish_undoing()
        if self._planner is None or self._is_over:
            if self._undo is None and not self._is_over:
                self._apply()
            return work()
        before = Before(self.pipe, generators, self.device)
        for tried in range(1, RETRIES + 2):
            try:
                if self._undo is None:
                    self._apply()
                with drawing(self.pipe, used_bytes(self.device)):
                    return work()
            except Exception as error:
                if not _ran_out(error, self._planner):
                    raise
                failed, failure = error, self._failure_of(error)
            before.restore()
            self._step_down(self._planner, failure, failed, tried)
        raise AssertionError("the last failure raises")

    def _failure_of(self, error: Exception) -> Failure:
        failure = failure_of(error, self.pipe, self._workload)
        with suppress(RuntimeError):  # of a device that answers no more
            load = device_load(self.device)
            if load is not None:
                failure = failure._replace(room_bytes=load.free_bytes + load.reserved_bytes)
        return failure

    def _step_down(self, planner: Planner, failure: Failure, error: Exception, tried: int) -> None:
        """Let go of everything, and take the next plan.

        Raises:
            MemoryShortageError: there is none, or enough was tried; the pipeline is as it was.
        """
        free_memory(self.pipe)
        self._unapply()
        ran_out = self.plan
        if self._unplanned is not None:  # nobody has predicted what ran out: nothing is learnt
            raise shortage_without_plan(failure, ran_out, self._unplanned) from error
        smaller = planner.step_down(ran_out, self._workload, failure)
        if tried > RETRIES or not smaller.plan.fits:
            raise shortage_after(failure, ran_out, smaller.plan, tried) from error
        log.warning(
            "%s; trying %s",
            describe_failure(failure, ran_out),
            describe_next(smaller.plan, ran_out, failure),
        )
        self._now(smaller)

    def _look_for_spilling(self, seconds: float) -> None:
        """Where the driver lent host RAM to the device, the next call takes a smaller plan."""
        load, prediction = device_load(self.device), self.plan.prediction
        once = 0.0 if self._images else prediction.once_s + (prediction.first_image_extra_s or 0.0)
        self._images += 1
        is_planned = self._unplanned is None and not self._is_over
        planner = self._planner if is_planned else None
        expected = prediction.seconds + once
        if load is None or planner is None or not is_spilling(seconds, expected, load, _SYSTEM):
            return
        took, planned = format_seconds(seconds, expected), format_seconds(expected, seconds)
        free = f"{format_bytes(load.free_bytes)} of {format_bytes(load.total_bytes)} free"
        failure = Failure(
            f"{took} instead of {planned}, {free}: spilling into host RAM", None, False
        )
        smaller = planner.step_down(self.plan, self._workload, failure, is_on=True)
        if smaller.plan.fits:
            what = f"the next image is drawn with {describe_next(smaller.plan, self.plan, failure)}"
        else:
            what = f"nothing smaller is left; try {ways_out(smaller.plan)}"
        log.warning("%s: %s", failure.text, what)
        if smaller.plan.fits:
            self._take(smaller)

    # ---- arguments ------------------------------------------------------------------------------

    def _with_generator(self, options: dict[str, Any], seed: int | None) -> dict[str, Any]:
        if "generator" not in options:
            return options | {"generator": self._generator(_checked(seed))}
        if seed is not None:
            raise RequestError("both seed and generator are given", "give one of them")
        return options

    def _planned(self, prompts: int) -> dict[str, Any]:
        """The arguments that were rehearsed, but for the texts and pictures."""
        planned = dict(self._rehearsed)
        copies = copies_name(planned)
        if copies is not None:
            planned[copies] = max(1, self._request.batch // prompts)
        return planned | self._request.options

    @functools.cached_property
    def _rehearsed(self) -> dict[str, bool | int | float | str]:
        return {
            name: value
            for name, value in call_arguments(self.pipe, self._request).items()
            if isinstance(value, (bool, int, float, str)) and name not in ("prompt", "output_type")
        }

    def _few_steps(self, options: dict[str, Any]) -> int:
        """So many that two are taken: pipelines that start from a picture skip a share of them."""
        planned = self._request
        taken = inspect.signature(self.pipe.__call__).parameters
        default = taken["strength"].default if "strength" in taken else None
        strength = options.get("strength", planned.options.get("strength", default))
        strength = number_of(strength)
        if strength is None or strength <= 0:
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


_SYSTEM = spilling_system()


def _in_ram(weights_bytes: int) -> int:
    """What of host RAM a plan counts that is taken already."""
    return weights_bytes + PROCESS_BYTES


def _size(request: Request) -> str:
    images = f", batch {request.batch}" if request.batch > 1 else ""
    return f"{request.width}x{request.height}, {request.steps} steps{images}"


def _checked(seed: Any) -> int:
    """A seed as PyTorch takes it; ``None``: any."""
    if seed is None:
        return secrets.randbits(63)
    try:
        number = operator.index(seed)
    except TypeError as error:
        raise RequestError(f"the seed {seed!r} is no whole number", "give one, as 42") from error
    if not -(2**63) <= number < 2**64:
        raise RequestError(f"the seed {number} does not fit in 64 bits", "give a smaller one")
    return number


def _count(prompt: Any, embeddings: Any) -> int:
    """Prompts in one call, as texts or as embeddings: they share the batch that was planned."""
    if embeddings is not None:
        return max(1, len(embeddings))
    return max(1, len(prompt)) if isinstance(prompt, (list, tuple)) else 1


def _ran_out(error: Exception, planner: Planner) -> bool:
    """Whether an error is about memory; what may mean something else, where hardly any is left."""
    if is_out_of_memory(error):
        return True
    try:
        return is_out_of_memory(error, is_scarce=True) and planner.is_scarce()
    except RuntimeError:  # of a device that answers no more
        return False
