"""A decode recast to sixteen bits is the decode as it is really traced in sixteen bits."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace

from autotune.decide.recast import recast
from autotune.testing.pipelines import build_vae
from autotune.workload.trace import trace
from autotune.workload.workload import Operator, Trace

ROUNDING_BYTES = 512
"""The allocator's, of which a tensor of half the size does not always take half."""


def decode(dtype: torch.dtype, batch: int = 1) -> Trace:
    vae = build_vae().to("meta", dtype)
    latent = torch.empty(batch, vae.config.latent_channels, 24, 16, dtype=dtype, device="meta")
    return trace(vae, lambda: vae.decode(latent), [latent])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("batch", [1, 3])
def test_recast_is_as_traced(dtype: str, batch: int) -> None:
    made = recast(decode(torch.float32, batch), dtype)
    real = decode(getattr(torch, dtype), batch)
    assert (made.timed, made.dispatches) == (real.timed, real.dispatches)
    assert made.activation_bytes == pytest.approx(real.activation_bytes, abs=ROUNDING_BYTES)
    assert len(made.timeline) == len(real.timeline)
    for one, other in zip(made.timeline, real.timeline, strict=True):
        assert abs(one - other) <= ROUNDING_BYTES
    for one, other in zip(made.operators, real.operators, strict=True):
        assert _apart_from_alive(one) == _apart_from_alive(other)
        # As many tensors are alive at once as are rounded.
        assert one.live_bytes == pytest.approx(other.live_bytes, abs=8 * ROUNDING_BYTES)


def _apart_from_alive(operator: Operator) -> Operator:
    return replace(operator, live_bytes=0)
