"""Linear layers that are left as their file holds them, until they are quantized or needed.

safetensors maps files into memory: weights in the dtype of their file take no RAM. A denoiser that
is to be quantized is read so, whatever dtype it runs in. Each layer is cast when it is packed, and
what there is to go back to is in the file: a copy of all in the dtype that they run in never is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from autotune.optimizations.modules import denoisers, modules_of
from autotune.workload.live import RUNS_IN, runs_in

_PACKED = "_autotune_left_in_file"
"""Attribute of a packed layer that takes the place of one."""


def leave_in_file(layer: Any, dtype: Any) -> None:
    """Note that a layer has the dtype of its file, and is to be cast to another before it runs."""
    vars(layer)[RUNS_IN] = dtype


def is_in_file(layer: Any) -> bool:
    """Whether it was left as its file holds it."""
    return runs_in(layer) is not None


def note_packed(layer: Any) -> None:
    """Note that the layer takes the place of one that was left in its file."""
    vars(layer)[_PACKED] = True


def ordinary(layer: Any) -> Any:
    """The layer as an ordinary load would have made it; itself, where that has."""
    import torch

    if not is_in_file(layer):
        return layer
    made = copy.copy(layer)
    dtype = vars(made).pop(RUNS_IN)
    made._parameters = {
        name: p if p is None else torch.nn.Parameter(p.data.to(dtype), p.requires_grad)
        for name, p in layer._parameters.items()
    }
    return made


def read_from_files(pipe: Any) -> None:
    """Make ordinary layers of all that were left in their files: for good."""
    for module in denoisers(pipe):
        for parent, name, layer in list(_children(module)):
            if is_in_file(layer):
                setattr(parent, name, ordinary(layer))


def left_in_files(pipe: Any) -> tuple[str, ...]:
    """Denoisers whose linear layers are left in files, be they packed at the moment."""
    modules = {} if pipe is None else modules_of(pipe)
    return tuple(
        name
        for name, module in modules.items()
        if any(is_in_file(m) or _PACKED in vars(m) for m in module.modules())
    )


def _children(module: Any) -> Iterator[tuple[Any, str, Any]]:
    for parent in module.modules():
        for name, child in parent.named_children():
            yield parent, name, child
