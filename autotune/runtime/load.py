"""Load a pipeline as a plan wants it: in its dtypes, with no copy of what is to be quantized."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import Version

from autotune.decide.plan import Plan
from autotune.errors import ModelError, first_line
from autotune.optimizations.file_layers import leave_in_file
from autotune.optimizations.quantization import linear_layers
from autotune.workload.architecture import Architecture
from autotune.workload.files import file_dtype

log = logging.getLogger("autotune")

_AGAIN = "download the model again, or check that the folder is complete"


def load_pipeline(architecture: Architecture, plan: Plan, maps_files: bool = False) -> Any:
    """Read the weights into host RAM, in the dtypes that the plan was made for.

    Linear layers that the plan quantizes are left as their files hold them, where those are mapped:
    the pipeline cannot run before the plan is applied, or ``read_from_files`` has made them as they
    would have been read.

    Args:
        architecture: With weights.
        plan: For it.
        maps_files: Whether weights stay mapped from their files here: what the plan was made for
            (``Machine.maps_files``).

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
            apart = dict(_read_apart(architecture, plan, weights, options)) if maps_files else {}
            pipe = _read(DiffusionPipeline, weights, options | apart)
            if any(getattr(pipe, name, None) is not module for name, module in apart.items()):
                pipe = _read(DiffusionPipeline, weights, options)  # its constructor makes others
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
    others = {n: c.dtype for n, c in architecture.components.items() if c.dtype not in ("", dtype)}
    if not others:
        return _dtype(dtype)
    return {name: _dtype(d) for name, d in {**others, "default": dtype}.items()}


# ---- what is to be quantized ---------------------------------------------------------------------


def _read_apart(
    architecture: Architecture, plan: Plan, weights: str, options: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Denoisers that the plan quantizes, their linear layers as the files hold them.

    Those that cannot be read so, such as quantized ones, are left to an ordinary load.
    """
    import diffusers

    scheme, usual = plan.execution.quantization, plan.workload.dtype
    if not scheme:
        return
    folder = _downloaded(weights, options)
    for name in plan.workload.denoisers:
        component = architecture.components.get(name)
        held = file_dtype(architecture, name, usual)
        cls = component and getattr(diffusers, component.class_name, None)
        if component is None or cls is None or held is None:
            continue
        as_held = {**options, _dtype_keyword(): _dtype(held)}
        try:
            read = _read(cls, str(folder / name), as_held)
            made = _left_in_file(read, _dtype(component.dtype or usual), scheme)
        except Exception as error:  # of diffusers, or of a class that is built in another way
            log.warning(
                "%s cannot be left in its files and is read whole, which may take more RAM: %s",
                name,
                first_line(error),
            )
        else:
            yield name, made


def _downloaded(weights: str, options: dict[str, Any]) -> Path:
    """Where the files are, which say what they hold only once they are here."""
    from diffusers import DiffusionPipeline

    if Path(weights).is_dir():
        return Path(weights)
    variant = options.get("variant")
    return Path(_with_variant(DiffusionPipeline.download, weights, {"variant": variant}))


def _left_in_file(read: Any, dtype: Any, scheme: str) -> Any:
    """A denoiser as read in ``dtype``, but for the linear layers that are to be quantized.

    Args:
        read: The same, read in the dtype of its file.
        dtype: That it runs in; it decides in what buffers are made that no file holds.
        scheme: What will be quantized.
    """
    from accelerate import init_empty_weights

    from autotune.workload.components import default_dtype, kept_in_float32

    with default_dtype(dtype), init_empty_weights():
        made = type(read).from_config(read.config)
    kept = kept_in_float32(made, dtype)
    left = {getattr(*place) for place in linear_layers(made, scheme)}
    paths = {path: layer for path, layer in made.named_modules() if layer in left}
    tensors = read.state_dict()
    for path, tensor in tensors.items():
        runs_in = dtype if kept.isdisjoint(path.split(".")) else _dtype("float32")
        layer = paths.get(path.rpartition(".")[0])
        if layer is not None:
            leave_in_file(layer, runs_in)
        elif tensor.is_floating_point():
            tensors[path] = tensor.to(runs_in)
    made.load_state_dict(tensors, assign=True)
    made.register_to_config(_name_or_path=read.config["_name_or_path"])
    return made.eval()


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


# ---- what is missing -----------------------------------------------------------------------------


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
    return _with_variant(cls.from_pretrained, weights, options)


def _with_variant(call: Any, weights: str, options: dict[str, Any]) -> Any:
    try:
        return call(weights, **options)
    except (OSError, ValueError) as error:
        if not options.get("variant") or options["variant"] not in str(error):
            raise
        # Not every repository has the 16-bit variant: the full one is cast while loading.
        rest = {k: v for k, v in options.items() if k != "variant"}
        return call(weights, **rest)
