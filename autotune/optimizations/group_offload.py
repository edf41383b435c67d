"""Weights moved block by block or layer by layer, by diffusers' own hooks, ahead of their use."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import msgspec

from autotune.errors import OptimizationError
from autotune.optimizations.base import Optimization, Parameters, Undo, undone_on_failure
from autotune.optimizations.execution import READS_PAST_HOOKS, Execution, GroupOffload
from autotune.optimizations.modules import (
    denoisers,
    modules_of,
    registries_of,
    remember_devices,
    remember_hooks,
    remove_hooks,
)
from autotune.optimizations.target import Target
from autotune.probe.machine import Machine
from autotune.units import GIB
from autotune.workload.workload import Workload

LEVELS = ("block", "leaf")

_HOOKS = ("lazy_prefetch_group_offloading", "layer_execution_tracker", "group_offloading")
"""Names under which diffusers registers its hooks: it has no public way to take them off."""


class GroupCpuOffload(Optimization):
    """One block of the denoiser on the device, the next one on its way."""

    name = "group_offload"
    summary = "a block or layer at a time is on the device; the next is copied while it computes"
    relieves = "vram of every phase"
    defaults = {"level": "block", "stream": True, "low_ram": False, "disk": False}

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        if machine.device.kind == "cpu":
            return "the CPU computes in host RAM: there is no device memory to offload from"
        if machine.link is None or machine.device.unified_memory:
            return "device and host share their memory: moving weights frees nothing"
        return None

    def worth_trying(self, machine: Machine, workload: Workload) -> tuple[Parameters, ...]:
        """Each level, overlapped with computing; all weights pinned, a group, or none in RAM."""
        storage: tuple[Parameters, ...] = ({}, {"low_ram": True}, {"disk": True})
        return tuple({**self.defaults, "level": level, **s} for level in LEVELS for s in storage)

    def check(self, parameters: Parameters) -> None:
        if parameters["level"] not in LEVELS:
            raise OptimizationError(
                f"group_offload:level={parameters['level']} is unknown",
                f"use {' or '.join(LEVELS)}",
            )
        if parameters["low_ram"] and parameters["disk"]:
            raise OptimizationError(
                "group_offload:disk=True leaves nothing in RAM that low_ram could save",
                "give one of them",
            )

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        return msgspec.structs.replace(
            execution, placement="group_offload", group=_group(parameters)
        )

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        import torch
        from diffusers.hooks import apply_group_offloading

        excluded = set(getattr(pipe, "_exclude_from_cpu_offload", ()))
        modules = modules_of(pipe)
        move_back = remember_devices(modules.values())
        unpin = _remember_pages(modules.values())
        folders: list[str] = []
        strided: list[tuple[Any, Any]] = []
        joined: list[tuple[Any, str, Any]] = []
        put_forwards_back = remember_hooks(modules.values())

        def undo() -> None:
            for module in modules.values():
                _take_off(module)
            put_forwards_back()
            for parent, name, layer in joined:
                parent._modules[name] = layer
            for tensor, layout in strided:
                tensor.data = tensor.data.contiguous(memory_format=layout)
            move_back()
            unpin()
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)

        with undone_on_failure(undo):
            for name, module in modules.items():
                if name in excluded:
                    module.to(device)
                    continue
                if parameters["disk"]:
                    _join_copies(module, joined)
                options = _options(module, parameters, device)
                if parameters["disk"] and not hasattr(module, "decode"):
                    # Pipelines read an autoencoder's statistics without calling it: not on disk.
                    # One folder for each: diffusers names files after layers, and would take one
                    # component's weights for another's.
                    folders.append(tempfile.mkdtemp(prefix="autotune-offload-"))
                    options["offload_to_disk_path"] = folders[-1]
                # A group that is interrupted may have freed its weights, its file unwritten. (Those
                # that stay in RAM would be there twice if they were held here.)
                data = list(_data_of(module)) if "offload_to_disk_path" in options else []
                with undone_on_failure(partial(_put_back, data)):
                    if "offload_to_disk_path" in options:
                        strided += _contiguous(module)
                    apply_group_offloading(module, torch.device(device), **options)
        return undo

    def found(self, pipe: Any) -> Parameters | None:
        hooks = [h for m in denoisers(pipe) for h in _hooks(m)]
        if not hooks:
            return None
        config = hooks[0].config
        return {
            "level": "leaf" if config.offload_type.value == "leaf_level" else "block",
            "stream": config.stream is not None,
            "low_ram": bool(config.low_cpu_mem_usage),
            "disk": config.offload_to_disk_path is not None,
        }

    def code(self, parameters: Parameters, target: Target) -> tuple[str, ...]:
        overlaps, by_block = bool(parameters["stream"]), parameters["level"] == "block"
        disk = bool(parameters["disk"])
        classes = {c.class_name for c in target.components.values()}
        whole = sorted(classes & READS_PAST_HOOKS)
        by_layer = "is_vae or not has_blocks" if by_block else "True"
        if whole:
            names = ", ".join(f'"{name}"' for name in whole)
            by_layer = f"({by_layer}) and type(module).__name__ not in ({names},)"
        level = '"leaf_level"' if by_layer == "True" else _LEVEL.format(by_layer)
        folder = _FOLDER if disk else ""
        return (
            *(("import tempfile",) if disk else ()),
            "from diffusers.hooks import apply_group_offloading",
            "for module in pipe.components.values():",
            "    if isinstance(module, torch.nn.Module):",
            *_VAE,
            *(_BLOCKS if by_block else ()),
            *(_COPIES if disk else ()),
            f"        level = {level}",
            f"        overlaps = {'not is_vae' if overlaps else False}",
            '        apply_group_offloading(module, torch.device("cuda"), offload_type=level,',
            "            num_blocks_per_group=1, use_stream=overlaps, record_stream=overlaps,",
            f"            low_cpu_mem_usage={bool(parameters['low_ram'])}{folder})",
        )


_LEVEL = '"leaf_level" if {} else "block_level"'

_FOLDER = ", offload_to_disk_path=None if is_vae else tempfile.mkdtemp()"

_VAE = (
    "        # Pipelines call an autoencoder's decode, for which blocks do not wait, read its",
    "        # statistics, and change its dtype, of which streams know nothing.",
    '        is_vae = hasattr(module, "decode")',
)

_BLOCKS = (
    "        # Blocks are those of the lists among its children: text encoders have none.",
    "        lists = (torch.nn.ModuleList, torch.nn.Sequential)",
    "        has_blocks = any(isinstance(child, lists) for child in module.children())",
)

_COPIES = (
    '        if hasattr(module, "shared"):  # T5 has its embedding twice: one layer, one file',
    "            module.shared = module.encoder.embed_tokens",
)


def _join_copies(module: Any, joined: list[tuple[Any, str, Any]]) -> None:
    """Let one layer stand for those with the same weights; notes the others, and where they were.

    The file of a copy would be written when its weights are gone already.
    """
    from autotune.workload.groups import copies

    for path, stands_in in copies(module):
        above, _, name = path.rpartition(".")
        parent = module.get_submodule(above)
        joined.append((parent, name, parent._modules[name]))
        parent._modules[name] = stands_in


def _contiguous(module: Any) -> list[tuple[Any, Any]]:
    """Give up other layouts, which safetensors refuses to write; the tensors with what they had."""
    import torch

    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    found = [
        (t, layouts[t.dim()])
        for t in module.parameters()
        if t.dim() in layouts
        and not t.is_contiguous()
        and t.is_contiguous(memory_format=layouts[t.dim()])
    ]
    for tensor, _ in found:
        tensor.data = tensor.data.contiguous()
    return found


def _data_of(module: Any) -> Iterator[tuple[Any, Any]]:
    return ((t, t.data) for t in (*module.parameters(), *module.buffers()))


_AT_ONCE_BYTES = GIB
"""Of pinned pages that are copied before they are given back: that much more RAM for a while."""


def _remember_pages(modules: Iterable[Any]) -> Callable[[], None]:
    """Undo of pinning: weights that stay in RAM lie in pages that can be swapped, as before.

    diffusers leaves its pinned copies, and PyTorch keeps what they took for the next ones.
    """
    modules = list(modules)
    pinned = {id(t) for module in modules for t, data in _data_of(module) if data.is_pinned()}

    def undo() -> None:
        from autotune.probe.devices import empty_host_cache

        cloned = 0
        for tensor, data in (found for module in modules for found in _data_of(module)):
            if data.is_pinned() and id(tensor) not in pinned:
                tensor.data = data.clone()
                cloned += data.nbytes
            del data
            if cloned > _AT_ONCE_BYTES:
                empty_host_cache()
                cloned = 0
        empty_host_cache()

    return undo


def _put_back(data: list[tuple[Any, Any]]) -> None:
    for tensor, values in data:
        tensor.data = values


def _options(module: Any, parameters: Parameters, device: str) -> dict[str, Any]:
    """Only devices with streams copy while they compute.

    SDXL's pipelines widen the VAE before they decode; the copies that a stream takes from would
    still be narrow.
    """
    is_fixed = not hasattr(module, "decode")
    overlaps = bool(parameters["stream"]) and is_fixed and not device.startswith("cpu")
    level = _level(module, parameters)
    return {
        "offload_type": f"{level}_level",
        "num_blocks_per_group": 1 if level == "block" else None,
        "use_stream": overlaps,
        "record_stream": overlaps,
        "non_blocking": overlaps,
        "low_cpu_mem_usage": bool(parameters["low_ram"]),
    }


def _group(parameters: Parameters) -> GroupOffload:
    return GroupOffload(
        level="leaf" if parameters["level"] == "leaf" else "block",
        overlaps=bool(parameters["stream"]),
        pins=not parameters["low_ram"],
        from_disk=bool(parameters["disk"]),
    )


def _level(module: Any, parameters: Parameters) -> str:
    """The level for this component: a block's hook waits for ``forward``, not for ``decode``."""
    from autotune.workload.groups import block_bytes, has_tied_layers

    if hasattr(module, "decode"):
        return "leaf"
    blocks, tied = bool(block_bytes(module)), has_tied_layers(module)
    by_layer = _group(parameters).by_layer(type(module).__name__, blocks, tied)
    return "leaf" if by_layer else "block"


def _hooks(module: Any) -> list[Any]:
    found = (r.get_hook("group_offloading") for r in registries_of(module))
    return [h for h in found if h is not None]


def _take_off(module: Any) -> None:
    """Bring the weights back from wherever they are, then remove the hooks.

    What is on the device may still be on its way there, on a stream of its own: what diffusers
    keeps in RAM or in files is whole.
    """
    import torch
    from safetensors.torch import load_file

    groups = {id(h.group): h.group for h in _hooks(module)}
    for group in groups.values():
        for tensor, copy in group.cpu_param_dict.items():
            if type(copy) is torch.Tensor:  # packed ones are as diffusers left them
                tensor.data = copy
        group.cpu_param_dict.clear()  # pinned copies would wait for the garbage collector
        if group.offload_to_disk_path is not None and group._is_offloaded_to_disk:
            stored = load_file(group.safetensors_file_path)
            for tensor, key in group.tensor_to_key.items():
                tensor.data = stored[key].clone()  # what was read lies where the file put it
    remove_hooks(module, _HOOKS)
