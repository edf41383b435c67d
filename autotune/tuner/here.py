"""This machine: from its profile, measured where that does not do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timezone
from typing import NamedTuple

from msgspec.structs import replace

from autotune.decide.corrections import replayable
from autotune.probe import nvml
from autotune.probe.host import read_host
from autotune.probe.live import identity, profile_key, refresh
from autotune.probe.machine import Device, Machine
from autotune.probe.parts import EVERYTHING, Part
from autotune.probe.software import installed_versions
from autotune.profile import merging
from autotune.profile.merging import with_machine, with_operators
from autotune.profile.profile import Profile
from autotune.profile.staleness import (
    Change,
    Facts,
    changes,
    facts_of,
    known_pcie,
    reasons,
    stale_parts,
)
from autotune.profile.store import load_profile, updated_if_possible
from autotune.workload.workload import Workload

log = logging.getLogger("autotune")

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
    """This machine from its profile; what is missing there, or stale, is measured first.

    Free memory, and which packages there are, is always read now. Where the profile cannot be
    stored, that is a warning.

    Args:
        device: ``"cuda:1"``, ``"cpu"``; by default the GPU with most free memory, else the CPU.
        remeasure: Measure everything, whatever the profile has.
        progress: Told what is being measured.

    Raises:
        MachineError: there is no such device.
    """
    key = identity(device)
    profile = load_profile(key)
    if profile is None or remeasure:
        why = "asked to" if remeasure else "no profile of this machine yet"
        return _measured(key, device, None, EVERYTHING, (why,), progress)
    now = facts_here(profile.machine.device)
    found = changes(facts_of(profile.machine), now)
    stale = stale_parts(found)
    if not stale:
        return Measured(key, refresh(replace(profile.machine, software=dict(now.software))), ())
    why_not = reasons(found, profile.machine)
    return _measured(key, device, profile.machine, stale, why_not, progress)


def _measured(
    key: str,
    device: str | None,
    known: Machine | None,
    parts: frozenset[Part],
    why: tuple[str, ...],
    progress: Progress | None,
) -> Measured:
    """Measure parts of this machine, and remember them."""
    from autotune.probe.measure import measure_machine

    log.info("measuring this machine: %s", "; ".join(why))
    machine = measure_machine(device, progress=progress, known=known, parts=parts)
    # With several GPUs, the one with most free memory may have changed: then all was measured.
    found_key = profile_key(machine)
    profile = remember_machine(found_key, machine, parts if found_key == key else EVERYTHING)
    return Measured(found_key, profile.machine if profile else machine, why)


def changes_here(profile: Profile) -> tuple[Change, ...]:
    """What has changed on this machine since its profile was measured."""
    before = profile.machine
    return changes(facts_of(before), facts_here(before.device))


def facts_here(device: Device) -> Facts:
    """What the figures of a device of this machine depend on, as it is now."""
    gpu = nvml.gpu(device.uuid)
    return Facts(
        device=device.name,
        total_bytes=gpu.total_bytes if gpu and not device.unified_memory else None,
        on_cpu=device.kind == "cpu",
        driver=gpu.driver if gpu else None,
        software=installed_versions(),
        host=read_host(),
        pcie=known_pcie(gpu.pcie_generation_max, gpu.pcie_width_max) if gpu else None,
    )


def why_stale(profile: Profile) -> tuple[str, ...]:
    """What of this machine's profile must be measured again, and why; empty when it holds."""
    return reasons(changes_here(profile), profile.machine)


def remember_machine(
    key: str, machine: Machine, parts: frozenset[Part] = EVERYTHING
) -> Profile | None:
    """Store a fresh measurement, merged with what others have stored; all records stay.

    Returns:
        The profile as stored; ``None`` where it could not be.
    """
    return updated_if_possible(
        key, lambda profile: with_machine(profile, key, machine, timestamp(), parts)
    )


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

    from autotune.decide.forward import ForwardModel
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

    updated_if_possible(
        measured.key,
        lambda stored: with_operators(stored, measured.key, machine, found, timestamp()),
    )
    known = machine.operators | found
    return measured._replace(machine=replace(machine, operators=known))


def new_profile(key: str, machine: Machine) -> Profile:
    """The profile of a machine that has none yet, as of now."""
    return merging.new_profile(key, machine, timestamp())


def device_name(machine: Machine) -> str:
    """PyTorch's name of the machine's device, ``"cuda:0"`` or ``"cpu"``."""
    kind = machine.device.kind
    return kind if kind in ("cpu", "mps") else f"{kind}:{machine.device.index}"


def timestamp() -> str:
    """Now, as ISO 8601 in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
