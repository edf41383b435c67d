"""Traced layouts of images against those of a real decode on the CPU."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from autotune.probe.operands import Buffers, fitting, rebuild
from autotune.testing.pipelines import build_vae
from autotune.workload.trace import trace
from autotune.workload.workload import Operator

Seen = Counter[tuple[tuple[int, ...], bool]]


class _Convolutions(TorchDispatchMode):
    """Shapes of what is convolved, and whether it lies channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Seen = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" in str(func):
            image, nhwc = args[0], torch.channels_last
            last = image.stride(0) >= image[0].numel() and image.is_contiguous(memory_format=nhwc)
            self.seen[tuple(image.shape), last and not image.is_contiguous()] += 1
        return func(*args, **(kwargs or {}))


def traced(batch: int) -> list[Operator]:
    with torch.device("meta"):
        vae = build_vae().eval()
        latents = torch.empty(batch, 4, 16, 16)
    return list(trace(vae, lambda: vae.decode(latents), [latents]).operators)


@pytest.mark.parametrize("batch", [1, 2])
def test_convolutions_lie_as_they_do_on_a_cpu(batch: int) -> None:
    """Of several images channels last after the attention; of a single one not."""
    with torch.no_grad(), _Convolutions() as real:
        build_vae().eval().decode(torch.randn(batch, 4, 16, 16))
    found: Seen = Counter()
    for operator in traced(batch):
        if operator.kind == "convolution":
            shape = tuple(json.loads(operator.signature)[1][0]["s"])
            found[shape, operator.is_channels_last_on_cpu] += operator.count
    assert found == real.seen
    assert any(last for _, last in found) == (batch > 1)


def test_replay_lays_operands_out_likewise() -> None:
    operators = [o for o in traced(2) if o.is_channels_last_on_cpu and '"l":' in o.signature]
    assert operators
    for operator in operators:
        (group,), _ = fitting([operator], 1 << 30)
        with torch.no_grad(), _Convolutions() as real:
            rebuild(operator.signature, Buffers(group, torch.device("cpu")))()
        ((_, last),) = real.seen
        assert last
