"""The probe: measures one device and its host, in seconds, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import datetime
import gc
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from msgspec import structs

from autotune.errors import MachineError, first_line
from autotune.probe import nvml
from autotune.probe.attention import measure_attention
from autotune.probe.deadline import Deadline
from autotune.probe.devices import (
    at_most,
    choose_device,
    cuda_uuid,
    describe,
    empty_cache,
    nvml_view,
)
from autotune.probe.disk import measure_disk
from autotune.probe.findings import find
from autotune.probe.host import read_host
from autotune.probe.kernels import measure_host_costs, measure_kernels, with_launch_cost
from autotune.probe.live import other_gpus, slug
from autotune.probe.machine import AttentionRate, Device, Figure, Kernels, Link, Machine
from autotune.probe.noise import Watch
from autotune.probe.parts import EVERYTHING, Part, composed
from autotune.probe.samples import DISTURBED_SPREAD
from autotune.probe.software import installed_versions
from autotune.probe.timing import Timer
from autotune.probe.transfers import measure_link, with_module_rates
from autotune.units import MIB

Progress = Callable[[str], None]

_MEMORY_SHARE = 10  # the probe takes at most this part of the free memory
_MEMORY_MOST = 4 << 30
_PLANNED_SHARE = 0.75  # of that for tensors; the rest is for what libraries take beside them

QUICK = "A quick look: `autotune probe` measures the rest, and remembers it."
QUICK_S, FULL_S = 2.6, 9.0
"""Seconds until nothing more is begun: 3 and 10, less what is under way then."""
_FIGURE_S, _QUICK_FIGURE_S = 0.1, 0.03

_DISK_S = 0.5
_NEEDS_S = {"kernels": 2.0, "link": 1.8, "attention": 2.0, "host": 3.6, "disk": _DISK_S}
"""About what each stage takes at most, in their order: the time left is shared out by that."""

_STAGES: dict[str, frozenset[Part]] = {
    "kernels": frozenset(("kernels",)),
    "link": frozenset(("link", "modules")),
    "attention": frozenset(("attention",)),
    "host": frozenset(("dispatch",)),
    "disk": frozenset(("disk",)),
}
"""The parts that each stage measures."""

# A CUDA context with its loaded kernels takes 300-500 MiB on GPUs since 2018; used only where
# neither NVML's free memory before the first tensor nor this process's entry can be read.
_CONTEXT_ESTIMATE_BYTES = 400 * MIB
_CONTEXT_PLAUSIBLE = range(64 * MIB, 2048 * MIB)


def measure_machine(
    device: str | None = None,
    *,
    quick: bool = False,
    progress: Progress | None = None,
    budget_s: float | None = None,
    known: Machine | None = None,
    parts: Collection[Part] = EVERYTHING,
) -> Machine:
    """Measures a device: memory, link, kernels, attention, and the host.

    Takes under 10 s beyond importing torch (3 s for a quick look) on any device, and at most a
    tenth of the free memory. What the time does not suffice for is left out, and said. Random
    state, global flags and other processes are left alone; afterwards nothing stays allocated.

    Args:
        device: ``"cuda:1"``, ``"cpu"``, …; by default the GPU with most free memory, else the CPU.
        quick: Measure what a first look needs; a finding says so.
        progress: Told in a few words what is being measured.
        budget_s: Seconds after which nothing more is begun, other than those above.
        known: This machine as measured before. Without it, where it is another device, and for a
            quick look, all is measured.
        parts: What of it to measure now; the rest is taken over.

    Raises:
        MachineError: there is no such device; the message lists those that exist.
    """
    start = time.perf_counter()
    deadline = Deadline(budget_s or (QUICK_S if quick else FULL_S))
    chosen = choose_device(device)
    context = _Context(chosen)
    try:
        with torch.no_grad():
            say = progress or (lambda text: None)
            machine = _measure(chosen, context, deadline, quick, say, known, frozenset(parts))
    except torch.OutOfMemoryError as error:
        message = f"{chosen} has too little free memory to be measured"
        raise MachineError(message, "close what else uses it, or --device cpu") from error
    except RuntimeError as error:
        if chosen.type == "cpu":
            raise
        message = f"{chosen} fails while it is measured: {first_line(error)}"
        raise MachineError(message, _remedy(error)) from error
    finally:
        gc.collect()
        with contextlib.suppress(RuntimeError):  # of a device that has failed
            empty_cache(chosen)
    return structs.replace(machine, measured_in_s=round(time.perf_counter() - start, 2))


def _remedy(error: RuntimeError) -> str:
    """What to do about a device that PyTorch lists and cannot compute on."""
    if "no kernel image" in str(error):
        return "install a torch built for this GPU's compute capability, or --device cpu"
    return "see what the driver says (nvidia-smi, dmesg), or --device cpu"


def _measure(
    device: torch.device,
    context: _Context,
    deadline: Deadline,
    quick: bool,
    say: Progress,
    known: Machine | None,
    parts: frozenset[Part],
) -> Machine:
    say("memory")
    watch = Watch(cuda_uuid(device), on_cpu=device.type == "cpu")
    host = read_host()
    facts = describe(device, host)
    has_link = device.type == "cuda" and not facts.unified_memory
    if known is None or quick or not _is_same(known, facts) or (has_link and not known.link):
        known, parts = None, EVERYTHING
    allowance = min(_MEMORY_MOST, facts.free_bytes // _MEMORY_SHARE)
    timer = Timer(device, _QUICK_FIGURE_S if quick else _FIGURE_S, deadline, watch)
    measuring = _Measuring(
        timer=timer,
        parts=parts,
        stages=_stages(quick, has_link, parts),
        quick=quick,
        say=say,
        memory_bytes=int(allowance * _PLANNED_SHARE),
        # A pinned and a pageable buffer at a time: of the host's memory, too, a tenth.
        host_bytes=host.ram_available_bytes // (2 * _MEMORY_SHARE),
    )
    with at_most(device, allowance):
        kernels = measuring.kernels(known)
        link = measuring.link(known, facts.uuid)
        attention = measuring.attention(known, kernels)
        facts = _still_warm(facts, device)
        kernels = measuring.host_costs(kernels, link)
    noise = watch.noise()
    empty_cache(device)
    host = structs.replace(host, disk_read_bytes_per_s=measuring.disk(known))
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
        left_out=deadline.left_out,
        others=other_gpus(facts),
    )
    machine = machine if known is None else composed(known, machine, parts)
    machine = find(
        machine,
        disturbed_above=2 * DISTURBED_SPREAD,
        noise=noise,
        accelerator=torch.accelerator.is_available(),
    )
    return structs.replace(machine, findings=(*machine.findings, QUICK)) if quick else machine


def _is_same(known: Machine, device: Device) -> bool:
    return (known.device.kind, known.device.uuid) == (device.kind, device.uuid)


@dataclass(frozen=True)
class _Measuring:
    """The stages of one measurement, each with its share of the time.

    Attributes:
        timer: With the deadline of all.
        parts: What to measure of a machine that is known; everything of one that is not.
        stages: Those to come to, in order.
        quick: Measure what a first look needs.
        say: Told what is being measured.
        memory_bytes: Of the device, for tensors.
        host_bytes: Of the host, for a buffer.
    """

    timer: Timer
    parts: frozenset[Part]
    stages: tuple[str, ...]
    quick: bool
    say: Progress
    memory_bytes: int
    host_bytes: int

    def kernels(self, known: Machine | None) -> Kernels:
        """Rates, and launches; where they are known, what is asked for of them."""
        if known is None or "kernels" in self.parts:
            return measure_kernels(
                self._within("kernels"),
                memory_bytes=self.memory_bytes,
                quick=self.quick,
                progress=self.say,
            )
        if "dispatch" not in self.parts:
            return known.kernels
        return with_launch_cost(self._within("host"), known.kernels)

    def link(self, known: Machine | None, uuid: str | None) -> Link | None:
        """Copies and module moves, or those alone."""
        if "link" not in self.stages:
            return known.link if known else None
        self.say("transfers")
        timer, buffer = self._within("link"), min(self.memory_bytes, self.host_bytes)
        if known is not None and known.link is not None and "link" not in self.parts:
            return with_module_rates(timer, known.link, memory_bytes=buffer)
        return measure_link(timer, memory_bytes=buffer, uuid=uuid, quick=self.quick)

    def attention(self, known: Machine | None, kernels: Kernels) -> tuple[AttentionRate, ...]:
        """The implementations at the shapes of real models."""
        if known is not None and "attention" not in self.parts:
            return known.attention
        self.say("attention")
        return measure_attention(
            self._within("attention"),
            memory_bytes=self.memory_bytes,
            flops_per_s=_widely_used_rate(kernels),
            quick=self.quick,
        )

    def host_costs(self, kernels: Kernels, link: Link | None) -> Kernels:
        """The kernels with what the host spends in a model and on hooks."""
        if "host" not in self.stages:
            return kernels
        return measure_host_costs(self._within("host"), kernels, link, self.say)

    def disk(self, known: Machine | None) -> Figure | None:
        """Bytes per second from the disk with the model cache."""
        if "disk" not in self.stages:
            return known.host.disk_read_bytes_per_s if known else None
        deadline = self.timer.deadline
        if not deadline.leaves("the read rate of the model cache"):
            return None
        self.say("disk")
        return measure_disk(budget_s=min(_DISK_S, deadline.left_s))

    def _within(self, stage: str) -> Timer:
        return self.timer.within(_share_s(stage, self.timer.deadline, self.stages))


def _stages(quick: bool, has_link: bool, parts: frozenset[Part]) -> tuple[str, ...]:
    """What is measured, in order."""
    stages = tuple(_NEEDS_S)[:3] if quick else tuple(_NEEDS_S)
    return tuple(s for s in stages if _STAGES[s] & parts and (has_link or s != "link"))


def _share_s(stage: str, deadline: Deadline, stages: tuple[str, ...]) -> float:
    """Seconds for a stage: what the ones before it left, less what the ones after it need."""
    still = sum(_NEEDS_S[name] for name in stages[stages.index(stage) :])
    return deadline.left_s * _NEEDS_S[stage] / still


def _widely_used_rate(kernels: Kernels) -> float:
    """FLOP/s of the dtype that attention is measured in: float16, on the CPU float32."""
    rates = kernels.matmul_flops_per_s
    return rates.get("float16", rates["float32"]).value


def machine_name(device: Device, cores: int) -> str:
    """``"nvidia-h100-80gb-hbm3"``, ``"cpu-intel-xeon-2-cores"``."""
    return f"cpu-{slug(device.name)}-{cores}-cores" if device.kind == "cpu" else slug(device.name)


def _still_warm(facts: Device, device: torch.device) -> Device:
    """Throttling shows under load: read it again before the device cools down."""
    gpu = nvml_view(device)
    if gpu is None:
        return facts
    return structs.replace(facts, throttle_reasons=gpu.throttle_reasons)


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
