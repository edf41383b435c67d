"""The ``Machine``: everything that decisions need to know about the hardware.

Pure data: no torch, no NVML. Quantities carry their unit in their name; a field that does not exist
on a machine (no link on a CPU, no power limit in a virtual machine) is ``None``.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from autotune.probe.software import maps_files

DeviceKind = Literal["cuda", "cpu", "mps", "xpu"]


class Value(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Base of the immutable values that the stages hand on."""


class Figure(Value, frozen=True):
    """One quantity, with how it was obtained.

    Attributes:
        value: The median of the samples, or the figure as published.
        samples: Every raw sample, in the unit of ``value``; empty when the figure was not measured.
        source: ``"measured"``, or where the figure was published and what fraction was taken.
        spread: Width of the samples' middle half as a fraction of the median; ``None`` for fewer
            than three samples.
        disturbances: What got in the way, also when it was measured again; empty when nothing did.
    """

    value: float
    samples: tuple[float, ...] = ()
    source: str = "measured"
    spread: float | None = None
    disturbances: tuple[str, ...] = ()


class GpuProcess(Value, frozen=True):
    """Somebody else's memory on the device."""

    pid: int
    used_bytes: int | None = None
    name: str | None = None


class Device(Value, frozen=True):
    """The device that runs the pipeline. ``free_bytes`` is a live fact: read again at every start.

    ``uuid`` is NVML's, because CUDA's index is not NVML's. For the CPU, memory is the host's RAM.
    ``used_bytes`` is as the driver reports it, which may count its own share apart.
    ``power_limit_default_watts`` is the maker's, ``power_limit_watts`` what holds. Clocks are the
    highest that the driver allows.
    """

    kind: DeviceKind
    name: str
    total_bytes: int
    free_bytes: int
    index: int = 0
    uuid: str | None = None
    compute_capability: str | None = None
    driver: str | None = None
    power_limit_watts: float | None = None
    sm_clock_max_mhz: int | None = None
    throttle_reasons: tuple[str, ...] | None = None
    mig_enabled: bool | None = None
    bar1_bytes: int | None = None
    unified_memory: bool = False
    processes: tuple[GpuProcess, ...] = ()
    used_bytes: int | None = None
    power_limit_default_watts: float | None = None
    memory_clock_max_mhz: int | None = None
    memory_bus_bits: int | None = None
    multiprocessors: int | None = None


class OtherGpu(Value, frozen=True):
    """A GPU beside the device, as this process sees it. ``free_bytes`` is a live fact, too.

    ``index`` is CUDA's: PyTorch calls it ``cuda:index``.
    """

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    uuid: str | None = None
    compute_capability: str | None = None


class TransferPoint(Value, frozen=True):
    """Copies of one size. *h2d* is host to device."""

    direction: Literal["h2d", "d2h"]
    pinned: bool
    bytes: int
    bytes_per_s: Figure


class Link(Value, frozen=True):
    """Host ↔ device. Bytes per second; *h2d* is host to device.

    ``module_*`` are ``module.to()`` as model offload runs it: far below what pinned copies reach.
    ``overlap_fraction`` is how much of the shorter of the two a pinned copy to the device and a
    kernel save by running at once: 1 is all of it, 0 means that one waits for the other.
    """

    h2d_pinned_bytes_per_s: Figure
    d2h_pinned_bytes_per_s: Figure
    h2d_pageable_bytes_per_s: Figure
    d2h_pageable_bytes_per_s: Figure
    module_h2d_bytes_per_s: Figure
    module_d2h_bytes_per_s: Figure
    pcie_generation_max: int | None = None
    pcie_width_max: int | None = None
    pcie_generation_in_copy: int | None = None
    pcie_width_in_copy: int | None = None
    overlap_fraction: Figure | None = None
    sweep: tuple[TransferPoint, ...] = ()


class Kernels(Value, frozen=True):
    """How fast the device computes. Keys are dtypes: ``"float32"``, ``"float16"``, ``"bfloat16"``.

    Matrix products have two more where the hardware does: ``"tensorfloat32"`` (float32 tensors,
    multiplied with ten bits) and ``"float8_e4m3fn"``; no pipeline has them as its dtype.
    ``memory_bytes_per_s`` counts bytes read plus bytes written. ``dispatch_s`` is what one operator
    inside a model costs the host, the Python of its modules included; ``launch_s`` what a bare one
    does, from the call to the kernel's launch.
    """

    matmul_flops_per_s: dict[str, Figure]
    convolution_flops_per_s: dict[str, Figure]
    memory_bytes_per_s: Figure
    dispatch_s: Figure
    convolution_channels_last_flops_per_s: dict[str, Figure] = {}
    offload_hook_s: Figure | None = None
    launch_s: Figure | None = None


