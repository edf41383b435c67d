"""``autotune profile``: look at, move and delete what this package remembers about machines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from autotune.cli.options import Device
from autotune.cli.output import JsonFlag, print_json
from autotune.cli.profile_show import print_list, print_profile
from autotune.errors import MachineError, ProfileError
from autotune.profile import coding, store
from autotune.profile.files import MAX_FILE_BYTES
from autotune.profile.profile import Profile
from autotune.profile.staleness import Change, reasons
from autotune.profile.store import StoredProfile
from autotune.units import printable

REMEDY = "`autotune probe` measures this machine, `autotune run` measures it and draws an image"

app = typer.Typer(
    help="Show, compare, move or delete what was measured on this machine.", no_args_is_help=True
)

_STANDARD = "-"
_KEY_HELP = "A profile's key, its beginning, its file's name, or a file."
KeyArgument = Annotated[str | None, typer.Argument(metavar="KEY", help=_KEY_HELP)]


@app.command()
def show(key: KeyArgument = None, json: JsonFlag = False) -> None:
    """Show a profile: machine, age, what is stale and why; plans, runs, what did not fit."""
    stored = _find(key) if key else _own_or_latest()
    profile = _readable(stored)
    changes = _changes(profile)
    if json:
        stale = None if changes is None else reasons(changes, profile.machine)
        told = None if changes is None else list(map(_told, changes))
        print_json({"path": stored.path, "stale": stale, "changes": told, "profile": profile})
    else:
        print_profile(profile, stored.path, changes)


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help=_KEY_HELP)],
    second: Annotated[
        str | None, typer.Argument(metavar="B", help="The same; this machine's by default.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also figures that differ by no more than noise.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Compare two profiles: machine, software, figures and plans, as far as they differ."""
    from autotune.cli.profile_diff import difference, print_difference

    a, b = _find(first), _find(second) if second else _own_or_only()
    found = difference(_readable(a), _readable(b), noise=everything)
    if json:
        print_json({"a": _summary(a), "b": _summary(b), "difference": found})
    else:
        print_difference(a, b, found)


@app.command("list")
def list_(json: JsonFlag = False) -> None:
    """List every profile, also those that cannot be read."""
    profiles = store.list_profiles()
    if json:
        print_json({"profiles": [_summary(stored) for stored in profiles]})
    elif profiles:
        print_list(profiles)
    else:
        typer.echo(f"No profile yet: {REMEDY}.")


@app.command()
def path(json: JsonFlag = False) -> None:
    """Print where this machine's profile is, or would be."""
    from autotune.probe.live import identity

    file = store.profile_path(identity())
    if json:
        print_json({"path": file, "exists": file.exists()})
    else:
        typer.echo(file)


@app.command()
def clear(
    key: Annotated[
        str | None,
        typer.Argument(metavar="KEY", help="A profile's key, its beginning, or its file's name."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: JsonFlag = False,
) -> None:
    """Delete one profile or all, with the files that were set aside."""
    chosen = _find_stored(key).path if key else None
    files = store.profile_files(chosen)
    if files and not yes:
        _confirm(files)
    deleted = store.clear_profiles(chosen)
    if json:
        print_json({"deleted": deleted})
    else:
        typer.echo("\n".join(f"Deleted {file}" for file in deleted) or "Nothing to delete.")


@app.command()
def export(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The file to write; - for standard output.")
    ],
    key: Annotated[str | None, typer.Option(help="Which profile; default: this machine's.")] = None,
    json: JsonFlag = False,
) -> None:
    """Write this machine's profile, or the only one, to a file."""
    stored = _find(key) if key else _own_or_only()
    if str(file) == _STANDARD:
        sys.stdout.buffer.write(store.exported(stored.path)[1])
        return
    profile = store.export_profile(stored.path, file)
    if json:
        print_json({"key": profile.key, "path": file})
    else:
        typer.echo(printable(f"Wrote the profile of {profile.machine.device.name} to {file}"))


@app.command("import")
def import_(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file from `export`; - for standard input.")
    ],
    device: Device = None,
    json: JsonFlag = False,
) -> None:
    """Take over a profile that was measured here or on a machine of the same kind.

    Same device, driver, CPU and software; what is free is read here. Runs already remembered stay.
    """
    from autotune.tuner import import_profile, why_stale

    profile, outdated = import_profile(_read(file), str(file), device)
    stored_at = store.profile_path(profile.key)
    name = profile.machine.device.name
    if json:
        print_json({"key": profile.key, "path": stored_at, "outdated": outdated})
    elif outdated:
        typer.echo(f"Kept the figures of {name} here, in {stored_at}: those of {file} are older")
        for difference in outdated:
            typer.echo(f"Changed since: {difference}")
    else:
        typer.echo(f"Stored as the profile of {name} here, in {stored_at}")
    for reason in () if json else why_stale(profile):
        typer.echo(f"At the next start: {reason}")


