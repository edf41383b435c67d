"""PyTorch's CUDA caching allocator, as far as sizes go: what it reserves, and what it counts.

``torch.cuda.max_memory_allocated`` counts the blocks handed out, ``max_memory_reserved`` the
segments they are cut from. Both follow from the sequence of requests alone, so they can be worked
out without a GPU (``c10/cuda/CUDACachingAllocator.cpp``, with its default settings).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

from autotune.units import MIB

ROUNDING_BYTES = 512
"""``kMinBlockSize``: every request is rounded up to a multiple of it."""

SMALL_BYTES = MIB
"""``kSmallSize``: requests up to here come from segments of ``SMALL_SEGMENT_BYTES``. A block of
another segment is cut only if more than this is left."""

SMALL_SEGMENT_BYTES = 2 * MIB
"""``kSmallBuffer``; larger segments are multiples of it (``kRoundLarge``)."""

MEDIUM_BYTES, MEDIUM_SEGMENT_BYTES = 10 * MIB, 20 * MIB
"""``kMinLargeAlloc`` and ``kLargeBuffer``: what several smaller requests share."""


@dataclass(eq=False)
class Block:
    """A part of a segment; neighbours are the parts before and after it."""

    bytes: int
    address: int
    is_small: bool
    is_free: bool = False
    before: Block | None = None
    after: Block | None = None

    @property
    def place(self) -> tuple[int, int]:
        """The allocator takes the smallest block that fits, of equal ones the first."""
        return self.bytes, self.address


class DeviceMemoryError(Exception):
    """No segment can be had, even after unused ones were given back."""


class CachingAllocator:
    """Hands out blocks, keeps what is freed, and gives it back only when it must.

    Attributes:
        allocated_bytes: Of the blocks handed out now.
        reserved_bytes: Of the segments held now.
        peak_allocated_bytes: The most so far.
        peak_reserved_bytes: The most so far.
    """

    def __init__(self, capacity_bytes: int | None = None) -> None:
        self.allocated_bytes = self.reserved_bytes = 0
        self.peak_allocated_bytes = self.peak_reserved_bytes = 0
        self._capacity = capacity_bytes
        self._free: dict[bool, list[Block]] = {True: [], False: []}
        self._next_address = 0

    def allocate(self, size: int) -> Block:
        """A block of at least so many bytes.

        Raises:
            DeviceMemoryError: it does not fit in the capacity.
        """
        size = -(-max(size, 1) // ROUNDING_BYTES) * ROUNDING_BYTES
        block = self._find(size) or self._new_segment(size)
        self._cut(block, size)
        block.is_free = False
        self.allocated_bytes += block.bytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: Block) -> None:
        """Take a block back and join it with free neighbours."""
        self.allocated_bytes -= block.bytes
        for other in (block.before, block.after):
            if other is not None and other.is_free:
                self._forget(other)
                block = _join(other, block) if other is block.before else _join(block, other)
        self._keep(block)

    def use(self, size: int) -> None:
        """Allocate and free at once, as an operator does with its workspace."""
        if size > 0:
            self.free(self.allocate(size))

    def release_cached(self) -> None:
        """Give whole unused segments back, as ``torch.cuda.empty_cache`` does."""
        for is_small, blocks in self._free.items():
            kept = [b for b in blocks if b.before is not None or b.after is not None]
            self.reserved_bytes -= sum(b.bytes for b in blocks) - sum(b.bytes for b in kept)
            self._free[is_small] = kept

    def _find(self, size: int) -> Block | None:
        blocks = self._free[size <= SMALL_BYTES]
        index = bisect.bisect_left(blocks, (size, -1), key=lambda b: b.place)
        return blocks.pop(index) if index < len(blocks) else None

    def _new_segment(self, size: int) -> Block:
        segment = segment_bytes(size)
        if self._capacity is not None and self.reserved_bytes + segment > self._capacity:
            self.release_cached()
            if self.reserved_bytes + segment > self._capacity:
                raise DeviceMemoryError(f"{segment} bytes on top of {self.reserved_bytes}")
        self.reserved_bytes += segment
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        block = Block(segment, self._next_address, is_small=size <= SMALL_BYTES)
        self._next_address += segment
        return block

    def _cut(self, block: Block, size: int) -> None:
        left = block.bytes - size
        if left < ROUNDING_BYTES or (not block.is_small and left <= SMALL_BYTES):
            return
        rest = Block(left, block.address + size, block.is_small, before=block, after=block.after)
        if block.after is not None:
            block.after.before = rest
        block.bytes, block.after = size, rest
        self._keep(rest)

    def _keep(self, block: Block) -> None:
        block.is_free = True
        bisect.insort(self._free[block.is_small], block, key=lambda b: b.place)

    def _forget(self, block: Block) -> None:
        blocks = self._free[block.is_small]
        blocks.pop(bisect.bisect_left(blocks, block.place, key=lambda b: b.place))


def segment_bytes(size: int) -> int:
    """Of the segment that a request gets where no free block fits."""
    if size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < MEDIUM_BYTES:
        return MEDIUM_SEGMENT_BYTES
    return -(-size // SMALL_SEGMENT_BYTES) * SMALL_SEGMENT_BYTES


def rounding_bytes(sizes: Iterable[int]) -> int:
    """What the allocator counts beyond the bytes of tensors that are moved to the device at once.

    Blocks that are not worth cutting: 0.05 % of FLUX.1's weights, 1.7 % of SDXL's.
    """
    allocator, total = CachingAllocator(), 0
    for size in sizes:
        allocator.allocate(size)
        total += size
    return allocator.allocated_bytes - total


HOST_PAGE_BYTES = 4096


def pinned_bytes(size: int) -> int:
    """What PyTorch pins of host RAM for so many: the next power of two, in whole pages.

    ``CachingHostAllocatorImpl::allocate`` in ``aten/src/ATen/core/CachingHostAllocator.h``. Of
    FLUX.1's transformer in 16 bits it makes 34.7 GiB where the weights are 22.2.
    """
    return max(HOST_PAGE_BYTES, 1 << (size - 1).bit_length()) if size else 0


def _join(first: Block, second: Block) -> Block:
    first.bytes += second.bytes
    first.after = second.after
    if second.after is not None:
        second.after.before = first
    return first
