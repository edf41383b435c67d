"""What a person should know about a measured machine, one sentence each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from msgspec.structs import replace

from autotune.probe import nvml
from autotune.probe.absence import why_no_gpu
from autotune.probe.attention import BACKENDS, WRONG, XFORMERS_ABSENT
from autotune.probe.deadline import left_out_finding
from autotune.probe.machine import Figure, GpuProcess, Link, Machine
from autotune.probe.noise import (
    FOREIGN_GPU_PERCENT,
    FOREIGN_SHARE,
    OTHERS_ON_CPU,
    OTHERS_ON_GPU,
    STOLEN,
    STOLEN_SHARE,
    Noise,
    serious,
)
from autotune.probe.pcie import line_rate
from autotune.probe.samples import UNSTEADY, spread
from autotune.units import GIB, format_bytes, format_rate

_LINK_FAR_BELOW = 0.6  # pinned copies reach 0.75-0.85 of the line rate on a healthy link
_FOREIGN_BYTES = GIB // 4
_AGAIN = "so its own rates are higher: measure again when it is quiet."
_WHEELS = "https://download.pytorch.org/whl"  # xFormers for each CUDA that torch is built for
_NAMED = 4  # figures named in a finding


def find(
    machine: Machine,
    *,
    disturbed_above: float,
    noise: Noise = Noise(),  # noqa: B008 - immutable
    accelerator: bool = False,
) -> Machine:
    """The machine with its findings.

    Args:
        machine: As measured.
        disturbed_above: Spread, as a fraction of the median, from which a figure is called
            unsteady.
        noise: What else went on meanwhile.
        accelerator: Torch has one; a CPU was then measured because somebody asked for it.
    """
    finders: tuple[Callable[[Machine], Iterator[str]], ...] = (
        _nvml_missing,
        _unified,
        _others,
        _throttled,
        _slow_link,
        _xformers,
        _wrong_attention,
    )
    found = [text for finder in finders for text in finder(machine)]
    if machine.device.kind == "cpu" and not accelerator:
        why = why_no_gpu(machine.software)
        found = [f"No usable NVIDIA GPU, so the CPU does the work: {why}.", *found]
    crowded = dict(_crowded(machine, noise))
    told = {*crowded, *serious(machine.device.throttle_reasons)}
    found += _disturbed(machine, disturbed_above, told)
    found += crowded.values()
    found += _left_out(machine)
    return replace(machine, findings=tuple(found))


def _nvml_missing(machine: Machine) -> Iterator[str]:
    reason = nvml.unavailable_reason()
    if machine.device.kind == "cuda" and "hip" not in machine.software and reason is not None:
        yield f"The GPU works but NVML does not, so who holds its memory is not known: {reason}."


def _unified(machine: Machine) -> Iterator[str]:
    if machine.device.unified_memory:
        yield "CPU and GPU share one memory here: offloading would save nothing."


def _others(machine: Machine) -> Iterator[str]:
    held = sum(process.used_bytes or 0 for process in machine.device.processes)
    if held >= _FOREIGN_BYTES:
        names = ", ".join(describe_process(process) for process in machine.device.processes[:3])
        yield f"Other processes hold {format_bytes(held)} of the GPU's memory: {names}."


def describe_process(process: GpuProcess) -> str:
    """``"python (PID 4242, 1.10 GiB)"``."""
    size = "unknown size" if process.used_bytes is None else format_bytes(process.used_bytes)
    return f"{process.name or 'a process'} (PID {process.pid}, {size})"


def _throttled(machine: Machine) -> Iterator[str]:
    reasons = serious(machine.device.throttle_reasons)
    if reasons:
        yield f"The GPU was slowed down while it was measured: {', '.join(reasons)}."


def _slow_link(machine: Machine) -> Iterator[str]:
    link = machine.link
    promised = line_rate(link.pcie_generation_max, link.pcie_width_max) if link else None
    if link is None or promised is None:
        return
    ways = (("to", link.h2d_pinned_bytes_per_s), ("from", link.d2h_pinned_bytes_per_s))
    slow = [
        f"{format_rate(figure.value, 'B/s')} {way} the GPU"
        for way, figure in ways
        if figure.value < _LINK_FAR_BELOW * promised
    ]
    if slow:
        yield (
            f"Pinned copies reach {' and '.join(slow)}, of the {format_rate(promised, 'B/s')} that "
            f"PCIe {link.pcie_generation_max} x{link.pcie_width_max} promises: {_link_cause(link)}."
        )


def _link_cause(link: Link) -> str:
    width, generation = link.pcie_width_in_copy, link.pcie_generation_in_copy
    if width and link.pcie_width_max and width < link.pcie_width_max:
        return f"the card runs at x{width}, likely in a slot with fewer lanes or sharing them"
    if generation and link.pcie_generation_max and generation < link.pcie_generation_max:
        return (
            f"the link stays at generation {generation} even under load, likely a riser cable, "
            "a BIOS setting or power saving"
        )
    return "likely a virtual machine, a remote NUMA node, or another process using the link"


def _xformers(machine: Machine) -> Iterator[str]:
    errors = [
        rate.error for rate in machine.attention if rate.implementation == "xformers" and rate.error
    ]
    if not errors or errors[0] == XFORMERS_ABSENT:
        return
    name = f"xformers {machine.software.get('xformers', '')}".strip()
    if machine.device.kind == "cpu":
        yield f"{name} is installed, but it has no kernels for the CPU ({errors[0]})."
        return
    cause = errors[0]
    library = re.search(r"libcudart\.so\.(\d+)", cause)
    if library is not None:
        cause = f"it is built for CUDA {library[1]}: {cause}"
    yield f"{name} is installed but unusable here ({cause}): {_xformers_remedy(machine)}."


def _xformers_remedy(machine: Machine) -> str:
    version, cuda = machine.software.get("torch", "?"), machine.software.get("cuda")
    if cuda is None:
        return f"install the xformers release that names torch {version}, or remove it"
    return (
        f"install the one for torch {version} and CUDA {cuda}: pip install --force-reinstall "
        f"--no-deps xformers --index-url {_WHEELS}/cu{cuda.replace('.', '')}, or remove it: "
        "PyTorch's own attention needs nothing"
    )


def _wrong_attention(machine: Machine) -> Iterator[str]:
    for rate in machine.attention:
        picky = rate.implementation in BACKENDS or rate.implementation == "sage"
        if picky and not (rate.error or "").startswith(WRONG):
            continue  # SDPA then chooses another; SageAttention is for some head sizes only
        if rate.implementation != "xformers" and rate.error:
            tokens = f"{rate.q_tokens} tokens, head size {rate.head_dim}"
            yield f"The {rate.implementation} attention fails at {tokens}: {rate.error}."


def _disturbed(machine: Machine, above: float, told: set[str]) -> Iterator[str]:
    """Figures by what got in their way, also when they were measured again.

    Args:
        machine: As measured.
        above: Spread from which a figure is called unsteady.
        told: What other findings say of the whole measurement.
    """
    names: dict[str, dict[str, None]] = {}
    for name, figure in _figures(machine):
        reasons = [r for r in figure.disturbances if r != UNSTEADY and r not in told]
        if spread(figure) > above:
            reasons.append(UNSTEADY)
        for reason in reasons:
            names.setdefault(reason, {})[name] = None
    for reason, figures in names.items():
        more = f" and {len(figures) - _NAMED} more" if len(figures) > _NAMED else ""
        yield (
            f"{reason[0].upper()}{reason[1:]} while measured, twice "
            f"({', '.join(list(figures)[:_NAMED])}{more}): measure again when it is quiet."
        )


def _left_out(machine: Machine) -> Iterator[str]:
    if machine.left_out:
        yield left_out_finding(machine.left_out)


def _crowded(machine: Machine, noise: Noise) -> Iterator[tuple[str, str]]:
    """What others did throughout, with the finding about it.

    On a CPU every figure suffers from neighbours; a GPU only needs one core that keeps up.
    """
    cores = machine.host.cores
    tolerated = FOREIGN_SHARE * cores if machine.device.kind == "cpu" else cores - 1.0
    if noise.foreign_cores > max(0.2, tolerated):
        yield (
            OTHERS_ON_CPU,
            f"Other processes kept {noise.foreign_cores:.1f} of {cores} cores busy while this was "
            f"measured, {_AGAIN}",
        )
    if noise.stolen_cores > STOLEN_SHARE * cores:
        yield (
            STOLEN,
            f"The hypervisor gave {noise.stolen_cores:.1f} of {cores} cores to other virtual "
            f"machines while this was measured, {_AGAIN}",
        )
    if noise.gpu_percent is not None and noise.gpu_percent > FOREIGN_GPU_PERCENT:
        yield (
            OTHERS_ON_GPU,
            f"Other processes kept the GPU busy for up to {noise.gpu_percent} % of the time, "
            f"{_AGAIN}",
        )


def _figures(machine: Machine) -> Iterator[tuple[str, Figure]]:
    kernels, link = machine.kernels, machine.link
    for what, figures in (
        ("matmul", kernels.matmul_flops_per_s),
        ("convolution", kernels.convolution_flops_per_s),
        ("channels-last", kernels.convolution_channels_last_flops_per_s),
    ):
        yield from ((f"{what} {name}", figure) for name, figure in figures.items())
    yield "memory bandwidth", kernels.memory_bytes_per_s
    yield "dispatch cost", kernels.dispatch_s
    if link is not None:
        yield "pinned copies to the device", link.h2d_pinned_bytes_per_s
        yield "pinned copies from the device", link.d2h_pinned_bytes_per_s
        yield "module.to()", link.module_h2d_bytes_per_s
    for rate in machine.attention:
        if rate.flops_per_s is not None:
            yield f"{rate.implementation} attention", rate.flops_per_s
