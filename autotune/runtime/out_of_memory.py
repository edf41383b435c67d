"""Telling out-of-memory from other errors, in all the forms it comes in, and letting go of it.

Libraries do not agree on a type: PyTorch's allocators have one, cuDNN, cuBLAS and their kin raise
plain ``RuntimeError``s. Some of those also stand for other faults, and mean memory only where there
is hardly any left.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

from autotune.errors import first_line
from autotune.workload.live import modules_of
from autotune.workload.workload import Workload

log = logging.getLogger("autotune")

_DEVICE_FORMS = (
    "cuda out of memory",
    "cuda error: out of memory",
    "cuda driver error: out of memory",
    "triton error [cuda]: out of memory",
    "cudaerrormemoryallocation",
    "hip out of memory",
    "hip error: out of memory",
    "triton error [hip]: out of memory",
    "hiperroroutofmemory",
    "xpu out of memory",
    "ur_result_error_out_of_device_memory",
    "pi_error_mem_object_allocation_failure",
    "mps backend out of memory",
    "kiogpucommandbuffercallbackerroroutofmemory",
    "invalid buffer size",  # of MPS: one tensor larger than the largest buffer
    "alloc_failed",  # CUDNN_STATUS_, CUBLAS_STATUS_, CUSOLVER_STATUS_, CUFFT_, HIPBLAS_STATUS_
    "device_allocation_failed",
    "host_allocation_failed",
    "rocblas_status_memory_error",
    "miopenstatusallocfailed",
)
"""What errors say, in lower case."""

_AMBIGUOUS_FORMS = (
    "cudnn_status_not_supported",
    "cudnn_status_not_initialized",
    "cudnn_status_internal_error",
    "cudnn_status_execution_failed",
    "cublas_status_not_initialized",
    "cublas_status_execution_failed",
    "unable to find an engine",
    "no valid execution plans",
    "ur_result_error_out_of_resources",
)
"""Handles, engines and algorithms that could not be had: because of memory where it is scarce."""

_HOST_FORMS = (
    "defaultcpuallocator",
    "std::bad_alloc",
    "bad allocation",
    "cannot allocate memory",
    "ur_result_error_out_of_host_memory",
    "unable to mmap",
    "could not create a memory",  # oneDNN
)


class Failure(NamedTuple):
    """What is known of an error once its memory has been let go.

    Attributes:
        text: The error's first line.
        phase: In which phase of the generation, as far as is known.
        of_host: Whether it was host RAM that ran out.
        room_bytes: Of the device, what this process had or could have had then. Others may have
            left since. ``None`` where PyTorch does not tell.
    """

    text: str
    phase: str | None
    of_host: bool
    room_bytes: int | None = None


def is_out_of_memory(error: BaseException, is_scarce: bool = False) -> bool:
    """Whether an error, or one that it came of, says that memory ran out.

    Args:
        error: As caught.
        is_scarce: Hardly any memory is left: then what may mean it does.
    """
    return any(_says_so(e, is_scarce) for e in _chain(error))


def is_of_host(error: BaseException) -> bool:
    """Whether it is host RAM that ran out."""
    return any(_is_of_host(e) for e in _chain(error))


def failure_of(error: BaseException, pipe: Any, workload: Workload) -> Failure:
    """What to say about it. Lets go of the frames that it passed through: they hold tensors.

    Clearing them would not do: what a function's closure holds stays.
    """
    log.debug("%s", "".join(traceback.format_exception(error)).rstrip())
    cause = next((e for e in _chain(error) if _says_so(e, is_scarce=True)), error)
    failure = Failure(_short(cause), _phase_of(error, pipe, workload), is_of_host(error))
    for e in _chain(error, suppressed=True):
        e.__traceback__ = None
    return failure


def _says_so(error: BaseException, is_scarce: bool) -> bool:
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    if any(form in text for form in (*_DEVICE_FORMS, *_HOST_FORMS)):
        return True
    if any(form in text for form in _AMBIGUOUS_FORMS):
        return is_scarce
    return bool(should_reduce_batch_size(error))


def _is_of_host(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(form in text for form in _HOST_FORMS)


def _chain(error: BaseException, suppressed: bool = False) -> Iterator[BaseException]:
    """The error and what it came of, each once.

    Args:
        error: As caught.
        suppressed: Also what was raised over ``from None``: it is not the cause, and is held.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        e = waiting.pop(0)
        if e is None or id(e) in seen:
            continue
        seen.add(id(e))
        yield e
        is_seen = suppressed or not e.__suppress_context__
        waiting += [e.__cause__, e.__context__ if is_seen else None]


_LONGEST = 120
"""CUDA's errors go on about fragmentation for half a page."""


def _short(error: BaseException) -> str:
    text = first_line(error)
    tried = text.find(". ", text.lower().find("tried to allocate"))
    if 0 <= tried < _LONGEST:
        return text[: tried + 1]
    return text if len(text) <= _LONGEST else text[:_LONGEST].rstrip() + "…"


def _phase_of(error: BaseException, pipe: Any, workload: Workload) -> str | None:
    """The phase of the component that the error came from, the outermost one."""
    phases = {(r.component, r.entry): p.name for p in workload.phases for r in p.runs}
    entered = list(_entered(error, pipe))
    component = entered[0][0] if entered else None
    # Hooks and decorators come before the method: an autoencoder's may be of two phases.
    known = (phases[entry] for entry in entered if entry[0] == component and entry in phases)
    return next(known, None) or next((p for (c, _), p in phases.items() if c == component), None)


def _entered(error: BaseException, pipe: Any) -> Iterator[tuple[str, str]]:
    """Component and function of each frame of a component that the error passed, outermost first.

    What is on a module itself is told by the name under which hooks have it.
    """
    names = {id(m): name for name, m in modules_of(pipe).items()}
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for variable in ("self", "module"):
            component = names.get(id(frame.f_locals.get(variable)))
            if component is not None:
                yield component, frame.f_code.co_name


def free_memory(pipe: Any) -> None:
    """Give back what an interrupted call has left behind: tensors, caches, weights out of place.

    What its exception holds must have been let go before: see ``failure_of``.
    """
    from accelerate.utils.memory import clear_device_cache

    with contextlib.suppress(Exception):  # of any pipeline; what it could not do, undoing does
        pipe.maybe_free_model_hooks()
    for module in modules_of(pipe).values():
        with contextlib.suppress(Exception):  # what a video's decode keeps from frame to frame
            module.clear_cache()
    clear_device_cache(garbage_collection=True)
