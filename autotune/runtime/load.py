"""Load a pipeline as a plan wants it: dtypes, and no full copy on a device that offloads."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from autotune.decide.plan import Plan
from autotune.errors import ModelError, first_line
from autotune.workload.architecture import Architecture

_AGAIN = "download the model again, or check that the folder is complete"


def load_pipeline(architecture: Architecture, plan: Plan) -> Any:
    """Read the weights into host RAM, in the dtypes that the plan was made for.

    Raises:
        ModelError: there are no weights, some are missing, or they cannot be read.
    """
    from diffusers import DiffusionPipeline

    weights = architecture.weights
    if weights is None:
        raise ModelError(f"{architecture.name} has no weights to load", "give a folder or a hub id")
    options = {_dtype_keyword(): _dtypes(architecture, plan.workload.dtype)}
    if architecture.variant and plan.workload.dtype != "float32":
        options["variant"] = architecture.variant
    with _made_up() as made_up:
        try:
            pipe = _read(DiffusionPipeline, weights, options)
        except Exception as error:  # diffusers, transformers and the hub raise all sorts
            raise ModelError(
                f"cannot load the weights of {weights}: {first_line(error)}", _AGAIN
            ) from error
    if made_up:
        raise ModelError(
            f"{weights} lacks weights of its {', '.join(made_up)}, which would be random", _AGAIN
        )
    _require_vocabularies(pipe, weights)
    return pipe


def _dtypes(architecture: Architecture, dtype: str) -> Any:
    """One dtype, or one for each component where some run in another than the rest."""
    import torch

    others = {n: c.dtype for n, c in architecture.components.items() if c.dtype not in ("", dtype)}
    if not others:
        return getattr(torch, dtype)
    return {name: getattr(torch, d) for name, d in {**others, "default": dtype}.items()}


class _MadeUp(logging.Filter):
    """Keeps the classes of modules that a library has filled with random weights.

    A file that lacks some is only worth a warning to diffusers and transformers, and pipelines do
    not hand on what ``output_loading_info`` returns.
    """

    def __init__(self, levels: dict[str, int]) -> None:
        super().__init__()
        self.classes: list[str] = []
        self._levels = levels

    def filter(self, record: logging.LogRecord) -> bool:
        text = re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage())
        if "newly initialized" not in text:
            return record.levelno >= self._levels[record.name]  # what was silenced stays so
        named = re.search(r"weights of (\w+) were|(\w+) LOAD REPORT", text)
        self.classes.append(next(filter(None, named.groups())) if named else "components")
        return False  # it becomes an error


_LOADERS = ("diffusers.models.modeling_utils", "transformers.modeling_utils")


@contextmanager
def _made_up() -> Iterator[list[str]]:
    """Classes whose weights are missing while loading inside, whatever the log levels are."""
    loggers = [logging.getLogger(name) for name in _LOADERS]
    watch = _MadeUp({logger.name: logger.getEffectiveLevel() for logger in loggers})
    own = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addFilter(watch)
        logger.setLevel(min(logger.getEffectiveLevel(), logging.WARNING))
    try:
        yield watch.classes
    finally:
        for logger, level in zip(loggers, own, strict=True):
            logger.removeFilter(watch)
            logger.setLevel(level)


def _require_vocabularies(pipe: Any, weights: str) -> None:
    """transformers 5 silently makes an empty tokenizer where the files of one are missing."""
    for name, part in pipe.components.items():
        special = getattr(part, "all_special_tokens", None)
        if special is not None and len(part) <= len(special):
            raise ModelError(f"{weights} has no vocabulary for its {name}", _AGAIN)


def _dtype_keyword() -> str:
    """``torch_dtype`` was renamed; older versions silently ignore the new name."""
    return "dtype" if Version(version("diffusers")) >= Version("0.42") else "torch_dtype"


def _read(cls: Any, weights: str, options: dict[str, Any]) -> Any:
    try:
        return cls.from_pretrained(weights, **options)
    except (OSError, ValueError) as error:
        if "variant" not in options or options["variant"] not in str(error):
            raise
        # Not every repository has the 16-bit variant: the full one is cast while loading.
        rest = {k: v for k, v in options.items() if k != "variant"}
        return cls.from_pretrained(weights, **rest)
