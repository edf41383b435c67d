"""Why there is no GPU, under drivers in every state."""

from __future__ import annotations

from typing import Any

import pytest

CPU_BUILD = {"torch": "2.13.0+cpu"}
CUDA_BUILD = {"torch": "2.13.0", "cuda": "13.0"}
CODE = """
import json
from autotune.probe.absence import why_no_gpu
print(json.dumps(why_no_gpu({})))
"""


@pytest.mark.parametrize(
    ("scenario", "software", "environment", "why"),
    [
        ("unloaded", CUDA_BUILD, {}, "is installed but not loaded"),
        ("mismatch", CUDA_BUILD, {}, "differ in version"),
        ("forbidden", CUDA_BUILD, {}, "no permission"),
        ("unknown", CUDA_BUILD, {}, "see what nvidia-smi says"),
        ("none", CUDA_BUILD, {}, "finds no GPU: check that one is plugged in"),
        ("desktop", CUDA_BUILD, {"NVML_STUB_LOST_AFTER": "1"}, "counts 1 GPU that cannot be"),
        ("two", CUDA_BUILD, {"NVML_STUB_LOST_AFTER": "1"}, "counts 2 GPUs that cannot be"),
        ("desktop", CPU_BUILD, {}, "2.13.0+cpu is built for the CPU only, and cannot use this"),
        ("desktop", CPU_BUILD, {"CUDA_VISIBLE_DEVICES": ""}, "install a CUDA build of torch"),
        ("desktop", CUDA_BUILD, {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES hides the"),
        ("desktop", CUDA_BUILD, {"CUDA_VISIBLE_DEVICES": "GPU-x"}, "hides the NVIDIA GeForce RTX"),
        ("desktop", CUDA_BUILD, {}, "with driver 575.51.03: update the driver"),
    ],
)
def test_the_first_thing_in_the_way_is_named(
    under_driver: Any,
    scenario: str,
    software: dict[str, str],
    environment: dict[str, str],
    why: str,
) -> None:
    code = CODE.replace("{}", repr(software))
    assert why in under_driver(scenario, code, **environment)
