"""Decoding in parts: image by image, or tile by tile."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import msgspec

from autotune.errors import OptimizationError
from autotune.optimizations.base import Optimization, Parameters, Undo
from autotune.optimizations.execution import Execution
from autotune.probe.machine import Machine
from autotune.workload.variants import has_tiles, restore, switch
from autotune.workload.workload import Workload


class _DecodeSwitch(Optimization):
    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        before = switch(pipe.vae, self._variant(parameters))
        own = {k: v for k, v in before.items() if k.startswith(self._fields)}
        return lambda: restore(pipe.vae, own)

    _fields: tuple[str, ...]
    """How the names of the attributes begin that it changes."""

    @abstractmethod
    def _variant(self, parameters: Parameters) -> str: ...


class VaeSlicing(_DecodeSwitch):
    """Decode one image of the batch at a time."""

    name = "vae_slicing"
    summary = "decodes one image of the batch at a time"
    relieves = "vram of decode"
    _fields = ("use_slicing",)

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        if workload.request.batch == 1:
            return "a batch of one has nothing to slice"
        if "sliced" not in _variants(workload):
            return "slicing changes nothing in this VAE's decode"
        return None

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        return msgspec.structs.replace(execution, decode_sliced=True)

    def code(self, parameters: Parameters) -> tuple[str, ...]:
        return ("pipe.{autoencoder}.enable_slicing()",)

    def _variant(self, parameters: Parameters) -> str:
        return "sliced"

    def found(self, pipe: Any) -> Parameters | None:
        return {} if getattr(_vae(pipe), "use_slicing", False) else None


class VaeTiling(_DecodeSwitch):
    """Decode in overlapping tiles that are blended."""

    name = "vae_tiling"
    summary = "decodes in overlapping tiles that are blended"
    relieves = "vram of decode"
    exactness = "near-exact"
    defaults = {"tile": 512}
    _fields = ("use_tiling", "tile_")

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        request = workload.request
        if not _tiles(workload):
            return f"a decode at {request.width}x{request.height} is not cut into tiles by this VAE"
        return None

    def worth_trying(self, machine: Machine, workload: Workload) -> tuple[Parameters, ...]:
        return tuple({"tile": t} for t in _tiles(workload))

    def check(self, parameters: Parameters) -> None:
        tile = int(parameters["tile"])
        if not 64 <= tile <= 4096 or tile % 64:
            raise OptimizationError(
                f"vae_tiling:tile={tile} is unusable", "use a multiple of 64 from 64 to 4096"
            )

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        return msgspec.structs.replace(execution, decode_tile=int(parameters["tile"]))

    def code(self, parameters: Parameters) -> tuple[str, ...]:
        tile, vae = parameters["tile"], "pipe.{autoencoder}"
        return (
            f"{vae}.enable_tiling()",
            f'if hasattr({vae}, "tile_sample_min_height"):',
            '    for way in ("height", "width"):',
            f'        whole = getattr({vae}, f"tile_sample_min_{{way}}")',
            f'        stride = getattr({vae}, f"tile_sample_stride_{{way}}", None)',
            f'        setattr({vae}, f"tile_sample_min_{{way}}", {tile})',
            "        if stride is not None:",
            f'            setattr({vae}, f"tile_sample_stride_{{way}}", {tile} * stride // whole)',
            "else:",
            f"    factor = 2 ** (len({vae}.config.block_out_channels) - 1)",
            f"    {vae}.tile_sample_min_size = {tile}",
            f"    {vae}.tile_latent_min_size = {tile} // factor",
        )

    def _variant(self, parameters: Parameters) -> str:
        return f"tiled:{parameters['tile']}"

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        if not has_tiles(pipe.vae):
            raise OptimizationError(
                f"{type(pipe.vae).__name__} does not take a tile size this way",
                "add --without vae_tiling",
            )
        return super().apply(pipe, parameters, device)

    def found(self, pipe: Any) -> Parameters | None:
        vae = _vae(pipe)
        if not getattr(vae, "use_tiling", False):
            return None
        sizes = (getattr(vae, f"tile_sample_min_{name}", None) for name in ("size", "height"))
        return {"tile": next((int(s) for s in sizes if s), self.defaults["tile"])}


def _vae(pipe: Any) -> Any:
    return getattr(pipe, "vae", None)


def _variants(workload: Workload) -> set[str]:
    runs = [r for p in workload.phases if p.name == "decode" for r in p.runs]
    return {v for r in runs for v in r.variants}


def _tiles(workload: Workload) -> list[int]:
    """Tile sides that were traced and change the decode."""
    found = (v.removeprefix("tiled:") for v in _variants(workload) if v.startswith("tiled:"))
    return sorted(map(int, found))
