"""Components on other GPUs. On a CPU they are there in name only: what is tried is who computes.

Every operator that reads a weight of a component that is elsewhere must run between its hook's two
halves, which bring its inputs there and its outputs back. Copies between GPUs are not tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import msgspec
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from autotune.errors import OptimizationError
from autotune.optimizations import device_map, find
from autotune.optimizations.modules import autoencoders, encoders
from autotune.probe.machine import Machine
from autotune.probe.reference import load_machine
from autotune.testing.pipelines import BUILDERS, call
from tests.workloads import few_frames, workload_of

MAP = find("device_map")
HOME, THERE = torch.device("cpu", 0), torch.device("cpu", 1)

KINDS = ("sd-img2img", "sdxl", "flux", "sana", "z-image", "ltx-video", "wan", "svd")
"""Every kind of autoencoder, and encoders that are large language models."""


class _Reads(TorchDispatchMode):
    """Operators that read a weight while no hook of its component is at work."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.astray: set[str] = set()
        self.visits = self.depth = 0
        self._weights = weights

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = any(isinstance(a, torch.Tensor) and self._is_weight(a) for a in args)
        is_copy = func._overloadpacket._qualified_op_name in ("aten::_to_copy", "aten::detach")
        if reads and not self.depth and not is_copy:
            self.astray.add(str(func))
        return func(*args, **(kwargs or {}))

    def _is_weight(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._weights


@contextmanager
def watched(pipe: Any) -> Iterator[_Reads]:
    moved = (*encoders(pipe), *autoencoders(pipe))
    weights = {p.untyped_storage().data_ptr() for m in moved for p in m.parameters()}
    hook, reads = device_map._visiting_hook(), _Reads(weights)
    before, after = hook.pre_forward, hook.post_forward

    def enter(self: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        is_call = bool(args or kwargs)  # decode asks an autoencoder's own hook, with nothing
        reads.depth += is_call and self.there == THERE
        reads.visits += is_call and self.there == THERE
        return before(self, module, *args, **kwargs)

    def leave(self: Any, module: Any, output: Any) -> Any:
        reads.depth -= self.there == THERE
        return after(self, module, output)

    with patch.multiple(hook, pre_forward=enter, post_forward=leave), reads:
        yield reads


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_elsewhere_computes_within_its_hooks(kind: str) -> None:
    pipe = BUILDERS[kind]()
    plain = call(pipe, **few_frames(pipe))
    undo = MAP.apply(pipe, {"encoders": 1, "autoencoder": 1}, "cpu")
    with watched(pipe) as reads:
        image = call(pipe, **few_frames(pipe))
    undo()
    assert torch.equal(image, plain)
    assert reads.visits and not reads.depth
    assert not reads.astray, f"outside of any hook: {reads.astray}"


@pytest.mark.parametrize("encoders_on", [0, 1])
@pytest.mark.parametrize("autoencoder_on", [0, 1])
def test_the_pipeline_computes_where_its_denoiser_is(
    sdxl_pipe: Any, encoders_on: int, autoencoder_on: int
) -> None:
    """Also where the component that diffusers asks first, the VAE, is on another GPU."""
    parameters = {"encoders": encoders_on, "autoencoder": autoencoder_on}
    undo = MAP.apply(sdxl_pipe, parameters, "cpu:0")
    assert sdxl_pipe._execution_device == HOME
    assert MAP.found(sdxl_pipe) == parameters
    undo()
    assert MAP.found(sdxl_pipe) is None


def test_what_is_offloaded_is_left_alone(sdxl_pipe: Any) -> None:
    sdxl_pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(OptimizationError, match="what other hooks move"):
        MAP.apply(sdxl_pipe, dict(MAP.defaults), "cpu")


# ---- where it is of use -------------------------------------------------------------------------


def two_gpus() -> Machine:
    return load_machine("rtx-4090-24gb-x2")


def test_one_gpu_is_too_few() -> None:
    workload = workload_of("sdxl")
    assert "second GPU" in (MAP.unavailable(load_machine("rtx-4090-24gb"), workload) or "")
    assert MAP.unavailable(two_gpus(), workload) is None


def test_a_gpu_of_another_model_is_not_used() -> None:
    machine = two_gpus()
    other = msgspec.structs.replace(machine.others[0], name="Tesla T4")
    reason = MAP.unavailable(msgspec.structs.replace(machine, others=(other,)), workload_of("sd"))
    assert reason is not None and "Tesla T4" in reason


def test_the_freest_of_the_others_is_tried() -> None:
    machine = two_gpus()
    first = machine.others[0]
    second, third = (
        msgspec.structs.replace(first, index=index, free_bytes=first.free_bytes + index)
        for index in (2, 3)
    )
    machine = msgspec.structs.replace(machine, others=(first, second, third))
    tried = MAP.worth_trying(machine, workload_of("sdxl"))
    assert {(p["encoders"], p["autoencoder"]) for p in tried} == {
        (3, 3), (3, 0), (0, 3), (3, 2), (2, 3),
    }  # fmt: skip


def test_no_gpu_has_a_negative_index() -> None:
    with pytest.raises(OptimizationError, match="is no GPU"):
        MAP.setting({"encoders": -1})
