"""What a call needs when it cannot be traced: a guess from the module's weights.

The rates are those of published models, which they meet within a factor of three or so: a wide
margin goes with every estimate.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from autotune.workload.components import weight_bytes
from autotune.workload.live import config_of
from autotune.workload.rehearsal import Call
from autotune.workload.request import config_factor
from autotune.workload.trace import ALLOCATION_BYTES
from autotune.workload.workload import Operator, Role, Trace

LAYERS_ALIVE = 8
"""Activations of a layer's width alive at once: in a transformer block the hidden states, the
residual, query, key, value, and the feed-forward's inner states, which are four times as wide."""

POSITIONS_PER_USE = {"tokens": 1, "latents": 8, "pixels": 16}
"""Positions for which a weight is used once, on average: of convolutional networks most weights are
where the picture is small."""

WEIGHTS_PER_LAYER = 12
"""Of a transformer, times its width squared: four of attention, eight of the feed-forward."""

USUAL_PATCH = 2
"""Latent elements by side that transformers make one token of."""

FRAME_FACTOR = 4
"""Frames per latent frame of most video autoencoders, after the first."""


def estimated_call(call: Call, role: Role) -> tuple[Trace, Any]:
    """A trace of one dense product with all weights, and an output that the pipeline can take.

    Models take their latents, ids or images first.

    Args:
        call: It has failed to be traced.
        role: What the component is for.
    """
    module = call.module
    main = next((t for t in call.tensors if t.dim() > 1), torch.empty(1, 1, device="meta"))
    parameters = list(module.parameters())
    dtype = parameters[0].dtype if parameters else torch.float32
    made = _made(call, main, role).to(dtype)
    positions, unit = _positions(module, max(main, made, key=Tensor.numel), role)
    uses = max(1, positions // POSITIONS_PER_USE[unit])
    flops = 2.0 * sum(p.numel() for p in parameters) * uses
    if unit == "pixels":
        alive = LAYERS_ALIVE * positions * _width_of_pixels(module) * dtype.itemsize
    else:
        alive = LAYERS_ALIVE * uses * _width(module) * dtype.itemsize
    if unit == "tokens":
        flops += _attention_flops(module, uses, main.shape[0])
    size = -(-(alive + _bytes(main)) // ALLOCATION_BYTES) * ALLOCATION_BYTES
    operator = Operator(
        name="estimated",
        kind="matmul",
        signature=f'["estimated","{type(module).__name__}",{uses}]',
        dtype=str(dtype).removeprefix("torch."),
        count=1,
        flops=flops,
        bytes=weight_bytes(module) + alive,
        live_bytes=size,
        in_bytes=_bytes(main),
        out_bytes=_bytes(made),
    )
    leaves = sum(1 for _ in module.modules())
    return Trace((operator,), size, dispatches=leaves), _output(call, made)


def _positions(module: nn.Module, main: Tensor, role: Role) -> tuple[int, str]:
    """How many there are, and what they are."""
    if role == "encoder" or main.dim() < 4:
        rows = main.shape[:-1] if main.is_floating_point() else main.shape
        return max(1, math.prod(rows)), "tokens"
    if role == "autoencoder":
        return main.numel() // min(main.shape[1:3]), "pixels"
    config = config_of(module)
    positions = main.numel() // (config.get("in_channels") or min(main.shape[1:3]))
    patch = config.get("patch_size")
    if patch is None and any(p.dim() > 3 and p.shape[-1] == 3 for p in module.parameters()):
        return positions, "latents"
    area = math.prod(patch) if isinstance(patch, (list, tuple)) else (patch or USUAL_PATCH) ** 2
    return max(1, positions // area), "tokens"


def _attention_flops(module: nn.Module, tokens: int, batch: int) -> float:
    """Of each token to all in its sample; the width is that of most matrices, as is the depth."""
    widths = Counter(p.shape[-1] for p in module.parameters() if p.dim() == 2)
    if not widths:
        return 0.0
    width = widths.most_common(1)[0][0]
    weights = sum(p.numel() for p in module.parameters() if p.dim() == 2)
    layers = weights / (WEIGHTS_PER_LAYER * width**2)
    return 4.0 * tokens**2 / batch * width * layers


def _width(module: nn.Module) -> int:
    """Of the widest layer."""
    return max((p.shape[-1] for p in module.parameters() if p.dim() > 1), default=1)


def _width_of_pixels(module: nn.Module) -> int:
    """Channels where the picture is largest: of the narrowest convolution."""
    convolutions = (p for p in module.parameters() if p.dim() > 3 and p.shape[-1] > 1)
    return min((max(p.shape[:2]) for p in convolutions), default=1)


def _made(call: Call, main: Tensor, role: Role) -> Tensor:
    """A tensor of the shape that probably comes out."""
    if role != "autoencoder" or main.dim() < 4:
        shape = main.shape if main.is_floating_point() else (*main.shape, _width(call.module))
        return torch.empty(shape, device="meta")
    config = config_of(call.module)
    factor = config_factor(config)
    batch, _, *frames, height, width = main.shape
    if call.entry == "decode":
        frames = [(f - 1) * FRAME_FACTOR + 1 for f in frames]
        shape = (batch, 3, *frames, height * factor, width * factor)
    else:
        channels = config.get("latent_channels") or config.get("z_dim") or 4
        frames = [(f - 1) // FRAME_FACTOR + 1 for f in frames]
        shape = (batch, channels, *frames, height // factor, width // factor)
    return torch.empty(shape, device="meta")


def _output(call: Call, made: Tensor) -> Any:
    """Something that the pipeline can go on with."""
    value = _Distribution(made) if call.entry == "encode" else made
    if call.kwargs.get("return_dict") is False:
        return (value,)
    return _Output(value)


class _Output(tuple):  # type: ignore[type-arg]
    """Answers to every name that models give their output."""

    def __new__(cls, value: Any) -> _Output:
        return super().__new__(cls, (value, [False] * value.shape[0]))  # a checker's verdict

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return [self[0]] * 64 if name == "hidden_states" else self[0]


class _Distribution:
    """What encoders return: latents are drawn from it."""

    def __init__(self, latents: Tensor) -> None:
        self.shape = latents.shape
        self.mean = self.latents = latents

    def sample(self, *_: Any, **__: Any) -> Tensor:
        """Some latents."""
        return self.mean

    mode = sample


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
