"""Workloads of the small pipelines: each is traced once in a run of the tests."""

from __future__ import annotations

import functools
import platform
from typing import Any

import msgspec

from autotune.probe.software import installed_versions, maps_files
from autotune.testing.pipelines import BUILDERS, arguments
from autotune.workload.architecture import describe_pipeline
from autotune.workload.phases import trace_workload
from autotune.workload.workload import Request, Workload

SIZES = ("height", "width", "num_frames", "guidance_scale", "true_cfg_scale")
"""Arguments that a request has names of its own for."""

FEW_FRAMES = 5
"""Of a video: the fewest that every kind draws."""

ONE_OF_EACH_AUTOENCODER = (
    "sd-img2img", "sana", "qwen-image", "cogvideox", "ltx-video", "wan", "hunyuanvideo", "svd",
)  # fmt: skip


def numbers_of(pipe: Any) -> dict[str, bool | int | float]:
    """The arguments of a small call that are neither texts nor pictures."""
    given = arguments(pipe).items()
    return {k: v for k, v in given if isinstance(v, (bool, int, float))}


def few_frames(pipe: Any) -> dict[str, int]:
    """As an argument, for pipelines that draw videos."""
    return {"num_frames": FEW_FRAMES} if "num_frames" in arguments(pipe) else {}


def maps_files_here() -> bool:
    """Whether the libraries that are installed here are known to map weights."""
    return maps_files(platform.system(), installed_versions())


@functools.cache
def workload_of(kind: str) -> Workload:
    """Of ``BUILDERS[kind]()``, in float32.

    Decodes in parts take longest to trace: two images of 128 x 128, which tiles cut, are asked for
    where the autoencoder is another; of the rest, one of 64 x 64.
    """
    pipe = BUILDERS[kind]()
    side, batch = (128, 2) if kind in ONE_OF_EACH_AUTOENCODER else (64, 1)
    frames = few_frames(pipe).get("num_frames", 1)
    options = {k: v for k, v in numbers_of(pipe).items() if k not in SIZES}
    request = Request(side, side, batch, 2, 5.0, "float32", frames, options)
    return trace_workload(describe_pipeline(pipe), request)


def all_cast(workload: Workload) -> Workload:
    """The workload as if nothing of its files could stay mapped."""
    return msgspec.structs.replace(workload, mapped=(), mappable=())
