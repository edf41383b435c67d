"""NVIDIA's management library: the only file that calls it.

Any query may be unsupported (a laptop, a container, a unified-memory board, an old driver, a GPU
that fell off the bus): the answer is then ``None``, never an exception. NVML is opened at the
first question, under one lock, closed at exit, and opened again in a forked child.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import threading
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import psutil

from autotune.probe.machine import GpuProcess, Value

_REINSTALL = "pip uninstall pynvml, then pip install --force-reinstall nvidia-ml-py"
_NEEDED = ("NVMLError", "nvmlInit", "nvmlShutdown", "nvmlDeviceGetHandleByUUID")
_CLOCK_SM, _CLOCK_MEMORY = 1, 2

# NVML's clock event bits. Bit 0, an idle GPU, is left out: it slows nothing down.
_THROTTLE_WORDS = {
    0x002: "application clocks",
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "power brake",
    0x100: "display clocks",
    0x200: "board limit",
    0x400: "reliability",
}


class Gpu(Value, frozen=True):
    """What NVML says about one GPU (or one MIG instance) at one moment.

    Attributes:
        index: NVML's index (PCI bus order), which need not be CUDA's.
        uuid: ``GPU-…`` or ``MIG-…``: what everything is keyed by.
        free_bytes: As NVML reports it; never computed, since drivers differ in what *used* counts.
        used_bytes: As NVML reports it, for people: some drivers count their own share in, some not.
        processes: Everybody on the GPU, this process included.
        sm_clock_mhz: Right now; an idle GPU clocks down.
        pcie_generation: Right now; an idle link drops to generation 1.
        throttle_reasons: In words; empty when nothing slows the clocks.
        mig_instances: UUIDs of the MIG instances of a GPU that is split.
    """

    index: int
    uuid: str
    name: str
    total_bytes: int | None = None
    free_bytes: int | None = None
    used_bytes: int | None = None
    processes: tuple[GpuProcess, ...] = ()
    driver: str | None = None
    compute_capability: str | None = None
    pcie_generation: int | None = None
    pcie_generation_max: int | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    power_limit_watts: float | None = None
    power_limit_default_watts: float | None = None
    sm_clock_mhz: int | None = None
    sm_clock_max_mhz: int | None = None
    memory_clock_max_mhz: int | None = None
    memory_bus_bits: int | None = None
    throttle_reasons: tuple[str, ...] | None = None
    mig_enabled: bool | None = None
    mig_instances: tuple[str, ...] = ()
    bar1_bytes: int | None = None


class _Session:
    """NVML, opened at most once per process; every call goes through :meth:`ask`."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._library: ModuleType | None = None
        self._failure: str | None = None
        self._inherited: ModuleType | None = None

    def failure(self) -> str | None:
        """Why NVML cannot be used here, or ``None``; opens it if nobody did yet."""
        with self.lock:
            if self._library is None and self._failure is None:
                self._library, self._failure = _open(self._inherited)
            return self._failure

    def ask(self, query: str, *arguments: Any) -> Any:
        """Calls one function of the binding; ``None`` when it has no answer."""
        with self.lock:
            if self.failure() is not None or self._library is None:
                return None
            try:
                return getattr(self._library, query)(*arguments)
            except (AttributeError, ValueError, OSError, self._library.NVMLError):
                return None

    def close(self) -> None:
        """Shuts NVML down; a later question opens it again."""
        with self.lock:
            if self._library is not None:
                _shut_down(self._library)
            self._library = self._failure = None

    def forget(self) -> None:
        """In a forked child: the parent's session is not ours, open one at the next question."""
        self._inherited = self._library
        self._library = self._failure = None
        self.lock.release()


def _shut_down(library: ModuleType) -> None:
    with contextlib.suppress(Exception):
        library.nvmlShutdown()


def _open(inherited: ModuleType | None) -> tuple[ModuleType | None, str | None]:
    """Imports the binding and initialises NVML: ``(library, None)`` or ``(None, why not)``."""
    try:
        library = importlib.import_module("pynvml")
    except ImportError:
        return None, "the NVML binding is not installed: pip install nvidia-ml-py"
    except Exception as error:  # such as a SyntaxError: its predecessors were written for Python 2
        return None, f"importing pynvml fails ({type(error).__name__}): {_REINSTALL}"
    missing = [name for name in _NEEDED if not hasattr(library, name)]
    if missing:
        return None, _shadowed(library, missing[0])
    if inherited is not None:
        # The copied reference count would make nvmlInit do nothing in a forked child.
        _shut_down(inherited)
    try:
        library.nvmlInit()
    except library.NVMLError as error:
        return None, _explain(library, error)
    return library, None


