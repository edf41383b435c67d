"""The ``Prediction``: memory and time of one way to run a workload, per phase."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

import msgspec

from autotune.probe.machine import Machine
from autotune.units import GIB

Resource = Literal["vram", "ram", "compute", "memory_bandwidth", "transfer", "launch"]


class Elsewhere(msgspec.Struct, frozen=True):
    """Memory on another GPU than the device, while a phase runs.

    Attributes:
        gpu: CUDA's index.
        resident_bytes: Weights there.
        activation_bytes: Peak of the activations there; 0 while nothing computes there.
        needed_bytes: What must be free there, margin included.
    """

    gpu: int
    resident_bytes: int
    activation_bytes: int
    needed_bytes: int


PROCESS_BYTES = int(0.41 * GIB)
"""Resident size of a Python process that has imported torch, diffusers and transformers, without
any weights (``scripts/benchmark_overhead.py``, PyTorch 2.13 for the CPU). CUDA's libraries come on
top, as pages of their files, which the system can drop."""


class PhasePrediction(msgspec.Struct, frozen=True):
    """One phase. Bytes are what torch's allocator holds; seconds are of one whole generation.

    Attributes:
        resident_bytes: Weights on the device while it runs.
        activation_bytes: Peak of the activations, the attention kernel's own memory included.
        workspace_bytes: What libraries take besides while memory is free: convolution layout
            copies, cuBLAS.
        margin_bytes: For fragmentation: counted when asking whether it fits, not part of the peak.
        peak_bytes: resident + activation + workspace: the peak to expect where memory is free.
        needed_bytes: What must be free: like the peak, but with the margin instead of the
            workspace that the libraries can do without.
        seconds: The sum of the four shares below.
        compute_s: Operators bound by arithmetic.
        memory_s: Operators bound by memory bandwidth.
        transfer_s: Weights crossing the link.
        launch_s: Time in which the host, not the device, sets the pace.
        once_s: What is done once, before the first image: compiling.
        elsewhere: On other GPUs: all that is above is of the device.
    """

    name: str
    resident_bytes: int
    activation_bytes: int
    workspace_bytes: int
    margin_bytes: int
    peak_bytes: int
    needed_bytes: int
    seconds: float
    compute_s: float
    memory_s: float
    transfer_s: float
    launch_s: float
    once_s: float = 0.0
    elsewhere: tuple[Elsewhere, ...] = ()

    @property
    def elsewhere_bytes(self) -> dict[int, int]:
        """Another GPU's index → what must be free there."""
        return {e.gpu: e.needed_bytes for e in self.elsewhere}


class LoadPrediction(msgspec.Struct, frozen=True):
    """Reading the weights and putting them where they will be used, before the first image.

    Attributes:
        peak_bytes: Most device memory meanwhile.
        host_bytes: Most host RAM meanwhile, this process included.
        seconds: Reading from the disk and crossing the link; ``None`` where the disk's speed is
            not known, or all has been read before.
    """

    peak_bytes: int
    host_bytes: int
    seconds: float | None


class Prediction(msgspec.Struct, frozen=True):
    """One way to run a workload.

    It fits when ``needed_bytes`` is within the device's budget, ``host_bytes`` within the host's,
    and ``elsewhere_bytes`` within the other GPUs'.

    Attributes:
        peak_bytes: Most device memory to expect, in steady state.
        needed_bytes: Most device memory that must be free, at load or in any phase.
        seconds: One generation in steady state.
        phases: In order of execution.
        load: Before the first image.
        host_bytes: Most host RAM that this process takes, at load or running.
        first_image_extra_s: What the first generation takes longer than those after it: kernels
            are loaded and algorithms chosen. ``None`` where it was not measured.
        images: Generations over which is spread what is done once.
    """

    peak_bytes: int
    needed_bytes: int
    seconds: float
    phases: tuple[PhasePrediction, ...]
    load: LoadPrediction
    host_bytes: int
    first_image_extra_s: float | None = None
    images: int = 1

    @property
    def once_s(self) -> float:
        """What is done once, before the first image: compiling."""
        return sum(p.once_s for p in self.phases)

    @property
    def mean_seconds(self) -> float:
        """One generation with its share of what is done once: what a choice compares."""
        return sum(p.seconds + p.once_s / self.images for p in self.phases)

    @property
    def binding_phase(self) -> PhasePrediction:
        """The phase that needs the most memory: shrinking another one changes nothing."""
        return max(self.phases, key=lambda p: p.needed_bytes)

    def binding_phase_of(self, gpu: int) -> PhasePrediction:
        """The phase that needs the most memory of another GPU, by its index."""
        return max(self.phases, key=lambda p: p.elsewhere_bytes.get(gpu, 0))

    @property
    def elsewhere_bytes(self) -> dict[int, int]:
        """Another GPU's index → what must be free there, in the phase that needs most there."""
        return most_of_each(p.elsewhere_bytes for p in self.phases)

    @property
    def phase_needs(self) -> dict[str, int]:
        """Phase → device memory that must be free in it."""
        return {p.name: p.needed_bytes for p in self.phases}

    @property
    def slowest_phase(self) -> PhasePrediction:
        """The phase that takes the most time."""
        return slowest_of(self.phases)


def slowest_of(phases: Iterable[PhasePrediction]) -> PhasePrediction:
    """The phase that takes the most time."""
    return max(phases, key=lambda p: p.seconds)


