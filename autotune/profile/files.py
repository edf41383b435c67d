"""The cache folder's files: where they are, read whole, replaced in one step, under a lock."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Final, NoReturn

from autotune.errors import ProfileError
from autotune.units import MIB, format_bytes

MAX_FILE_BYTES: Final = 64 * MIB
LOCK_TIMEOUT_S = 10.0
HUNG_TIMEOUT_S: Final = 0.2
"""For a lock that this process has waited for in vain: who kept it so long keeps it longer."""

# Distinctive, so that `clear` can delete nothing else where AUTOTUNE_CACHE names a shared folder.
SUFFIX: Final = ".profile.json"
FOLDER_HINT: Final = "set AUTOTUNE_CACHE to a folder that you can write"
MEASURE_HINT: Final = "`autotune probe` measures this machine and saves its profile"

_hung: set[Path] = set()
"""Folders whose lock was held for too long when this process last asked."""


def location() -> Path:
    """The cache folder's path, whether it is there or not.

    Raises:
        ProfileError: ``AUTOTUNE_CACHE`` names no path.
    """
    chosen = os.environ.get("AUTOTUNE_CACHE")
    if not chosen:
        import platformdirs

        return platformdirs.user_cache_path("diffusers-autotune", appauthor=False)
    try:
        return Path(chosen).expanduser()
    except RuntimeError as error:
        raise ProfileError(f"AUTOTUNE_CACHE is {chosen}: {error}", FOLDER_HINT) from error


def cache_folder() -> Path:
    """The folder of the profiles: ``AUTOTUNE_CACHE``, else the platform's cache folder.

    Made when missing, for its owner alone.

    Raises:
        ProfileError: it is no folder, or cannot be made or written.
    """
    folder = location()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ProfileError(f"the cache folder {folder} is not a folder", FOLDER_HINT) from error
    except OSError as error:
        raise_from(error, f"cannot make the cache folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ProfileError(f"the cache folder {folder} is not writable", FOLDER_HINT)
    return folder


def profile_path(key: str) -> Path:
    """Where the profile of ``key`` is, or would be.

    The hash tells apart keys with the same slug, also on file systems that ignore case, and keeps
    a key from spelling one of Windows's reserved names.
    """
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", key).strip(".-")[:80]
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return location() / f"{slug or 'machine'}-{digest}{SUFFIX}"


def read_bytes(path: Path) -> bytes:
    """A regular file's content; of anything else nothing is read, since a pipe may never end.

    Raises:
        ProfileError: it cannot be read, is no regular file, or is too large for a profile.
    """
    try:
        with open(path, "rb", opener=_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ProfileError(f"{path} is not a regular file", MEASURE_HINT)
            # All that may be read is allocated first, where memory may have run out.
            data = file.read(min(status.st_size, MAX_FILE_BYTES) + 1)
    except OSError as error:
        raise_from(error, f"cannot read {path}", MEASURE_HINT)
    if len(data) > MAX_FILE_BYTES:
        limit = format_bytes(MAX_FILE_BYTES)
        raise ProfileError(f"{path} is larger than {limit}: not a profile", MEASURE_HINT)
    return data


def _at_once(path: str, flags: int) -> int:
    """Opens without waiting for the other end of a pipe, where there are such pipes."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def replace_file(path: Path, data: bytes, hint: str, *, private: bool = True) -> None:
    """Replace ``path`` by ``data`` in one step: a reader sees the old file or the new one.

    Args:
        path: The file.
        data: Its new content.
        hint: What to do where that fails.
        private: Only the owner may read it; otherwise who may read any new file.

    Raises:
        ProfileError: it cannot be written; the file from before is intact.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    made = False
    try:
        descriptor = os.open(temporary, flags, 0o600 if private else 0o666)
        made = True
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if made:
            _discard(temporary)
        if isinstance(error, OSError):
            raise_from(error, f"cannot write {path}", hint)
        raise


def set_aside(path: Path) -> Path:
    """Rename a file that cannot be used, so that it is in nobody's way and not lost.

    Raises:
        ProfileError: it cannot be renamed.
    """
    now = datetime.now(timezone.utc)
    target = path.with_name(f"{path.name}.set-aside-{now:%Y%m%dT%H%M%S.%fZ}")
    try:
        return path.rename(target)
    except OSError as error:
        raise_from(error, f"cannot set aside {path}")


@contextmanager
def locked() -> Iterator[None]:
    """Hold the cache folder's lock: the operating system's, so a killed holder frees it.

    Raises:
        ProfileError: another process kept it for ``LOCK_TIMEOUT_S`` (or does so still, when asked
            for again: see ``HUNG_TIMEOUT_S``), or it cannot be made.
    """
    import filelock

    folder = cache_folder()
    timeout_s = HUNG_TIMEOUT_S if folder in _hung else LOCK_TIMEOUT_S
    lock = filelock.FileLock(folder / ".lock", timeout=timeout_s, mode=0o600)
    try:
        lock.acquire()
        _hung.discard(folder)
    except filelock.Timeout as error:
        _hung.add(folder)
        raise ProfileError(_holder(folder), "wait for it, or end it if it hangs") from error
    except OSError as error:
        raise_from(error, f"cannot lock the cache folder {folder}")
    except NotImplementedError as error:  # a network file system without locks
        raise ProfileError(f"the cache folder {folder} has no locks", FOLDER_HINT) from error
    try:
        _tidy(folder)
        yield
    finally:
        lock.release()


def raise_from(error: OSError, message: str, hint: str = FOLDER_HINT) -> NoReturn:
    """Say what could not be done, and why the operating system did not let us."""
    raise ProfileError(f"{message}: {error.strerror or error}", hint) from error


def _discard(temporary: Path) -> None:
    with suppress(OSError):
        temporary.unlink()


def _tidy(folder: Path) -> None:
    """Say who holds the lock, and sweep what writers killed half-way left: only a holder writes."""
    with suppress(OSError):
        for orphan in folder.glob(f".*{SUFFIX}.*.tmp"):
            orphan.unlink()
        (folder / ".lock-holder").write_text(str(os.getpid()))


def _holder(folder: Path) -> str:
    try:
        who = f"process {int((folder / '.lock-holder').read_text())}"
    except (OSError, ValueError):
        who = "another process"
    return f"{who} has held the lock {folder / '.lock'} for {LOCK_TIMEOUT_S:g} s"
