"""The allocator's model: the rules of the real one, and what was published of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.decide.allocator import (
    CachingAllocator,
    DeviceMemoryError,
    rounding_bytes,
    segment_bytes,
)
from autotune.units import GIB, KIB, MIB


@pytest.mark.parametrize(
    ("size", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
        (11 * MIB + 1, 12 * MIB, 12 * MIB),  # less than a MiB is left: not cut off
    ],
)
def test_sizes_of_one_request(size: int, allocated: int, reserved: int) -> None:
    allocator = CachingAllocator()
    allocator.allocate(size)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (allocated, reserved)


def test_what_is_freed_is_used_again() -> None:
    allocator = CachingAllocator()
    for _ in range(3):
        allocator.use(100 * MIB)
    assert allocator.reserved_bytes == 100 * MIB
    allocator.use(101 * MIB)  # fits in no free block
    assert allocator.reserved_bytes == 202 * MIB


def test_the_smallest_block_that_fits_is_taken() -> None:
    allocator = CachingAllocator()
    large, small = allocator.allocate(100 * MIB), allocator.allocate(50 * MIB)
    allocator.free(large)
    allocator.free(small)
    assert allocator.allocate(40 * MIB) is small


def test_neighbours_are_joined() -> None:
    allocator = CachingAllocator()
    allocator.use(100 * MIB)
    parts = [allocator.allocate(30 * MIB) for _ in range(3)]
    for part in (parts[0], parts[2], parts[1]):
        allocator.free(part)
    allocator.allocate(100 * MIB)
    assert allocator.reserved_bytes == 100 * MIB


def test_unused_segments_are_given_back_before_it_fails() -> None:
    allocator = CachingAllocator(capacity_bytes=100 * MIB)
    allocator.use(60 * MIB)
    block = allocator.allocate(90 * MIB)
    assert allocator.reserved_bytes == 90 * MIB
    with pytest.raises(DeviceMemoryError):
        allocator.allocate(20 * MIB)
    allocator.free(block)
    allocator.release_cached()
    assert allocator.reserved_bytes == 0


@given(st.lists(st.integers(min_value=1, max_value=64 * MIB), max_size=30), st.randoms())
def test_nothing_is_lost(sizes: list[int], random: object) -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(s) for s in sizes]
    assert allocator.allocated_bytes >= sum(sizes)
    assert allocator.reserved_bytes <= sum(segment_bytes(s) for s in sizes)
    random.shuffle(blocks)  # type: ignore[attr-defined]
    for block in blocks:
        allocator.free(block)
    assert allocator.allocated_bytes == 0
    allocator.release_cached()
    assert allocator.reserved_bytes == 0
    assert allocator.peak_reserved_bytes >= allocator.peak_allocated_bytes


def test_rounding_is_what_is_not_worth_cutting_off() -> None:
    assert rounding_bytes([512] * 8) == 0
    # The seventeenth of 1.125 MiB gets all that is left of a segment of 20.
    assert rounding_bytes([1152 * KIB] * 17) == 20 * MIB - 17 * 1152 * KIB


def test_weights_of_flux_as_published() -> None:
    """31.438 GiB allocated (diffusers-torchao), 31.447 reserved (diffusers-quantization blog)."""
    import torch

    from autotune.workload.architecture import find_architecture
    from autotune.workload.components import build_on_meta, describe

    architecture = find_architecture("flux-dev")
    allocator = CachingAllocator()
    for name in ("vae", "text_encoder", "text_encoder_2", "transformer"):
        module = build_on_meta(name, architecture.components[name], torch.bfloat16)
        for size in describe(name, module).tensor_bytes:
            allocator.allocate(size)
    assert allocator.allocated_bytes / GIB == pytest.approx(31.438, abs=0.001)
    assert allocator.reserved_bytes / GIB == pytest.approx(31.447, abs=0.001)
