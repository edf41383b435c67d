"""What all tests share: a cache folder of their own, recorded machines, small real pipelines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autotune.probe.machine import Machine
from autotune.probe.reference import load_machine

if "PYTEST_XDIST_WORKER" in os.environ:  # workers that each start a thread per core starve
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test reads or writes the user's profiles, and none reaches for the hub."""
    monkeypatch.setenv("AUTOTUNE_CACHE", str(tmp_path / "autotune-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield


@pytest.fixture
def rtx_3080() -> Machine:
    """A desktop card on today's stack: xFormers ties with SDPA."""
    return load_machine("rtx-3080-10gb")


@pytest.fixture
def rtx_3080_torch1() -> Machine:
    """The same card where the default attention is vanilla and xFormers measures faster."""
    return load_machine("rtx-3080-10gb-torch1")


@pytest.fixture
def cpu_machine() -> Machine:
    """A machine without a GPU."""
    return load_machine("cpu-16-cores")


# ---- small real pipelines: random but seeded weights, float32, milliseconds per step ------------

Draw = Callable[..., Any]


@pytest.fixture
def sd_pipe() -> Any:
    """Like SD 1.5: one text encoder, cross-attention at every level of the UNet."""
    return _build("sd")


@pytest.fixture
def sdxl_pipe() -> Any:
    """Like SDXL: two text encoders, size conditions, no attention at the latent's resolution."""
    return _build("sdxl")


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request: pytest.FixtureRequest) -> Any:
    """Each of the two in turn."""
    return _build(request.param)


def _build(kind: str) -> Any:
    from autotune.testing.pipelines import BUILDERS  # imports torch, which most tests do without

    return BUILDERS[kind]()


@pytest.fixture
def draw() -> Draw:
    """``draw(pipe, seed=0, side=64, images=2)``: a pipeline's images as one float tensor."""

    def draw_images(pipe: Any, seed: int = 0, side: int = 64, images: int = 2) -> Any:
        import torch

        return pipe(
            "a small cat",
            height=side,
            width=side,
            num_inference_steps=2,
            num_images_per_prompt=images,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images

    return draw_images


# ---- state --------------------------------------------------------------------------------------

Snapshot = Callable[[Any], dict[str, Any]]


@pytest.fixture
def snapshot() -> Snapshot:
    """All that an optimization could leave changed on a pipeline, to compare by ``==``."""
    from autotune.testing.state import take_snapshot

    return take_snapshot
