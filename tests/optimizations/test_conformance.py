"""Every member of the catalogue keeps to what the suite asks of any optimization."""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from autotune.optimizations import CATALOGUE
from autotune.optimizations.attention import KERNELS
from autotune.probe.machine import Machine
from autotune.probe.reference import load_machine
from autotune.testing import OptimizationConformance
from autotune.testing.pipelines import build_flux, build_sd, build_sdxl
from tests.thorough import THOROUGH, part


def build_half_sdxl() -> Any:
    """In float16, so that its decode is widened."""
    return build_sdxl().to(torch.float16)


def with_kernels(machine: Machine) -> Machine:
    """A machine on which each kernel was timed."""
    timed = next(r for r in machine.attention if r.flops_per_s)
    names = ("sage", *(f"sdpa_{kernel}" for kernel in KERNELS))
    rates = [msgspec.structs.replace(timed, implementation=name) for name in names]
    return msgspec.structs.replace(machine, attention=(*machine.attention, *rates))


def build_wide_flux() -> Any:
    """With heads of 64, which SageAttention has a kernel for."""
    pipe = build_flux()
    config = {**pipe.transformer.config, "attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)}
    torch.manual_seed(0)
    pipe.transformer = type(pipe.transformer).from_config(config).eval()
    return pipe


CHANGES: dict[str, dict[str, Any]] = {
    "device_map": {"machine": with_kernels(load_machine("rtx-4090-24gb-x2"))},
    "first_block_cache": {
        "pipelines": (build_flux,),
        "settings": ({"threshold": 0.5},),  # random weights let no step pass at less
        "steps": 4,
    },
    "taylorseer_cache": {"pipelines": (build_flux,), "steps": 6},  # it computes the first three
    "sage_attention": {"pipelines": (build_wide_flux,)},
    "faster_cache": {"pipelines": (build_flux,), "steps": 4},
    "vae_bfloat16": {"pipelines": (build_half_sdxl,), "side": 32},
    # Tiles of 64 pixels cut 128. The transformer, which draws that sooner, is tried first.
    "vae_tiling": {"pipelines": (build_flux, build_sd), "side": 128, "steps": 1},
}
"""Attributes of the suite that are others for an optimization."""

ALONE_AVAILABLE = ("vae_bfloat16", "vae_tiling")
"""For requests of their own, so that others do not try them."""

APART = ("quantization", "tiny_autoencoder")
"""They need a package or weights of their own, and have tests of their own."""


def _suite(name: str) -> type[OptimizationConformance]:
    """Each pair is tried once: by the first of the two, or by the one with requirements."""
    names = list(CATALOGUE)
    index = names.index(name)
    others = names if name in ALONE_AVAILABLE else names[index + 1 :]
    others = part(others, 4, index)  # the rest in test_pairs.py and scripts/check_pairs.py
    attributes = {
        "optimization": CATALOGUE[name],
        "machine": with_kernels(load_machine("rtx-3080-10gb")),
        "partners": tuple(CATALOGUE[n] for n in others if n not in APART),
        **CHANGES.get(name, {}),
    }
    if not THOROUGH:  # test_pairs tries a part of the pairs, and more with each
        attributes["test_goes_with_every_other"] = None
    return type(f"Test_{name}", (OptimizationConformance,), attributes)


for _name in CATALOGUE:
    if _name not in APART:
        globals()[f"Test_{_name}"] = _suite(_name)
