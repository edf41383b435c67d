"""Decoding in parts: image by image, or tile by tile."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import msgspec

from autotune.errors import OptimizationError
from autotune.optimizations.base import (
    Optimization,
    Parameters,
    Undo,
    quality_of,
    undone_on_failure,
)
from autotune.optimizations.execution import Execution
from autotune.optimizations.modules import autoencoders, classes_of
from autotune.optimizations.target import Target
from autotune.probe.machine import Machine
from autotune.workload.architecture import ComponentConfig
from autotune.workload.variants import OVERLAP, has_tiles, restore, switch
from autotune.workload.workload import Workload


class _DecodeSwitch(Optimization):
    _fields: tuple[str, ...]
    """How the names of the attributes begin that it changes; the first is the switch itself."""

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        switchable = [a for a in autoencoders(pipe) if self._can_switch(a)]
        if not switchable:
            names = ", ".join(type(a).__name__ for a in autoencoders(pipe)) or "this pipeline"
            raise OptimizationError(f"{names} has no {self.name}", f"add --without {self.name}")
        before: list[tuple[Any, dict[str, Any]]] = []

        def undo() -> None:
            for autoencoder, fields in before:
                restore(autoencoder, fields)

        with undone_on_failure(undo):
            for autoencoder in switchable:
                fields = switch(autoencoder, "")  # as they are
                own = {k: v for k, v in fields.items() if k.startswith(self._fields)}
                before.append((autoencoder, own))
                switch(autoencoder, self._variant(parameters))
        return undo

    def _can_switch(self, autoencoder: Any) -> bool:
        return hasattr(autoencoder, self._fields[0])

    @abstractmethod
    def _variant(self, parameters: Parameters) -> str: ...


class VaeSlicing(_DecodeSwitch):
    """Decode one image of the batch at a time."""

    name = "vae_slicing"
    summary = "decodes one image of the batch at a time"
    relieves = "vram of decode"
    _fields = ("use_slicing",)

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        if "sliced" in _variants(workload):
            return None
        if workload.request.batch == 1:
            return "a batch of one has nothing to slice"
        return f"slicing changes nothing in this decode{_by(workload)}"

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        return msgspec.structs.replace(execution, decode_sliced=True)

    def code(self, parameters: Parameters, target: Target) -> tuple[str, ...]:
        return tuple(f"pipe.{name}.enable_slicing()" for name in target.autoencoders)

    def _variant(self, parameters: Parameters) -> str:
        return "sliced"

    def found(self, pipe: Any) -> Parameters | None:
        is_on = any(getattr(a, "use_slicing", False) for a in autoencoders(pipe))
        return {} if is_on else None


SEAMLESS = 256
"""Pixels of a tile from which few people see a seam. Smaller ones differ visibly: of 64 pixels by
28.6 dB (docs/quality.md)."""


class VaeTiling(_DecodeSwitch):
    """Decode in overlapping tiles that are blended."""

    name = "vae_tiling"
    summary = "decodes in overlapping tiles that are blended"
    relieves = "vram of decode"
    exactness = "near-exact"
    defaults = {"tile": 512}
    _fields = ("use_tiling", "tile_")

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        if _tiles(workload):
            return None
        request = workload.request
        size = f"{request.width}x{request.height}"
        tiled = (why for v, why in _refused(workload).items() if v.startswith("tiled"))
        return next(tiled, f"a decode at {size} is not cut into tiles{_by(workload)}")

    def worth_trying(self, machine: Machine, workload: Workload) -> tuple[Parameters, ...]:
        return tuple({"tile": t} for t in _tiles(workload))

    def quality(self, parameters: Parameters) -> str:
        return quality_of(self.exactness) if int(parameters["tile"]) >= SEAMLESS else "balanced"

    def check(self, parameters: Parameters) -> None:
        tile = int(parameters["tile"])
        if not 64 <= tile <= 4096 or tile % 64:
            raise OptimizationError(
                f"vae_tiling:tile={tile} is unusable", "use a multiple of 64 from 64 to 4096"
            )

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        return msgspec.structs.replace(execution, decode_tile=int(parameters["tile"]))

    def code(self, parameters: Parameters, target: Target) -> tuple[str, ...]:
        tile = int(parameters["tile"])
        named = ((name, target.components.get(name)) for name in target.autoencoders)
        return tuple(line for n, part in named for line in _tiling(f"pipe.{n}", part, tile))

    def _variant(self, parameters: Parameters) -> str:
        return f"tiled:{parameters['tile']}"

    def _can_switch(self, autoencoder: Any) -> bool:
        return has_tiles(autoencoder)

    def found(self, pipe: Any) -> Parameters | None:
        tiled = [a for a in autoencoders(pipe) if getattr(a, "use_tiling", False)]
        if not tiled:
            return None
        sizes = (getattr(tiled[0], f"tile_sample_min_{name}", None) for name in ("size", "height"))
        return {"tile": next((int(s) for s in sizes if s), self.defaults["tile"])}


class VaeBfloat16(Optimization):
    """Decode in bfloat16 what overflows in float16 and is widened to float32 for that.

    bfloat16 has the range of float32 and eight bits of mantissa.
    """

    name = "vae_bfloat16"
    summary = "decodes in bfloat16 where the pipeline would widen the autoencoder to float32"
    relieves = "vram and time of decode"
    exactness = "near-exact"

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        runs = workload.runs_as("autoencoder")
        if not any(r.upcast_bytes for r in runs):
            return "nothing is widened to float32 to be decoded"
        if any(r.entry == "encode" for r in runs):
            return "encoding the picture would set the autoencoder's dtype again"
        if "bfloat16" not in machine.kernels.convolution_flops_per_s:
            return "this device has no convolutions in bfloat16"
        return None

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        return msgspec.structs.replace(execution, decode_dtype="bfloat16")

    def code(self, parameters: Parameters, target: Target) -> tuple[str, ...]:
        return tuple(
            line
            for vae in (f"pipe.{name}" for name in target.autoencoders)
            for line in (
                f"{vae}.to(torch.bfloat16)",
                f"{vae}.decode = lambda z, *args, decode={vae}.decode, **options: "
                "decode(z.bfloat16(), *args, **options)",
            )
        )

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        import torch

        targets = [a for a in autoencoders(pipe) if _is_widened(a)]
        before = [
            (a, {n: p.detach().to("cpu", copy=True) for n, p in a.named_parameters()})
            for a in targets
        ]

        def undo() -> None:
            for autoencoder, weights in before:
                vars(autoencoder).pop("decode", None)
                autoencoder.to(torch.float16)
                for name, parameter in autoencoder.named_parameters():
                    parameter.data.copy_(weights[name])  # bfloat16 has rounded them

        with undone_on_failure(undo):
            for autoencoder in targets:
                autoencoder.decode = _narrowing(autoencoder.decode)
                autoencoder.to(torch.bfloat16)
        return undo

    def found(self, pipe: Any) -> Parameters | None:
        is_set = any(hasattr(vars(a).get("decode"), "narrows") for a in autoencoders(pipe))
        return {} if is_set else None


_STRIDES = {
    "AutoencoderDC": 7 / 8,
    "AutoencoderKLHunyuanVideo": 3 / 4,
    "AutoencoderKLLTXVideo": 7 / 8,
    "AutoencoderKLMochi": 3 / 4,
    "AutoencoderKLQwenImage": 3 / 4,
    "AutoencoderKLWan": 3 / 4,
}
"""Autoencoder → from one tile to the next, as a share of its side (diffusers 0.42)."""


def _tiling(vae: str, component: ComponentConfig | None, tile: int) -> tuple[str, ...]:
    """The lines that do for one autoencoder what ``variants.switch`` does."""
    name = "" if component is None else component.class_name
    config = {} if component is None else component.config
    ways = ("height", "width")
    sizes = [f"tile_sample_min_{way}={tile}" for way in ways]
    if name in _STRIDES:
        factor = _pixels_per_latent(config)
        stride = int(tile * _STRIDES[name]) // factor * factor
        sizes += [f"tile_sample_stride_{way}={stride}" for way in ways]
        return (f"{vae}.enable_tiling({', '.join(sizes)})",)
    if name == "AutoencoderKLCogVideoX":
        sizes += [f"tile_overlap_factor_{way}={OVERLAP}" for way in ways]
        return (f"{vae}.enable_tiling({', '.join(sizes)})",)
    if name in ("AutoencoderKL", "AutoencoderKLFlux2"):
        return (
            f"{vae}.enable_tiling()",
            f"{vae}.tile_sample_min_size = {tile}",
            f"{vae}.tile_latent_min_size = {tile // _pixels_per_latent(config)}",
        )
    return (f"{vae}.enable_tiling()  # planned with tiles of {tile} pixels: set them as it has it",)


def _pixels_per_latent(config: dict[str, Any]) -> int:
    """Along a side, as the autoencoders' classes work it out of their configurations."""
    if "spatio_temporal_scaling" in config:  # LTX
        return int(config["patch_size"] * 2 ** sum(config["spatio_temporal_scaling"]))
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    if blocks:
        return int(2 ** (len(blocks) - 1))
    return 8


