"""Pipelines with random weights: full-size ones from configurations, and small ones like them."""

from __future__ import annotations

import copy
import functools
import time
from typing import Any

import torch
from msgspec.structs import replace
from torch import nn

from autotune.workload.architecture import Architecture, ComponentConfig, find_architecture
from autotune.workload.components import build
from autotune.workload.live import modules_of
from autotune.workload.stage import constructor_parts, pipeline_class, quiet

_CLIP = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 128,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_T5 = {
    "vocab_size": 1000,
    "d_model": 256,
    "d_kv": 32,
    "d_ff": 512,
    "num_layers": 2,
    "num_heads": 4,
}
_VAE = {"block_out_channels": [32, 64, 128, 128], "sample_size": 64}

SMALL: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "text_encoder": _CLIP,
        "unet": {
            "block_out_channels": [64, 128, 256, 256],
            "attention_head_dim": 2,  # of them, as in SD 1.5: 32 channels each instead of 40
            "cross_attention_dim": 128,
        },
        "vae": _VAE,
    },
    "sdxl": {
        "text_encoder": _CLIP,
        "text_encoder_2": _CLIP,
        "unet": {
            "block_out_channels": [64, 128, 256],
            "attention_head_dim": [1, 2, 4],
            "transformer_layers_per_block": [1, 2, 3],
            "cross_attention_dim": 256,
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 128 + 6 * 32,
        },
        "vae": _VAE,
    },
    "sd3-medium": {
        "text_encoder": _CLIP,
        "text_encoder_2": _CLIP,
        "text_encoder_3": _T5,
        "transformer": {
            "num_layers": 6,
            "num_attention_heads": 6,
            "joint_attention_dim": 256,
            "caption_projection_dim": 384,
            "pooled_projection_dim": 256,
            "pos_embed_max_size": 64,
        },
        "vae": _VAE,
    },
    "flux-dev": {
        "text_encoder": _CLIP,
        "text_encoder_2": _T5,
        "transformer": {
            "num_layers": 2,
            "num_single_layers": 4,
            "num_attention_heads": 4,
            "joint_attention_dim": 256,
            "pooled_projection_dim": 128,
        },
        "vae": _VAE,
    },
}
"""Configuration values that make a model small: a second or two on one CPU core, in which compute
and not Python takes the time. What is left out is as in the real one."""

HOST = torch.device("cpu")

_SUFFIX = "-small"


@functools.cache
def architecture_of(model: str) -> Architecture:
    """A built-in architecture; with ``-small`` at its end, one like it for the CPU.

    Raises:
        ModelError: there is none of that name.
    """
    if not model.endswith(_SUFFIX):
        return find_architecture(model)
    whole = find_architecture(model.removesuffix(_SUFFIX))
    changes = SMALL[whole.name]
    parts = {n: _changed(c, changes.get(n, {})) for n, c in whole.components.items()}
    return replace(
        whole, name=model, components=parts, parameters={}, height=None, width=None, weights=None
    )


def _changed(component: ComponentConfig, changes: dict[str, Any]) -> ComponentConfig:
    return replace(component, config=component.config | changes)


def build_modules(
    architecture: Architecture, dtype: str, device: torch.device
) -> dict[str, nn.Module]:
    """Every component in host RAM, its random weights made on the device, one after the other."""
    torch.manual_seed(0)
    modules = {}
    for name, component in architecture.components.items():
        wanted = getattr(torch, component.dtype or dtype)
        with torch.no_grad(), quiet():
            modules[name] = build(name, component, wanted, device).to("cpu")
    return modules


def pipeline_around(architecture: Architecture, modules: dict[str, nn.Module]) -> Any:
    """diffusers' own pipeline around these modules; tokenizers only count words."""
    cls = pipeline_class(architecture)
    with quiet():
        pipe = cls(**dict(constructor_parts(cls, architecture, modules)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Model:
    """A pipeline that is built when it is first asked for, and can be let go.

    Args:
        architecture: Of which model.
        dtype: Of its weights.
        device: Where its random weights are made.
    """

    def __init__(self, architecture: Architecture, dtype: str, device: torch.device) -> None:
        self.architecture = architecture
        self._dtype, self._device = dtype, device
        self._pipe: Any = None
        self._place: torch.device | None = None
        self._build_s = 0.0
        self.spent_s = 0.0
        """Seconds for all builds."""

    @property
    def build_s(self) -> float:
        """Seconds until it is there, as far as is known."""
        return self._build_s if self._pipe is None else 0.0

    def at(self, place: torch.device) -> Any:
        """The pipeline, its weights there: they are moved only where they are elsewhere."""
        if self._pipe is None:
            start = time.monotonic()
            modules = build_modules(self.architecture, self._dtype, self._device)
            self._pipe, self._place = pipeline_around(self.architecture, modules), HOST
            self._build_s = time.monotonic() - start
            self.spent_s += self._build_s
        if place != self._place:
            self._place = None
            for module in modules_of(self._pipe).values():
                module.to(place)
            self._place = place
        return self._pipe

    def release(self) -> None:
        """Let its weights go."""
        self._pipe = self._place = None


def copied(pipe: Any, architecture: Architecture) -> Any:
    """The same pipeline with weights of its own, for what does not put back what it changes."""
    modules = {n: copy.deepcopy(m) for n, m in modules_of(pipe).items()}
    return pipeline_around(architecture, modules)
