"""Others on the same cases: rules of thumb as lists of sets, and tools that set a pipeline up.

A rule is tried rung by rung, as people do it by hand, until one does not run out of memory; its
rungs are sets of the catalogue, so they are measured once and looked up. A tool gets a pipeline of
its own, since most have no way back.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import sys
import tempfile
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import psutil
import torch

from autotune.units import GIB, format_bytes
from autotune.workload.live import modules_of


class UnusableError(Exception):
    """It cannot run here; the message says why."""


class Tool(ABC):
    """A package that configures a pipeline.

    Attributes:
        name: In tables.
        package: The distribution that brings it.
        module: What is imported first.
        is_told_the_size: Whether it is given how much memory to use, and does not ask CUDA.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    module: ClassVar[str]
    is_told_the_size: ClassVar[bool] = False

    @property
    def version(self) -> str:
        """Of the installed package.

        Raises:
            UnusableError: it is not installed.
        """
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError as error:
            raise UnusableError(
                f"not installed: pip install '.[peers]' brings {self.package}"
            ) from error

    def set_up(self, pipe: Any, device: torch.device, card_bytes: int | None) -> str:
        """Configure a pipeline whose weights are in host RAM, as the package's documentation says.

        Returns:
            What it chose, as far as it tells.

        Raises:
            UnusableError: it is not installed. Whatever else it raises says why it cannot run here.
        """
        version = self.version
        importlib.import_module(self.module)
        return f"{version}: {self._set_up(pipe, device, card_bytes)}"

    def leave(self) -> None:
        """Give back what it keeps outside of the pipeline."""
        torch.set_default_device(None)

    @abstractmethod
    def _set_up(self, pipe: Any, device: torch.device, card_bytes: int | None) -> str: ...


class ComponentsManagerOffload(Tool):
    """diffusers' own: whole components leave when another needs their room."""

    name = "ComponentsManager"
    package = "diffusers"
    module = "diffusers"

    def _set_up(self, pipe: Any, device: torch.device, card_bytes: int | None) -> str:
        from diffusers import ComponentsManager

        manager = ComponentsManager()
        for name, module in modules_of(pipe).items():
            manager.add(name, module)
        manager.enable_auto_cpu_offload(device=device)
        pipe._kept_by_validation = manager
        return "automatic offload, 3 GB kept free"


class DiffusersMm(Tool):
    """``managed(pipe)``: by the sizes of components and free memory."""

    name = "diffusers-mm"
    package = "diffusers-mm"
    module = "diffusers_mm"

    def _set_up(self, pipe: Any, device: torch.device, card_bytes: int | None) -> str:
        from diffusers_mm import managed

        managed(pipe, device=device)
        return str(pipe.mm.applied_strategy)


class Mmgp(Tool):
    """``offload.profile``: one of five, by RAM and by the card's size."""

    name = "mmgp"
    package = "mmgp"
    module = "mmgp.offload"

    def _set_up(self, pipe: Any, device: torch.device, card_bytes: int | None) -> str:
        from mmgp import offload, profile_type

        size = card_bytes or torch.cuda.get_device_properties().total_memory
        profile = self._profile(size, psutil.virtual_memory().total)
        offload.profile(pipe, profile_type(profile), verboseLevel=0)
        return f"profile {profile}"

    def leave(self) -> None:
        """It makes CUDA the default device, and keeps the last pipeline, partly in pinned RAM."""
        super().leave()
        offload = sys.modules.get(self.module)
        last = getattr(offload, "last_offload_obj", None)
        if last is not None:
            offload.last_offload_obj = None  # type: ignore[union-attr]
            with contextlib.suppress(Exception):  # of a pipeline that it has set up halfway
                last.release()

    @staticmethod
    def _profile(card_bytes: int, ram_bytes: int) -> int:
        """As its README names them: 24 GB of VRAM or 12, with 48 GB of RAM or 32; else the last."""
        has_ram = ram_bytes >= 48 * GIB
        if card_bytes >= 24 * GIB:
            return 1 if has_ram else 3
        if card_bytes >= 12 * GIB:
            return 2 if has_ram else 4
        return 5


class AccelerateRule(Tool):
    """``infer_auto_device_map``: as many layers on the device as their weights fit, the rest away.

    As it does by itself, a tenth of the device is left free for what is not weights.
    """

    name = "accelerate device_map"
    package = "accelerate"
    module = "accelerate"
    is_told_the_size = True

    def _set_up(self, pipe: Any, device: torch.device, card_bytes: int | None) -> str:
        from accelerate import cpu_offload, disk_offload, dispatch_model, infer_auto_device_map

        main, away = ("cpu", "disk") if device.type == "cpu" else (device.index or 0, "cpu")
        size = card_bytes or _free_bytes(device)
        left, moved = int(0.9 * size), 0
        folder = tempfile.TemporaryDirectory()
        pipe._kept_by_validation = folder
        for name, module in modules_of(pipe).items():
            room = {main: left} | ({away: 1 << 40} if away != "disk" else {})
            whole = getattr(module, "_no_split_modules", None) or []
            places = infer_auto_device_map(module, room, no_split_module_classes=whole)
            here, there = _bytes_by_place(module, places, main)
            left, moved = max(0, left - here), moved + there
            where, kept = set(places.values()), f"{folder.name}/{name}"
            if where == {"disk"}:  # dispatch_model has no hooks for what is all in one place
                disk_offload(module, kept, main)
            elif where == {"cpu"} and main != "cpu":
                cpu_offload(module, main)
            elif where != {"cpu"}:
                dispatch_model(module, places, main_device=main, offload_dir=kept)
        return f"{format_bytes(moved)} of weights on the {'disk' if away == 'disk' else 'host'}"


def _free_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.cuda.mem_get_info(device)[0])


def _bytes_by_place(module: Any, places: dict[str, Any], main: Any) -> tuple[int, int]:
    """Weights on the device, and elsewhere."""
    here = there = 0
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        at = next(
            (
                p
                for prefix, p in places.items()
                if not prefix or f"{name}.".startswith(f"{prefix}.")
            ),
            main,
        )
        if at == main:
            here += tensor.nbytes
        else:
            there += tensor.nbytes
    return here, there


class Switch(Tool):
    """One of a pipeline's own switches, where the catalogue does not offer it: to see why."""

    package = "diffusers"
    module = "diffusers"

    def __init__(self, method: str) -> None:
        self.name = f"{method}()"  # type: ignore[misc]
        self._method = method

    def _set_up(self, pipe: Any, device: torch.device, card_bytes: int | None) -> str:
        getattr(pipe, self._method)()
        return self._method


SWITCHES = tuple(
    map(
        Switch,
        (
            "enable_model_cpu_offload",
            "enable_sequential_cpu_offload",
            "enable_xformers_memory_efficient_attention",
        ),
    )
)
"""Rungs of rules that a CPU has no use for: tried all the same."""

TOOLS: tuple[Tool, ...] = (ComponentsManagerOffload(), DiffusersMm(), Mmgp(), AccelerateRule())
