"""Transfers: what can be checked with no link."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autotune.probe import transfers
from autotune.probe.machine import Figure, TransferPoint
from autotune.probe.pcie import line_rate
from autotune.probe.timing import Timer
from autotune.probe.transfers import (
    copy_rate,
    headline,
    measure_link,
    measure_overlap,
    module_rates,
    offloadable_module,
    overlap,
    sweep_of,
)

CPU = torch.device("cpu")
BRIEF = Timer(CPU, 0.002)
MIB = 1 << 20


@pytest.fixture
def no_pinning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinning memory needs CUDA; everything else of a transfer runs between CPU tensors."""
    monkeypatch.setattr(
        transfers, "_host_buffer", lambda size, pinned: torch.zeros(size, dtype=torch.uint8)
    )


def test_a_cpu_has_no_link() -> None:
    assert measure_link(BRIEF, memory_bytes=MIB) is None


def test_a_copy_has_a_rate() -> None:
    source = torch.ones(MIB, dtype=torch.uint8)
    target = torch.zeros_like(source)
    assert copy_rate(BRIEF, target, source).value > 0
    assert torch.equal(target, source)


def test_the_module_is_as_large_as_allowed_and_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    module = offloadable_module(64 * MIB)
    size = sum(parameter.nbytes for parameter in module.parameters())
    assert 32 * MIB < size <= 64 * MIB
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.dtype is torch.float16 for parameter in module.parameters())


def test_module_rates_leave_out_the_first_round() -> None:
    out, back = module_rates(BRIEF, 8 * MIB)
    assert len(out.samples) == len(back.samples) == transfers._MODULE_ROUNDS


def test_module_rates_that_were_disturbed_are_measured_once_more() -> None:
    reasons = iter([("somebody else",), ()])

    class Noise:
        def begin(self) -> Any:
            return lambda: next(reasons)

    timer: Any = replace(BRIEF, watch=Noise())
    out, back = module_rates(timer, 8 * MIB)
    assert next(reasons, None) is None, "both times were watched"
    assert "somebody else" not in (*out.disturbances, *back.disturbances)


@pytest.mark.usefixtures("no_pinning")
def test_the_sweep_copies_every_size_both_ways() -> None:
    points = tuple(sweep_of(BRIEF, (MIB, 4 * MIB), pinned=True))
    assert [(p.direction, p.bytes) for p in points] == [
        ("h2d", MIB),
        ("d2h", MIB),
        ("h2d", 4 * MIB),
        ("d2h", 4 * MIB),
    ]
    assert all(point.pinned and point.bytes_per_s.samples for point in points)


@pytest.mark.usefixtures("no_pinning")
def test_a_slow_link_is_not_swept_with_large_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "copy_rate", lambda *_: Figure(10.0 * MIB))
    points = tuple(sweep_of(BRIEF, (MIB, 4 * MIB, 16 * MIB), pinned=False))
    assert {point.bytes for point in points} == {MIB}


def test_the_headline_is_the_rate_of_a_large_copy() -> None:
    sizes = (MIB, 256 * MIB, 1024 * MIB)
    sweep = tuple(
        TransferPoint(direction, pinned, size, Figure(float(size)))
        for size in sizes
        for direction in ("h2d", "d2h")
        for pinned in (True, False)
    )
    assert headline(sweep, "d2h", pinned=False).value == 256 * MIB
    assert headline(sweep[:4], "h2d", pinned=True).value == MIB


@given(st.integers(0, 1 << 34), st.booleans())
def test_sweeps_stay_within_the_allowance(memory: int, quick: bool) -> None:
    sizes = transfers._sizes(memory, quick)
    assert sizes == tuple(sorted(sizes))
    assert sizes[-1] <= max(MIB, memory)
    assert sizes[-1] <= (256 * MIB if quick else 1024 * MIB)


def test_a_link_is_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def swept(timer: Any, sizes: Any, *, pinned: bool) -> Any:
        yield TransferPoint("h2d", pinned, sizes[-1], Figure(2.0 if pinned else 4.0))
        yield TransferPoint("d2h", pinned, sizes[-1], Figure(3.0 if pinned else 5.0))

    facts = SimpleNamespace(pcie_generation_max=4, pcie_width_max=16)
    monkeypatch.setattr(transfers, "sweep_of", swept)
    monkeypatch.setattr(transfers, "_link_in_copy", lambda *_: (4, 8))
    monkeypatch.setattr(transfers, "module_rates", lambda *_, **__: (Figure(6.0), Figure(7.0)))
    monkeypatch.setattr(transfers, "measure_overlap", lambda *_: Figure(0.9))
    monkeypatch.setattr(transfers.nvml, "gpu", lambda uuid: facts)
    timer = Timer(torch.device("cuda:0"))
    link = measure_link(timer, memory_bytes=64 * MIB, uuid="GPU-x")
    assert link is not None
    assert (link.h2d_pinned_bytes_per_s.value, link.d2h_pageable_bytes_per_s.value) == (2.0, 5.0)
    assert (link.module_h2d_bytes_per_s.value, link.overlap_fraction) == (6.0, Figure(0.9))
    assert (link.pcie_width_max, link.pcie_width_in_copy) == (16, 8)
    assert len(link.sweep) == 4
    quick = measure_link(timer, memory_bytes=64 * MIB, quick=True)
    assert quick is not None
    assert quick.sweep == ()
    assert quick.overlap_fraction is None


@pytest.mark.parametrize(
    ("both", "fraction"), [(3.0, 0.0), (2.5, 0.5), (2.0, 1.0), (4.0, 0.0), (1.5, 1.0)]
)
def test_overlap_is_what_doing_both_at_once_saves(both: float, fraction: float) -> None:
    figure = overlap(1.0, 2.0, Figure(both, (both, both, 3.0)))
    assert figure.value == pytest.approx(fraction)
    assert figure.samples == (figure.value, figure.value, 0.0)


@pytest.mark.usefixtures("no_pinning")
def test_a_copy_runs_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[tuple[str, str]] = []

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = str(name)

        def wait_stream(self, other: Stream) -> None:
            waits.append((self.name, other.name))

    monkeypatch.setattr(transfers, "_OVERLAPPED_SIDE", 32)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copying"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("computing"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    with torch.no_grad():
        figure = measure_overlap(BRIEF, 4 * MIB)
    assert figure is not None
    assert 0 <= figure.value <= 1
    assert waits[:2] == [("copying", "computing"), ("computing", "copying")]
    assert measure_overlap(BRIEF, 1) is None


@pytest.mark.usefixtures("no_pinning")
def test_the_link_state_in_copy_is_the_best_one_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter([(1, 16), (4, 16), (None, None), (4, 16), (3, 16)])
    monkeypatch.setattr(transfers.nvml, "link_state", lambda uuid: next(states))
    assert transfers._link_in_copy(BRIEF, Figure(1e9), MIB, "GPU-x") == (4, 16)
    assert transfers._link_in_copy(BRIEF, Figure(1e9), MIB, None) == (None, None)


@pytest.mark.parametrize(
    ("generation", "width", "gigabytes"),
    [(3, 16, 15.76), (4, 16, 31.5), (4, 8, 15.75), (5, 16, 63.0), (1, 4, 1.0)],
)
def test_line_rates(generation: int, width: int, gigabytes: float) -> None:
    assert line_rate(generation, width) == pytest.approx(gigabytes * 1e9, rel=1e-3)


def test_an_unknown_link_promises_nothing() -> None:
    assert line_rate(None, 16) is line_rate(4, None) is line_rate(4, 0) is line_rate(9, 16) is None
