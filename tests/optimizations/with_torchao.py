"""Quantization by torchao, which is installed apart: importing it slows every other test.

Run by ``test_quantization.py``.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers import FluxPipeline

from autotune.errors import OptimizationError
from autotune.optimizations import find
from autotune.optimizations.target import LOADING, Target
from autotune.testing.pairs import Subject
from autotune.testing.pipelines import BUILDERS, call
from autotune.testing.state import differences, whole_state
from tests.optimizations.packed import require_packed_and_back

ALIKE = {"int8": 0.01, "float8": 0.05}
"""Scheme → largest difference of a pixel, of 1, in a network of random weights."""


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
@pytest.mark.parametrize("scheme", ALIKE)
def test_layers_are_packed_and_come_back(kind: str, scheme: str) -> None:
    require_packed_and_back(kind, scheme, ALIKE[scheme])


@pytest.mark.parametrize("scheme", ALIKE)
def test_the_lines_for_it_load_the_same_weights(scheme: str, tmp_path: Path) -> None:
    BUILDERS["flux"]().save_pretrained(tmp_path)
    quantization = find("quantization")
    target = Target("FluxPipeline", str(tmp_path), "bfloat16", denoisers=("transformer",))
    lines = quantization.code({"scheme": scheme}, target)
    loading = [line.removeprefix(LOADING) for line in lines if line.startswith(LOADING)]
    names: dict[str, Any] = {}
    exec("\n".join(line for line in lines if not line.startswith(LOADING)), names)
    load = functools.partial(FluxPipeline.from_pretrained, tmp_path, torch_dtype=torch.bfloat16)
    loaded = eval(f"load({', '.join(loading)})", {**names, "load": load})
    applied = load()
    quantization.apply(applied, {"scheme": scheme}, "cpu")
    assert quantization.found(loaded) == {"scheme": scheme}
    theirs = dict(loaded.transformer.named_parameters())
    for name, weight in applied.transformer.named_parameters():
        if type(weight) is not torch.nn.Parameter:  # diffusers packs small layers, too
            assert type(theirs[name]) is type(weight)
            assert torch.equal(theirs[name].dequantize(), weight.dequantize()), name


def test_hooks_that_came_and_went_do_not_hide_what_is_packed() -> None:
    """They leave the layers' own forwards on them, which a copy would call."""
    pipe, quantization = BUILDERS["sd"](), find("quantization")
    plain = call(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    cpu_offload(pipe.unet, torch.device("cpu"))
    pipe.remove_all_hooks()
    remove_hook_from_module(pipe.unet, recurse=True)
    undo = quantization.apply(pipe, {"scheme": "int8"}, "cpu")
    assert not torch.equal(call(pipe), plain)
    undo()
    assert torch.equal(call(pipe), plain)


def test_pairs_with_it_come_fail_and_go() -> None:
    subject = Subject("flux")
    pairs = [p for p in subject.pairs() if "quantization" in {s.name for s in p}]
    assert len(pairs) > 5
    assert list(subject.problems(pairs[-1])) == []


def test_a_gpu_that_does_not_multiply_float8_is_said() -> None:
    pipe, quantization = BUILDERS["flux"](), find("quantization")
    before = whole_state(pipe)
    with pytest.raises((OptimizationError, AssertionError), match=r"8\.9"):
        quantization.apply(pipe, {"scheme": "float8_dynamic"}, "cpu")
    assert differences(before, whole_state(pipe)) == {}
