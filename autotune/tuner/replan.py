"""Planning again for a pipeline that is loaded: another request, less memory, what ran out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec

from autotune.decide.corrections import plain_operators
from autotune.decide.history import Applied, History, Misfit
from autotune.decide.limits import Limits, budget_within
from autotune.decide.misfits import MORE, counting
from autotune.decide.plan import Plan
from autotune.decide.prediction import Budget
from autotune.optimizations.base import Setting
from autotune.optimizations.file_layers import left_in_files
from autotune.probe.live import refresh, refresh_free
from autotune.probe.machine import Machine
from autotune.profile.profile import MisfitRecord
from autotune.runtime.claims import configuring
from autotune.runtime.guard import traces_as_loaded
from autotune.runtime.out_of_memory import Failure
from autotune.tuner.ask import Ask
from autotune.tuner.here import Measured, device_name, timestamp
from autotune.tuner.history import history_here, remember_misfit
from autotune.tuner.planning import Planned, completed, decided
from autotune.workload.architecture import Architecture
from autotune.workload.cache import traced_before, workload_of
from autotune.workload.workload import Operator, Phase, Repeat, Request, Workload

log = logging.getLogger("autotune")

MOST_KNOWN = 16
"""Workloads and plans kept in memory: requests that alternate."""


class Replanner:
    """Plans for one pipeline in this process; see ``runtime.guard.Planner``.

    Args:
        pipe: The loaded pipeline.
        planned: The first plan.
        measured: Of which machine.
        ask: What was asked; its limits hold for every request.
        say: Adds to a plan what it cannot know itself.
    """

    def __init__(
        self,
        pipe: Any,
        planned: Planned,
        measured: Measured,
        ask: Ask,
        say: Callable[[Plan], Plan] | None = None,
    ) -> None:
        self.limits: Limits = ask.limits
        self._pipe = pipe
        self._architecture: Architecture = planned.architecture
        self._machine: Machine = planned.machine
        self._measured = measured
        self._ask = ask
        self._say = say or (lambda plan: plan)
        self._misfits: dict[str, tuple[Misfit, ...]] = {}
        self._workloads = {_key(planned.workload.request): planned.workload}
        self._plans = {self._asked(planned.workload.request, planned.plan.optimizations): planned}
        self._timed = _timed(planned)
        self._held: Any = None
        self._cost_s = 0.0
        """Of keeping what is on, beside the best for each request since it is."""

    # ---- the memory there is --------------------------------------------------------------------

    def look(self) -> None:
        """Note where the pipeline's weights are: whenever they have been moved."""
        from autotune.runtime.memory import held_by

        self._held = held_by(self._pipe, self._device, self._machine)

    @property
    def context_bytes(self) -> int:
        """Of the runtime, which no plan counts."""
        return self._machine.context_bytes

    @property
    def held(self) -> Any:
        """Where the pipeline's weights are, as noted last: ``runtime.memory.Held``."""
        if self._held is None:
            self.look()
        return self._held

    def holds(self, plan: Plan) -> bool:
        """Whether the memory that is free now, with what the pipeline has, is enough."""
        budget = self._budget(refresh_free(self._machine))
        return budget.lacks(plan.prediction) <= 1 + MORE

    def is_current(self, plan: Plan) -> bool:
        """Whether the same would be planned again: nothing better is waiting or has come to fit."""
        return plan.postponed is None and self._suits(plan)

    def _suits(self, plan: Plan) -> bool:
        """Whether neither less memory is free than it needs, nor more than it was chosen for.

        Where nothing fitted: whether there is as much as then.
        """
        budget = self._budget(refresh_free(self._machine))
        if not plan.fits:
            return _is_about(budget, plan.budget)
        is_outgrown = plan.validity is not None and plan.validity.is_outgrown(budget, MORE)
        return budget.lacks(plan.prediction) <= 1 + MORE and not is_outgrown

    def is_scarce(self) -> bool:
        """Whether hardly any device memory is left."""
        device = self._own(refresh_free(self._machine)).device
        weights = self.held.device_bytes
        return bool(device.free_bytes - weights < SCARCE * device.total_bytes)

    def _budget(self, machine: Machine) -> Budget:
        return budget_within(self._own(machine), self.limits)

    def _own(self, machine: Machine) -> Machine:
        from autotune.runtime.memory import with_own_memory

        return with_own_memory(machine, self._device, self._pipe, self.held)

    @property
    def _device(self) -> str:
        return device_name(self._machine)

    # ---- plans ----------------------------------------------------------------------------------

    def must_trace(self, request: Request) -> bool:
        """Whether this request takes a new trace, of a pipeline as the user made it."""
        if self._derived(request) is not None:
            return False
        return traced_before(self._architecture, self._completed(request), self._pipe) is None

    def plan(self, request: Request, applied: tuple[Setting, ...] | None = None) -> Planned:
        """The plan for a request with the memory that is free now.

        Args:
            request: What to draw.
            applied: The set that is on: kept where changing it does not pay yet.

        Raises:
            RequestError, ModelError: the model cannot draw it, or it cannot be traced.
        """
        key = self._asked(request, applied)
        planned = self._plans.get(key)
        if planned is None or not self._suits(planned.plan) or self._pays(planned.plan):
            planned = self._planned_anew(request, applied)
            if applied is None or planned.plan.optimizations == applied:
                _keep(self._plans, key, planned)
            else:  # with what is on changed to again, it would have to pay again
                self._plans.pop(key, None)
        self._count(planned.plan, applied)
        return planned

    def _asked(
        self, request: Request, applied: tuple[Setting, ...] | None
    ) -> tuple[str, str, tuple[str, ...]]:
        """What a plan is found by; what goes back to files takes no RAM until it has been read."""
        return (_key(request), str(applied), left_in_files(self._pipe))

    def _planned_anew(self, request: Request, applied: tuple[Setting, ...] | None) -> Planned:
        with configuring():
            workload = self._workload(request)
            traces = applied is None or traces_as_loaded(self._pipe, applied)
            machine = self._own(refresh(self._machine))
            return self._planned(workload, machine, applied, traces)

    def _pays(self, plan: Plan) -> bool:
        """Whether what is on has cost as much as changing it takes."""
        waiting = plan.postponed
        return waiting is not None and self._cost_s + waiting.saves_s >= waiting.takes_s

    def _count(self, plan: Plan, applied: tuple[Setting, ...] | None) -> None:
        """What the next generation loses with what is on."""
        if plan.postponed is not None:
            self._cost_s += plan.postponed.saves_s
        elif plan.optimizations != applied:
            self._cost_s = 0.0

    def step_down(
        self, plan: Plan, workload: Workload, failure: Failure, is_on: bool = False
    ) -> Planned:
        """Remember what did not fit, and plan with what is predicted to need less.

        Nothing of the pipeline's calls must be left in memory.

        Args:
            plan: That ran out.
            workload: What ran.
            failure: How.
            is_on: The plan is applied, and will be until the next call.
        """
        self._plans.clear()
        self._cost_s = 0.0
        self.look()
        machine = self._own(refresh(self._machine))  # what free memory does meanwhile is no matter
        self._remember(plan, workload, failure, budget_within(machine, self.limits))
        with configuring():
            traces = not is_on or traces_as_loaded(self._pipe, plan.optimizations)
            return self._planned(workload, machine, None, traces, retries=False)

    def _planned(
        self,
        workload: Workload,
        machine: Machine,
        applied: tuple[Setting, ...] | None,
        traces: bool,
        retries: bool = True,
    ) -> Planned:
        """Where what is applied changes the modules, they must not be traced, nor kept as traced.

        A trace is found again by how the pipeline was loaded. What was left in files may have been
        read since the workload was made.
        """
        planned = decided(
            self._architecture,
            machine,
            msgspec.structs.replace(workload, mappable=left_in_files(self._pipe)),
            self.limits,
            self._pipe,
            self._history(workload, machine),
            None if applied is None else Applied(applied, self._cost_s),
            traces,
            retries,
        )
        return planned._replace(plan=self._say(planned.plan))

    def _history(self, workload: Workload, machine: Machine) -> History:
        """The profile's, and what ran out in this process where the profile cannot be written."""
        found = history_here(self._measured.key, workload, machine, self.limits)
        here = self._misfits.get(workload.memory_key, ())
        both = msgspec.structs.replace(found, misfits=(*found.misfits, *here), alike=self._timed)
        return counting(both, budget_within(machine, self.limits))

    def _workload(self, request: Request) -> Workload:
        workload = self._derived(request)
        if workload is None:
            workload = workload_of(self._architecture, self._completed(request), self._pipe)
        _keep(self._workloads, _key(request), workload)
        return workload

    def _completed(self, request: Request) -> Request:
        asked = msgspec.structs.replace(
            self._ask,
            height=request.height,
            width=request.width,
            batch=request.batch,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            dtype=request.dtype,
            frames=request.frames,
            options=request.options,
        )
        return completed(self._architecture, self._machine, asked)

    def _derived(self, request: Request) -> Workload | None:
        """The workload where it is known, or differs from one that is in steps alone."""
        known = self._workloads.get(_key(request))
        if known is not None:
            return known
        alike = (w for w in self._workloads.values() if is_alike(w.request, request))
        return next((as_asked(w, request) for w in alike), None)

    # ---- what ran out ---------------------------------------------------------------------------

    def _remember(
        self, plan: Plan, workload: Workload, failure: Failure, available: Budget
    ) -> None:
        """Here, and in the profile with what there was when it ran out.

        Others may have held more then than now: what fits beside nobody is not ruled out for ever.
        """
        of_host = failure.of_host and available.host_bytes is not None
        there = available.host_bytes if of_host else available.device_bytes
        prediction, settings = plan.prediction, (*plan.kept, *plan.optimizations)
        misfit = Misfit(settings, there or 0, of_host, failure.phase)
        key = workload.memory_key
        self._misfits[key] = (*self._misfits.get(key, ()), misfit)
        record = MisfitRecord(
            workload=key,
            optimizations=tuple(map(str, settings)),
            available_bytes=misfit.available_bytes if of_host else self._then(misfit, failure),
            predicted_bytes=prediction.host_bytes
            if of_host
            else prediction.phase_needs.get(failure.phase or "", prediction.needed_bytes),
            phase=failure.phase,
            error=failure.text,
            at=timestamp(),
            of_host=of_host,
            weight_bytes=workload.weight_bytes,
        )
        remember_misfit(self._measured, workload, record, available)

    def _then(self, misfit: Misfit, failure: Failure) -> int:
        """Device memory that was available when it ran out."""
        if failure.room_bytes is None:
            return misfit.available_bytes
        return max(0, min(misfit.available_bytes, failure.room_bytes - self.limits.reserve))


