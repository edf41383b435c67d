"""This machine: from its profile, measured where that does not do."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from typing import NamedTuple

import msgspec

from autotune.decide.corrections import replayable
from autotune.decide.forward import ForwardModel
from autotune.probe import nvml
from autotune.probe.host import read_host
from autotune.probe.live import identity, profile_key, refresh
from autotune.probe.machine import Machine
from autotune.probe.software import installed_versions
from autotune.profile.profile import Profile
from autotune.profile.staleness import stale_reasons
from autotune.profile.store import load_profile, update_profile
from autotune.workload.workload import Workload

REPLAY_S = 3.0
"""Seconds that a new workload may spend on timing its operators; once per workload and machine."""


Progress = Callable[[str], None]


class Measured(NamedTuple):
    """This machine, and why it was measured now (empty when the profile was used)."""

    key: str
    machine: Machine
    reasons: tuple[str, ...]


def machine_here(
    device: str | None = None, *, remeasure: bool = False, progress: Progress | None = None
) -> Measured:
    """This machine from its profile, measured first where there is none or it is stale.

    Free memory is always read now.

    Raises:
        MachineError: there is no such device.
        ProfileError: the cache folder cannot be used.
    """
    key = identity(device)
    profile = load_profile(key)
    reasons = ("asked to",) if remeasure else _why_measure(profile)
    if profile is not None and not reasons:
        return Measured(key, refresh(profile.machine), ())
    from autotune.probe.measure import measure_machine

    machine = measure_machine(device, progress=progress)
    key = profile_key(machine)  # with several GPUs, the one with most free memory may have changed
    remember_machine(key, machine)
    return Measured(key, machine, reasons)


def _why_measure(profile: Profile | None) -> tuple[str, ...]:
    return ("no profile of this machine yet",) if profile is None else why_stale(profile)


def why_stale(profile: Profile) -> tuple[str, ...]:
    """Why this machine's profile must be measured again, compared with what is installed now."""
    gpu = nvml.gpu(profile.machine.device.uuid)
    return stale_reasons(
        profile,
        software=installed_versions(),
        driver=gpu.driver if gpu else None,
        host=read_host(),
    )


def remember_machine(key: str, machine: Machine) -> Profile:
    """Store a fresh measurement; runs remembered before stay."""

    def change(profile: Profile | None) -> Profile:
        base = profile or new_profile(key, machine)
        return msgspec.structs.replace(base, machine=machine, updated_at=timestamp())

    return update_profile(key, change)


def new_profile(key: str, machine: Machine) -> Profile:
    now = timestamp()
    return Profile(key=key, machine=machine, created_at=now, updated_at=now)


def replayed(measured: Measured, workload: Workload, budget_s: float) -> Measured:
    """This machine with the workload's operators timed, as far as a budget of seconds goes.

    What was timed before is in the profile; what is timed now is added to it.
    """
    machine = measured.machine
    memory = machine.device.free_bytes // 10  # never disturb what else runs here
    operators = [o for o in replayable(workload) if o.bytes <= memory]
    if all(o.key in machine.operators for o in operators):
        return measured
    import torch

    from autotune.probe.replay import replay

    model = ForwardModel(machine, workload)
    found = replay(
        operators,
        torch.device(device_name(machine)),
        known=machine.operators,
        budget_s=budget_s,
        memory_bytes=memory,
        weight=lambda o: o.count * model.rate_seconds(o),
    )

    def change(profile: Profile | None) -> Profile:
        now = timestamp()
        base = profile or new_profile(measured.key, machine)
        known = base.machine.operators | found
        updated = msgspec.structs.replace(base.machine, operators=known)
        return msgspec.structs.replace(base, machine=updated, updated_at=now)

    known = update_profile(measured.key, change).machine.operators
    return measured._replace(machine=msgspec.structs.replace(machine, operators=known))


def device_name(machine: Machine) -> str:
    """PyTorch's name of the machine's device, ``"cuda:0"`` or ``"cpu"``."""
    kind = machine.device.kind
    return kind if kind in ("cpu", "mps") else f"{kind}:{machine.device.index}"


def timestamp() -> str:
    """Now, as ISO 8601 in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
