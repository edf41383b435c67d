"""How fast the disk with the model cache reads: what loading a model waits for."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from autotune.probe.machine import Figure
from autotune.units import MIB

_READ_BYTES = 256 * MIB
_SAMPLE_BYTES = 16 * MIB
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
        budget_s: When it is spent, what has been read is what counts.

    Returns:
        ``None`` where the page cache cannot be passed by (not Linux), or the disk not be used.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    try:
        with _large_file(folder or model_cache()) as descriptor:
            return _read_rate(descriptor, budget_s)
    except OSError:
        return None


def model_cache() -> Path:
    """The folder where the hub keeps what it downloads."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


@contextlib.contextmanager
def _large_file(folder: Path) -> Iterator[int]:
    """A descriptor of something large on the folder's disk."""
    found = _largest(folder)
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
        block = os.urandom(MIB)  # nothing that a file system could compress
        for _ in range(_WRITTEN_BYTES // MIB):
            file.write(block)
        os.fsync(file.fileno())  # pages not yet written cannot be dropped
        yield file.fileno()


def _largest(folder: Path) -> Path | None:
    """The largest of the first few thousand files, if it is large enough to tell a rate."""
    sizes: dict[Path, int] = {}
    for at, (parent, _, names) in enumerate(os.walk(folder)):
        for name in names:
            path = Path(parent, name)
            with contextlib.suppress(OSError):
                sizes[path] = 0 if path.is_symlink() else path.stat().st_size
        if at > _ENTRIES or len(sizes) > _ENTRIES:
            break
    largest = max(sizes, key=lambda path: sizes[path], default=None)
    return largest if largest is not None and sizes[largest] >= _LARGE_BYTES else None


def _read_rate(descriptor: int, budget_s: float) -> Figure | None:
    os.posix_fadvise(descriptor, 0, _READ_BYTES, os.POSIX_FADV_DONTNEED)
    buffer = memoryview(bytearray(_SAMPLE_BYTES))
    samples: list[float] = []
    deadline = time.perf_counter() + budget_s
    while len(samples) < _READ_BYTES // _SAMPLE_BYTES and time.perf_counter() < deadline:
        start, offset = time.perf_counter(), len(samples) * _SAMPLE_BYTES
        if _fill(descriptor, buffer, offset) < _SAMPLE_BYTES:
            break
        samples.append(_SAMPLE_BYTES / (time.perf_counter() - start))
    return Figure(statistics.median(samples), tuple(samples)) if samples else None


def _fill(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Bytes read into the buffer from an offset; fewer than it holds only at the file's end."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done
