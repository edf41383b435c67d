"""A profile measured on one machine, taken over by another of the same kind."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from autotune.errors import ProfileError
from autotune.probe.live import other_gpus, profile_key
from autotune.probe.machine import Machine
from autotune.probe.software import installed_versions
from autotune.profile.merging import merged, with_profile
from autotune.profile.profile import Profile
from autotune.profile.staleness import Change, changes, facts_of, stale_parts
from autotune.profile.store import update_profile
from autotune.tuner.here import changes_here, facts_here, timestamp


class Imported(NamedTuple):
    """What came of an import.

    Attributes:
        profile: As it is stored.
        outdated: What has changed since the imported one was measured and not since the one stored
            here was, whose figures therefore stay; empty where the imported ones were taken over.
    """

    profile: Profile
    outdated: tuple[str, ...]


def import_profile(imported: Profile, source: str, device: str | None = None) -> Imported:
    """Store a profile that was measured here or on a machine of the same kind as this machine's.

    What identifies the machine and what is free is read here. The imported figures take the place
    of those stored before, which only fill gaps, unless they are from before a change of this very
    machine that those know of: then it is the other way round. Runs, plans and misfits of both are
    kept, but none that would pass for one of the machine as it is and is not.

    Args:
        imported: As it was exported.
        source: What it is called in errors, such as the file it comes from.
        device: For which of this machine's devices; by default the one that it would be for a
            pipeline, and for the profile of a CPU the CPU.

    Raises:
        ProfileError: the profile is of a machine of another kind, or the cache folder cannot be
            written.
        MachineError: there is no such device.
    """
    on_cpu = imported.machine.device.kind == "cpu"
    machine = _as_here(imported.machine, device or ("cpu" if on_cpu else None))
    key = profile_key(machine)
    differences = kind_differences(imported.machine, machine)
    if differences and imported.key != key:
        raise ProfileError(
            f"{source} is of another kind of machine: {'; '.join(differences)}",
            "measure this one: `autotune probe`; compare them: `autotune profile diff FILE`",
        )
    # Of this very machine, from before a change: then that is what it stays, and is found stale.
    of_here = machine if not differences else imported.machine
    given = msgspec.structs.replace(imported, key=key, machine=of_here, updated_at=timestamp())
    outdated: tuple[str, ...] = ()

    def change(stored: Profile | None) -> Profile:
        nonlocal outdated
        if stored is None:
            return given
        outdated = differences if _has_less_stale(stored, given) else ()
        return _joined(stored, given, keeps=bool(outdated))

    return Imported(update_profile(key, change), outdated)


def _has_less_stale(stored: Profile, given: Profile) -> bool:
    return stale_parts(changes_here(stored)) < stale_parts(changes_here(given))


def _joined(stored: Profile, given: Profile, *, keeps: bool) -> Profile:
    """One profile of both; ``keeps``: the figures of the stored one rather than those given."""
    older, newer = (given, stored) if keeps else (stored, given)
    differ = stale_parts(changes(facts_of(older.machine), facts_of(newer.machine)))
    base, other = (newer, older) if differ else (stored, given)
    base = msgspec.structs.replace(base, created_at=stored.created_at)
    return with_profile(base, other, merged(older.machine, newer.machine), given.updated_at)


def kind_differences(there: Machine, here: Machine) -> tuple[str, ...]:
    """Why figures of one machine do not hold for another, in words; empty when they do."""
    kinds = (there.device.kind, here.device.kind)
    if kinds[0] != kinds[1]:
        return (f"a {kinds[0]} device there, {kinds[1]} here",)
    device = here.device
    now = facts_here(device)._replace(
        total_bytes=None if device.unified_memory else device.total_bytes
    )
    found = changes(facts_of(there), now)
    return tuple(_told(change) for change in found if change.parts)


def _told(change: Change) -> str:
    return f"{change.what} {change.before} there, {change.now} here"


def _as_here(machine: Machine, device: str | None) -> Machine:
    """The machine with everything of this one that is read and not measured."""
    import torch

    from autotune.probe.devices import choose_device, describe
    from autotune.probe.findings import find
    from autotune.probe.host import read_host
    from autotune.probe.samples import DISTURBED_SPREAD

    host = read_host()
    facts = describe(choose_device(device), host)
    disk = machine.host.disk_read_bytes_per_s
    here = msgspec.structs.replace(
        machine,
        device=facts,
        host=msgspec.structs.replace(host, disk_read_bytes_per_s=disk),
        software=installed_versions(),
        others=other_gpus(facts),
    )
    accelerator = torch.accelerator.is_available()
    return find(here, disturbed_above=2 * DISTURBED_SPREAD, accelerator=accelerator)
