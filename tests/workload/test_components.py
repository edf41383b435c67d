"""Modules without weights against the same modules really loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from autotune.testing.pipelines import BUILDERS
from autotune.workload.architecture import ComponentConfig, find_architecture
from autotune.workload.components import build_on_meta, describe, meta_module, weight_bytes
from tests.thorough import part

HALVES = (torch.float16, torch.bfloat16)


def dtypes_of(module: nn.Module) -> dict[str, torch.dtype]:
    return {n: t.dtype for n, t in (*module.named_parameters(), *module.named_buffers())}


@pytest.mark.parametrize("kind", part(tuple(BUILDERS), 3))
def test_every_tensor_has_the_dtype_that_loading_gives_it(kind: str, tmp_path: Path) -> None:
    """Tables and norms of Wan stay in float32, as do rotary frequencies that no file holds."""
    BUILDERS[kind]().save_pretrained(tmp_path)
    architecture = find_architecture(str(tmp_path))
    for dtype in HALVES:
        pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=dtype)
        for name, config in architecture.components.items():
            real, built = getattr(pipe, name), build_on_meta(name, config, dtype)
            assert dtypes_of(built) == dtypes_of(real), name
            loaded = describe(name, real)
            assert describe(name, built) == loaded
            assert loaded.weight_bytes == weight_bytes(real)
            assert describe(name, meta_module(name, config, dtype, {name: real})) == loaded


def test_transformers_keeps_float32_in_float16_only(tmp_path: Path) -> None:
    """T5's output projections."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=20)
    T5EncoderModel(config).save_pretrained(tmp_path)
    component = ComponentConfig("transformers", "T5EncoderModel", config.to_dict())
    for dtype in HALVES:
        real = T5EncoderModel.from_pretrained(tmp_path, dtype=dtype)
        built = build_on_meta("text_encoder", component, dtype)
        assert dtypes_of(built) == dtypes_of(real)
        wide = {n for n, d in dtypes_of(built).items() if d == torch.float32}
        assert all(".wo." in n for n in wide) and bool(wide) == (dtype == torch.float16)


def test_building_leaves_the_default_dtype_alone() -> None:
    config: dict[str, Any] = {"sample_size": 8, "cross_attention_dim": "wide"}
    component = ComponentConfig("diffusers", "UNet2DConditionModel", config)
    with pytest.raises(Exception, match="cannot build unet"):
        build_on_meta("unet", component, torch.float16)
    assert torch.get_default_dtype() == torch.float32
