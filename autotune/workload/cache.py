"""Traces, kept on disk: the same model at the same size is not traced twice.

A file is named after everything that decides its content, so it can never be stale, only unused;
the oldest are removed when there are too many. Losing one costs a second. What runs code of the
user's own is traced each time: nothing says which version that is.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from autotune.errors import ProfileError
from autotune.probe.software import version_of
from autotune.profile.store import cache_folder
from autotune.workload.architecture import Architecture
from autotune.workload.files import InFiles, in_files
from autotune.workload.live import has_own_code
from autotune.workload.workload import Request, Workload

MAX_FILES, MAX_BYTES = 256, 128 << 20
"""SDXL's traces take a quarter of a megabyte, a video's with its tiles a few."""

_ABANDONED_S = 3600
"""A file that is still being written after an hour never will be finished."""


def workload_of(architecture: Architecture, request: Request, pipe: Any = None) -> Workload:
    """The workload from the cache, else traced now (which imports torch) and stored.

    Args:
        architecture: The model.
        request: A complete request.
        pipe: The loaded pipeline, where there is one.

    Raises:
        ModelError: the model cannot be traced.
        RequestError: its pipeline refuses the request.
    """
    workload = traced_before(architecture, request, pipe)
    if workload is not None:
        return workload
    from autotune.workload.phases import trace_workload

    workload = trace_workload(architecture, request, pipe)
    path = _path(architecture, request) if is_lasting(pipe) else None
    if path and (pipe is None or not _is_estimated(workload)):
        _write(path, workload)
    return _named(workload, architecture, pipe)


def traced_before(
    architecture: Architecture, request: Request, pipe: Any = None
) -> Workload | None:
    """The workload from the cache; ``None`` where it is not there, or nothing is kept."""
    path = _path(architecture, request) if is_lasting(pipe) else None
    workload = _read(path) if path else None
    return None if workload is None else _named(workload, architecture, pipe)


def _is_estimated(workload: Workload) -> bool:
    """Of a loaded pipeline it may be so for what its user did to it, which no file is named by."""
    return any(run.is_estimated for run in workload.runs)


def _named(workload: Workload, architecture: Architecture, pipe: Any) -> Workload:
    """What a trace does not depend on, and is not kept with it."""
    is_loaded = pipe is not None
    found = InFiles() if is_loaded else in_files(architecture, workload)
    return msgspec.structs.replace(
        workload,
        model=architecture.name,
        is_loaded=is_loaded,
        mapped=found.mapped,
        mappable=found.mappable,
    )


def is_lasting(pipe: Any) -> bool:
    """Whether what was found out of a pipeline will be true in the next process."""
    return pipe is None or not has_own_code(pipe)


def _path(architecture: Architecture, request: Request) -> Path | None:
    try:
        folder = cache_folder() / "traces"
        folder.mkdir(exist_ok=True)
    except (ProfileError, OSError):
        return None  # tracing works without a cache
    return folder / f"{origin_of(architecture, request)}.json"


def origin_of(architecture: Architecture, request: Request) -> str:
    """A digest of everything that decides how a request is traced."""
    parts = (
        architecture.pipeline,
        architecture.components,
        architecture.schedulers,
        architecture.tokenizers,
        architecture.options,
        request,
        _tracer(),
        *(version_of(p) or "" for p in ("torch", "diffusers", "transformers")),
    )
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()[:32]


@functools.cache
def _tracer() -> str:
    """A digest of the code that traces: another tracer would have traced otherwise."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> Workload | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Workload)
    except (OSError, msgspec.MsgspecError, RecursionError):
        return None


def _write(path: Path, workload: Workload) -> None:
    """Write and rename: a reader never sees half a file; a full disk costs the cache only."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.encode(workload))
        os.replace(temporary, path)
        _prune(path.parent)
    except OSError:
        Path(temporary).unlink(missing_ok=True)


def _prune(folder: Path) -> None:
    """Keep the newest; other processes may be doing the same."""
    found = []
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append((file.stat(), file))
    total = kept = 0
    for status, file in sorted(found, key=lambda f: f[0].st_mtime, reverse=True):
        if file.suffix == ".tmp":
            if status.st_mtime < time.time() - _ABANDONED_S:
                file.unlink(missing_ok=True)
            continue
        total, kept = total + status.st_size, kept + 1
        if kept > MAX_FILES or total > MAX_BYTES:
            file.unlink(missing_ok=True)
