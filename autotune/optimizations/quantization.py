"""Linear layers of the denoiser in eight or four bits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import msgspec

from autotune.errors import OptimizationError
from autotune.optimizations.base import Optimization, Parameters, Undo, undone_on_failure
from autotune.optimizations.execution import Execution
from autotune.optimizations.file_layers import is_in_file, note_packed, ordinary
from autotune.optimizations.gguf_blocks import BLOCK, in_blocks, scheme_of_blocks
from autotune.optimizations.modules import denoisers, random_state_kept
from autotune.optimizations.target import LOADING, Target
from autotune.probe.machine import Machine
from autotune.probe.software import is_importable
from autotune.workload.workload import Workload

PACKAGES = {
    "int8": "torchao",
    "float8": "torchao",
    "float8_dynamic": "torchao",
    "nf4": "bitsandbytes",
    "gguf_q8_0": "gguf",
    "gguf_q4_0": "gguf",
}
"""Scheme → the package that has it."""

_LIGHTER = {"gguf_q8_0": "int8", "gguf_q4_0": "nf4"}
"""GGUF's blocks take half a bit more than these, and are unpacked in more passes: they are tried
where these are not to be had."""

QUALITIES = {
    "int8": "balanced",
    "float8": "balanced",
    "float8_dynamic": "fast",
    "nf4": "fast",
    "gguf_q8_0": "balanced",
    "gguf_q4_0": "fast",
}

FEWEST_VALUES = 1024
"""Layers with fewer weights than this stay as they are: there is nothing to save."""


class Quantization(Optimization):
    """Weights (and with ``float8_dynamic`` what they are multiplied with) in fewer bits.

    Best before the pipeline is on the device: what is moved there is already small. Layers that
    were left in their file are packed from there, and go back to it.
    """

    name = "quantization"
    summary = "the denoiser's linear layers in eight or four bits"
    relieves = "vram of denoise"
    exactness = "lossy"
    defaults = {"scheme": "int8"}
    before_moving = True
    packs_from_files = True

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        if machine.device.kind != "cuda":
            return "weights are kept in host RAM to go back to: on the CPU it would save nothing"
        named = workload.components_as("denoiser")
        if not any(c.linear_bytes for c in named):
            return "the denoiser has no linear layers"
        if workload.request.dtype == "float32":
            return "in float32 nothing is gained by narrower weights: run in 16 bits first"
        if not self._schemes(machine):
            packages = " or ".join(sorted(set(PACKAGES.values())))
            return f"it needs the package {packages}: pip install {packages.split()[-1]}"
        return None

    def worth_trying(self, machine: Machine, workload: Workload) -> tuple[Parameters, ...]:
        return tuple({"scheme": scheme} for scheme in self._schemes(machine))

    def _schemes(self, machine: Machine) -> list[str]:
        """Those that this GPU computes and whose package is installed."""
        usable = [s for s in PACKAGES if s != "float8_dynamic" or _multiplies_float8(machine)]
        usable = [s for s in usable if machine.has(PACKAGES[s])]
        return [s for s in usable if _LIGHTER.get(s) not in usable]

    def check(self, parameters: Parameters) -> None:
        if parameters["scheme"] not in PACKAGES:
            raise OptimizationError(
                f"quantization:scheme={parameters['scheme']} is unknown",
                f"use {', '.join(PACKAGES)}",
            )

    def quality(self, parameters: Parameters) -> str:
        return QUALITIES[str(parameters["scheme"])]

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        return msgspec.structs.replace(execution, quantization=str(parameters["scheme"]))

    def code(self, parameters: Parameters, target: Target) -> tuple[str, ...]:
        scheme = str(parameters["scheme"])
        if scheme.startswith("gguf"):
            return tuple(_gguf_lines(scheme.removeprefix("gguf_").upper(), target))
        if scheme == "nf4":
            return (
                "from diffusers import PipelineQuantizationConfig",
                f"{LOADING}quantization_config=PipelineQuantizationConfig("
                'quant_backend="bitsandbytes_4bit", quant_kwargs={"load_in_4bit": True, '
                '"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, '
                f'"bnb_4bit_compute_dtype": torch.{target.dtype}}}, '
                f"components_to_quantize={json.dumps(target.denoisers)})",
            )
        made = f"TorchAoConfig({_CONFIGS[scheme]}())"
        mapping = ", ".join(f"{json.dumps(name)}: {made}" for name in target.denoisers)
        return (
            "from diffusers import PipelineQuantizationConfig, TorchAoConfig",
            f"from torchao.quantization import {_CONFIGS[scheme]}",
            f"{LOADING}quantization_config=PipelineQuantizationConfig(quant_mapping={{{mapping}}})",
        )

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        scheme = str(parameters["scheme"])
        if not is_importable(PACKAGES[scheme]):
            raise OptimizationError(
                f"quantization:scheme={scheme} needs the package {PACKAGES[scheme]}",
                f"pip install {PACKAGES[scheme]}",
            )
        before: list[tuple[Any, str, Any]] = []

        def undo() -> None:
            for parent, name, layer in reversed(before):
                if not is_in_file(layer):
                    layer.to(next(getattr(parent, name).parameters()).device)
                setattr(parent, name, layer)

        with undone_on_failure(undo), random_state_kept(device):
            for module in denoisers(pipe):
                for parent, name in linear_layers(module, scheme):
                    layer = getattr(parent, name)
                    before.append((parent, name, layer))
                    setattr(parent, name, _packed(layer, scheme))
        return undo

    def found(self, pipe: Any) -> Parameters | None:
        layers = (layer for m in denoisers(pipe) for layer in m.modules())
        schemes = {s for s in map(_scheme_of, layers) if s}
        return {"scheme": sorted(schemes)[0]} if schemes else None


_CONFIGS = {
    "int8": "Int8WeightOnlyConfig",
    "float8": "Float8WeightOnlyConfig",
    "float8_dynamic": "Float8DynamicActivationFloat8WeightConfig",
}
"""Names in ``torchao.quantization``."""


def _gguf_lines(scheme: str, target: Target) -> Iterator[str]:
    """diffusers reads such blocks from files only: which others publish, under names of theirs."""
    yield "from diffusers import GGUFQuantizationConfig"
    sought = f"{PurePath(target.model).name} gguf"
    for name in target.denoisers:
        part, file = f"pipe.{name}", f"{name}-{scheme}.gguf"
        yield f"# A file of this model's {name} in {scheme}, by its path or its address on the hub:"
        yield f"# search huggingface.co/models for {json.dumps(sought)}; it ends in {scheme}.gguf."
        yield f'file = "path/to/{file}"'
        yield f"{part} = type({part}).from_single_file("
        yield "    file,"
        yield (
            f"    quantization_config=GGUFQuantizationConfig(compute_dtype=torch.{target.dtype}),"
        )
        yield f"    torch_dtype=torch.{target.dtype},"
        yield ")"


def _multiplies_float8(machine: Machine) -> bool:
    return "float8_e4m3fn" in machine.kernels.matmul_flops_per_s


def linear_layers(module: Any, scheme: str) -> list[tuple[Any, str]]:
    """Those to be quantized, plain ones: by the module that holds each, and its name there.

    Not those with a hook: a copy would call the layer that it is a copy of.
    """
    import torch

    row = BLOCK if scheme.startswith("gguf") else 1

    return [
        (parent, name)
        for parent in module.modules()
        for name, child in parent.named_children()
        if type(child) is torch.nn.Linear
        and not _has_other_forward(child)
        and type(child.weight) is torch.nn.Parameter
        and child.weight.numel() >= FEWEST_VALUES
        and child.in_features % row == 0
    ]


def _has_other_forward(layer: Any) -> bool:
    """Whether it is hooked; hooks that were taken off leave the class's own forward behind."""
    forward = vars(layer).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(layer).forward


