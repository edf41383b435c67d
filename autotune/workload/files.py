"""What a model's files say of its weights before they are read: the dtype that they hold.

safetensors maps files into memory. Weights that run in the dtype of their file stay there: the
system drops such pages and reads them again as it likes, so that they take no RAM of the process.
Weights in another dtype are cast, which makes copies of all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from autotune.workload.architecture import Architecture
from autotune.workload.workload import Component, Workload

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_DTYPES = {b"F32": "float32", b"F16": "float16", b"BF16": "bfloat16", b"F64": "float64"}

_CAST_SHARE = 0.05
"""Weights that a library keeps wider than the rest are cast: more of them are not overlooked."""


class InFiles(NamedTuple):
    """Components by what their files hold: empty where nothing is known.

    Attributes:
        mapped: Those that stay mapped when they are read, since they run in the dtype there.
        mappable: Those that would, if they were read in the dtype there.
    """

    mapped: tuple[str, ...] = ()
    mappable: tuple[str, ...] = ()


def in_files(architecture: Architecture, workload: Workload) -> InFiles:
    """What need not take RAM of the weights that are to be read, where a machine maps files."""
    dtype = workload.request.dtype
    wanted = {n: c.dtype or dtype for n, c in architecture.components.items()}
    held = {c.name: file_dtype(architecture, c.name, dtype) for c in workload.components}
    mappable = tuple(c for c in workload.components if held[c.name])
    return InFiles(
        tuple(
            c.name
            for c in mappable
            if held[c.name] == wanted[c.name] and _is_of_one_width(c, wanted[c.name])
        ),
        tuple(c.name for c in mappable),
    )


def file_dtype(architecture: Architecture, component: str, dtype: str) -> str | None:
    """The dtype of all weights in a component's files, if it is one and they can be mapped.

    Args:
        architecture: Whose files are looked for on this disk; for those that are not here yet, it
            may know.
        component: Its name.
        dtype: That the pipeline runs in: the 16-bit variant is read for one of 16 bits only.
    """
    if component not in architecture.components:
        return None
    folder = _folder(architecture.weights)
    variant = architecture.variant if dtype != "float32" else None
    if folder is None or not _holds_weights(folder / component):
        return architecture.stored.get(component) if variant == architecture.variant else None
    found = _dtypes_in(folder / component, variant)
    return next(iter(found)) if len(found) == 1 and found <= {*_DTYPES.values()} else None


def _is_of_one_width(component: Component, dtype: str) -> bool:
    return component.weight_bytes <= (1 + _CAST_SHARE) * component.parameters * _BYTES[dtype]


def _folder(weights: str | None) -> Path | None:
    """Where the files are, if they are on this disk: a folder, or what the hub's cache has."""
    if weights is None:
        return None
    path = Path(weights).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub.constants import HF_HUB_CACHE

    kept = Path(HF_HUB_CACHE) / f"models--{weights.replace('/', '--')}"
    try:
        return kept / "snapshots" / (kept / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        return None


def _holds_weights(folder: Path) -> bool:
    """Whether there are any, be they pickled or links that lead nowhere."""
    try:
        return any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir())
    except OSError:
        return False


def _dtypes_in(folder: Path, variant: str | None) -> set[str]:
    """Of all weights in the files that diffusers and transformers would read and map."""
    marked = rf"(\.{re.escape(variant)})?" if variant else ""
    name = rf"(diffusion_pytorch_model|model){marked}(-\d+-of-\d+)?{marked}\.safetensors"
    found = [f for f in folder.glob("*.safetensors") if re.fullmatch(name, f.name)]
    if variant:  # without any, the full ones are read
        found = [f for f in found if f".{variant}" in f.name] or found
    try:
        return {dtype for file in found for dtype in _dtypes_of(file)}
    except OSError:
        return set()


def _dtypes_of(file: Path) -> Iterator[str]:
    """As its header says: a length of eight bytes, then JSON. Integers are no weights."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(min(length, 100_000_000))
    for code in set(re.findall(rb'"dtype"\s*:\s*"([A-Z0-9_]+)"', header)):
        if not re.fullmatch(rb"[IU]\d+|BOOL", code):
            yield _DTYPES.get(code, code.decode())  # one of eight bits is known by its code alone
