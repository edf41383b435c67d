"""The probe ends in time, takes no more memory than it may, and leaves nothing, on any device.

Time is that of a clock that only the tests move: a device, a disk or an import that takes minutes
by it takes none.
"""

from __future__ import annotations

import gc
import os
import threading
from typing import Any

import pytest
import torch

from autotune.probe import attention, deadline, disk, kernels, measure
from autotune.probe.kernels import BARE
from autotune.probe.machine import Machine
from autotune.probe.measure import FULL_S, QUICK_S, measure_machine
from autotune.probe.parts import part_of
from autotune.probe.timing import COLD
from tests.probe.pretend import SlowDevice, pretend, shrink

MIB = 1 << 20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


def probed(
    clock: Any, device: str, *, quick: bool = False, per_operator_s: float = 5e-4
) -> tuple[Machine, float]:
    """The machine, and the seconds it took by the clock."""
    start = clock.now
    with SlowDevice(clock.advance, per_operator_s):
        machine = measure_machine(device, quick=quick)
    return machine, clock.now - start


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("per_operator_s", [5e-4, 2e-3, 0.02, 0.1])
@pytest.mark.parametrize("quick", [True, False])
def test_a_slow_device_ends_the_probe_in_time(
    slow_clock: Any, per_operator_s: float, quick: bool
) -> None:
    """At 0.1 s per operator, measuring everything would take half an hour."""
    machine, seconds = probed(slow_clock, "cpu", quick=quick, per_operator_s=per_operator_s)
    # Nothing is begun after the deadline but the few calls without which there is no machine.
    assert seconds <= (3.0 if quick else 10.0) + 60 * per_operator_s
    assert machine.kernels.matmul_flops_per_s["float32"].value > 0
    assert machine.kernels.dispatch_s.value >= per_operator_s
    assert {"sdpa", "vanilla"} - {rate.implementation for rate in machine.attention} <= (
        {"vanilla"} if quick else set()
    )


@pytest.mark.usefixtures("small")
def test_what_a_slow_device_was_not_asked_is_named(slow_clock: Any) -> None:
    machine, _ = probed(slow_clock, "cpu", per_operator_s=0.1)
    assert all(map(part_of, machine.left_out))
    assert "bfloat16 kernels" in machine.left_out
    assert "bfloat16" not in machine.kernels.matmul_flops_per_s
    assert "the host's cost per operator in a model" in machine.left_out
    assert machine.kernels.dispatch_s.source == BARE
    (finding,) = (text for text in machine.findings if text.startswith("Left out for want of time"))
    assert "bfloat16 kernels" in finding


@pytest.mark.usefixtures("small")
def test_a_quick_device_leaves_nothing_out(slow_clock: Any) -> None:
    machine, seconds = probed(slow_clock, "cpu", per_operator_s=1e-4)
    assert machine.left_out == ()
    assert machine.kernels.dispatch_s.source == "measured"
    assert machine.kernels.launch_s is not None
    assert seconds <= FULL_S


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("quick", [True, False])
def test_a_slow_gpu_with_a_slow_link_ends_in_time(
    slow_clock: Any, monkeypatch: pytest.MonkeyPatch, quick: bool
) -> None:
    with pretend(monkeypatch, "cuda"):
        machine, seconds = probed(slow_clock, "cuda:0", quick=quick, per_operator_s=0.02)
    assert seconds <= (3.0 if quick else 10.0) + 1.0
    assert machine.link is not None
    assert machine.link.h2d_pinned_bytes_per_s.value > 0
    assert any("copies of" in text for text in machine.left_out) or quick
    assert all(map(part_of, machine.left_out))