def _packed(layer: Any, scheme: str) -> Any:
    """What takes the layer's place, which waits in RAM or in its file."""
    made = _quantized(ordinary(layer), scheme)
    if is_in_file(layer):
        note_packed(made)
    else:
        layer.to("cpu")
    return made


def _quantized(layer: Any, scheme: str) -> Any:
    """A quantized copy of one layer; the layer itself is not touched."""
    if scheme == "nf4":
        return _in_four_bits(layer)
    if scheme.startswith("gguf"):
        return in_blocks(layer, scheme)
    import copy

    import torch
    import torchao.quantization as torchao

    holder = torch.nn.Sequential(copy.copy(layer))
    holder[0]._parameters = dict(layer._parameters)
    for name in ("_diffusers_hook", "forward"):  # they are the layer's, not the copy's
        vars(holder[0]).pop(name, None)
    torchao.quantize_(holder, getattr(torchao, _CONFIGS[scheme])())
    return holder[0]


def _in_four_bits(layer: Any) -> Any:
    """bitsandbytes packs the weights when they come to the GPU."""
    import bitsandbytes

    made = bitsandbytes.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        compress_statistics=True,
        quant_type="nf4",
    )
    made.weight = bitsandbytes.nn.Params4bit(
        layer.weight.data.to("cpu"), requires_grad=False, quant_type="nf4"
    )
    made.bias = layer.bias
    return made.to(layer.weight.device)


def _scheme_of(layer: Any) -> str | None:
    """How a layer is quantized, as far as its weights tell."""
    weight = getattr(layer, "weight", None)
    name = type(weight).__name__
    if name == "Float8Tensor":
        return "float8_dynamic" if getattr(weight, "act_quant_kwargs", None) else "float8"
    if name == "GGUFParameter":
        return scheme_of_blocks(weight)
    return {"Params4bit": "nf4", "Int8Tensor": "int8"}.get(name)
