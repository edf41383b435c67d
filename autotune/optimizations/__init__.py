"""The catalogue: every optimization, one file per family, and those of other packages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from autotune.errors import OptimizationError
from autotune.optimizations.attention import AttentionSlicing, XFormers
from autotune.optimizations.backends import AttentionBackend, SageAttention
from autotune.optimizations.base import Optimization, Setting
from autotune.optimizations.casting import LayerwiseCasting
from autotune.optimizations.compilation import Compile
from autotune.optimizations.device_map import ComponentsOnGpus
from autotune.optimizations.execution import Execution
from autotune.optimizations.group_offload import GroupCpuOffload
from autotune.optimizations.memory_format import ChannelsLast
from autotune.optimizations.offload import ModelCpuOffload, SequentialCpuOffload, TextEncoderOffload
from autotune.optimizations.plugins import Catalogue
from autotune.optimizations.projections import FuseQkv
from autotune.optimizations.quantization import Quantization
from autotune.optimizations.step_caches import (
    FasterCache,
    FirstBlockCache,
    PyramidAttentionBroadcast,
    TaylorSeerCache,
)
from autotune.optimizations.tiny_autoencoder import TinyAutoencoder
from autotune.optimizations.tome import ToMe
from autotune.optimizations.vae import VaeBfloat16, VaeSlicing, VaeTiling

CATALOGUE = Catalogue(
    (
        XFormers(),
        AttentionSlicing(),
        AttentionBackend(),
        SageAttention(),
        ComponentsOnGpus(),
        TextEncoderOffload(),
        ModelCpuOffload(),
        SequentialCpuOffload(),
        GroupCpuOffload(),
        FuseQkv(),
        Quantization(),
        LayerwiseCasting(),
        ToMe(),
        FirstBlockCache(),
        TaylorSeerCache(),
        PyramidAttentionBroadcast(),
        FasterCache(),
        VaeSlicing(),
        VaeTiling(),
        VaeBfloat16(),
        TinyAutoencoder(),
        ChannelsLast(),
        Compile(),
    )
)
"""Name → handler, in the order in which people read them."""

CLASSIC = ("xformers", "attention_slicing", "model_cpu_offload", "sequential_cpu_offload", "tome")
"""The five that every guide names."""


def find(name: str) -> Optimization:
    """The optimization of that name.

    Raises:
        OptimizationError: there is none; the message names the closest.
    """
    if name in CATALOGUE:
        return CATALOGUE[name]
    close = difflib.get_close_matches(name, CATALOGUE, n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    raise OptimizationError(
        f"unknown optimization {name!r}", f"{guess}known: {', '.join(CATALOGUE)}"
    )


def parse_setting(text: str) -> Setting:
    """``"tome:ratio=0.3,max_downsample=2"`` → a checked ``Setting`` with every parameter.

    Several parameters may also be separated by ``:``, since ``,`` separates optimizations in lists.

    Raises:
        OptimizationError: the name or a parameter is unknown, or a value is out of range.
    """
    name, _, rest = text.strip().partition(":")
    pairs = [p for p in rest.replace(",", ":").split(":") if p]
    parameters = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise OptimizationError(
                f"cannot read {pair!r} in {text!r}", "write it like tome:ratio=0.3"
            )
        parameters[key.strip()] = value.strip()
    return find(name).setting(dict(parameters))


def parse_settings(text: str) -> tuple[Setting, ...]:
    """A comma-separated list; ``key=value`` items belong to the optimization before them.

    Raises:
        OptimizationError: as ``parse_setting``, or an optimization is named twice.
    """
    items: list[str] = []
    for item in filter(None, (i.strip() for i in text.split(","))):
        is_parameter = "=" in item and ":" not in item and items
        if is_parameter:
            items[-1] += f":{item}"
        else:
            items.append(item)
    settings = tuple(parse_setting(i) for i in items)
    names = [s.name for s in settings]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice:
        raise OptimizationError(f"{twice} is named twice", "give each optimization once")
    return settings


def execution_of(settings: Iterable[Setting], base: Execution | None = None) -> Execution:
    """The execution that a set of optimizations amounts to, on top of another.

    Raises:
        OptimizationError: an optimization is unknown.
    """
    execution = base or Execution()
    for setting in settings:
        execution = find(setting.name).configure(execution, setting.parameters)
    return execution
