"""The ``Execution``: how a pipeline will run. Optimizations edit it; the predictor reads it."""

from __future__ import annotations

from typing import Literal

from autotune.probe.machine import Value

Placement = Literal["device", "model_offload", "sequential_offload", "group_offload"]


class TokenMerge(Value, frozen=True):
    """ToMe: ``ratio`` of the tokens merged, in blocks up to ``max_downsample`` below the latent."""

    ratio: float
    max_downsample: int


class GroupOffload(Value, frozen=True):
    """Weights that come in groups.

    Attributes:
        level: A group is a block of the network, or one layer.
        overlaps: The next group is copied while this one computes.
        pins: All weights lie in pinned RAM; else each group is pinned when it is its turn.
        from_disk: Groups lie on the disk, not in RAM.
    """

    level: Literal["block", "leaf"] = "block"
    overlaps: bool = True
    pins: bool = True
    from_disk: bool = False


class Execution(Value, frozen=True):
    """One way to run a workload; the default is what diffusers does when nothing is set.

    Attributes:
        attention: The denoiser's and VAE's implementation; ``""`` is the machine's default.
        attention_slices: ``"auto"`` (half of the heads at a time) or ``"max"`` (one head), for the
            denoiser only; ``""`` is off. Slicing brings its own vanilla kernel.
        merge: Token merging in the denoiser.
        decode_sliced: Decode one image of the batch at a time.
        decode_tile: Decode in tiles of so many pixels; 0 is off.
        channels_last: Convolution weights of denoiser and VAE in NHWC layout.
        placement: Where weights live while they are not used.
        group: How, under group offload.
        storage_dtype: What the denoiser's layers rest in between their uses; ``""`` is what they
            compute in.
    """

    attention: str = ""
    attention_slices: str = ""
    merge: TokenMerge | None = None
    decode_sliced: bool = False
    decode_tile: int = 0
    channels_last: bool = False
    placement: Placement = "device"
    group: GroupOffload | None = None
    storage_dtype: str = ""

    @property
    def decode_variant(self) -> str:
        """The name of the decode's code path, as in ``ComponentRun.variants``."""
        parts = ["sliced"] if self.decode_sliced else []
        return "+".join(parts + ([f"tiled:{self.decode_tile}"] if self.decode_tile else []))
