"""What the rules of coherence say, on diffusers itself: one test for each rule, by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from autotune.decide.rules import LAYER_OFFLOADS, RULES
from autotune.optimizations import find
from autotune.optimizations.modules import denoisers
from autotune.testing.pipelines import build_flux, build_sd, call
from autotune.testing.standins import sage_on_cpu, sequential_on_cpu


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small pipelines are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def apply(pipe: Any, name: str, **parameters: Any) -> Callable[[], None]:
    handler = find(name)
    return handler.apply(pipe, handler.setting(parameters).parameters, "cpu")


def processors(pipe: Any) -> set[str]:
    layers = (layer for m in denoisers(pipe) for layer in m.modules())
    return {type(layer.processor).__name__ for layer in layers if hasattr(layer, "processor")}


def test_slicing_alone(xformers_on_cpu: list[Any]) -> None:
    pipe = build_sd()
    pipe.unet.enable_xformers_memory_efficient_attention()
    pipe.enable_attention_slicing()
    xformers_on_cpu.clear()
    call(pipe)
    assert processors(pipe) == {"SlicedAttnProcessor"}
    assert not xformers_on_cpu


def test_one_kernel(xformers_on_cpu: list[Any]) -> None:
    pipe = build_flux()
    pipe.transformer.enable_xformers_memory_efficient_attention()
    pipe.transformer.set_attention_backend("native")
    xformers_on_cpu.clear()
    call(pipe)
    assert not xformers_on_cpu


def test_one_named_kernel() -> None:
    with sage_on_cpu() as calls:
        pipe = build_flux()
        undo = apply(pipe, "sage_attention")
        apply(pipe, "attention_backend", kernel="flash")
        call(pipe)
        assert not calls
        undo()


def test_fused_processor() -> None:
    pipe = build_sd()
    weights = pipe.unet.num_parameters()
    undo = apply(pipe, "fuse_qkv")
    assert processors(pipe) == {"FusedAttnProcessor2_0"}
    pipe.enable_attention_slicing()
    assert processors(pipe) == {"SlicedAttnProcessor"}
    assert pipe.unet.num_parameters() > weights
    undo()


def test_one_step_cache() -> None:
    from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

    transformer = build_flux().transformer
    transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="already been enabled"):
        transformer.enable_cache(TaylorSeerCacheConfig())


def test_one_offload() -> None:
    for name in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        pipe = build_sd()
        apply(pipe, "group_offload")
        with pytest.raises(ValueError, match="group offloading enabled"):
            getattr(pipe, name)(device="cpu")


def test_one_offload_by_the_same_hooks() -> None:
    pipe = build_sd()
    with sequential_on_cpu():
        pipe.enable_model_cpu_offload(device="cpu")
        pipe.enable_sequential_cpu_offload(device="cpu")
        assert not find("model_cpu_offload").is_set(pipe)
        pipe.enable_model_cpu_offload(device="cpu")
        assert not find("sequential_cpu_offload").is_set(pipe)


def test_casting_lost_in_offload() -> None:
    pipe = build_sd()
    plain = call(pipe)
    with sequential_on_cpu():
        pipe.enable_sequential_cpu_offload(device="cpu")
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn)
        assert torch.equal(call(pipe), plain)


def test_casting_lost_in_offload_to_the_disk() -> None:
    pipe = build_sd()
    plain = call(pipe)
    undo = apply(pipe, "group_offload", level="leaf", disk=True)
    apply(pipe, "layerwise_casting")
    torch.testing.assert_close(call(pipe), plain, rtol=0, atol=1e-4)
    undo()


def test_layout_lost_in_offload() -> None:
    pipe = build_sd()
    plain = call(pipe)
    pipe.unet.to(memory_format=torch.channels_last)
    assert not torch.equal(call(pipe), plain)  # other kernels round otherwise
    pipe.unet.to(memory_format=torch.contiguous_format)
    with sequential_on_cpu():
        pipe.enable_sequential_cpu_offload(device="cpu")
        pipe.unet.to(memory_format=torch.channels_last)
        assert torch.equal(call(pipe), plain)


def test_fused_from_nothing() -> None:
    pipe = build_sd()
    plain = call(pipe)
    with sequential_on_cpu():
        pipe.enable_sequential_cpu_offload(device="cpu")
        pipe.unet.fuse_qkv_projections()
        assert not torch.allclose(call(pipe), plain, rtol=0, atol=1e-3)


def test_fused_in_eight_bits() -> None:
    pipe = build_sd()
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="Float8"):
        pipe.fuse_qkv_projections()


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def graph_calls(network: torch.nn.Module, given: torch.Tensor) -> int:
    """How often a compiled graph is entered in one forward."""
    calls = []

    def counting(graph: Any, _: Any) -> Any:
        def run(*inputs: Any) -> Any:
            calls.append(1)
            return graph(*inputs)

        return run

    torch._dynamo.reset()
    network.compile(backend=counting)
    network(given)
    return len(calls)


def test_graph_in_pieces() -> None:
    from diffusers.hooks import apply_group_offloading, apply_layerwise_casting

    given = torch.zeros(1, 8)
    assert graph_calls(Network(), given) == 1
    cast = Network()
    apply_layerwise_casting(cast, torch.float8_e4m3fn, torch.float32)
    assert graph_calls(cast, given) >= 4
    moved = Network()
    apply_group_offloading(moved, torch.device("cpu"), offload_type="leaf_level")
    assert graph_calls(moved, given) >= 4


def test_graph_in_pieces_by_other_blocks() -> None:
    """Token merging renames the blocks that diffusers would compile."""
    pipe = build_sd()
    apply(pipe, "tome")
    with pytest.raises(ValueError, match="classes are not found"):
        pipe.unet.compile_repeated_blocks(backend="eager")


def test_one_decoder() -> None:
    """What was switched on in the autoencoder is not on in the one that takes its place."""
    from diffusers import AutoencoderTiny

    pipe = build_sd()
    apply(pipe, "vae_slicing")
    pipe.vae = AutoencoderTiny(latent_channels=4)
    assert not find("vae_slicing").is_set(pipe)


def test_narrow_once(torchao: None) -> None:
    """What is packed already has no layer that casting would make smaller."""
    pipe = build_sd()
    apply(pipe, "quantization")
    packed = find("quantization").found(pipe)
    apply(pipe, "layerwise_casting")
    assert find("quantization").found(pipe) == packed


def test_packed_weights_stay(torchao: None) -> None:
    pipe = build_sd()
    apply(pipe, "quantization")
    with pytest.raises(Exception):  # noqa: B017
        apply(pipe, sorted(LAYER_OFFLOADS)[0], level="leaf", disk=True)
        call(pipe)


def test_packed_weights_apart(torchao: None) -> None:
    pipe = build_sd()
    apply(pipe, "quantization")
    with pytest.raises(Exception):  # noqa: B017
        pipe.fuse_qkv_projections()


@pytest.fixture
def torchao() -> None:
    if find_spec("torchao") is None:
        pytest.skip("torchao is not installed")


PREDICTED = {r.id for r in RULES if r.clash == "gains nothing"}
"""Tested in ``tests/decide``, on recorded machines."""


@pytest.mark.parametrize("rule", [r.id for r in RULES if r.id not in PREDICTED])
def test_every_rule_has_its_test(rule: str) -> None:
    assert f"test_{rule.replace('-', '_')}" in globals()
