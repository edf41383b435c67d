"""A decode by a distilled autoencoder (TAESD) in the place of the pipeline's own."""

from __future__ import annotations

import functools
from typing import Any

import torch

from autotune.workload import variants
from autotune.workload.rehearsal import Call
from autotune.workload.trace import trace
from autotune.workload.workload import Request, Trace


def traced_tiny(call: Call, request: Request) -> Trace | None:
    """What a distilled autoencoder would do with the same latents; ``None`` where there is none.

    It does not overflow in float16, so nothing is widened.
    """
    size = sum(p.numel() for p in call.module.parameters())
    if call.entry != "decode" or size not in variants.DISTILLED:
        return None
    latents = call.tensors[0]
    dtype = getattr(torch, request.dtype)
    tiny = _built(latents.shape[1], dtype)
    narrow = torch.empty(latents.shape, dtype=dtype, device="meta")
    return trace(tiny, lambda: tiny.decode(narrow), [narrow])


@functools.cache
def _built(channels: int, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderTiny

    with torch.device("meta"):
        return AutoencoderTiny(latent_channels=channels).to(dtype).eval()
