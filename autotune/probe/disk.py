"""How fast the disk with the model cache reads: what loading a model waits for."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from autotune.probe.deadline import Deadline
from autotune.probe.machine import Figure
from autotune.probe.samples import flagged
from autotune.units import MIB

_READ_BYTES = 256 * MIB
_SAMPLE_BYTES = 4 * MIB  # so few that a slow disk, too, reads them before the time is up
_BUDGET_S = 0.5
_WRITTEN_BYTES = 64 * MIB  # where the cache has no large file yet
_LARGE_BYTES = 64 * MIB
_ENTRIES = 2000  # of the cache folder looked at


def measure_disk(folder: Path | None = None, budget_s: float = _BUDGET_S) -> Figure | None:
    """Bytes per second of reading a large file of the model cache, past the page cache.

    Reads the start of the largest file there, or of a nameless temporary one where there is none:
    at most 256 MiB, at most ``budget_s``.

    Args:
        folder: The model cache; by default the hub's. Its nearest parent stands in for one that
            does not exist.
        budget_s: Seconds. Half of them, at most, go into finding or writing a file; when all are
            spent, what has been read is what counts.

    Returns:
        ``None`` where the page cache cannot be passed by (not Linux), or the disk not be used.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    deadline = Deadline(budget_s)
    try:
        with _large_file(folder or model_cache(), deadline.part(budget_s / 2)) as descriptor:
            return _read_rate(descriptor, deadline)
    except OSError:
        return None


def model_cache() -> Path:
    """The folder where the hub keeps what it downloads."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


@contextlib.contextmanager
def _large_file(folder: Path, deadline: Deadline) -> Iterator[int]:
    """A descriptor of something large on the folder's disk."""
    found = _largest(folder, deadline)
    if found is not None:
        descriptor = os.open(found, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
        return
    existing = next(part for part in (folder, *folder.absolute().parents) if part.is_dir())
    if shutil.disk_usage(existing).free < 10 * _WRITTEN_BYTES:
        raise OSError("the disk is nearly full")
    with tempfile.TemporaryFile(dir=existing, buffering=0) as file:  # has no name to be left behind
        _write(file, deadline)
        yield file.fileno()


def _write(file: IO[bytes], deadline: Deadline) -> None:
    """Writes through to the disk: pages not yet written cannot be dropped."""
    block = os.urandom(MIB)  # nothing that a file system could compress
    for _ in range(0, _WRITTEN_BYTES, _SAMPLE_BYTES):
        if deadline.has_passed:
            return
        for _ in range(_SAMPLE_BYTES // MIB):
            file.write(block)
        os.fsync(file.fileno())


def _largest(folder: Path, deadline: Deadline) -> Path | None:
    """The largest of the first few thousand files, if it is large enough to tell a rate."""
    found, largest = None, _LARGE_BYTES - 1
    for path in itertools.islice(_files(folder), _ENTRIES):
        if deadline.has_passed:
            break
        with contextlib.suppress(OSError):
            size = path.stat().st_size
            if size > largest and not path.is_symlink():
                found, largest = path, size
    return found


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)


def _read_rate(descriptor: int, deadline: Deadline) -> Figure | None:
    os.posix_fadvise(descriptor, 0, _READ_BYTES, os.POSIX_FADV_DONTNEED)
    buffer = memoryview(bytearray(_SAMPLE_BYTES))
    samples: list[float] = []
    while len(samples) < _READ_BYTES // _SAMPLE_BYTES and not deadline.has_passed:
        start, offset = time.perf_counter(), len(samples) * _SAMPLE_BYTES
        if _fill(descriptor, buffer, offset) < _SAMPLE_BYTES:
            break
        samples.append(_SAMPLE_BYTES / (time.perf_counter() - start))
    return flagged(samples) if samples else None


def _fill(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Bytes read into the buffer from an offset; fewer than it holds only at the file's end."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done