def _shadowed(library: ModuleType, missing: str) -> str:
    places = [getattr(library, "__file__", None), *getattr(library, "__path__", ())]
    where = next((place for place in places if place), "an unknown place")
    return f"the module pynvml at {where} is not NVIDIA's (it has no {missing}): {_REINSTALL}"


def _explain(library: ModuleType, error: Any) -> str:
    remedies = {
        "NVML_ERROR_LIBRARY_NOT_FOUND": "no NVIDIA driver here (libnvidia-ml was not found): "
        "install the driver, or start the container with --gpus all",
        "NVML_ERROR_DRIVER_NOT_LOADED": "the NVIDIA driver is installed but not loaded: "
        "run nvidia-smi as root, or reboot",
        "NVML_ERROR_LIB_RM_VERSION_MISMATCH": "the NVIDIA driver and its library differ in "
        "version, as after an update: reboot, or reload the nvidia kernel modules",
        "NVML_ERROR_NO_PERMISSION": "no permission to talk to the NVIDIA driver: "
        "check the access rights of /dev/nvidia*",
    }
    value = getattr(error, "value", None)
    for name, remedy in remedies.items():
        if value is not None and getattr(library, name, None) == value:
            return remedy
    return f"NVML does not start ({error}): see what nvidia-smi says"


_session = _Session()
atexit.register(_session.close)
if hasattr(os, "register_at_fork"):
    # Forking while another thread is inside NVML would leave the child a lock that nobody releases.
    os.register_at_fork(
        before=_session.lock.acquire,
        after_in_parent=_session.lock.release,
        after_in_child=_session.forget,
    )


def unavailable_reason() -> str | None:
    """Why NVML has nothing to say here, and what to do about it; ``None`` if it works."""
    return _session.failure()


def gpus() -> tuple[Gpu, ...]:
    """Every GPU that answers, in NVML's order; empty without a driver."""
    count = _session.ask("nvmlDeviceGetCount") or 0
    handles = (_session.ask("nvmlDeviceGetHandleByIndex", index) for index in range(count))
    facts = (_facts(handle, index) for index, handle in enumerate(handles) if handle is not None)
    return tuple(gpu for gpu in facts if gpu is not None)


def silent_gpus() -> int:
    """How many GPUs the driver counts and cannot reach, such as one that fell off the bus."""
    return max(0, (_session.ask("nvmlDeviceGetCount") or 0) - len(gpus()))


def gpu(uuid: str | None) -> Gpu | None:
    """The GPU or MIG instance with this UUID.

    Args:
        uuid: With NVML's prefix, or bare as ``torch.cuda.get_device_properties(i).uuid`` writes it.
    """
    handle = _handle(uuid) if uuid else None
    return (
        None if handle is None else _facts(handle, _session.ask("nvmlDeviceGetIndex", handle) or 0)
    )


def free_bytes(uuid: str | None) -> int | None:
    """Memory that is free on the GPU right now, in two queries; ``None`` where NVML is silent."""
    handle = _handle(uuid) if uuid else None
    memory = None if handle is None else _session.ask("nvmlDeviceGetMemoryInfo", handle)
    return None if memory is None else int(memory.free)


def link_state(uuid: str | None) -> tuple[int | None, int | None]:
    """PCIe generation and width right now: read it while copies run, an idle link steps down."""
    handle = _handle(uuid) if uuid else None
    if handle is None:
        return None, None
    generation = _session.ask("nvmlDeviceGetCurrPcieLinkGeneration", handle)
    return generation or None, _session.ask("nvmlDeviceGetCurrPcieLinkWidth", handle) or None


def visible_gpus(environ: Mapping[str, str] = os.environ) -> tuple[Gpu, ...]:
    """The GPUs that CUDA would show this process, as CUDA numbers them, without starting CUDA.

    Indices are NVML's: see :func:`numbers_as_cuda` for where CUDA's are the same.
    """
    known = gpus()
    instances = {gpu.uuid: gpu.mig_instances for gpu in known if gpu.mig_enabled}
    uuids = visible_uuids(
        environ.get("CUDA_VISIBLE_DEVICES"), [gpu.uuid for gpu in known], instances
    )
    by_uuid = {gpu.uuid: gpu for gpu in known}
    found = (by_uuid.get(uuid) or gpu(uuid) for uuid in uuids)
    return tuple(item for item in found if item is not None)


