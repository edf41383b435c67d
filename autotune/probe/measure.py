"""The probe: measures one device and its host, in seconds, and leaves nothing behind."""

from __future__ import annotations

import datetime
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from msgspec.structs import replace

from autotune.errors import MachineError
from autotune.probe import nvml, timing
from autotune.probe.attention import measure_attention
from autotune.probe.devices import choose_device, cuda_uuid, describe, empty_cache, nvml_view
from autotune.probe.disk import measure_disk
from autotune.probe.findings import Noise, find
from autotune.probe.host import Neighbours, read_host
from autotune.probe.kernels import measure_kernels
from autotune.probe.live import slug
from autotune.probe.machine import Device, Machine
from autotune.probe.software import installed_versions
from autotune.probe.transfers import measure_link
from autotune.units import MIB

Progress = Callable[[str], None]

_MEMORY_SHARE = 10  # the probe takes at most this part of the free memory
_MEMORY_MOST = 4 << 30

QUICK = "A quick look: `autotune probe` measures the rest, and remembers it."
_FIGURE_S, _QUICK_FIGURE_S = 0.1, 0.03

# A CUDA context with its loaded kernels takes 300-500 MiB on GPUs since 2018; used only where
# neither NVML's free memory before the first tensor nor this process's entry can be read.
_CONTEXT_ESTIMATE_BYTES = 400 * MIB
_CONTEXT_PLAUSIBLE = range(64 * MIB, 2048 * MIB)


def measure_machine(
    device: str | None = None, *, quick: bool = False, progress: Progress | None = None
) -> Machine:
    """Measures a device: memory, link, kernels, attention, and the host.

    Takes under 10 s beyond importing torch and diffusers, and at most a tenth of the free memory.
    Random state, global flags and other processes are left alone; afterwards nothing stays
    allocated.

    Args:
        device: ``"cuda:1"``, ``"cpu"``, …; by default the GPU with most free memory, else the CPU.
        quick: Measure in under 3 s what a first look needs; a finding says so.
        progress: Told in a few words what is being measured.

    Raises:
        MachineError: there is no such device; the message lists those that exist.
    """
    start = time.perf_counter()
    say = progress or (lambda text: None)
    chosen = choose_device(device)
    context = _Context(chosen)
    try:
        with torch.no_grad():
            return _measure(chosen, context, quick, say, start)
    except torch.OutOfMemoryError as error:
        message = f"{chosen} has too little free memory to be measured"
        raise MachineError(message, "close what else uses it, or --device cpu") from error
    finally:
        gc.collect()
        empty_cache(chosen)


def _measure(
    device: torch.device, context: _Context, quick: bool, say: Progress, start: float
) -> Machine:
    say("memory")
    watch = _Watch(device)
    host = read_host()
    facts = describe(device, host)
    allowance = min(_MEMORY_MOST, facts.free_bytes // _MEMORY_SHARE)
    budget_s = _QUICK_FIGURE_S if quick else _FIGURE_S
    say("kernels")
    kernels = measure_kernels(
        device, memory_bytes=allowance, budget_s=budget_s, quick=quick, progress=say
    )
    link = None
    if not facts.unified_memory:
        say("transfers")
        # A pinned and a pageable buffer at a time: of the host's memory, too, a tenth.
        buffer = min(allowance, host.ram_available_bytes // (2 * _MEMORY_SHARE))
        link = measure_link(
            device, memory_bytes=buffer, uuid=facts.uuid, budget_s=budget_s, quick=quick
        )
    say("attention")
    attention = measure_attention(device, memory_bytes=allowance, quick=quick)
    facts = _still_warm(facts, device)
    noise = watch.noise()
    empty_cache(device)
    if not quick:
        say("disk")
        host = replace(host, disk_read_bytes_per_s=measure_disk())
    machine = Machine(
        name=machine_name(facts, host.cores),
        source="measured",
        device=facts,
        host=host,
        kernels=kernels,
        link=link,
        attention=attention,
        context_bytes=context.bytes_now(),
        software=installed_versions(),
        measured_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        measured_in_s=round(time.perf_counter() - start, 2),
    )
    machine = find(
        machine,
        disturbed_above=2 * timing.DISTURBED_SPREAD,
        noise=noise,
        accelerator=torch.accelerator.is_available(),
    )
    return replace(machine, findings=(*machine.findings, QUICK)) if quick else machine


class _Watch:
    """What else goes on from now on."""

    def __init__(self, device: torch.device) -> None:
        self._neighbours = Neighbours()
        self._uuid, self._since = cuda_uuid(device), time.time()
        # Before the first kernel of this probe: whatever runs then is not its own.
        self._before = nvml.busy_percent(self._uuid)

    def noise(self) -> Noise:
        """What went on until now."""
        others = nvml.others_percent(self._uuid, self._since)
        return Noise(
            foreign_cores=self._neighbours.busy_cores(),
            stolen_cores=self._neighbours.stolen_cores(),
            gpu_percent=self._before if others is None else others,
        )


def machine_name(device: Device, cores: int) -> str:
    """``"nvidia-h100-80gb-hbm3"``, ``"cpu-intel-xeon-2-cores"``."""
    return f"cpu-{slug(device.name)}-{cores}-cores" if device.kind == "cpu" else slug(device.name)


def _still_warm(facts: Device, device: torch.device) -> Device:
    """Throttling shows under load: read it again before the device cools down."""
    gpu = nvml_view(device)
    return facts if gpu is None else replace(facts, throttle_reasons=gpu.throttle_reasons)


@dataclass
class _Context:
    """What the runtime takes beside tensors: free memory before it started, less that after.

    Made before CUDA is started in this process; where it runs already, this process's entry in
    NVML less what torch holds stands in.
    """

    device: torch.device
    free_before: int | None = None

    def __post_init__(self) -> None:
        if self.device.type == "cuda" and not _has_context(self.device):
            self.free_before = self._free()

    def bytes_now(self) -> int:
        """Bytes; 0 on anything but CUDA."""
        if self.device.type != "cuda":
            return 0
        held = torch.cuda.memory_reserved(self.device)
        candidates = [self._by_free_memory(held), self._by_own_entry(held)]
        plausible = [size for size in candidates if size is not None and size in _CONTEXT_PLAUSIBLE]
        return plausible[0] if plausible else _CONTEXT_ESTIMATE_BYTES

    def _by_free_memory(self, held: int) -> int | None:
        free = self._free()
        return None if free is None or self.free_before is None else self.free_before - free - held

    def _by_own_entry(self, held: int) -> int | None:
        own = nvml.own_bytes(cuda_uuid(self.device))
        return None if own is None else own - held

    def _free(self) -> int | None:
        gpu = nvml_view(self.device)
        return None if gpu is None else gpu.free_bytes


def _has_context(device: torch.device) -> bool:
    has_context = getattr(torch._C, "_cuda_hasPrimaryContext", None)
    try:
        return has_context is None or bool(has_context(device.index or 0))
    except RuntimeError:
        return True
