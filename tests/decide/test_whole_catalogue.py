"""Every optimization being allowed, a plan is never worse than one of the five that guides name.

Worse means: slower by more than the tolerance; larger by more than that without being faster by it,
since memory that fits has no other use; not fitting where a classic one does; and where none fits,
a nearest miss that is not as near.
"""

from __future__ import annotations

import pytest

from autotune.decide.decision import TOLERANCE, Decision, decide
from autotune.decide.limits import Limits
from autotune.decide.predict import Predictor
from autotune.optimizations import CATALOGUE, CLASSIC
from autotune.probe.machine import Machine
from autotune.probe.reference import load_machine, reference_machines
from autotune.workload.architecture import builtin_names, find_architecture
from autotune.workload.request import native_request
from autotune.workload.workload import Workload
from tests.thorough import THOROUGH, part

SIZES: dict[str, tuple[dict[str, int], ...]] = {
    "sd15": ({}, {"height": 768, "width": 768, "batch": 4}, {"height": 1024, "width": 1024}),
    "sdxl": ({"height": 512, "width": 512}, {}, {"batch": 4}),
    "sd3-medium": ({"height": 512, "width": 512}, {}, {"batch": 2}),
    "flux-dev": ({"height": 512, "width": 512}, {}, {"height": 1024, "width": 1536}),
    "pixart-sigma": ({"height": 512, "width": 512}, {}, {"batch": 4}),
    "ltx-video": (
        {"height": 256, "width": 256, "frames": 9},
        {"height": 512, "width": 704, "frames": 9},
        {"height": 512, "width": 704, "frames": 25},
    ),
}


OTHERS = tuple(name for name in builtin_names() if name not in SIZES)
"""Left to the thorough tests."""


def sizes_of(model: str) -> tuple[dict[str, int], ...]:
    """Three requests: smaller than the model's own, its own, and two at once."""
    if model in SIZES:
        return SIZES[model]
    native = native_request(find_architecture(model))
    half = {side: max(64, getattr(native, side) // 128 * 64) for side in ("height", "width")}
    return half, {}, {"batch": 2}


def choice(machine: Machine, workload: Workload, quality: str, only: tuple[str, ...]) -> Decision:
    limits = Limits(quality=quality, only=only)
    return decide(Predictor(machine, workload), limits, CATALOGUE)


CASES = [
    (model, size, quality)
    for model in (*SIZES, *(OTHERS if THOROUGH else ()))
    for size in sizes_of(model)
    for quality in ("exact", "fast")
]


@pytest.mark.parametrize(("model", "size", "quality"), part(CASES, 3), ids=str)
def test_on_every_reference_machine(traced, model, size, quality):
    """One case and the next share the machines out between them, unless all are asked for."""
    workload = traced(model, **size)
    for name in part(reference_machines(), 4, CASES.index((model, size, quality))):
        machine = load_machine(name)
        classic = choice(machine, workload, quality, CLASSIC)
        whole = choice(machine, workload, quality, ())
        assert whole.fits or not classic.fits, name
        if classic.fits:
            longest = classic.chosen.seconds * (1 + TOLERANCE)
            assert whole.chosen.seconds <= longest, name
            is_faster = whole.chosen.seconds * (1 + TOLERANCE) < classic.chosen.seconds
            largest = classic.chosen.needed_bytes * (1 + TOLERANCE)
            assert is_faster or whole.chosen.needed_bytes <= largest, name
        if not whole.fits:
            count, shares = whole.budget.shortage(whole.chosen)
            classic_count, classic_shares = whole.budget.shortage(classic.chosen)
            assert count <= classic_count, name
            assert count < classic_count or shares <= classic_shares * (1 + TOLERANCE), name


def test_it_fits_where_no_classic_set_does(traced):
    """Published: tiling the decode is what SDXL's last gigabytes hang on."""
    machine, workload = load_machine("laptop-rtx-3050-4gb"), traced("sdxl", batch=4)
    assert not choice(machine, workload, "high", CLASSIC).fits
    assert choice(machine, workload, "high", ()).fits
