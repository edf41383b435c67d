"""What is proposed where nothing fits: of the same shape, and within reason."""

from __future__ import annotations

import msgspec
import pytest

from autotune.decide.changes import (
    fewer_frames_at_once,
    lifting,
    said_of_memory,
    shorter,
    smaller,
)
from autotune.decide.limits import Limits
from autotune.probe.machine import Machine
from autotune.units import GIB
from autotune.workload.workload import Request

VIDEO = Request(576, 1024, 1, 25, 3.0, "float16", frames=25)


def sizes(width: int, height: int) -> list[tuple[object, object]]:
    request = msgspec.structs.replace(VIDEO, width=width, height=height)
    return [(step.change["width"], step.change["height"]) for step in smaller(request)]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), [(768, 768), (512, 512)]),
        ((1536, 1024), [(1152, 768), (768, 512)]),
        ((1024, 576), [(704, 384), (576, 320)]),
        ((1280, 720), [(1024, 576), (576, 320)]),
        ((128, 64), []),
    ],
)
def test_smaller_pictures_have_the_same_shape(size, expected):
    assert sizes(*size) == expected


@pytest.mark.parametrize(("frames", "expected"), [(81, [41, 17]), (25, [9]), (9, []), (1, [])])
def test_a_shorter_video_is_still_a_video(frames, expected):
    steps = shorter(msgspec.structs.replace(VIDEO, frames=frames))
    assert [step.change["frames"] for step in steps] == expected


def test_a_video_is_decoded_in_parts_where_the_pipeline_can():
    at_once = msgspec.structs.replace(VIDEO, options={"decode_chunk_size": 4, "fps": 7})
    pipeline = "StableVideoDiffusionPipeline"
    assert [s.what for s in fewer_frames_at_once(VIDEO, pipeline)] == [
        "decode_chunk_size=8",
        "decode_chunk_size=2",
    ]
    (step,) = fewer_frames_at_once(at_once, pipeline)
    assert step.change == {"options": {"decode_chunk_size": 2, "fps": 7}}
    assert fewer_frames_at_once(VIDEO, "WanPipeline") == ()


def test_limits_are_lifted_one_by_one_and_then_all():
    steps = lifting(Limits(vram_limit=GIB, ram_limit=GIB))
    assert [s.change for s in steps] == [
        {"vram_limit": None},
        {"ram_limit": None},
        {"vram_limit": None, "ram_limit": None},
    ]
    assert lifting(Limits()) == ()


def test_memory_beyond_what_the_machine_has_is_another_machine(rtx_3080: Machine) -> None:
    assert (
        said_of_memory(rtx_3080, {"device_bytes": GIB // 4}) == "256.0 MiB more free device memory"
    )
    assert said_of_memory(rtx_3080, {"device_bytes": 9 * GIB}) == "a GPU with at least 19 GiB"
    ram = said_of_memory(rtx_3080, {"host_bytes": 32 * GIB, "vram_limit": None})
    assert ram == "lifting the VRAM limit and a machine with at least 64 GiB of RAM"
