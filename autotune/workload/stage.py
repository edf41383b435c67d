"""The stage of a rehearsal: a pipeline around modules without data, stand-ins for the rest."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autotune.errors import ModelError, first_line
from autotune.workload.architecture import Architecture, ComponentConfig
from autotune.workload.live import is_of_a_library
from autotune.workload.standins import (
    CLIP_PIXELS,
    StandInProcessor,
    StandInTokenizer,
    Unprocessed,
)


class RehearsalError(Exception):
    """This pipeline cannot be rehearsed, whatever the request."""


def pipeline_class(architecture: Architecture, pipe: Any = None) -> Any:
    """The class of the loaded pipeline, else diffusers' class of that name.

    Raises:
        ModelError: there is no such class.
    """
    import diffusers

    cls = getattr(diffusers, architecture.pipeline, None) if pipe is None else type(pipe)
    if cls is None:
        raise ModelError(
            f"{architecture.pipeline} is no pipeline of the installed diffusers",
            "upgrade diffusers, or load the pipeline yourself and call autotune.configure",
        )
    return cls


def meta_pipeline(
    architecture: Architecture, cls: Any, modules: dict[str, nn.Module], pipe: Any = None
) -> Any:
    """The pipeline around modules on the meta device, with stand-ins for what has no weights.

    Args:
        architecture: Names its schedulers, tokenizers and options.
        cls: Its class.
        modules: Pipeline attribute → module on the meta device.
        pipe: The loaded pipeline, where there is one: a class of the user's own is copied from it,
            since nobody knows what it keeps on itself.

    Raises:
        RehearsalError: the class does not take these parts.
    """
    try:
        with quiet():
            if pipe is None or is_of_a_library(cls):
                made = _on_cpu(cls)(**dict(constructor_parts(cls, architecture, modules, pipe)))
            else:
                made = _copied(pipe, architecture, modules)
    except Exception as error:  # the constructor of any pipeline
        raise RehearsalError(first_line(error)) from error
    if hasattr(made, "set_progress_bar_config"):
        made.set_progress_bar_config(disable=True)
    for name in ("image_processor", "video_processor", "mask_processor"):
        processor = getattr(made, name, None)
        for method in ("postprocess", "postprocess_video"):
            if hasattr(processor, method):
                setattr(processor, method, Unprocessed())
    return made


def _copied(pipe: Any, architecture: Architecture, modules: dict[str, nn.Module]) -> Any:
    """The loaded pipeline's own state, around other modules: neither learns of the other."""
    made = object.__new__(_on_cpu(type(pipe)))
    processors = {n: copy.copy(v) for n, v in vars(pipe).items() if n.endswith("_processor")}
    tokenizers = {n: StandInTokenizer(limit) for n, limit in architecture.tokenizers.items()}
    parts = processors | tokenizers | _schedulers(architecture, pipe) | modules
    vars(made).update(vars(pipe) | parts, _all_hooks=[])  # hooks would offload the real modules
    return made


def _schedulers(architecture: Architecture, pipe: Any) -> dict[str, Any]:
    if pipe is not None:
        return {n: copy.deepcopy(getattr(pipe, n)) for n in architecture.schedulers}
    return {n: make_scheduler(c) for n, c in architecture.schedulers.items()}


def _on_cpu(cls: Any) -> Any:
    """The class, run on the CPU although its modules are on the meta device."""
    cpu = property(lambda _: torch.device("cpu"))
    return type(
        cls.__name__,
        (cls,),
        {"device": cpu, "_execution_device": cpu, "__module__": cls.__module__},
    )


def constructor_parts(
    cls: Any, architecture: Architecture, modules: dict[str, nn.Module], pipe: Any = None
) -> Iterator[tuple[str, Any]]:
    """What a pipeline's constructor takes by name, as far as somebody knows it."""
    known = {**_schedulers(architecture, pipe), **architecture.options, **modules}
    looking = next((modules[n] for n in ("image_encoder", "safety_checker") if n in modules), None)
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in known:
            yield name, known[name]
        elif name == "requires_safety_checker":
            yield name, "safety_checker" in modules
        elif "tokenizer" in name:
            encoder = name.replace("tokenizer", "text_encoder")
            limit = architecture.tokenizers.get(name)
            if limit is not None or encoder in modules:
                yield name, StandInTokenizer(limit or _positions(modules.get(encoder)))
            else:
                yield name, None
        elif "processor" in name or "feature_extractor" in name:
            needed = looking is not None or parameter.default is parameter.empty
            yield name, StandInProcessor(_pixels(looking)) if needed else None
        elif parameter.default is parameter.empty:
            yield name, None


def _pixels(encoder: nn.Module | None) -> int:
    """Side of the images that an encoder looks at."""
    config = getattr(encoder, "config", None)
    found = getattr(getattr(config, "vision_config", config), "image_size", None)
    return found if isinstance(found, int) else CLIP_PIXELS


def _positions(encoder: nn.Module | None) -> int:
    config = getattr(encoder, "config", None)
    return int(getattr(config, "max_position_embeddings", 0) or 512)


def make_scheduler(component: ComponentConfig) -> Any:
    """A scheduler from its configuration.

    Raises:
        ModelError: the installed diffusers has no such class.
    """
    import diffusers

    cls = getattr(diffusers, component.class_name, None)
    if cls is None:
        raise ModelError(f"diffusers has no scheduler {component.class_name}", "upgrade diffusers")
    with quiet():
        return cls.from_config(component.config)


@contextmanager
def quiet() -> Iterator[None]:
    """A rehearsal's warnings are about stand-ins."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