def most_of_each(needs: Iterable[Mapping[int, int]]) -> dict[int, int]:
    """The most that any needs of each GPU."""
    most: dict[int, int] = {}
    for gpu, needed in (item for need in needs for item in need.items()):
        most[gpu] = max(needed, most.get(gpu, 0))
    return most


class Needs(Protocol):
    """What must fit: a whole prediction, or just its numbers."""

    @property
    def needed_bytes(self) -> int:
        """Of device memory."""

    @property
    def host_bytes(self) -> int:
        """Of host RAM."""

    @property
    def elsewhere_bytes(self) -> dict[int, int]:
        """Of other GPUs' memory, by their index."""

    @property
    def phase_needs(self) -> dict[str, int]:
        """Phase → device memory that must be free in it."""


class Shortage(NamedTuple):
    """How far from fitting, in the order in which more is farther.

    Attributes:
        lacking: Memories that do not suffice: what helps one does nothing for another.
        shares: Of these: needed over available, added up.
    """

    lacking: int
    shares: float


class Budget(NamedTuple):
    """Memory that a pipeline may take, in bytes; ``None`` where the host's is the device's.

    ``elsewhere_bytes`` is that of other GPUs, by CUDA's index. ``phase_bytes`` is the most that a
    phase may be predicted to need of the device's, where one ran out of memory before.
    """

    device_bytes: int
    host_bytes: int | None
    elsewhere_bytes: Mapping[int, int] = MappingProxyType({})
    phase_bytes: Mapping[str, int] = MappingProxyType({})

    def holds(self, needs: Needs) -> bool:
        """Whether it fits on device and host."""
        if needs.needed_bytes > self.device_bytes or not self.host_holds(needs):
            return False  # said without dividing: most sets are asked about for this alone
        return not (needs.elsewhere_bytes or self.phase_bytes) or self.lacks(needs) <= 1

    def host_holds(self, needs: Needs) -> bool:
        """Whether it fits in the host's RAM."""
        return self.host_bytes is None or needs.host_bytes <= self.host_bytes

    def lacks(self, needs: Needs) -> float:
        """How far it is from fitting: needed over available, of the scarcer memory."""
        return max(self._shares(needs))

    def shortage(self, needs: Needs) -> Shortage:
        """How far it is from fitting, in each memory that does not suffice."""
        short = [share for share in self._shares(needs) if share > 1]
        return Shortage(len(short), sum(short))

    def _shares(self, needs: Needs) -> Iterator[float]:
        """Needed over available, of each memory."""
        yield needs.needed_bytes / max(self.device_bytes, 1)
        if self.host_bytes is not None:
            yield needs.host_bytes / max(self.host_bytes, 1)
        for gpu, needed in needs.elsewhere_bytes.items():
            yield needed / max(self.elsewhere_bytes.get(gpu, 0), 1)
        for phase, most in self.phase_bytes.items():
            yield needs.phase_needs.get(phase, 0) / max(most, 1)

    def short_phase(self, needs: Needs) -> str | None:
        """The phase that needs as much as what ran out of memory in it; ``None``: none does."""
        found = needs.phase_needs if self.phase_bytes else {}
        return next((p for p, most in self.phase_bytes.items() if found.get(p, 0) > most), None)

    def short_gpu(self, needs: Needs) -> int | None:
        """The other GPU that lacks most, ``None`` where it fits on all of them."""
        lacking = {
            gpu: needed / max(self.elsewhere_bytes.get(gpu, 0), 1)
            for gpu, needed in needs.elsewhere_bytes.items()
        }
        worst = max(lacking, key=lambda gpu: lacking[gpu], default=None)
        return worst if worst is not None and lacking[worst] > 1 else None


def budget_of(machine: Machine, vram_limit: int | None = None, reserve: int = 0) -> Budget:
    """What is free now, less context and reserve.

    Limit and reserve are of each GPU. Where the device computes in host RAM, its budget is the
    host's too.
    """

    def left(free: int) -> int:
        within = free if vram_limit is None else min(free, vram_limit)
        return max(0, within - machine.context_bytes - reserve)

    shares = machine.device.kind == "cpu" or machine.device.unified_memory
    host = None if shares else machine.host.ram_available_bytes
    elsewhere = {gpu.index: left(gpu.free_bytes) for gpu in machine.others}
    return Budget(left(machine.device.free_bytes), host, elsewhere)


class Bottleneck(msgspec.Struct, frozen=True):
    """What holds a generation back, and in which phase."""

    resource: Resource
    phase: str


def find_bottleneck(prediction: Prediction, budget: Budget) -> Bottleneck:
    """Memory while it does not fit; else the largest share of the slowest phase's time."""
    if prediction.needed_bytes > budget.device_bytes:
        return Bottleneck("vram", prediction.binding_phase.name)
    if not budget.host_holds(prediction):
        return Bottleneck("ram", "load")
    short = budget.short_gpu(prediction)
    if short is not None:
        return Bottleneck("vram", prediction.binding_phase_of(short).name)
    ran_out = budget.short_phase(prediction)
    if ran_out is not None:
        return Bottleneck("vram", ran_out)
    phase = prediction.slowest_phase
    shares: dict[Resource, float] = {
        "compute": phase.compute_s,
        "memory_bandwidth": phase.memory_s,
        "transfer": phase.transfer_s,
        "launch": phase.launch_s,
    }
    return Bottleneck(max(shares, key=lambda r: shares[r]), phase.name)
