"""Switches of a VAE's code path: used to trace each path, and to apply it.

A variant is named in one string: ``"sliced"``, ``"tiled:512"`` or ``"sliced+tiled:512"``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from autotune.workload.workload import Request

DISTILLED = (83_653_863, 83_819_683)
"""Parameters of the autoencoders that TAESD was distilled from, of four and of sixteen channels.
One of another size has another latent space."""

VIDEO_TILE = 256
"""Side in pixels that diffusers' video autoencoders tile with by default."""


def variants_of(vae: Any, request: Request, batch: int) -> tuple[str, ...]:
    """Switches that can change this call: slicing needs a batch, tiling a larger image."""
    tiles = [f"tiled:{t}" for t in tile_sizes(request)] if has_tiles(vae) else []
    if batch == 1 or not hasattr(vae, "use_slicing"):
        return tuple(tiles)
    return ("sliced", *tiles, *(f"sliced+{t}" for t in tiles))


def tile_sizes(request: Request) -> tuple[int, ...]:
    """A tile side in pixels that really cuts the image.

    512, as most VAEs are trained on; half of a smaller image; a quarter of one so large that 512
    would make hundreds of tiles; for video the 256 of its autoencoders.
    """
    longest = max(request.height, request.width)
    if request.frames > 1 and longest > VIDEO_TILE:
        return (VIDEO_TILE,)
    if longest > 2048:
        return (-(-longest // 4 // 64) * 64,)
    if longest > 512:
        return (512,)
    half = longest // 2 // 64 * 64
    return (half,) if half else ()


def has_tiles(vae: Any) -> bool:
    """Whether this autoencoder lets its tile size be set in the way that ``switch`` does."""
    return hasattr(vae, "use_tiling") and any(
        hasattr(vae, f) for f in ("tile_sample_min_size", "tile_sample_min_height")
    )


def switch(vae: Any, variant: str) -> dict[str, Any]:
    """Put the autoencoder on the path that the variant names.

    Returns:
        The attributes as they were, for ``restore``.
    """
    names = ("use_slicing", "use_tiling", *(n for n in vars(vae) if n.startswith("tile_")))
    before = {n: getattr(vae, n) for n in names if hasattr(vae, n)}
    for part in filter(None, variant.split("+")):
        name, _, size = part.partition(":")
        if name == "sliced":
            vae.enable_slicing()
        elif name == "tiled":
            _tile(vae, int(size))
    return before


def restore(vae: Any, before: dict[str, Any]) -> None:
    """Undo ``switch``."""
    for field, value in before.items():
        setattr(vae, field, value)


@contextmanager
def switched(vae: Any, variant: str) -> Iterator[None]:
    """The autoencoder on another path for a while."""
    before = switch(vae, variant)
    try:
        yield
    finally:
        restore(vae, before)


OVERLAP = 0.25
"""Share of a tile that the next one covers again, where an autoencoder is told it as a share.
CogVideoX's own sixth and fifth are no whole latents: its frames would come out too wide."""


def _tile(vae: Any, pixels: int) -> None:
    """Turn tiling on; image autoencoders have one size, the others one for each direction."""
    if not hasattr(vae, "tile_sample_min_height"):
        vae.enable_tiling()
        if has_tiles(vae):
            vae.tile_sample_min_size = pixels
            vae.tile_latent_min_size = pixels // _factor(vae)
        return
    sizes: dict[str, Any] = {}
    for way in ("height", "width"):
        sizes[f"tile_sample_min_{way}"] = pixels
        stride = getattr(vae, f"tile_sample_stride_{way}", None)
        if stride is not None:  # the same share of overlap as by default, in whole latents
            share = stride / getattr(vae, f"tile_sample_min_{way}")
            factor = _factor(vae)
            sizes[f"tile_sample_stride_{way}"] = int(pixels * share) // factor * factor
        if hasattr(vae, f"tile_overlap_factor_{way}"):
            sizes[f"tile_overlap_factor_{way}"] = OVERLAP
    vae.enable_tiling(**sizes)


def _factor(vae: Any) -> int:
    """Pixels per latent element along a side."""
    told = getattr(vae, "spatial_compression_ratio", None)
    return int(told or 2 ** (len(vae.config.block_out_channels) - 1))
