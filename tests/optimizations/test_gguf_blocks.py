"""GGUF's blocks: the bytes of the gguf package, layers that compute with them, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.optimizations import find
from autotune.optimizations.gguf_blocks import in_blocks
from autotune.testing.pipelines import BUILDERS
from tests.optimizations.packed import require_packed_and_back

KINDS = {"gguf_q8_0": GGMLQuantizationType.Q8_0, "gguf_q4_0": GGMLQuantizationType.Q4_0}
ALIKE = {"gguf_q8_0": 0.01, "gguf_q4_0": 0.15}
"""Scheme → largest difference of a pixel, of 1, in a network of random weights."""


@given(
    scheme=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 2**31),
    size=st.sampled_from((1e-6, 1.0, 100.0)),
    zeros=st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_the_bytes_are_those_of_the_package(
    scheme: str, seed: int, size: float, zeros: float
) -> None:
    random = np.random.default_rng(seed)
    weights = random.normal(0, size, (4, 64)) * (random.random((4, 64)) >= zeros)
    values = weights.astype(np.float32)
    values[0, :32] = 0  # a block without a scale
    layer = torch.nn.Linear(64, 4)
    layer.weight.data = torch.from_numpy(values)
    packed = in_blocks(layer, scheme).weight.as_tensor().numpy()
    assert np.array_equal(packed, quants.quantize(values, KINDS[scheme]))


@pytest.mark.parametrize("kind", ["sd", "flux"])
@pytest.mark.parametrize("scheme", ALIKE)
def test_layers_are_packed_and_come_back(kind: str, scheme: str) -> None:
    require_packed_and_back(kind, scheme, ALIKE[scheme])


def test_a_file_of_another_kind_is_known_by_its_bits() -> None:
    """A model loaded from a file: what it has is left as it is, and reported."""
    from diffusers.quantizers.gguf.utils import GGUFParameter

    pipe = BUILDERS["flux"]()
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    bytes_of_q5_1 = torch.zeros(layer.out_features, layer.in_features // 32 * 24, dtype=torch.uint8)
    layer.weight = GGUFParameter(bytes_of_q5_1, quant_type=GGMLQuantizationType.Q5_1)
    assert find("quantization").found(pipe) == {"scheme": "gguf_q4_0"}