def _read(file: Path) -> Profile:
    if str(file) != _STANDARD:
        return store.read_profile(file)
    return coding.decode(sys.stdin.buffer.read(MAX_FILE_BYTES + 1), "standard input")


def _own_keys() -> tuple[str, ...]:
    """The keys of this machine: its default device's and its CPU's; none where it cannot tell."""
    from autotune.probe.live import identity

    try:
        return identity(), identity("cpu")
    except MachineError:
        return ()


def _find(key: str) -> StoredProfile:
    """What ``_find_stored`` finds, or the profile in the file of that path."""
    if Path(key).is_file() and not any(stored.path.name == key for stored in store.list_profiles()):
        return StoredProfile(Path(key), store.read_profile(Path(key)))
    return _find_stored(key)


def _find_stored(key: str) -> StoredProfile:
    """The profile with this key or file name, or the only one whose key begins so."""
    profiles = store.list_profiles()
    for stored in profiles:
        if stored.path == store.profile_path(key) or stored.path.name == key:
            return stored
    begun = [stored for stored in profiles if stored.profile and stored.profile.key.startswith(key)]
    if len(begun) != 1:
        count = "more than one profile has" if begun else "no profile has"
        raise ProfileError(f"{count} a key like {key!r}", "see `autotune profile list`")
    return begun[0]


def _own_or_latest() -> StoredProfile:
    profiles = _any_profiles()
    readable = [stored for stored in profiles if stored.profile] or profiles
    return _own(profiles) or max(readable, key=_updated_at)


def _own_or_only() -> StoredProfile:
    profiles = _any_profiles()
    own = _own(profiles)
    if own is None and len(profiles) > 1:
        raise ProfileError(
            f"this machine has no profile, and there are {len(profiles)} of others",
            "choose one with --key, see `autotune profile list`",
        )
    return own or profiles[0]


def _any_profiles() -> Sequence[StoredProfile]:
    profiles = store.list_profiles()
    if not profiles:
        raise ProfileError("no profile yet", REMEDY)
    return profiles


def _own(profiles: Sequence[StoredProfile]) -> StoredProfile | None:
    by_path = {stored.path: stored for stored in profiles}
    own = (by_path.get(store.profile_path(key)) for key in _own_keys())
    return next((stored for stored in own if stored), None)


def _updated_at(stored: StoredProfile) -> str:
    return stored.profile.updated_at if stored.profile else ""


def _readable(stored: StoredProfile) -> Profile:
    if stored.profile is None:
        raise ProfileError(stored.problem or f"{stored.path} cannot be read", store.MEASURE_HINT)
    return stored.profile


def _changes(profile: Profile) -> tuple[Change, ...] | None:
    """What has changed since the profile was measured; ``None`` for another machine's."""
    from autotune.probe import nvml
    from autotune.tuner import changes_here

    is_here = nvml.gpu(profile.machine.device.uuid) is not None or profile.key in _own_keys()
    return changes_here(profile) if is_here else None


def _told(change: Change) -> dict[str, Any]:
    return {**change._asdict(), "parts": sorted(change.parts)}


def _confirm(files: Sequence[Path]) -> None:
    """Ask on the terminal before deleting.

    Raises:
        ProfileError: there is no terminal to ask on.
        typer.Abort: the user said no.
    """
    if not sys.stdin.isatty():
        raise ProfileError(f"this deletes {len(files)} file(s)", "add --yes to delete them unasked")
    names = "\n".join(f"  {file}" for file in files)
    typer.confirm(f"Delete these files?\n{names}\n", abort=True, err=True)


def _summary(stored: StoredProfile) -> dict[str, Any]:
    profile = stored.profile
    if profile is None:
        return {"path": stored.path, "problem": stored.problem}
    return {
        "path": stored.path,
        "key": profile.key,
        "device": profile.machine.device.name,
        "runs": len(profile.runs),
        "plans": len(profile.plans),
        "misfits": len(profile.misfits),
        "created_at": profile.created_at,
        "updated_at": profile.updated_at,
    }