def numbers_as_cuda(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether an index means the same GPU to CUDA as here.

    NVML numbers by bus. CUDA puts the fastest GPU first unless ``CUDA_DEVICE_ORDER=PCI_BUS_ID``:
    with equal GPUs that is the same, with different ones only CUDA itself knows.
    """
    by_bus = environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    by_uuid = environ.get("CUDA_VISIBLE_DEVICES", "").strip().startswith(("GPU-", "MIG-"))
    return by_bus or by_uuid or len({gpu.name for gpu in gpus()}) <= 1


def visible_uuids(
    value: str | None,
    uuids: Sequence[str],
    mig_instances: Mapping[str, Sequence[str]] | None = None,
) -> tuple[str, ...]:
    """What ``CUDA_VISIBLE_DEVICES`` leaves visible, in CUDA's order.

    The rules are CUDA's: the first entry's form (index, ``GPU-`` or ``MIG-`` UUID) holds for the
    whole list; an entry that names no device, or a UUID prefix that names two, ends the list; a
    device named twice empties it. A process sees one MIG instance at most.

    Args:
        value: The variable's value; ``None`` when it is not set.
        uuids: UUIDs of the GPUs, in index order.
        mig_instances: UUIDs of the MIG instances of each GPU that is split.
    """
    instances = dict(mig_instances or {})
    if value is None:
        chosen = tuple(uuids)
    elif value.strip().startswith("MIG-"):
        known = [uuid for group in instances.values() for uuid in group]
        return _pick([_by_prefix(entry, known, "MIG-") for entry in value.split(",")])[:1]
    elif value.strip().startswith("GPU-"):
        chosen = _pick([_by_prefix(entry, uuids, "GPU-") for entry in value.split(",")])
    else:
        chosen = _pick([_by_index(entry, uuids) for entry in value.split(",")])
    return _enter_mig(chosen, instances)


def _pick(entries: Sequence[str | None]) -> tuple[str, ...]:
    """The entries up to the first invalid one; none at all when one is named twice."""
    valid = tuple(entries[: entries.index(None)] if None in entries else entries)
    return tuple(entry for entry in valid if entry) if len(set(valid)) == len(valid) else ()


def _by_index(entry: str, uuids: Sequence[str]) -> str | None:
    """CUDA reads the leading digits and ignores the rest: ``1gpu`` is 1."""
    text = entry.strip().removeprefix("+")
    digits = text[
        : next((at for at, char in enumerate(text) if char not in "0123456789"), len(text))
    ]
    index = int(digits[:9]) if digits else -1
    return uuids[index] if 0 <= index < len(uuids) else None


def _by_prefix(entry: str, uuids: Sequence[str], kind: str) -> str | None:
    prefix = entry.strip()
    matches = [uuid for uuid in uuids if uuid.startswith(prefix)]
    return matches[0] if prefix.startswith(kind) and len(matches) == 1 else None


def _enter_mig(uuids: Sequence[str], instances: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """A split GPU shows its first instance, and then nothing else is visible."""
    for uuid in uuids:
        if instances.get(uuid):
            return (instances[uuid][0],)
    return tuple(uuids)


def _handle(uuid: str) -> Any:
    names = (uuid,) if uuid.startswith(("GPU-", "MIG-")) else (f"GPU-{uuid}", f"MIG-{uuid}")
    handles = (_session.ask("nvmlDeviceGetHandleByUUID", name) for name in names)
    return next((handle for handle in handles if handle is not None), None)


def _facts(handle: Any, index: int) -> Gpu | None:
    """Everything about one device; ``None`` when it does not even tell its UUID (lost GPU)."""
    ask = _session.ask
    uuid = ask("nvmlDeviceGetUUID", handle)
    if uuid is None:
        return None
    memory = ask("nvmlDeviceGetMemoryInfo", handle)
    bar1 = ask("nvmlDeviceGetBAR1MemoryInfo", handle)
    mig = ask("nvmlDeviceGetMigMode", handle)
    return Gpu(
        index=index,
        uuid=uuid,
        name=ask("nvmlDeviceGetName", handle) or "NVIDIA GPU",
        total_bytes=None if memory is None else int(memory.total),
        free_bytes=None if memory is None else int(memory.free),
        used_bytes=None if memory is None else int(memory.used),
        processes=_processes(handle),
        driver=ask("nvmlSystemGetDriverVersion"),
        compute_capability=_compute_capability(handle),
        pcie_generation=ask("nvmlDeviceGetCurrPcieLinkGeneration", handle) or None,
        pcie_generation_max=ask("nvmlDeviceGetMaxPcieLinkGeneration", handle) or None,
        pcie_width=ask("nvmlDeviceGetCurrPcieLinkWidth", handle) or None,
        pcie_width_max=ask("nvmlDeviceGetMaxPcieLinkWidth", handle) or None,
        power_limit_watts=_watts(
            handle, "nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetPowerManagementLimit"
        ),
        power_limit_default_watts=_watts(handle, "nvmlDeviceGetPowerManagementDefaultLimit"),
        sm_clock_mhz=ask("nvmlDeviceGetClockInfo", handle, _CLOCK_SM),
        sm_clock_max_mhz=ask("nvmlDeviceGetMaxClockInfo", handle, _CLOCK_SM) or None,
        memory_clock_max_mhz=ask("nvmlDeviceGetMaxClockInfo", handle, _CLOCK_MEMORY) or None,
        memory_bus_bits=ask("nvmlDeviceGetMemoryBusWidth", handle) or None,
        throttle_reasons=_throttle_reasons(handle),
        mig_enabled=None if mig is None else bool(mig[0]),
        mig_instances=_mig_instances(handle) if mig is not None and mig[0] else (),
        bar1_bytes=None if bar1 is None else int(bar1.bar1Total),
    )


def _first(queries: Sequence[str], handle: Any) -> Any:
    """The first answer: newer names of a query before the ones that old drivers know."""
    answers = (_session.ask(query, handle) for query in queries)
    return next((answer for answer in answers if answer is not None), None)


def _compute_capability(handle: Any) -> str | None:
    version = _session.ask("nvmlDeviceGetCudaComputeCapability", handle)
    return None if version is None else f"{version[0]}.{version[1]}"


def _watts(handle: Any, *queries: str) -> float | None:
    milliwatts = _first(queries, handle)
    return milliwatts / 1000 if milliwatts else None


def throttle_reasons(uuid: str | None) -> tuple[str, ...] | None:
    """What slows the clocks right now, in words; ``None`` where NVML does not tell."""
    handle = _handle(uuid) if uuid else None
    return None if handle is None else _throttle_reasons(handle)


def _throttle_reasons(handle: Any) -> tuple[str, ...] | None:
    bits = _first(
        ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"),
        handle,
    )
    return None if bits is None else throttle_words(bits)


def throttle_words(bits: int) -> tuple[str, ...]:
    """NVML's clock event bits in words; an idle GPU gives none."""
    return tuple(word for bit, word in _THROTTLE_WORDS.items() if bits & bit)


def _mig_instances(handle: Any) -> tuple[str, ...]:
    count = _session.ask("nvmlDeviceGetMaxMigDeviceCount", handle) or 0
    instances = (
        _session.ask("nvmlDeviceGetMigDeviceHandleByIndex", handle, at) for at in range(count)
    )
    uuids = (
        _session.ask("nvmlDeviceGetUUID", instance)
        for instance in instances
        if instance is not None
    )
    return tuple(uuid for uuid in uuids if uuid is not None)


def _processes(handle: Any) -> tuple[GpuProcess, ...]:
    """Compute and graphics processes, each once, largest first."""
    used: dict[int, int] = {}
    for kind in ("Compute", "Graphics"):
        name = f"nvmlDeviceGet{kind}RunningProcesses"
        for process in _first((f"{name}_v3", f"{name}_v2"), handle) or ():
            used[process.pid] = max(used.get(process.pid, 0), process.usedGpuMemory or 0)
    return tuple(
        GpuProcess(pid=pid, used_bytes=size or None, name=_process_name(pid))
        for pid, size in sorted(used.items(), key=lambda item: (-item[1], item[0]))
    )


def _process_name(pid: int) -> str | None:
    try:
        return str(psutil.Process(pid).name())
    except (psutil.Error, ValueError, OverflowError):
        return None


def busy_percent(uuid: str | None) -> int | None:
    """Share of the last moments in which any kernel ran on the GPU."""
    handle = _handle(uuid) if uuid else None
    rates = None if handle is None else _session.ask("nvmlDeviceGetUtilizationRates", handle)
    return None if rates is None else int(rates.gpu)


def others_percent(uuid: str | None, since_s: float) -> int | None:
    """The highest share of the GPU that another process took at any time since then.

    Args:
        uuid: As for :func:`gpu`.
        since_s: Seconds since the epoch; this process must have run kernels after it.

    Returns:
        ``None`` where NVML does not tell, or does not list this process: in a container the
        processes may be numbered as on the host, and ours would be taken for another one.
    """
    handle = _handle(uuid) if uuid else None
    if handle is None:
        return None
    samples = _session.ask("nvmlDeviceGetProcessUtilization", handle, int(since_s * 1e6)) or ()
    if all(sample.pid != os.getpid() for sample in samples):
        return None
    return max((int(item.smUtil) for item in samples if item.pid != os.getpid()), default=0)


def own_bytes(uuid: str | None) -> int | None:
    """Device memory that NVML puts down to this process; ``None`` where it does not see it."""
    facts = gpu(uuid)
    mine = [item.used_bytes for item in facts.processes if item.pid == os.getpid()] if facts else []
    return mine[0] if mine else None