@pytest.mark.usefixtures("small")
def test_one_slow_implementation_does_not_use_up_the_time(
    slow_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crawling(*tensors: torch.Tensor) -> torch.Tensor:
        slow_clock.advance(0.5)
        return attention.vanilla(*tensors)

    monkeypatch.setitem(attention.IMPLEMENTATIONS, "sliced", crawling)
    machine, seconds = probed(slow_clock, "cpu")
    assert seconds <= 10.0
    assert "sliced" in {rate.implementation for rate in machine.attention}
    assert any("attention" in text for text in machine.left_out)
    assert machine.host.disk_read_bytes_per_s is not None or not hasattr(os, "posix_fadvise")


@pytest.mark.usefixtures("small")
def test_a_slow_import_of_diffusers_is_not_waited_for(
    slow_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: list[float | None] = []

    class Endless:
        def __init__(self, **_: Any) -> None: ...

        def start(self) -> None: ...

        def join(self, timeout: float | None) -> None:
            joined.append(timeout)
            slow_clock.advance(timeout or 1e9)

        def is_alive(self) -> bool:
            return True

    monkeypatch.setattr(kernels, "UNET_MODULE", "a_library_on_a_slow_disk")
    monkeypatch.setattr(deadline.threading, "Thread", Endless)
    machine, seconds = probed(slow_clock, "cpu")
    assert len(joined) == 1
    assert seconds <= 10.0
    assert machine.kernels.dispatch_s.source == BARE
    assert "the host's cost per operator in a model" in machine.left_out


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="only Linux drops pages on request")
@pytest.mark.parametrize("operation", ["fsync", "preadv"])
def test_a_slow_disk_ends_in_time(
    slow_clock: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, operation: str
) -> None:
    real = getattr(os, operation)

    def crawling(*arguments: Any) -> Any:
        slow_clock.advance(0.2)
        return real(*arguments)

    monkeypatch.setattr(os, operation, crawling)
    start = slow_clock.now
    disk.measure_disk(tmp_path, budget_s=0.5)
    assert slow_clock.now - start <= 0.5 + 0.2


@pytest.mark.usefixtures("small")
def test_a_figure_begun_too_late_is_timed_once_and_says_so(slow_clock: Any) -> None:
    machine, _ = probed(slow_clock, "cpu", quick=True, per_operator_s=1.0)
    assert machine.kernels.memory_bytes_per_s.source == COLD
    assert len(machine.kernels.memory_bytes_per_s.samples) == 1


def test_the_budgets_leave_room_for_what_is_under_way() -> None:
    assert QUICK_S < 3.0
    assert FULL_S < 10.0


@pytest.mark.usefixtures("small")
def test_a_tenth_of_the_free_memory_is_the_most(
    monkeypatch: pytest.MonkeyPatch, slow_clock: Any
) -> None:
    """By torch's own limit, for tensors and libraries' workspaces; it is lifted afterwards."""
    with pretend(monkeypatch, "cuda") as limits:
        probed(slow_clock, "cuda:0", per_operator_s=0.002)
    free, total = 4 << 30, 8 << 30
    assert limits == [pytest.approx(free / 10 / total, rel=1e-6), 1.0]


def test_tensors_stay_within_the_tenth(monkeypatch: pytest.MonkeyPatch, slow_clock: Any) -> None:
    """Where nothing enforces a limit, sizes are chosen to fit: no tensor is larger."""
    sizes: list[int] = []

    class Sizes(SlowDevice):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = super().__torch_dispatch__(func, types, args, kwargs)
            if isinstance(out, torch.Tensor) and not out.is_meta:
                sizes.append(out.untyped_storage().nbytes())
            return out

    free = 400 * MIB
    described = measure.describe
    monkeypatch.setattr(
        measure,
        "describe",
        lambda device, host: measure.structs.replace(described(device, host), free_bytes=free),
    )
    with Sizes(slow_clock.advance, 0.005):
        measure_machine("cpu")
    assert 16 * MIB <= max(sizes) <= free // 10


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_nothing_stays(monkeypatch: pytest.MonkeyPatch, slow_clock: Any, device: str) -> None:
    """No tensor, no thread, no flag, no random number."""

    def state() -> dict[str, Any]:
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
        return {
            "bytes of tensors": sum(tensor.nbytes for tensor in tensors),
            "threads": threading.active_count(),
            "torch threads": torch.get_num_threads(),
            "precision": torch.get_float32_matmul_precision(),
            "gradients": torch.is_grad_enabled(),
            "default dtype": torch.get_default_dtype(),
            "random state": torch.get_rng_state().tolist(),
            "flash": torch.backends.cuda.flash_sdp_enabled(),
        }

    with pretend(monkeypatch, "cuda"):
        # Once before: what libraries keep for good is theirs.
        probed(slow_clock, device, per_operator_s=0.002)
        before = state()
        probed(slow_clock, device, per_operator_s=0.002)
        assert state() == before
