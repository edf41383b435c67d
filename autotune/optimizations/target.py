"""What an optimization's lines of code are written for."""

from __future__ import annotations

from typing import NamedTuple

from autotune.workload.architecture import ComponentConfig

LOADING = "from_pretrained: "
"""How lines begin that are arguments of ``from_pretrained``."""

BEFORE_IMAGE = "before_image: "
"""How lines begin that are to be run before each image."""


class Target(NamedTuple):
    """A pipeline and its device, as a plan knows them; in the lines, it is called ``pipe``.

    Attributes:
        pipeline: Class name in diffusers.
        model: What the user called it.
        dtype: ``"float16"``, that it runs in.
        device_index: CUDA's, of the device.
        encoders: Attributes of the pipeline; likewise ``denoisers`` and ``autoencoders``.
        components: Attribute → class and configuration; empty where the model cannot be read.
    """

    pipeline: str
    model: str
    dtype: str
    device_index: int = 0
    encoders: tuple[str, ...] = ()
    denoisers: tuple[str, ...] = ()
    autoencoders: tuple[str, ...] = ()
    components: dict[str, ComponentConfig] = {}


def listed(names: tuple[str, ...]) -> str:
    """``("vae",)`` → ``"pipe.vae"``; several in a row."""
    return ", ".join(f"pipe.{name}" for name in names)
