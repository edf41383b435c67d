"""Where in a network an operator is: what token merging, step caches and compilers change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn

from autotune.workload.workload import Region


class Marked(Protocol):
    """What is told: tokens of the UNet block whose self-attention runs, and the region."""

    block_tokens: int
    region: Region


BLOCK_LISTS = frozenset(
    {
        "blocks",
        "joint_transformer_blocks",
        "layers",
        "single_transformer_blocks",
        "temporal_transformer_blocks",
        "transformer_blocks",
        "visual_transformer_blocks",
    }
)
"""What diffusers calls the lists of a network's repeated blocks (``hooks/_common.py``)."""


@contextmanager
def self_attention_marked(module: nn.Module, recorder: Marked) -> Iterator[None]:
    """Tell the recorder when it is inside a UNet block's self-attention, which ToMe shortens."""

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        recorder.block_tokens = hidden.shape[1]

    def leave(*_: Any) -> None:
        recorder.block_tokens = 0

    handles = []
    for child in module.modules():
        if type(child).__name__ == "BasicTransformerBlock":
            attention: Any = child.attn1
            handles.append(attention.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(attention.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def regions_marked(module: nn.Module, recorder: Marked) -> Iterator[None]:
    """Tell the recorder when it is inside a repeated block, and inside its attention."""
    left: list[Region] = []

    def entering(region: Region) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            left.append(recorder.region)
            recorder.region = region

        return enter

    def leave(*_: Any) -> None:
        recorder.region = left.pop()

    handles = []
    for child, region in _regions(module):
        handles.append(child.register_forward_pre_hook(entering(region)))
        handles.append(child.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _regions(module: nn.Module) -> Iterator[tuple[nn.Module, Region]]:
    for path, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and path.rpartition(".")[2] in BLOCK_LISTS:
            yield from ((block, "block") for block in child)
        elif hasattr(child, "set_processor"):
            yield child, "attention"
