"""Linear layers in GGUF's blocks of 32 weights, as diffusers computes with them.

The ``gguf`` package quantizes in NumPy, some 30 million weights a second, which takes minutes for a
transformer. Here PyTorch does the same where the weights are; a test holds both to the same bytes.
"""

from __future__ import annotations

from typing import Any

BLOCK = 32
"""Weights that share a scale."""


def in_blocks(layer: Any, scheme: str) -> Any:
    """A copy of a linear layer that diffusers unpacks in each call.

    Args:
        layer: Its rows must be a multiple of 32 long.
        scheme: ``"gguf_q8_0"`` or ``"gguf_q4_0"``.
    """
    import torch
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType

    pack = {"gguf_q8_0": _q8_0, "gguf_q4_0": _q4_0}[scheme]
    kind = GGMLQuantizationType[scheme.removeprefix("gguf_").upper()]
    with torch.device("meta"):
        made = GGUFLinear(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            compute_dtype=layer.weight.dtype,
        )
    blocks = layer.weight.detach().reshape(-1, BLOCK).float()
    packed = pack(blocks).reshape(layer.out_features, -1)
    made.weight = GGUFParameter(packed, quant_type=kind)
    made.bias = layer.bias
    return made.train(layer.training)


def scheme_of_blocks(weight: Any) -> str:
    """The nearest scheme here of a weight in GGUF's blocks, whatever file it is from."""
    from gguf import GGML_QUANT_SIZES

    weights, size = GGML_QUANT_SIZES[weight.quant_type]
    return "gguf_q8_0" if 8 * size / weights > 6.5 else "gguf_q4_0"


def _q8_0(blocks: Any) -> Any:
    """A scale in 16 bits and 32 weights in eight."""
    import torch

    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    scaled = blocks * _inverse(scale)
    rounded = scaled.sign() * (scaled.abs() + 0.5).floor()
    return torch.cat([_as_bytes(scale), rounded.to(torch.int8).view(torch.uint8)], dim=1)


def _q4_0(blocks: Any) -> Any:
    """A scale in 16 bits and 32 weights in four: the first half low, the second half high."""
    import torch

    largest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    scale = largest / -8
    values = (blocks * _inverse(scale) + 8.5).trunc().clamp(0, 15).to(torch.uint8)
    low, high = values.chunk(2, dim=1)
    return torch.cat([_as_bytes(scale), low | (high << 4)], dim=1)


def _inverse(scale: Any) -> Any:
    """Of blocks that are all zero, zero."""
    import torch

    return torch.where(scale == 0, 0.0, 1 / scale)


def _as_bytes(scale: Any) -> Any:
    import torch

    return scale.to(torch.float16).view(torch.uint8)
