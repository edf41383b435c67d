"""A loaded pipeline's own weights are not counted against it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from autotune.decide.prediction import PROCESS_BYTES
from autotune.probe.machine import Machine
from autotune.runtime import memory
from autotune.runtime.memory import with_own_memory

MIB = 1 << 20
PLENTY = 1 << 40


@pytest.fixture
def machine(cpu_machine: Machine) -> Machine:
    """With 1000 bytes free."""
    return msgspec.structs.replace(
        cpu_machine,
        device=msgspec.structs.replace(cpu_machine.device, free_bytes=1000),
        host=msgspec.structs.replace(cpu_machine.host, ram_available_bytes=1000),
    )


def weights_of(pipe: Any) -> int:
    modules = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    return sum(t.nbytes for m in modules for t in (*m.parameters(), *m.buffers()))


def given_back(machine: Machine, device: str, pipe: Any = None) -> tuple[int, int]:
    """Bytes of device memory, and of host RAM."""
    found = with_own_memory(machine, device, pipe)
    return found.device.free_bytes - 1000, found.host.ram_available_bytes - 1000


def test_weights_already_there_are_given_back(
    sd_pipe: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_private_bytes", lambda: PLENTY)
    own = weights_of(sd_pipe)
    assert given_back(machine, "cpu", sd_pipe) == (own, own + PROCESS_BYTES)
    assert given_back(machine, "cpu") == (0, PROCESS_BYTES)


def test_packed_weights_are_as_large_as_what_they_wrap(
    sd_pipe: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantized ones look as large to the outside as they were before."""
    from torch.testing._internal.two_tensor import TwoTensor

    monkeypatch.setattr(memory, "_private_bytes", lambda: PLENTY)
    before, _ = given_back(machine, "cpu", sd_pipe)
    weight = sd_pipe.unet.conv_in.weight
    packed = TwoTensor(weight.detach().half(), weight.detach().half().clone())
    sd_pipe.unet.conv_in.weight = nn.Parameter(packed[:, :1], requires_grad=False)
    inner = 2 * weight[:, :1].numel() * 2
    assert given_back(machine, "cpu", sd_pipe)[0] == before - weight.nbytes + inner


def test_weights_in_ram_are_no_memory_of_the_device(
    sd_pipe: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_private_bytes", lambda: PLENTY)
    assert given_back(machine, "cuda:0", sd_pipe) == (0, weights_of(sd_pipe) + PROCESS_BYTES)


def test_what_sequential_offload_has_put_away_is_in_ram(
    sd_pipe: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_private_bytes", lambda: PLENTY)
    before = given_back(machine, "cuda:0", sd_pipe)
    sd_pipe.enable_sequential_cpu_offload(device="cpu")
    assert all(p.is_meta for p in sd_pipe.unet.parameters())
    assert given_back(machine, "cuda:0", sd_pipe) == before


def test_mapped_weights_are_the_systems_to_drop(
    sd_pipe: Any, machine: Machine, tmp_path: Path
) -> None:
    """They are pages of their files, and counted as available already."""
    from safetensors.torch import load_file, save_file

    held = memory._private_bytes()
    save_file({"weight": torch.ones(64 * MIB // 4)}, tmp_path / "weights.safetensors")
    mapped = load_file(tmp_path / "weights.safetensors")["weight"]
    assert mapped.sum() == 64 * MIB // 4  # every page was read
    assert memory._private_bytes() - held < 16 * MIB
    copied = mapped.clone()
    assert memory._private_bytes() - held > 48 * MIB
    del copied


def test_no_more_than_this_process_holds_itself(
    sd_pipe: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_private_bytes", lambda: 5)
    assert given_back(machine, "cpu", sd_pipe) == (5, 5)


def test_never_more_than_there_is(
    sd_pipe: Any, cpu_machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_private_bytes", lambda: PLENTY)
    device, host = cpu_machine.device, cpu_machine.host
    full = msgspec.structs.replace(
        cpu_machine,
        device=msgspec.structs.replace(device, free_bytes=device.total_bytes),
        host=msgspec.structs.replace(host, ram_available_bytes=host.ram_total_bytes),
    )
    assert with_own_memory(full, "cpu", sd_pipe) == full
