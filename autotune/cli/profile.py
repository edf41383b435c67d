"""``autotune profile``: look at, move and delete what this package remembers about machines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autotune.cli.output import JsonFlag, console, print_json
from autotune.errors import MachineError, ProfileError
from autotune.probe.machine import Machine
from autotune.profile import store
from autotune.profile.profile import PhaseMeasurement, Profile, RunRecord
from autotune.profile.store import StoredProfile
from autotune.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.table import Table

REMEDY = "`autotune probe` measures this machine, `autotune run` measures it and draws an image"

app = typer.Typer(
    help="Show, move or delete what was measured on this machine.", no_args_is_help=True
)

KeyArgument = Annotated[
    str | None,
    typer.Argument(metavar="KEY", help="A profile's key, its beginning, or its file's name."),
]


@app.command()
def show(key: KeyArgument = None, json: JsonFlag = False) -> None:
    """Show a profile: machine, age, what is stale and why, remembered runs."""
    stored = _find(key) if key else _own_or_latest()
    if stored.profile is None:
        raise ProfileError(stored.problem or f"{stored.path} cannot be read", store.MEASURE_HINT)
    stale = _stale(stored.profile)
    if json:
        print_json({"path": stored.path, "stale": stale, "profile": stored.profile})
    else:
        _print_profile(stored.profile, stored.path, stale)


@app.command("list")
def list_(json: JsonFlag = False) -> None:
    """List every profile, also those that cannot be read."""
    profiles = store.list_profiles()
    if json:
        print_json({"profiles": [_summary(stored) for stored in profiles]})
    elif profiles:
        console().print(_profile_table(profiles))
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
    key: KeyArgument = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: JsonFlag = False,
) -> None:
    """Delete one profile or all, with the files that were set aside."""
    chosen = _find(key).path if key else None
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
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")],
    key: Annotated[str | None, typer.Option(help="Which profile; default: this machine's.")] = None,
    json: JsonFlag = False,
) -> None:
    """Write this machine's profile, or the only one, to a file."""
    stored = _find(key) if key else _own_or_only()
    profile = store.export_profile(stored.path, file)
    if json:
        print_json({"key": profile.key, "path": file})
    else:
        typer.echo(f"Wrote the profile of {profile.machine.device.name} to {file}")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file from `export`.")],
    json: JsonFlag = False,
) -> None:
    """Store a profile from a file; runs already remembered for that machine are kept."""
    profile = store.import_profile(file)
    stored_at = store.profile_path(profile.key)
    if json:
        print_json({"key": profile.key, "path": stored_at})
    else:
        typer.echo(f"Stored the profile of {profile.machine.device.name} in {stored_at}")


def _own_keys() -> tuple[str, ...]:
    """The keys of this machine: its default device's and its CPU's; none where it cannot tell."""
    from autotune.probe.live import identity

    try:
        return identity(), identity("cpu")
    except MachineError:
        return ()


def _find(key: str) -> StoredProfile:
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


def _stale(profile: Profile) -> tuple[str, ...] | None:
    """Why this machine's profile must be measured again; ``None`` for another machine's."""
    from autotune.probe import nvml
    from autotune.tuner import why_stale

    is_here = nvml.gpu(profile.machine.device.uuid) is not None or profile.key in _own_keys()
    return why_stale(profile) if is_here else None


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
        "created_at": profile.created_at,
        "updated_at": profile.updated_at,
    }


def _print_profile(profile: Profile, path: Path, stale: Sequence[str] | None) -> None:
    for label, text in (
        ("Machine", _machine_line(profile.machine)),
        ("Profile", f"{profile.key}, {path}"),
        ("Measured", f"{_age(profile.created_at)} ({profile.created_at})"),
        ("Stale", _stale_line(stale)),
    ):
        typer.echo(typer.style(f"{label:<9}", bold=True) + text)
    if profile.runs:
        console().print(_run_table(profile.runs))
    else:
        typer.echo("No runs remembered yet.")


def _machine_line(machine: Machine) -> str:
    device, host = machine.device, machine.host
    parts = [f"{device.name}, {format_bytes(device.total_bytes)}"]
    if device.driver:
        parts.append(f"driver {device.driver}")
    if device.kind != "cpu":
        parts.append(f"{host.cpu} with {format_bytes(host.ram_total_bytes)} RAM")
    return ", ".join((*parts, f"{host.cores} cores, {host.os}"))


def _stale_line(reasons: Sequence[str] | None) -> str:
    if reasons is None:
        return "unknown: this is another machine's"
    return "; ".join(reasons) + ": measured again at the next start" if reasons else "no"


def _age(timestamp: str) -> str:
    """``"2026-05-01T10:00:00Z"`` → ``"3 days ago"``; what is no such timestamp stays as it is."""
    try:
        # Python 3.10 does not read the "Z".
        moment = datetime.fromisoformat(timestamp.replace("Z", "+00:00"))
    except ValueError:
        return timestamp
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return _span((datetime.now(timezone.utc) - moment).total_seconds()) + " ago"


def _span(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(0, seconds):.0f} seconds"


def _run_table(runs: Sequence[RunRecord]) -> Table:
    """Predicted against measured, newest first."""
    columns = ("when", "workload", "chosen", "predicted", "measured")
    table = _table(*columns, wrapped=("workload", "chosen"))
    for run in reversed(runs):
        chosen = ", ".join(run.optimizations) or "none"
        _add_row(
            table, _age(run.at), run.workload, chosen, _total(run.predicted), _total(run.measured)
        )
    return table


def _total(phases: Sequence[PhaseMeasurement]) -> str:
    """Seconds add up over the phases; the largest peak is the run's."""
    if not phases:
        return "-"
    seconds = format_seconds(sum(phase.seconds for phase in phases))
    peaks = [phase.peak_bytes for phase in phases if phase.peak_bytes is not None]
    return f"{seconds}\n{format_bytes(max(peaks))}" if peaks else seconds


def _profile_table(profiles: Sequence[StoredProfile]) -> Table:
    table = _table("device", "key", "measured", "runs", wrapped=("device", "key", "measured"))
    for stored in profiles:
        if stored.profile is None:
            _add_row(table, "cannot be read", stored.path.name, stored.problem or "", "")
        else:
            _add_row(table, *_profile_cells(stored.profile))
    return table


def _profile_cells(profile: Profile) -> tuple[str, ...]:
    device = profile.machine.device.name
    return device, profile.key, _age(profile.created_at), str(len(profile.runs))


def _table(*columns: str, wrapped: Sequence[str]) -> Table:
    """A table whose ``wrapped`` columns give way on a narrow terminal; figures stay whole."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, no_wrap=name not in wrapped, overflow="fold")
    return table


def _add_row(table: Table, *cells: str) -> None:
    """Names come from files: they are shown as they are, not read as markup."""
    from rich.text import Text

    table.add_row(*map(Text, cells))
