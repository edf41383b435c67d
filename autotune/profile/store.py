"""The profile files: one JSON file per machine in the user's cache folder.

Files are validated when read, replaced atomically under a lock when written, and set aside, never
deleted, when they cannot be understood.
"""

from __future__ import annotations

import functools
import glob
import logging
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from autotune.errors import ProfileError
from autotune.probe.machine import Value
from autotune.profile.coding import decode, encode
from autotune.profile.files import (
    FOLDER_HINT,
    MEASURE_HINT,
    SUFFIX,
    cache_folder,
    location,
    locked,
    profile_path,
    raise_from,
    read_bytes,
    replace_file,
    set_aside,
)
from autotune.profile.merging import bounded
from autotune.profile.profile import Profile

__all__ = [
    "MEASURE_HINT",
    "StoredProfile",
    "cache_folder",
    "clear_profiles",
    "export_profile",
    "exported",
    "list_profiles",
    "load_profile",
    "profile_files",
    "profile_path",
    "read_profile",
    "save_profile",
    "update_profile",
    "updated_if_possible",
]

log = logging.getLogger("autotune")


class StoredProfile(Value, frozen=True):
    """A file of the cache folder: its profile, or the problem that keeps it from being read."""

    path: Path
    profile: Profile | None = None
    problem: str | None = None


def load_profile(key: str) -> Profile | None:
    """The profile of ``key``; ``None`` means: measure this machine.

    One of an older schema is upgraded. A file that cannot be used (corrupt, from a newer version,
    another machine's) is set aside with a warning. A folder that can only be read is good enough.
    """
    path = profile_path(key)
    try:
        return _read_if_there(path, key)
    except ProfileError as error:
        problem = error.message
    try:
        with locked():
            return _read_or_set_aside(path, key)
    except ProfileError as error:
        log.warning("%s; it could not be set aside: %s", problem, error)
        return None


def read_profile(path: Path) -> Profile:
    """Read and validate one profile file, upgraded where its schema is an older one.

    Raises:
        ProfileError: it cannot be read, is too large, is no profile, or is of a newer version.
    """
    return decode(read_bytes(path), str(path))


def save_profile(profile: Profile) -> None:
    """Write ``profile`` in the place of the one that has its key, with its latest records.

    To change a stored profile use :func:`update_profile`, which loses no other writer's change.

    Raises:
        ProfileError: it cannot be written; the file from before is intact.
    """
    with locked():
        _store(profile)


def update_profile(key: str, change: Callable[[Profile | None], Profile]) -> Profile:
    """Read, change and write the profile of ``key`` with no other writer in between.

    Args:
        key: The profile's key.
        change: From the stored profile (``None``: there is none that can be read) to the new one.
            It runs under the lock: keep it quick, and call nothing of this module in it. Those of
            ``merging`` add to a profile.

    Returns:
        The profile as stored: of runs, plans and misfits the latest, a share for every workload.

    Raises:
        ProfileError: it cannot be written; the file from before is intact.
        ValueError: ``change`` returned the profile of another key.
    """
    with locked():
        profile = change(_read_or_set_aside(profile_path(key), key))
        if profile.key != key:
            raise ValueError(f"the change of {key!r} returned the profile of {profile.key!r}")
        return _store(profile)


def updated_if_possible(key: str, change: Callable[[Profile | None], Profile]) -> Profile | None:
    """The same where remembering is a convenience: a read-only folder or a full disk is no failure.

    Returns:
        ``None`` where it could not be stored, which is said in a warning.
    """
    try:
        return update_profile(key, change)
    except ProfileError as error:
        _warn_once(f"what was found out about this machine is not remembered: {error}")
        return None


@functools.cache
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def list_profiles() -> tuple[StoredProfile, ...]:
    """Every profile file of the cache folder, readable or not, by file name."""
    return tuple(_stored(path) for path in sorted(location().glob(f"*{SUFFIX}")))


def profile_files(source: str | Path | None = None) -> tuple[Path, ...]:
    """The file of a key or path (or all), with those set aside from it: what clearing deletes."""
    name = f"*{SUFFIX}" if source is None else glob.escape(_path(source).name)
    folder = location()
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
    with locked():
        paths = profile_files(source)
        try:
            for path in paths:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise_from(error, f"cannot delete {path}")
    return paths


def export_profile(source: str | Path, file: Path) -> Profile:
    """Write the profile of a key (or of a profile file's path) to ``file``, for anybody to read.

    Raises:
        ProfileError: there is no such profile, or ``file`` cannot be written.
    """
    profile, data = exported(source)
    target = file.resolve()
    if target.exists() and not target.is_file():
        raise ProfileError(f"{file} is not a regular file", "name a file to write")
    replace_file(target, data, "name a file that you can write", private=False)
    return profile


def exported(source: str | Path) -> tuple[Profile, bytes]:
    """The profile of a key (or of a profile file's path) as it leaves this machine, and its bytes.

    Which processes held memory stays here.

    Raises:
        ProfileError: there is no such profile.
    """
    path = _path(source)
    if not path.exists():
        raise ProfileError(f"no profile of {source} to export", MEASURE_HINT)
    profile = _without_processes(read_profile(path))
    return profile, encode(profile)


def _without_processes(profile: Profile) -> Profile:
    device = msgspec.structs.replace(profile.machine.device, processes=())
    machine = msgspec.structs.replace(profile.machine, device=device)
    return msgspec.structs.replace(profile, machine=machine)


def _path(source: str | Path) -> Path:
    return profile_path(source) if isinstance(source, str) else source


def _read_if_there(path: Path, key: str) -> Profile | None:
    if not os.path.lexists(path):
        return None
    profile = _read_once(path, _identity(path))
    if profile.key != key:
        raise ProfileError(f"{path} is the profile of {profile.key!r}, not of {key!r}")
    return profile


@functools.lru_cache(maxsize=4)
def _read_once(path: Path, identity: tuple[int, ...] | None) -> Profile:
    """As ``read_profile``; a program asks for the same profile several times when it starts."""
    return read_profile(path)


def _identity(path: Path) -> tuple[int, ...] | None:
    """What is another after any change: files are replaced, never written in place."""
    try:
        status = path.stat()
    except OSError:
        return None  # a dangling link, or no permission: reading says so
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read_or_set_aside(path: Path, key: str) -> Profile | None:
    """As :func:`load_profile`, with the lock held."""
    try:
        return _read_if_there(path, key)
    except ProfileError as error:
        log.warning("%s; set aside as %s", error.message, set_aside(path))
        return None


def _stored(path: Path) -> StoredProfile:
    try:
        return StoredProfile(path=path, profile=read_profile(path))
    except ProfileError as error:
        return StoredProfile(path=path, problem=error.message)


def _store(profile: Profile) -> Profile:
    """Write the profile with its latest records; the lock is held."""
    kept = bounded(profile)
    hint = f"free some disk space, or {FOLDER_HINT}"
    replace_file(profile_path(profile.key), encode(kept), hint)
    return kept