def _is_widened(autoencoder: Any) -> bool:
    """As pipelines ask before they decode."""
    is_half = str(autoencoder.dtype) == "torch.float16"
    return is_half and bool(getattr(autoencoder.config, "force_upcast", False))


def _narrowing(decode: Any) -> Any:
    """The same method for latents of any dtype."""

    def narrowed(z: Any, *args: Any, **options: Any) -> Any:
        return decode(z.bfloat16(), *args, **options)

    narrowed.narrows = True  # type: ignore[attr-defined]
    return narrowed


def _by(workload: Workload) -> str:
    names = ", ".join(classes_of(workload, "autoencoder"))
    return f" by {names}" if names else ""


def _variants(workload: Workload) -> set[str]:
    runs = [r for p in workload.phases if p.name == "decode" for r in p.runs]
    return {v for r in runs for v in r.variants}


def _refused(workload: Workload) -> dict[str, str]:
    """Switches that some autoencoder does not take, and why."""
    return {variant: why for r in workload.runs for variant, why in r.refused.items()}


def _tiles(workload: Workload) -> list[int]:
    """Tile sides that were traced and change the decode, and no other call's output."""
    usable = _variants(workload) - _refused(workload).keys()
    return sorted(int(v.removeprefix("tiled:")) for v in usable if v.startswith("tiled:"))
