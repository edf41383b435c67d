"""What else goes on: others on the CPU, a hypervisor, others on the GPU, heat."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import pytest

from autotune.probe import host, noise, nvml
from autotune.probe.host import _Times
from autotune.probe.noise import OTHERS_ON_CPU, OTHERS_ON_GPU, STOLEN, Watch, serious


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, _Times]:
    """A machine of four cores whose counters the test moves."""
    now = {"now": _Times(0, 0, 0, 0)}
    monkeypatch.setattr(host, "_read_times", lambda: now["now"])
    monkeypatch.setattr(host, "_affinity", lambda: 4)
    for module in (host, noise):
        monkeypatch.setattr(module, "usable_cores", lambda: 4)
    return now


@pytest.mark.parametrize(
    ("moved", "found"),
    [
        (_Times(1, 1.0, 1.0, 0), ()),
        (_Times(1, 2.0, 1.0, 0), (OTHERS_ON_CPU,)),
        (_Times(1, 1.0, 1.0, 0.5), (STOLEN,)),
        (_Times(1, 3.0, 1.0, 1.0), (OTHERS_ON_CPU, STOLEN)),
        (_Times(0.1, 0.05, 0, 0), ()),
        (_Times(0.1, 0.0, 0, 0.02), ()),
    ],
    ids=["own work", "others", "stolen", "both", "ticks of others", "a stolen tick"],
)
def test_what_happened_on_the_cpu(
    times: dict[str, _Times], moved: _Times, found: tuple[str, ...]
) -> None:
    watch = Watch()
    times["now"] = _Times(*[50.0] * 4)
    finish = watch.begin()
    times["now"] = _Times(*(50.0 + value for value in moved))
    assert finish() == found


def test_a_gpu_needs_one_core_that_keeps_up(times: dict[str, _Times]) -> None:
    watch = Watch(on_cpu=False)
    finish = watch.begin()
    times["now"] = _Times(1, 2.9, 0, 0)
    assert finish() == ()
    times["now"] = _Times(1, 3.5, 0, 0)
    assert finish() == (OTHERS_ON_CPU,)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux pins processes")
def test_a_process_that_really_runs_beside_us_is_seen() -> None:
    code = f"import os; os.sched_setaffinity(0, {os.sched_getaffinity(0)!r})\nwhile True: pass"
    finish = Watch().begin()
    busy = [subprocess.Popen([sys.executable, "-c", code]) for _ in os.sched_getaffinity(0)]
    try:
        time.sleep(1.0)
        assert OTHERS_ON_CPU in finish()
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_what_others_do_to_the_gpu_is_read_from_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[int | None] = [None, 12]
    monkeypatch.setattr(nvml, "busy_percent", lambda uuid: 37)
    monkeypatch.setattr(nvml, "others_percent", lambda uuid, since: shares.pop(0))
    watch = Watch("GPU-1")
    assert watch.noise().gpu_percent == 37, "before the probe's own kernels"
    assert watch.noise().gpu_percent == 12


WATCHED = """
import json
from autotune.probe.noise import Watch
watch = Watch("GPU-11111111-aaaa-0000-0000-000000000000", on_cpu=False)
print(json.dumps([watch.begin()(), watch.noise().gpu_percent]))
"""


def test_under_a_driver_every_disturbance_has_its_name(under_driver: Any) -> None:
    """The stub's card is hot, and 4194302 takes a third of it."""
    hot = [OTHERS_ON_GPU, "software thermal slowdown"]
    assert under_driver("desktop", WATCHED) == [hot, 35]
    assert under_driver("idle", WATCHED) == [[], 0]
    assert under_driver("container", WATCHED)[0] == ["software thermal slowdown"]
    assert under_driver("lost", WATCHED)[0] == []
    assert under_driver("none", WATCHED) == [[], None]


def test_a_power_cap_is_how_a_gpu_works() -> None:
    assert serious(("power cap", "application clocks")) == ()
    assert serious(("power brake", "hardware slowdown")) == ("power brake", "hardware slowdown")
    assert serious(None) == ()
