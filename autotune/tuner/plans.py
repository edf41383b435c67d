"""Decisions kept in the profile: what was decided once is not decided again.

A decision is found by everything that it was made from, but for free memory: for that it says the
range in which it would be made again (``decide/validity.py``).
"""

from __future__ import annotations

import functools
import hashlib
import logging
from pathlib import Path
from typing import Any

import msgspec

import autotune
from autotune.decide.corrections import replayable
from autotune.decide.history import History
from autotune.decide.limits import Limits, budget_within
from autotune.decide.plan import Plan, Validity, summarize_machine
from autotune.decide.prediction import Budget
from autotune.optimizations import CATALOGUE
from autotune.probe.machine import Machine
from autotune.profile.profile import Available, PhaseMeasurement, PlanRecord, Profile
from autotune.profile.store import load_profile, updated_if_possible
from autotune.tuner.here import Measured, new_profile, timestamp
from autotune.units import format_bytes
from autotune.workload.workload import Workload

log = logging.getLogger("autotune")

_STEADY = 0.01
"""Free memory that has changed by less than this share is not worth a word."""


_DECIDING = (
    "decide/*.py",
    "optimizations/*.py",
    "probe/machine.py",  # what a machine has
    "probe/software.py",  # what its versions can do
)
"""The code that decides."""


def basis_of(
    machine: Machine, workload: Workload, origin: str, limits: Limits, history: History
) -> str:
    """A digest of what decides: the machine as it is measured, what is asked, what is known.

    Args:
        machine: Its free memory is left out.
        workload: Whose operators' times count.
        origin: A digest of what the workload was traced from.
        limits: What the user allows.
        history: What the machine taught about the workload.
    """
    times = {o.key: machine.operators.get(o.key) for o in replayable(workload)}
    sources = {name: CATALOGUE.source(name) for name in CATALOGUE}
    asked = (origin, workload.is_loaded, workload.mapped, workload.mappable, limits)
    lasting = _lasting(machine)
    parts = (lasting, times, asked, history, sources, _offers(lasting, workload), _code())
    return _digest(parts)


def recall(key: str, machine: Machine, limits: Limits, basis: str) -> Plan | None:
    """The plan that was made from the same, where free memory is within its range.

    Args:
        key: The profile's.
        machine: With the memory that is free now.
        limits: Of that memory.
        basis: What decides.
    """
    profile = load_profile(key)
    records = profile.plans if profile is not None else ()
    record = next((r for r in reversed(records) if _is_made_from(r, basis)), None)
    plan = _plan_of(record, basis) if record is not None else None
    budget = budget_within(machine, limits)
    if plan is None or plan.validity is None or not plan.validity.holds(budget):
        return None
    return _as_of_now(plan, machine, budget)


def keep(measured: Measured, workload: Workload, plan: Plan, basis: str) -> None:
    """Remember a plan that fits; a profile that cannot be written costs the time to decide."""
    validity = plan.validity
    if validity is None:
        return
    plain = msgspec.json.decode(msgspec.json.encode(plan))
    record = PlanRecord(
        workload=workload.key,
        basis=_sealed(basis, plain),
        optimizations=tuple(map(str, plan.optimizations)),
        predicted=tuple(
            PhaseMeasurement(p.name, p.seconds, p.peak_bytes) for p in plan.prediction.phases
        ),
        least=_least(validity),
        most=_most(validity),
        plan=plain,
        at=timestamp(),
    )

    def change(profile: Profile | None) -> Profile:
        base = profile or new_profile(measured.key, measured.machine)
        sealed = (p for p in base.plans if "-" in p.basis)  # older ones are never used again
        others = tuple(p for p in sealed if not _is_made_from(p, basis))
        return msgspec.structs.replace(base, plans=(*others, record), updated_at=timestamp())

    updated_if_possible(measured.key, change)


def _lasting(machine: Machine) -> Machine:
    """The machine without what changes from one moment to the next."""
    device = msgspec.structs.replace(
        machine.device, free_bytes=0, used_bytes=None, processes=(), throttle_reasons=None
    )
    others = tuple(msgspec.structs.replace(gpu, free_bytes=0) for gpu in machine.others)
    host = msgspec.structs.replace(machine.host, ram_available_bytes=0)
    return msgspec.structs.replace(machine, device=device, others=others, host=host, operators={})


def _offers(machine: Machine, workload: Workload) -> dict[str, tuple[object, ...]]:
    """What each optimization says for itself: that depends on packages and compilers, too."""
    found: dict[str, tuple[object, ...]] = {}
    for name, optimization in CATALOGUE.items():
        try:
            reason = optimization.unavailable(machine, workload)
            found[name] = (reason,) if reason else optimization.worth_trying(machine, workload)
        except Exception as error:  # another package's may raise anything
            found[name] = (repr(error),)
    return found


@functools.cache
def _code() -> str:
    """A digest of the code that decides: another one might decide otherwise."""
    digest = hashlib.sha256(autotune.__version__.encode())
    package = Path(autotune.__file__).parent
    for pattern in _DECIDING:
        for file in sorted(package.glob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()[:32]


def _sealed(basis: str, plain: dict[str, Any]) -> str:
    """The basis with a digest of what was made from it.

    A type can be right where a value is not: a set that does not exist, a time below zero. All that
    is in a plan was checked when it was decided, by the code and for the packages that are in its
    basis, and holds as long as nobody has touched it.
    """
    return f"{basis}-{_digest(plain)}"


def _is_made_from(record: PlanRecord, basis: str) -> bool:
    return record.basis.startswith(f"{basis}-")


def _plan_of(record: PlanRecord, basis: str) -> Plan | None:
    """``None`` where it is not what was stored, or not of a type of today's."""
    try:
        if record.basis != _sealed(basis, record.plan):
            raise ValueError("it was edited")
        return msgspec.convert(record.plan, Plan, str_keys=True)
    except (msgspec.ValidationError, ValueError) as error:
        log.info("a remembered plan of %s is not used: %s", record.workload, error)
        return None


def _as_of_now(plan: Plan, machine: Machine, budget: Budget) -> Plan:
    """The same plan with the memory that is free now, and a word where that is not what it was."""
    then = plan.budget
    now: dict[str, Any] = {
        "machine": summarize_machine(machine),
        "budget_bytes": budget.device_bytes,
        "host_budget_bytes": budget.host_bytes,
        "elsewhere_budget_bytes": dict(budget.elsewhere_bytes),
    }
    if abs(budget.device_bytes - then.device_bytes) > _STEADY * then.device_bytes:
        text = (
            f"decided when {format_bytes(then.device_bytes)} were available; with "
            f"{format_bytes(budget.device_bytes)} the same is chosen"
        )
        now["notes"] = (*plan.notes, text)
    return msgspec.structs.replace(plan, **now)


def _least(validity: Validity) -> Available:
    return Available(
        validity.least_bytes, validity.least_host_bytes, validity.least_elsewhere_bytes
    )


def _most(validity: Validity) -> Available | None:
    if validity.most_bytes is None:
        return None
    elsewhere = validity.most_elsewhere_bytes or {}
    return Available(validity.most_bytes, validity.most_host_bytes, elsewhere)
