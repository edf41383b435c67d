"""The ``Execution``: how a pipeline will run. Optimizations edit it; the predictor reads it."""

from __future__ import annotations

from typing import Literal

from autotune.probe.machine import Value

Placement = Literal[
    "device",
    "encoder_offload",
    "model_offload",
    "sequential_offload",
    "group_offload",
    "device_map",
]


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

    @property
    def is_pinned(self) -> bool:
        """Whether groups lie in pinned RAM between two calls."""
        return self.pins and self.overlaps and not self.from_disk

    def by_layer(self, class_name: str, has_blocks: bool, has_tied_layers: bool) -> bool:
        """Whether a component moves layer by layer, and not block by block (diffusers 0.42).

        What has no blocks would be on the device as a whole. But some layers are never called
        themselves; and a layer's file is written when its weights may be gone already, where
        another layer has the same and is no copy that one could stand for.
        """
        if class_name in READS_PAST_HOOKS or (self.from_disk and has_tied_layers):
            return False
        return self.level == "leaf" or not has_blocks


READS_PAST_HOOKS = frozenset(
    {
        "HunyuanDiT2DModel",
        "HunyuanDiT2DControlNetModel",
        "HunyuanDiT2DMultiControlNetModel",
        "ControlNetUnionModel",
        "SiglipVisionModel",
        "SiglipVisionTransformer",
    }
)
"""Components with a layer whose weights another one reads without calling it."""


class DeviceMap(Value, frozen=True):
    """Components on other GPUs, by CUDA's index; what has the device's own index stays there.

    Attributes:
        encoders: Where the text encoders are.
        autoencoder: Where the VAE is.
    """

    encoders: int
    autoencoder: int


class StepCache(Value, frozen=True):
    """Steps that reuse what an earlier one computed.

    Attributes:
        method: ``"first_block"``: all blocks but the first, while its result changes by less than
            ``value``. ``"taylor"``: all blocks but at every ``value``-th step, from where it is
            extrapolated. ``"attention"``: attention at all but every ``value``-th step, apart from
            the first and the last ones (pyramid attention broadcast). ``"faster"``: the same late
            in the schedule, by extrapolation, where guidance is mostly extrapolated too.
        value: As the method reads it.
    """

    method: Literal["first_block", "taylor", "attention", "faster"]
    value: float


class Effect(Value, frozen=True):
    """What an optimization of another package does to the components of one role.

    For what no field of an execution says; several multiply.

    Attributes:
        role: Whose: ``"encoder"``, ``"denoiser"`` or ``"autoencoder"``.
        time: Factor on what the device takes.
        launch: Factor on what the host takes to dispatch it.
        weights: Factor on the bytes of their weights.
        activations: Factor on their activations at the peak.
        extra_bytes: Device memory that each of them takes besides while it runs.
        once_s: Seconds that it takes once, before the first image.
    """

    role: Literal["encoder", "denoiser", "autoencoder"]
    time: float = 1.0
    launch: float = 1.0
    weights: float = 1.0
    activations: float = 1.0
    extra_bytes: int = 0
    once_s: float = 0.0


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
        device_map: Which components are on which GPU, where they are on several.
        storage_dtype: What the denoiser's layers rest in between their uses; ``""`` is what they
            compute in.
        compiled: The denoiser by ``torch.compile``: its repeated blocks, or all of it.
        fused_projections: One product for queries, keys and values in the denoiser.
        quantization: Scheme of the denoiser's linear layers (``decide/quantized.py``).
        step_cache: Steps of the denoiser that are not wholly computed.
        decode_dtype: What a decode is computed in that would be widened to float32 otherwise.
        decoder: ``"tiny"`` for a distilled one in the place of the autoencoder.
        effects: Of other packages' optimizations.
    """

    attention: str = ""
    attention_slices: str = ""
    merge: TokenMerge | None = None
    decode_sliced: bool = False
    decode_tile: int = 0
    channels_last: bool = False
    placement: Placement = "device"
    group: GroupOffload | None = None
    device_map: DeviceMap | None = None
    storage_dtype: str = ""
    compiled: Literal["", "regional", "whole"] = ""
    fused_projections: bool = False
    quantization: str = ""
    step_cache: StepCache | None = None
    decode_dtype: str = ""
    decoder: Literal["", "tiny"] = ""
    effects: tuple[Effect, ...] = ()

    @property
    def decode_variant(self) -> str:
        """The name of the decode's code path, as in ``ComponentRun.variants``."""
        if self.decoder:
            return self.decoder
        parts = ["sliced"] if self.decode_sliced else []
        return "+".join(parts + ([f"tiled:{self.decode_tile}"] if self.decode_tile else []))
