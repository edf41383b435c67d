"""The feed-forward layers of a UNet, one image of the batch at a time."""

from __future__ import annotations

from typing import Any

import msgspec

from autotune.optimizations.base import Optimization, Parameters, Undo, undone_on_failure
from autotune.optimizations.execution import Effect, Execution
from autotune.optimizations.modules import classes_of, denoisers
from autotune.optimizations.rule import Rule
from autotune.optimizations.target import Target, listed
from autotune.probe.machine import Machine
from autotune.workload.workload import Workload

EFFECT = Effect("denoiser", time=1.02, activations=0.9)
"""Factors on the time and on the activations at the peak. Guesses: measure yours."""


class ChunkedFeedForward(Optimization):
    """diffusers' feed-forward chunking, along the batch."""

    name = "chunked_feed_forward"
    summary = "feed-forward layers of the UNet take one image of the batch at a time"
    relieves = "vram of denoise"
    rules = (
        Rule(
            "merged-blocks-do-not-chunk",
            "tomesd's blocks call their feed-forward layers on the whole batch",
            frozenset({"chunked_feed_forward"}),
            frozenset({"tome"}),
            "hinders",
        ),
    )

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        others = set(classes_of(workload, "denoiser")) - {"UNet2DConditionModel"}
        return f"diffusers does not chunk {sorted(others)[0]}" if others else None

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        if EFFECT in execution.effects:
            return execution
        return msgspec.structs.replace(execution, effects=(*execution.effects, EFFECT))

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        before = [(b, b._chunk_size, b._chunk_dim) for b in _blocks(pipe)]

        def undo() -> None:
            for block, size, dim in before:
                block.set_chunk_feed_forward(size, dim)

        with undone_on_failure(undo):
            for block, _, _ in before:
                block.set_chunk_feed_forward(1, dim=0)
        return undo

    def found(self, pipe: Any) -> Parameters | None:
        return {} if any(b._chunk_size for b in _blocks(pipe)) else None

    def code(self, parameters: Parameters, target: Target) -> tuple[str, ...]:
        return (
            f"for denoiser in [{listed(target.denoisers)}]:",
            "    for layer in denoiser.modules():",
            '        if hasattr(layer, "set_chunk_feed_forward"):',
            "            layer.set_chunk_feed_forward(1, dim=0)",
        )


def _blocks(pipe: Any) -> list[Any]:
    layers = (layer for m in denoisers(pipe) for layer in m.modules())
    return [layer for layer in layers if hasattr(layer, "set_chunk_feed_forward")]
