"""A CUDA device that is not there, for a build of PyTorch without CUDA.

``install()`` must run before torch is imported. From then on ``torch.cuda`` is available, tensors
go to ``cuda:0`` and say so, and memory is handed out, counted and refused as PyTorch's caching
allocator does. Operators are the CPU's, on the same memory. So it is seen which tensor is where,
what is allocated at every moment, and what happens when memory runs out: on the real code of
diffusers and accelerate. It says nothing about time, about work that overlaps, or about the scratch
memory of CUDA kernels.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from autotune.probe import software

SOURCE = Path(__file__).with_name("device.cpp")

_STATS = (
    "allocated",
    "peak_allocated",
    "reserved",
    "peak_reserved",
    "allocations",
    "retries",
    "failures",
    "free",
    "total",
    "pinned",
    "peak_pinned",
)


@dataclass(frozen=True, slots=True)
class Simulated:
    """The simulated devices; sizes are in bytes."""

    library: ctypes.CDLL

    def stats(self, device: int = 0) -> dict[str, int]:
        """What the allocator counts: the state, the peaks, how often it was asked and failed."""
        out = (ctypes.c_size_t * len(_STATS))()
        self.library.stats(device, out)
        return dict(zip(_STATS, out, strict=True))

    def reset_pinned(self) -> None:
        """Lets the peak of pinned host memory begin anew."""
        self.library.reset_pinned()

    def fail_in(self, allocations: int, device: int = 0) -> None:
        """Lets the allocation after so many fail, whatever is free; -1 takes that back."""
        self.library.fail_in(device, ctypes.c_longlong(allocations))


def build() -> Path:
    """Compiles the device, once per version of its source and of torch.

    Raises:
        RuntimeError: There is no C++ compiler, or it failed; the message has its last lines.
    """
    root = _torch_folder()
    version = (root / "version.py").read_bytes()
    key = hashlib.sha256(SOURCE.read_bytes() + version + str(root).encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"autotune-simulated-gpu-{os.getuid()}-{key}.so"
    if library.exists():
        return library
    unfinished = library.with_suffix(f".{os.getpid()}")
    command = ["g++", "-O1", "-shared", "-fPIC", "-std=c++20", str(SOURCE), "-o", str(unfinished)]
    command += ["-Wl,-soname,libnvidia-ml.so.1"]  # it is NVML, too: pynvml finds it by this name
    command += [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
    command += [f"-L{root}/lib", "-ltorch_cpu", "-lc10"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError("a simulated GPU needs g++, which is not installed") from None
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"the simulated GPU did not compile: {error.stderr[-800:]}") from None
    unfinished.replace(library)
    return library


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("a simulated GPU needs torch, which is not installed")
    return Path(spec.origin).parent


def install(
    total_bytes: int = 8 << 30,
    context_bytes: int = 300 << 20,
    devices: int = 1,
) -> Simulated:
    """Gives torch its simulated devices. Call it before anything imports torch.

    Raises:
        RuntimeError: torch was imported already or has CUDA, or the device does not compile.
    """
    if "torch" in sys.modules:
        raise RuntimeError("a simulated GPU must be installed before torch is imported")
    library_path = build()
    folder = _torch_folder() / "lib"
    for part in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(folder / part), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(library_path))
    library.get_fraction.restype = ctypes.c_double
    simulated = Simulated(library)
    library.simulate(devices, ctypes.c_size_t(total_bytes), ctypes.c_size_t(context_bytes))
    import torch

    if torch.version.cuda is not None:
        raise RuntimeError("a simulated GPU needs a build of torch without CUDA")
    _complete(torch, simulated, devices)
    software.torch_build = lambda: {"cuda": "13.0"}
    return simulated


def _complete(torch: ModuleType, simulated: Simulated, devices: int) -> None:
    """Adds what ``torch.cuda`` asks of its C++ half, which this build of torch lacks."""
    library, cuda = simulated.library, torch.cuda

    def nested_stats(device: int) -> dict[str, Any]:
        stats = simulated.stats(device)

        def stat(current: str, peak: str) -> dict[str, Any]:
            both = {"current": stats[current], "peak": stats[peak]}
            return {"all": both | {"allocated": 0, "freed": 0}}

        return {
            "allocated_bytes": stat("allocated", "peak_allocated"),
            "active_bytes": stat("allocated", "peak_allocated"),
            "reserved_bytes": stat("reserved", "peak_reserved"),
            "num_ooms": stats["failures"],
            "num_alloc_retries": stats["retries"],
        }

    def exchange(device: int) -> int:
        before = library.get_device()
        library.set_device(device)
        return int(before)

    def set_stream(stream_id: int, device_index: int, device_type: int) -> None:
        torch.accelerator.set_stream(
            torch.Stream(stream_id=stream_id, device_index=device_index, device_type=device_type)
        )

    def current_stream(device: int) -> tuple[int, int, int]:
        stream = torch.accelerator.current_stream(torch.device("cuda", device))
        return stream.stream_id, stream.device_index, stream.device_type

    for function, does in {
        "getDeviceCount": lambda: devices,
        "init": lambda: None,
        "isInBadFork": lambda: False,
        "getDevice": lambda: library.get_device(),
        "setDevice": lambda device: library.set_device(device),
        "exchangeDevice": exchange,
        "maybeExchangeDevice": exchange,
        "synchronize": lambda: None,
        "sleep": lambda cycles: None,
        "ipc_collect": lambda: None,
        "getArchFlags": lambda: "sm_86",
        "canDeviceAccessPeer": lambda one, other: False,
        "memoryStats": nested_stats,
        "resetPeakMemoryStats": lambda device: library.reset_peak(device),
        "resetAccumulatedMemoryStats": lambda device: None,
        "emptyCache": lambda: library.empty_cache(),
        "clearCublasWorkspaces": lambda: library.clear_cublas(),
        "setMemoryFraction": lambda share, device: library.set_fraction(
            device, ctypes.c_double(share)
        ),
        "getMemoryFraction": lambda device: library.get_fraction(device),
        "setStream": set_stream,
        "getCurrentStream": current_stream,
        "getCurrentRawStream": lambda device: current_stream(device)[0],
        "getDefaultStream": lambda device: (0, device, 1),
    }.items():
        setattr(torch._C, f"_cuda_{function}", does)
    cuda._exchange_device, cuda._maybe_exchange_device = exchange, exchange

    def memory(device: int) -> tuple[int, int]:
        stats = simulated.stats(device)
        return stats["free"], stats["total"]

    cuda._cudart = SimpleNamespace(cudaMemGetInfo=memory)
    facts = SimpleNamespace(
        name="Simulated GPU",  # as its NVML says
        major=8,
        minor=6,
        multi_processor_count=68,
        is_integrated=0,
        is_multi_gpu_board=0,
        L2_cache_size=6 << 20,
        warp_size=32,
        max_threads_per_multi_processor=1536,
        regs_per_multiprocessor=65536,
        gcnArchName="",
    )

    def properties(device: Any = None) -> SimpleNamespace:
        index = cuda._utils._get_device_index(device, optional=True)
        if not 0 <= index < devices:
            raise AssertionError("Invalid device id")
        total = simulated.stats(index)["total"]
        uuid = f"00000000-0000-0000-0000-{index:012d}"
        return SimpleNamespace(**vars(facts), total_memory=total, uuid=uuid)

    cuda.get_device_properties = properties
    cuda.default_generators = tuple(
        torch.Generator(torch.device("cuda", index)) for index in range(devices)
    )

    for index, generator in enumerate(cuda.default_generators):
        library.set_default_generator(index, ctypes.c_void_p(generator._cdata))

    class Stream(torch.Stream):  # type: ignore[misc, name-defined]
        """Everything runs at once, whatever the stream."""

        def __new__(cls, device: Any = None, priority: int = 0, **known: Any) -> Any:
            if known:
                return super().__new__(cls, **known)
            index = cuda._utils._get_device_index(device, optional=True)
            return super().__new__(cls, device=torch.device("cuda", index), priority=priority)

        @property
        def cuda_stream(self) -> int:
            return int(self.stream_id)

    class Event:
        """Stamped when it is recorded."""

        def __init__(self, enable_timing: bool = False, **_: Any) -> None:
            self._event = torch.Event(device="cuda", enable_timing=enable_timing)

        def record(self, stream: Any = None) -> None:
            self._event.record(stream or cuda.current_stream())

        def wait(self, stream: Any = None) -> None: ...

        def synchronize(self) -> None: ...

        def query(self) -> bool:
            return True

        def elapsed_time(self, end: Event) -> float:
            return float(self._event.elapsed_time(end._event))

    for module in (cuda, cuda.streams):
        module.Stream, module.Event = Stream, Event
    with contextlib.suppress(AttributeError):
        torch.backends.cuda.is_built = lambda: True
