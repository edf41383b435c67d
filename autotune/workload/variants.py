"""Switches of a VAE's code path: used to trace each path, and to apply it.

A variant is named in one string: ``"sliced"``, ``"tiled:512"`` or ``"sliced+tiled:512"``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from autotune.workload.workload import Request

_TILE_FIELDS = ("tile_sample_min_size", "tile_latent_min_size")


def decode_variants(request: Request) -> tuple[str, ...]:
    """Switches that can change this decode: slicing needs a batch, tiling a larger image."""
    tiles = [f"tiled:{t}" for t in tile_sizes(request)]
    if request.batch == 1:
        return tuple(tiles)
    return ("sliced", *tiles, *(f"sliced+{t}" for t in tiles))


def tile_sizes(request: Request) -> tuple[int, ...]:
    """A tile side in pixels that really cuts the image.

    512, as most VAEs are trained on; half of a smaller image; a quarter of one so large that 512
    would make hundreds of tiles.
    """
    longest = max(request.height, request.width)
    if longest > 2048:
        return (-(-longest // 4 // 64) * 64,)
    if longest > 512:
        return (512,)
    half = longest // 2 // 64 * 64
    return (half,) if half else ()


def has_tiles(vae: Any) -> bool:
    """Whether this VAE lets its tile size be set in the way that ``switch`` does."""
    return all(hasattr(vae, f) for f in _TILE_FIELDS) and hasattr(vae, "use_tiling")


def switch(vae: Any, variant: str) -> dict[str, Any]:
    """Put the VAE on the path that the variant names.

    Returns:
        The attributes as they were, for ``restore``.
    """
    fields = ("use_slicing", "use_tiling", *_TILE_FIELDS)
    before = {f: getattr(vae, f) for f in fields if hasattr(vae, f)}
    for part in filter(None, variant.split("+")):
        name, _, size = part.partition(":")
        if name == "sliced":
            vae.enable_slicing()
        elif name == "tiled":
            vae.enable_tiling()
            _set_tile(vae, int(size))
    return before


def restore(vae: Any, before: dict[str, Any]) -> None:
    """Undo ``switch``."""
    for field, value in before.items():
        setattr(vae, field, value)


@contextmanager
def switched(vae: Any, variant: str) -> Iterator[None]:
    """The VAE on another path for a while."""
    before = switch(vae, variant)
    try:
        yield
    finally:
        restore(vae, before)


def _set_tile(vae: Any, pixels: int) -> None:
    if not has_tiles(vae):
        return
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    vae.tile_sample_min_size = pixels
    vae.tile_latent_min_size = pixels // factor