SCARCE = 0.1
"""Share of the device below which libraries cannot get what they would like."""


def is_alike(one: Request, other: Request) -> bool:
    """Whether two requests run the same, but for the number of steps."""
    return _guided(one) == _guided(other)


def _guided(request: Request) -> Request:
    """A guidance above 1 runs the denoiser twice; which it is changes nothing."""
    return msgspec.structs.replace(
        request, steps=1, guidance_scale=2.0 if request.guidance_scale > 1 else 1.0
    )


def as_asked(workload: Workload, request: Request) -> Workload:
    """The workload of a request that is alike: with as many more calls as there are steps."""
    ratio = request.steps / workload.request.steps
    phases = tuple(
        _repeated(p, ratio) if any(r.role == "denoiser" for r in p.runs) else p
        for p in workload.phases
    )
    return msgspec.structs.replace(workload, request=request, phases=phases)


def _repeated(phase: Phase, ratio: float) -> Phase:
    """What is called at each step is called so many times as often."""
    if ratio == 1:
        return phase
    runs = tuple(
        msgspec.structs.replace(r, calls=max(1, round(r.calls * ratio))) for r in phase.runs
    )
    longest = max((r.times for r in phase.order), default=0)
    order = tuple(
        Repeat(max(1, round(r.times * ratio)), r.runs) if r.times == longest else r
        for r in phase.order
    )
    return msgspec.structs.replace(phase, runs=runs, order=order)


def _timed(planned: Planned) -> tuple[Operator, ...]:
    """The operators of the first request that this machine has timed, each once."""
    times = planned.machine.operators
    return tuple({o.key: o for o in plain_operators(planned.workload) if o.key in times}.values())


def _is_about(one: Budget, other: Budget) -> bool:
    pairs = ((one.device_bytes, other.device_bytes), (one.host_bytes or 0, other.host_bytes or 0))
    return all(abs(a - b) <= MORE * max(a, b) for a, b in pairs)


def _key(request: Request) -> str:
    return msgspec.json.encode(request, order="deterministic").decode()


def _keep(known: dict[Any, Any], key: Any, value: Any) -> None:
    """The latest, and not too many."""
    known.pop(key, None)
    known[key] = value
    while len(known) > MOST_KNOWN:
        known.pop(next(iter(known)))
