"""What a run taught, kept in the profile for the next start."""

from __future__ import annotations

import logging

import msgspec

from autotune.decide.corrections import replayable
from autotune.decide.plan import Plan
from autotune.decide.prediction import Prediction
from autotune.probe.machine import Machine
from autotune.profile.profile import PhaseMeasurement, Profile, RunRecord
from autotune.profile.store import load_profile, update_profile
from autotune.tuner.here import Measured, new_profile, timestamp
from autotune.tuner.history import verified_runs, without_outgrown
from autotune.tuner.planning import Planned
from autotune.workload.workload import Workload

log = logging.getLogger("autotune")


def remember_run(
    measured: Measured, planned: Planned, phases: tuple[PhaseMeasurement, ...]
) -> None:
    """Keep predicted and measured figures of a verified run in the profile."""
    plan = planned.plan
    record = RunRecord(
        workload=planned.workload.key,
        optimizations=_set_of(plan),
        predicted=tuple(
            PhaseMeasurement(p.name, p.seconds, p.peak_bytes) for p in plan.prediction.phases
        ),
        measured=phases,
        at=timestamp(),
        weight_bytes=planned.workload.weight_bytes,
    )

    def change(profile: Profile | None) -> Profile:
        now = timestamp()
        base = profile or new_profile(measured.key, measured.machine)
        if is_far_off(plan.prediction, phases):
            log.info("far from the prediction: the operators will be timed again")
            base = msgspec.structs.replace(base, machine=_forgotten(base.machine, planned.workload))
        misfits = without_outgrown(base, planned.workload, plan.budget)
        runs = (*base.runs, record)
        return msgspec.structs.replace(base, runs=runs, misfits=misfits, updated_at=now)

    update_profile(measured.key, change)


def is_far_off(prediction: Prediction, phases: tuple[PhaseMeasurement, ...]) -> bool:
    """Whether a run took less than half or more than twice the time predicted.

    No model is that wrong about an operator it has timed: the machine was busy, then or now.
    """
    measured = sum(p.seconds for p in phases)
    longest = prediction.seconds + prediction.once_s  # the first image waits for the compiler
    return not prediction.seconds / 2 <= measured <= longest * 2


def _forgotten(machine: Machine, workload: Workload) -> Machine:
    """The machine without the times of the workload's operators."""
    drop = {o.key for o in replayable(workload)}
    kept = {k: t for k, t in machine.operators.items() if k not in drop}
    return msgspec.structs.replace(machine, operators=kept)


def was_verified(measured: Measured, planned: Planned) -> bool:
    """Whether the profile has a verified run of this very plan on the machine as it is."""
    profile = load_profile(measured.key)
    chosen = _set_of(planned.plan)
    return profile is not None and any(
        run.optimizations == chosen for run in verified_runs(profile, planned.workload)
    )


def _set_of(plan: Plan) -> tuple[str, ...]:
    """What is on, set by hand or chosen."""
    return tuple(map(str, (*plan.kept, *plan.optimizations)))
