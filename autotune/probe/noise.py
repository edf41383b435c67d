"""What else goes on while something is measured: other processes, the hypervisor, heat."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from autotune.probe import nvml
from autotune.probe.host import Neighbours, usable_cores

OTHERS_ON_CPU = "other processes on the CPU"
OTHERS_ON_GPU = "other processes on the GPU"
STOLEN = "CPU time stolen by the hypervisor"

FOREIGN_GPU_PERCENT = 10  # a desktop being drawn stays below
STOLEN_SHARE = 0.05  # of the cores
FOREIGN_SHARE = 0.15  # of the cores, where the CPU is what is measured

_SERIOUS = ("slowdown", "power brake")  # a power cap is how a GPU normally works
_TICK_S = 0.01  # the kernel counts in these, core by core: one more or less on each tells nothing
_GPU_SAMPLES_S = 1.0  # the driver keeps a process's share of the GPU for about so long

Finish = Callable[[], tuple[str, ...]]


class Noise(NamedTuple):
    """What else went on while the machine was measured.

    Attributes:
        foreign_cores: Cores that other processes kept busy.
        stolen_cores: Cores' worth of time that the hypervisor gave to other machines.
        gpu_percent: Share of the GPU that other processes took; ``None`` where nobody tells.
    """

    foreign_cores: float = 0.0
    stolen_cores: float = 0.0
    gpu_percent: int | None = None


def serious(throttle_reasons: tuple[str, ...] | None) -> tuple[str, ...]:
    """Those that make a GPU slower than it is."""
    return tuple(word for word in throttle_reasons or () if any(part in word for part in _SERIOUS))


class Watch:
    """What else goes on from now on.

    Args:
        uuid: NVML's name of the device measured; ``None`` for one that it does not know.
        on_cpu: The CPU itself is measured: every core that somebody else uses counts. A GPU needs
            one that keeps up.
    """

    def __init__(self, uuid: str | None = None, *, on_cpu: bool = True) -> None:
        self._neighbours = Neighbours()
        self._uuid, self._since, self._cores = uuid, time.time(), usable_cores()
        # Before the first kernel of this probe: whatever runs then is not its own.
        self._before = nvml.busy_percent(uuid)
        tolerated = FOREIGN_SHARE * self._cores if on_cpu else self._cores - 1.0
        self.tolerated_cores = max(0.2, tolerated)

    def noise(self) -> Noise:
        """What went on until now."""
        others = nvml.others_percent(self._uuid, self._since)
        return Noise(
            foreign_cores=self._neighbours.busy_cores(),
            stolen_cores=self._neighbours.stolen_cores(),
            gpu_percent=self._before if others is None else others,
        )

    def begin(self) -> Finish:
        """Starts watching one measurement; what it returns names what disturbed it, when called."""
        neighbours, start = Neighbours(), time.time()

        def disturbances() -> tuple[str, ...]:
            return (*self._on_cpu(neighbours), *self._on_gpu(start))

        return disturbances

    def _on_cpu(self, neighbours: Neighbours) -> tuple[str, ...]:
        seconds = neighbours.seconds()
        least = _TICK_S * (2 + self._cores) / seconds if seconds > 0 else 0.0
        found = []
        if neighbours.busy_cores() > max(self.tolerated_cores, least):
            found.append(OTHERS_ON_CPU)
        if neighbours.stolen_cores() > max(STOLEN_SHARE * self._cores, least):
            found.append(STOLEN)
        return tuple(found)

    def _on_gpu(self, start: float) -> tuple[str, ...]:
        if self._uuid is None:
            return ()
        others = nvml.others_percent(self._uuid, start - _GPU_SAMPLES_S) or 0
        found = (OTHERS_ON_GPU,) if others > FOREIGN_GPU_PERCENT else ()
        return (*found, *serious(nvml.throttle_reasons(self._uuid)))