class AttentionRate(Value, frozen=True):
    """One attention implementation, really called at one shape.

    ``"sdpa"`` is PyTorch's own choice; ``"sdpa_flash"``, ``"sdpa_efficient"``, ``"sdpa_cudnn"``
    and ``"sdpa_math"`` are what it chooses from.
    ``flops_per_s`` counts 4·batch·heads·q_tokens·kv_tokens·head_dim per call. It is ``None`` when
    the implementation failed; ``error`` then has its message.
    """

    implementation: str
    dtype: str
    batch: int
    heads: int
    q_tokens: int
    kv_tokens: int
    head_dim: int
    flops_per_s: Figure | None = None
    extra_bytes: int | None = None
    deviation: float | None = None
    error: str | None = None


class OperatorTime(Value, frozen=True):
    """One operator run alone on random data; ``workspace_bytes`` is beside its output.

    ``seconds`` is ``None`` where it cannot be run alone, because its values matter.
    ``first_extra_s`` is how much longer its first call took: kernels loaded, algorithms searched.
    ``samples`` are the raw seconds, to four digits; ``seconds`` is their median, or the least of
    them where something got in the way of many.
    """

    seconds: float | None
    workspace_bytes: int | None = None
    first_extra_s: float | None = None
    samples: tuple[float, ...] = ()


class Host(Value, frozen=True):
    """The computer around the device. RAM respects a container's limit; cores the affinity mask.

    ``memlock_limit_bytes`` is ``RLIMIT_MEMLOCK``, ``None`` when unlimited or unknown: information
    only, because CUDA's driver pins memory without it; what bounds pinned memory is RAM, in a
    container the control group's. ``disk_read_bytes_per_s`` is that of the disk with the hub's
    model cache, past the page cache.
    """

    cpu: str
    cores: int
    ram_total_bytes: int
    ram_available_bytes: int
    os: str
    memlock_limit_bytes: int | None = None
    disk_read_bytes_per_s: Figure | None = None


class Machine(Value, frozen=True):
    """Everything measured (or published) about one device and its host.

    Attributes:
        name: Short name: a reference machine's file name, or one made from the device's name.
        source: ``"measured"``, or ``"datasheet"`` for published figures.
        context_bytes: What the device's runtime takes before the first tensor (CUDA context).
        default_attention: What the installed stack uses when nothing is set: ``"sdpa"`` on
            today's PyTorch, ``"vanilla"`` on PyTorch 1.
        software: Distribution name → version of what was measured with, and of what optimizations
            need: empty where that was not installed; nothing is known of what is not in it.
        operators: Replayed operators of the workloads seen so far, by ``Operator.key``.
        findings: What a person should know, one sentence each.
        left_out: What the probe's time did not suffice for, in words.
        others: The other GPUs, in CUDA's order; read at every start, nothing of them is measured.
    """

    name: str
    source: Literal["measured", "datasheet"]
    device: Device
    host: Host
    kernels: Kernels
    link: Link | None = None
    attention: tuple[AttentionRate, ...] = ()
    context_bytes: int = 0
    default_attention: Literal["sdpa", "vanilla"] = "sdpa"
    software: dict[str, str] = {}
    findings: tuple[str, ...] = ()
    measured_at: str | None = None
    measured_in_s: float | None = None
    operators: dict[str, OperatorTime] = {}
    left_out: tuple[str, ...] = ()
    others: tuple[OtherGpu, ...] = ()

    def has(self, package: str) -> bool:
        """Whether a package that optimizations need (``software.OPTIONAL``, ``"c++"``) is there.

        Asked of the machine and not of this process: a plan for a machine is the same everywhere.
        What nobody looked for is taken to be there: on a reference machine, that is everything.
        """
        return self.software.get(package) != ""

    @property
    def maps_files(self) -> bool:
        """Whether weights stay mapped from their files as they are read, and take no RAM."""
        return maps_files(self.host.os, self.software)

    @property
    def twins(self) -> tuple[OtherGpu, ...]:
        """The other GPUs of the device's own model, the one with most free memory first.

        What was measured of the device holds for them.
        """
        mine = (self.device.name, self.device.compute_capability)
        alike = [gpu for gpu in self.others if (gpu.name, gpu.compute_capability) == mine]
        return tuple(sorted(alike, key=lambda gpu: (-gpu.free_bytes, gpu.index)))
