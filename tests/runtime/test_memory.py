"""A loaded pipeline's own weights are not counted against it."""

from __future__ import annotations

from typing import Any

import msgspec

from autotune.probe.machine import Machine
from autotune.runtime.memory import with_own_memory


def test_weights_already_there_are_given_back(sd_pipe: Any, cpu_machine: Machine) -> None:
    device = msgspec.structs.replace(cpu_machine.device, free_bytes=1000)
    machine = msgspec.structs.replace(cpu_machine, device=device)
    modules = [m for m in sd_pipe.components.values() if hasattr(m, "parameters")]
    own = sum(p.numel() * p.element_size() for m in modules for p in m.parameters())
    assert with_own_memory(machine, "cpu", sd_pipe).device.free_bytes == 1000 + own
    assert with_own_memory(machine, "cpu").device.free_bytes == 1000
    elsewhere = with_own_memory(machine, "meta", sd_pipe)
    assert elsewhere.device.free_bytes == 1000


def test_never_more_than_there_is(sd_pipe: Any, cpu_machine: Machine) -> None:
    total = cpu_machine.device.total_bytes
    device = msgspec.structs.replace(cpu_machine.device, free_bytes=total)
    full = msgspec.structs.replace(cpu_machine, device=device)
    assert with_own_memory(full, "cpu", sd_pipe).device.free_bytes == total
