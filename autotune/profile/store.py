"""The profile files: one JSON file per machine in the user's cache folder.

Files are validated when read, replaced atomically under a lock when written, and set aside, never
deleted, when they cannot be understood.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from autotune.errors import ProfileError
from autotune.probe.machine import Value
from autotune.profile.profile import SCHEMA_VERSION, Profile
from autotune.units import MIB, format_bytes

MAX_FILE_BYTES: Final = 64 * MIB
MAX_RUNS: Final = 50
LOCK_TIMEOUT_S = 10.0

# Distinctive, so that `clear` can delete nothing else where AUTOTUNE_CACHE names a shared folder.
_SUFFIX: Final = ".profile.json"
_FOLDER_HINT: Final = "set AUTOTUNE_CACHE to a folder that you can write"
MEASURE_HINT: Final = "`autotune probe` measures this machine and saves its profile"

log = logging.getLogger("autotune")


class StoredProfile(Value, frozen=True):
    """A file of the cache folder: its profile, or the problem that keeps it from being read."""

    path: Path
    profile: Profile | None = None
    problem: str | None = None


class _Header(msgspec.Struct):
    """The one field that every schema version has, whatever else a newer one adds."""

    schema_version: int


def cache_folder() -> Path:
    """The folder of the profiles: ``AUTOTUNE_CACHE``, else the platform's cache folder.

    Made when missing, for its owner alone.

    Raises:
        ProfileError: it is no folder, or cannot be made or written.
    """
    folder = _location()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ProfileError(f"the cache folder {folder} is not a folder", _FOLDER_HINT) from error
    except OSError as error:
        _raise_from(error, f"cannot make the cache folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ProfileError(f"the cache folder {folder} is not writable", _FOLDER_HINT)
    return folder


def profile_path(key: str) -> Path:
    """Where the profile of ``key`` is, or would be.

    The hash tells apart keys with the same slug, also on file systems that ignore case, and keeps
    a key from spelling one of Windows's reserved names.
    """
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", key).strip(".-")[:80]
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return _location() / f"{slug or 'machine'}-{digest}{_SUFFIX}"


def load_profile(key: str) -> Profile | None:
    """The profile of ``key``; ``None`` means: measure this machine.

    A file that cannot be used (corrupt, from a newer version, another machine's) is set aside with
    a warning. A folder that can only be read is good enough.
    """
    path = profile_path(key)
    try:
        return _read_if_there(path, key)
    except ProfileError as error:
        problem = error.message
    try:
        with _locked():
            return _read_or_set_aside(path, key)
    except ProfileError as error:
        log.warning("%s; it could not be set aside: %s", problem, error)
        return None


def read_profile(path: Path) -> Profile:
    """Read and validate one profile file.

    Raises:
        ProfileError: it cannot be read, is too large, is no profile, or is of a newer version.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        _raise_from(error, f"cannot read {path}", MEASURE_HINT)
    if len(data) > MAX_FILE_BYTES:
        limit = format_bytes(MAX_FILE_BYTES)
        raise ProfileError(f"{path} is larger than {limit}: not a profile", MEASURE_HINT)
    return _decode(data, str(path))


def save_profile(profile: Profile) -> None:
    """Write ``profile`` in the place of the one that has its key; the latest 50 runs are kept.

    To change a stored profile use :func:`update_profile`, which loses no other writer's change.

    Raises:
        ProfileError: it cannot be written; the file from before is intact.
    """
    with _locked():
        _store(profile)


def update_profile(key: str, change: Callable[[Profile | None], Profile]) -> Profile:
    """Read, change and write the profile of ``key`` with no other writer in between.

    Args:
        key: The profile's key.
        change: From the stored profile (``None``: there is none that can be read) to the new one.
            It runs under the lock: keep it quick, and call nothing of this module in it.

    Returns:
        The profile as stored.

    Raises:
        ProfileError: it cannot be written; the file from before is intact.
        ValueError: ``change`` returned the profile of another key.
    """
    with _locked():
        profile = change(_read_or_set_aside(profile_path(key), key))
        if profile.key != key:
            raise ValueError(f"the change of {key!r} returned the profile of {profile.key!r}")
        return _store(profile)


def list_profiles() -> tuple[StoredProfile, ...]:
    """Every profile file of the cache folder, readable or not, by file name."""
    return tuple(_stored(path) for path in sorted(_location().glob(f"*{_SUFFIX}")))


def profile_files(source: str | Path | None = None) -> tuple[Path, ...]:
    """The file of a key or path (or all), with those set aside from it: what clearing deletes."""
    name = f"*{_SUFFIX}" if source is None else glob.escape(_path(source).name)
    folder = _location()
    return tuple(sorted((*folder.glob(name), *folder.glob(f"{name}.set-aside-*"))))


def clear_profiles(source: str | Path | None = None) -> tuple[Path, ...]:
    """Delete the profile of a key or path, or all; files set aside from them too.

    Returns:
        The deleted files.

    Raises:
        ProfileError: one cannot be deleted.
    """
    if not profile_files(source):
        return ()
    with _locked():
        paths = profile_files(source)
        try:
            for path in paths:
                path.unlink(missing_ok=True)
        except OSError as error:
            _raise_from(error, f"cannot delete {path}")
    return paths


def export_profile(source: str | Path, file: Path) -> Profile:
    """Write the profile of a key (or of a profile file's path) to ``file``.

    Raises:
        ProfileError: there is no such profile, or ``file`` cannot be written.
    """
    path = _path(source)
    if not path.exists():
        raise ProfileError(f"no profile of {source} to export", MEASURE_HINT)
    profile = read_profile(path)
    target = file.resolve()
    if target.exists() and not target.is_file():
        raise ProfileError(f"{file} is not a regular file", "name a file to write")
    _write(target, _encode(profile), "name a file that you can write")
    return profile


def import_profile(file: Path) -> Profile:
    """Store the profile in ``file`` under its key; runs already remembered there are kept.

    Returns:
        The profile as stored.

    Raises:
        ProfileError: ``file`` is no readable profile, or the cache folder cannot be written.
    """
    imported = read_profile(file)
    return update_profile(imported.key, lambda stored: _with_runs_of(imported, stored))


def _location() -> Path:
    """The cache folder's path, whether it is there or not."""
    chosen = os.environ.get("AUTOTUNE_CACHE")
    if not chosen:
        import platformdirs

        return platformdirs.user_cache_path("diffusers-autotune", appauthor=False)
    try:
        return Path(chosen).expanduser()
    except RuntimeError as error:
        raise ProfileError(f"AUTOTUNE_CACHE is {chosen}: {error}", _FOLDER_HINT) from error


def _path(source: str | Path) -> Path:
    return profile_path(source) if isinstance(source, str) else source


def _decode(data: bytes, name: str) -> Profile:
    """Validate a file's content; ``name`` says in errors where it comes from."""
    try:
        version = msgspec.json.decode(data, type=_Header).schema_version
        if version <= SCHEMA_VERSION:
            return msgspec.json.decode(data, type=Profile)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProfileError(f"{name} is not a readable profile: {error}", MEASURE_HINT) from error
    raise ProfileError(
        f"{name} has profile schema {version}, and this version reads up to {SCHEMA_VERSION}",
        "update diffusers-autotune",
    )


def _encode(profile: Profile) -> bytes:
    """Indented JSON, proven to read back the same: JSON would turn a NaN into ``null``."""
    # The version is written always: defaults are omitted, and this one changes with every schema.
    fields = {"schema_version": profile.schema_version, **msgspec.to_builtins(profile)}
    try:
        data = msgspec.json.format(msgspec.json.encode(fields), indent=2) + b"\n"
    except ValueError as error:
        raise ProfileError(f"profile {profile.key!r} cannot be stored: {error}") from error
    if len(data) > MAX_FILE_BYTES or _decode(data, "the profile to store") != profile:
        raise ProfileError(
            f"profile {profile.key!r} cannot be stored and read back ({format_bytes(len(data))})",
            "a figure is not finite, a value has the wrong type, or it is too large",
        )
    return data


def _read_if_there(path: Path, key: str) -> Profile | None:
    if not os.path.lexists(path):
        return None
    profile = read_profile(path)
    if profile.key != key:
        raise ProfileError(f"{path} is the profile of {profile.key!r}, not of {key!r}")
    return profile


def _read_or_set_aside(path: Path, key: str) -> Profile | None:
    """As :func:`load_profile`, with the lock held."""
    try:
        return _read_if_there(path, key)
    except ProfileError as error:
        log.warning("%s; set aside as %s", error.message, _set_aside(path))
        return None


def _set_aside(path: Path) -> Path:
    now = datetime.now(timezone.utc)
    target = path.with_name(f"{path.name}.set-aside-{now:%Y%m%dT%H%M%S.%fZ}")
    try:
        return path.rename(target)
    except OSError as error:
        _raise_from(error, f"cannot set aside {path}")


def _stored(path: Path) -> StoredProfile:
    try:
        return StoredProfile(path=path, profile=read_profile(path))
    except ProfileError as error:
        return StoredProfile(path=path, problem=error.message)


def _store(profile: Profile) -> Profile:
    """Write the profile with its latest runs; the lock is held."""
    latest = msgspec.structs.replace(profile, runs=profile.runs[-MAX_RUNS:])
    _write(profile_path(profile.key), _encode(latest), "free some disk space, or " + _FOLDER_HINT)
    return latest


def _with_runs_of(profile: Profile, other: Profile | None) -> Profile:
    """``profile`` with the runs of both, oldest first, each once."""
    runs = dict.fromkeys((*(other.runs if other else ()), *profile.runs))
    return msgspec.structs.replace(profile, runs=tuple(sorted(runs, key=lambda run: run.at)))


def _write(path: Path, data: bytes, hint: str) -> None:
    """Replace ``path`` by ``data`` in one step: a reader sees the old file or the new one."""
    import tempfile

    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(".tmp", f".{path.name}.", path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        _discard(temporary)
        if isinstance(error, OSError):
            _raise_from(error, f"cannot write {path}", hint)
        raise


def _discard(temporary: str | None) -> None:
    if temporary is not None:
        with suppress(OSError):
            os.unlink(temporary)


@contextmanager
def _locked() -> Iterator[None]:
    """Hold the cache folder's lock: the operating system's, so a killed holder frees it.

    Raises:
        ProfileError: another process kept it for ``LOCK_TIMEOUT_S``, or it cannot be made.
    """
    import filelock

    folder = cache_folder()
    lock = filelock.FileLock(folder / ".lock", timeout=LOCK_TIMEOUT_S, mode=0o600)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise ProfileError(_holder(folder), "wait for it, or end it if it hangs") from error
    except OSError as error:
        _raise_from(error, f"cannot lock the cache folder {folder}")
    try:
        _tidy(folder)
        yield
    finally:
        lock.release()


def _tidy(folder: Path) -> None:
    """Say who holds the lock, and sweep what writers killed half-way left: only a holder writes."""
    with suppress(OSError):
        for orphan in folder.glob(f".*{_SUFFIX}.*.tmp"):
            orphan.unlink()
        (folder / ".lock-holder").write_text(str(os.getpid()))


def _holder(folder: Path) -> str:
    try:
        who = f"process {int((folder / '.lock-holder').read_text())}"
    except (OSError, ValueError):
        who = "another process"
    return f"{who} has held the lock {folder / '.lock'} for {LOCK_TIMEOUT_S:g} s"


def _raise_from(error: OSError, message: str, hint: str = _FOLDER_HINT) -> NoReturn:
    raise ProfileError(f"{message}: {error.strerror or error}", hint) from error
