#!/usr/bin/env python3
"""Writes the reference machines of ``profiles/`` from one table of published figures.

Nothing here was measured on the machine in question: every figure says which document gives the
peak, and what fraction of it real work reaches and why. ``--check`` only compares.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from msgspec import structs  # noqa: E402

from autotune.probe.machine import (  # noqa: E402
    AttentionRate,
    Device,
    Figure,
    Host,
    Kernels,
    Link,
    Machine,
)
from autotune.probe.pcie import line_rate  # noqa: E402
from autotune.probe.reference import encode_machine  # noqa: E402
from autotune.units import GIB, MIB, format_bytes  # noqa: E402

FOLDER = ROOT / "profiles"


@dataclass(frozen=True)
class Fractions:
    """What part of a peak real work reaches, by kind of chip, and how that is known.

    ``attention`` is a fused kernel's at head size 64 and thousands of tokens.
    """

    matmul: float
    convolution: float
    channels_last: float
    plain: float
    memory: float
    attention: float
    why: str


GEFORCE = Fractions(
    matmul=0.75,
    convolution=0.60,
    channels_last=0.65,
    plain=0.70,
    memory=0.88,
    attention=0.55,
    why="tensor cores with float32 accumulation run at half rate on GeForce and so are easily kept "
    "busy: a whole SD 1.5 run published for the RTX 3060 (onnxruntime's stable_diffusion README, "
    "5.6 s for 50 steps of 1.6 TFLOP) comes to 0.58 of that peak, all other work included",
)
AMPERE_SERVER = Fractions(
    matmul=0.65,
    convolution=0.25,
    channels_last=0.30,
    plain=0.90,
    memory=0.88,
    attention=0.45,
    why="large cuBLAS products reach 0.7-0.8 of an A100's peak, cuDNN convolutions less; the "
    "FlashAttention-2 paper gives 0.6-0.7 for its kernel alone; whole SD 1.5 steps at batch 4 come "
    "to 0.27 of the peak in diffusers' torch2.0 benchmark (13.1 steps/s of 6.4 TFLOP)",
)
HOPPER = Fractions(
    matmul=0.60,
    convolution=0.20,
    channels_last=0.25,
    plain=0.80,
    memory=0.88,
    attention=0.36,
    why="large cuBLAS products reach 600-650 TFLOP/s within an H100's power limit; "
    "FlashAttention-2, which PyTorch ships, about 350; convolutions in proportion to an A100's",
)
T4 = Fractions(
    matmul=0.32,
    convolution=0.18,
    channels_last=0.22,
    plain=0.55,
    memory=0.80,
    attention=0.17,
    why="its 70 W do not sustain the boost clock that the peak assumes: whole SD 1.5 steps come to "
    "0.18 of it in diffusers' torch2.0 benchmark (6.9 steps/s of 1.6 TFLOP)",
)
TURING_PLAIN = Fractions(
    matmul=0.85,
    convolution=0.75,
    channels_last=0.60,
    plain=0.85,
    memory=0.88,
    attention=0.40,
    why="plain float32 units, no tensor cores",
)
DESKTOP_CPU = Fractions(
    matmul=0.60,
    convolution=0.45,
    channels_last=0.50,
    plain=0.60,
    memory=0.75,
    attention=0.30,
    why="oneDNN on all cores, whose clocks fall under vector load",
)

# Fused attention against head size 64: sizes between 64 and 128 are padded up, 128 keeps the tensor
# cores busier. Any attention against thousands of tokens: short sequences do not fill the device.
HEAD_FACTORS = {40: 0.65, 64: 1.0, 80: 0.70, 128: 1.10, 160: 0.75}
TOKEN_FACTORS = {256: 0.30, 1024: 0.70, 4096: 1.0, 4608: 1.0}

# (batch, heads, tokens, head_dim): SD 1.5 at 512² by resolution, SDXL at 1024², and a DiT.
ATTENTION_SHAPES = (
    (2, 8, 4096, 40),
    (2, 8, 1024, 80),
    (2, 8, 256, 160),
    (2, 10, 4096, 64),
    (2, 20, 1024, 64),
    (1, 24, 4608, 128),
)

# Vanilla attention: the products of thin matrices reach about half of what square ones do, and the
# score matrix crosses memory four times (written, read and written by the softmax, read).
VANILLA_MATMUL, VANILLA_PASSES = 0.5, 4
# The xFormers kernels of PyTorch 1's time against today's: the onnxruntime README cited above has
# SD 1.5 on the RTX 3060 at 6.0 s with PyTorch 1.13 and xFormers, 5.6 s with PyTorch 2 and SDPA.
XFORMERS_TORCH1 = 0.85

PINNED, PAGEABLE = 0.80, 0.40
DESKTOP_DISPATCH_S, SERVER_DISPATCH_S, HOOK_S = 25e-6, 40e-6, 2.0e-3

PINNED_WHY = "0.80 of the line rate, as pinned copies reach once packet overhead is paid"
PAGEABLE_WHY = "0.40 of the line rate: pageable memory is copied once more on the host"
MODULE_WHY = (
    "estimate from published model-offload runs of 0.6-3 GB/s (such as SDXL on an A100 in Hugging "
    "Face's simple_sdxl_optimizations: 4.7 s for about 14 GB both ways)"
)
DISPATCH_WHY = (
    "estimate per operator that computes, views and module code included: an A100 server takes "
    "31 ms for an SD 1.5 UNet step of 727 operators (fal-ai/stable-diffusion-benchmarks) that "
    "its GPU alone does in less, an RTX 4090 desktop at most 25 ms (diffusers' torch2.0 benchmark)"
)
HOOK_WHY = (
    "derived from Hugging Face's simple_sdxl_optimizations: SDXL on an A100, 25 steps, 67.0 s with "
    "sequential offload and 11.4 s without; what the transfer does not explain, over about 800 "
    "leaf modules a step. accelerate empties the allocator's cache for every tensor that it "
    "places, so that segments are freed and asked for again; before it did, it was 0.25 ms "
    "(diffusers PR #2269: SD 1.5, 50 steps, 21.42 s against 3.18 s)"
)


@dataclass(frozen=True)
class Card:
    """One row: published peaks in TFLOP/s (dense, never sparse) and GB/s, and an assumed host.

    Attributes:
        name: The file's name.
        device: As the driver calls it.
        document: Where the peaks are published.
        plain: float32 without tensor cores.
        half: float16 on tensor cores with float32 accumulation, as PyTorch runs it; ``None`` where
            float16 is of no use.
        tf32: What cuDNN uses for float32 convolutions by PyTorch's default; ``None`` before Ampere.
        bfloat16: Whether the hardware multiplies it (at the float16 rate).
        memory: Bandwidth.
        chip: Multiprocessors and the boost clock in MHz, from the same document; what the peaks
            are computed from.
        bus: Width in bits and the memory's clock in MHz, as the driver counts it: two transfers.
        total_mib: As the driver reports it.
        held_mib: What driver and desktop typically hold of it.
        module: GB/s of ``module.to()`` to the device and back.
        host: RAM in GiB and cores, assumed.
    """

    name: str
    device: str
    document: str
    fractions: Fractions
    plain: float
    half: float | None
    tf32: float | None
    memory: float
    total_mib: int
    held_mib: int
    context_mib: int
    capability: str
    chip: tuple[int, int]
    bus: tuple[int, int]
    pcie: tuple[int, int]
    watts: float
    module: tuple[float, float]
    host: tuple[int, int]
    bfloat16: bool = True
    desktop: bool = True
    findings: tuple[str, ...] = field(default=())


AMPERE_PAPER = "NVIDIA Ampere GA102 whitepaper v2, appendix A"
ADA_PAPER = "NVIDIA Ada GPU architecture whitepaper, appendix A"
BLACKWELL_PAPER = "NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A"
GA10X_RULE = (
    "with the GA10x rates per core (tensor float16 with float32 accumulation: twice float32)"
)

CARDS = (
    Card(
        name="rtx-3080-10gb",
        device="NVIDIA GeForce RTX 3080",
        document=AMPERE_PAPER,
        fractions=GEFORCE,
        plain=29.77,
        half=59.5,
        tf32=29.8,
        memory=760.3,
        total_mib=10240,
        held_mib=512,
        context_mib=350,
        capability="8.6",
        chip=(68, 1710),
        bus=(320, 9501),
        pcie=(4, 16),
        watts=320,
        module=(2.4, 1.6),
        host=(32, 8),
    ),
    Card(
        name="rtx-3060-12gb",
        device="NVIDIA GeForce RTX 3060",
        document=f"NVIDIA GeForce RTX 3060 specifications (3584 cores, 1.78 GHz) {GA10X_RULE}",
        fractions=GEFORCE,
        plain=12.74,
        half=25.5,
        tf32=12.74,
        memory=360.0,
        total_mib=12288,
        held_mib=512,
        context_mib=330,
        capability="8.6",
        chip=(28, 1777),
        bus=(192, 7501),
        pcie=(4, 16),
        watts=170,
        module=(2.4, 1.6),
        host=(32, 6),
    ),
    Card(
        name="laptop-rtx-3050-4gb",
        device="NVIDIA GeForce RTX 3050 Laptop GPU",
        document="NVIDIA GeForce RTX 3050 Laptop specifications (2048 cores, taken at 1.5 GHz of "
        f"the 1.06-1.74 GHz that 35-80 W allow) {GA10X_RULE}",
        fractions=GEFORCE,
        plain=6.14,
        half=12.3,
        tf32=6.14,
        memory=192.0,
        total_mib=4096,
        held_mib=256,
        context_mib=310,
        capability="8.6",
        chip=(16, 1500),
        bus=(128, 6001),
        pcie=(4, 8),
        watts=60,
        module=(2.0, 1.3),
        host=(16, 4),
    ),
    Card(
        name="rtx-4060-8gb",
        device="NVIDIA GeForce RTX 4060",
        document="NVIDIA GeForce RTX 4060 specifications (3072 cores, 2.46 GHz) with the Ada rates "
        "per core (tensor float16 with float32 accumulation: twice float32)",
        fractions=GEFORCE,
        plain=15.11,
        half=30.2,
        tf32=15.11,
        memory=272.0,
        total_mib=8188,
        held_mib=448,
        context_mib=400,
        capability="8.9",
        chip=(24, 2460),
        bus=(128, 8501),
        pcie=(4, 8),
        watts=115,
        module=(2.2, 1.5),
        host=(16, 6),
    ),
    Card(
        name="rtx-4090-24gb",
        device="NVIDIA GeForce RTX 4090",
        document=ADA_PAPER,
        fractions=GEFORCE,
        plain=82.58,
        half=165.2,
        tf32=82.6,
        memory=1008.0,
        total_mib=24564,
        held_mib=640,
        context_mib=420,
        capability="8.9",
        chip=(128, 2520),
        bus=(384, 10501),
        pcie=(4, 16),
        watts=450,
        module=(3.0, 2.0),
        host=(64, 16),
    ),
    Card(
        name="rtx-5090-32gb",
        device="NVIDIA GeForce RTX 5090",
        document=BLACKWELL_PAPER,
        fractions=GEFORCE,
        plain=104.8,
        half=209.5,
        tf32=104.8,
        memory=1792.0,
        total_mib=32607,
        held_mib=768,
        context_mib=500,
        capability="12.0",
        chip=(170, 2407),
        bus=(512, 14001),
        pcie=(5, 16),
        watts=575,
        module=(3.0, 2.0),
        host=(64, 16),
    ),
    Card(
        name="gtx-1660-6gb",
        device="NVIDIA GeForce GTX 1660",
        document="NVIDIA GeForce GTX 1660 specifications (TU116: 1408 cores, 1.785 GHz)",
        fractions=TURING_PLAIN,
        plain=5.03,
        half=None,
        tf32=None,
        memory=192.0,
        total_mib=6144,
        held_mib=384,
        context_mib=300,
        capability="7.5",
        chip=(22, 1785),
        bus=(192, 4001),
        pcie=(3, 16),
        watts=120,
        module=(2.0, 1.3),
        host=(16, 6),
        bfloat16=False,
        findings=(
            "float16 is left out: it has no tensor cores, and Stable Diffusion in float16 is known "
            "to give black images on GTX 16xx cards, so it runs in float32.",
        ),
    ),
    Card(
        name="t4-16gb",
        device="Tesla T4",
        document="NVIDIA T4 datasheet",
        fractions=T4,
        plain=8.1,
        half=65.0,
        tf32=None,
        memory=300.0,
        total_mib=15360,
        held_mib=300,
        context_mib=300,
        capability="7.5",
        chip=(40, 1590),
        bus=(256, 5001),
        pcie=(3, 16),
        watts=70,
        module=(1.8, 1.2),
        host=(13, 2),
        bfloat16=False,
        desktop=False,
        findings=("bfloat16 is left out: Turing emulates it.",),
    ),
    Card(
        name="a100-40gb",
        device="NVIDIA A100-SXM4-40GB",
        document="NVIDIA A100 datasheet (SXM)",
        fractions=AMPERE_SERVER,
        plain=19.5,
        half=312.0,
        tf32=156.0,
        memory=1555.0,
        total_mib=40960,
        held_mib=560,
        context_mib=430,
        capability="8.0",
        chip=(108, 1410),
        bus=(5120, 1215),
        pcie=(4, 16),
        watts=400,
        module=(3.0, 2.0),
        host=(85, 12),
        desktop=False,
    ),
    Card(
        name="a100-80gb",
        device="NVIDIA A100-SXM4-80GB",
        document="NVIDIA A100 datasheet (SXM)",
        fractions=AMPERE_SERVER,
        plain=19.5,
        half=312.0,
        tf32=156.0,
        memory=2039.0,
        total_mib=81920,
        held_mib=640,
        context_mib=430,
        capability="8.0",
        chip=(108, 1410),
        bus=(5120, 1593),
        pcie=(4, 16),
        watts=400,
        module=(3.0, 2.0),
        host=(170, 12),
        desktop=False,
    ),
    Card(
        name="h100-80gb",
        device="NVIDIA H100 80GB HBM3",
        document="NVIDIA H100 datasheet (SXM; its sparse figures halved)",
        fractions=HOPPER,
        plain=66.9,
        half=989.4,
        tf32=494.7,
        memory=3352.0,
        total_mib=81559,
        held_mib=560,
        context_mib=500,
        capability="9.0",
        chip=(132, 1980),
        bus=(5120, 2619),
        pcie=(5, 16),
        watts=700,
        module=(3.0, 2.0),
        host=(200, 26),
        desktop=False,
    ),
)


def main() -> int:
    """Writes the files, or compares them with ``--check``; the exit status is 1 if one is stale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args().check
    stale = [machine for machine in machines() if _differs(machine)]
    for machine in stale:
        print(f"{'stale' if check else 'wrote'}: {_path(machine).relative_to(ROOT)}")
        if not check:
            _path(machine).write_bytes(encode_machine(machine))
    return 1 if check and stale else 0


def machines() -> Iterator[Machine]:
    """Every reference machine of the table."""
    for card in CARDS:
        yield machine_of(card)
    yield with_torch1(machine_of(CARDS[0]))
    yield cpu_machine()


def machine_of(card: Card) -> Machine:
    """One card in its assumed host."""
    memory = _peak(card.memory * 1e9, card.fractions.memory, card, "memory bandwidth", "GB/s", 1e9)
    dispatch_s = DESKTOP_DISPATCH_S if card.desktop else SERVER_DISPATCH_S
    kernels = Kernels(
        matmul_flops_per_s=_by_dtype(card, _matmul),
        convolution_flops_per_s=_by_dtype(card, _convolution),
        convolution_channels_last_flops_per_s=_by_dtype(card, _channels_last),
        memory_bytes_per_s=memory,
        dispatch_s=Figure(value=dispatch_s, source=DISPATCH_WHY),
        offload_hook_s=Figure(value=HOOK_S, source=HOOK_WHY),
    )
    return Machine(
        name=card.name,
        source="datasheet",
        device=_device(card),
        host=_host(*card.host),
        kernels=kernels,
        link=_link(card),
        attention=tuple(_attention(card, kernels)),
        context_bytes=card.context_mib * MIB,
        findings=_findings(card),
    )


def with_torch1(machine: Machine) -> Machine:
    """The same card under PyTorch 1: the default attention is vanilla, xFormers is faster."""
    absent = "PyTorch 1 has no scaled_dot_product_attention"
    return structs.replace(
        machine,
        name=f"{machine.name}-torch1",
        default_attention="vanilla",
        software={"torch": "1.13.1", "xformers": "0.0.16"},
        attention=tuple(_in_torch1(rate, absent) for rate in machine.attention),
    )


def cpu_machine() -> Machine:
    """A desktop with 16 cores and no GPU."""
    card = Card(
        name="cpu-16-cores",
        device="AMD Ryzen 9 7950X 16-Core Processor",
        document="AMD Ryzen 9 7950X specifications (16 cores at the 4.5 GHz base clock, 32 float32 "
        "operations per core and cycle, two channels of DDR5-5200)",
        fractions=DESKTOP_CPU,
        plain=2.30,
        half=4.61,
        tf32=None,
        memory=83.2,
        total_mib=64 * 1024,
        held_mib=6 * 1024,
        context_mib=0,
        capability="",
        chip=(0, 0),
        bus=(0, 0),
        pcie=(0, 0),
        watts=0,
        module=(0, 0),
        host=(64, 16),
    )
    machine = machine_of(card)
    kernels = machine.kernels
    only = ("float32", "bfloat16")
    return structs.replace(
        machine,
        device=Device(
            kind="cpu",
            name=card.device,
            total_bytes=machine.host.ram_total_bytes,
            free_bytes=machine.host.ram_available_bytes,
        ),
        kernels=structs.replace(
            kernels,
            matmul_flops_per_s=_only(kernels.matmul_flops_per_s, only),
            convolution_flops_per_s=_only(kernels.convolution_flops_per_s, only),
            convolution_channels_last_flops_per_s=_only(
                kernels.convolution_channels_last_flops_per_s, only
            ),
            offload_hook_s=None,
        ),
        link=None,
        attention=tuple(_attention(replace(card, half=None), kernels, xformers=False)),
        findings=(
            "No GPU: the CPU does the work. Published figures, nothing measured; assumed are "
            f"{card.host[0]} GiB of RAM, 80 % of it available.",
        ),
    )


def _device(card: Card) -> Device:
    return Device(
        kind="cuda",
        name=card.device,
        total_bytes=card.total_mib * MIB,
        free_bytes=(card.total_mib - card.held_mib) * MIB,
        compute_capability=card.capability,
        power_limit_watts=card.watts,
        power_limit_default_watts=card.watts,
        multiprocessors=card.chip[0],
        sm_clock_max_mhz=card.chip[1],
        memory_bus_bits=card.bus[0],
        memory_clock_max_mhz=card.bus[1],
    )


def _host(ram_gib: int, cores: int) -> Host:
    total = ram_gib * GIB
    return Host(
        cpu="assumed",
        cores=cores,
        ram_total_bytes=total,
        ram_available_bytes=int(total * 0.8),
        os="Linux",
    )


def _link(card: Card) -> Link:
    generation, width = card.pcie
    rate = line_rate(generation, width) or 0.0
    bus = f"PCIe {generation} x{width}, {rate / 1e9:.1f} GB/s"
    pinned = Figure(value=_round(PINNED * rate), source=f"{bus}: {PINNED_WHY}")
    pageable = Figure(value=_round(PAGEABLE * rate), source=f"{bus}: {PAGEABLE_WHY}")
    out, back = (Figure(value=_round(speed * 1e9), source=MODULE_WHY) for speed in card.module)
    return Link(
        pcie_generation_max=generation,
        pcie_width_max=width,
        h2d_pinned_bytes_per_s=pinned,
        d2h_pinned_bytes_per_s=pinned,
        h2d_pageable_bytes_per_s=pageable,
        d2h_pageable_bytes_per_s=pageable,
        module_h2d_bytes_per_s=out,
        module_d2h_bytes_per_s=back,
    )


def _findings(card: Card) -> tuple[str, ...]:
    """Where the numbers come from that are no figures, and what is assumed."""
    holder = "driver and desktop hold" if card.desktop else "the driver holds"
    context, held = (format_bytes(size * MIB) for size in (card.context_mib, card.held_mib))
    ram, cores = card.host
    return (
        "Published figures, nothing measured. Memory size, clocks, bus and power limit: "
        f"{card.document.partition(' (')[0]}.",
        f"Assumed: {holder} {held} of the memory, a CUDA context takes {context} (300 to 500 MiB "
        f"on GPUs since 2018), and the host has {cores} cores and {ram} GiB, 80 % of it available.",
        *card.findings,
    )


def _by_dtype(card: Card, figure: Callable[[Card, str], Figure]) -> dict[str, Figure]:
    names = ["float32"]
    names += ["float16"] if card.half else []
    names += ["bfloat16"] if card.bfloat16 else []
    return {name: figure(card, name) for name in names}


def _matmul(card: Card, dtype: str) -> Figure:
    if dtype == "float32":
        return _peak(card.plain * 1e12, card.fractions.plain, card, "float32", "TFLOP/s", 1e12)
    return _half(card, card.fractions.matmul)


def _convolution(card: Card, dtype: str) -> Figure:
    return _any_convolution(card, dtype, card.fractions.convolution)


def _channels_last(card: Card, dtype: str) -> Figure:
    return _any_convolution(card, dtype, card.fractions.channels_last)


def _any_convolution(card: Card, dtype: str, fraction: float) -> Figure:
    if dtype != "float32":
        return _half(card, fraction)
    what = "TF32 (PyTorch's default for convolutions)" if card.tf32 else "float32"
    return _peak((card.tf32 or card.plain) * 1e12, fraction, card, what, "TFLOP/s", 1e12)


def _half(card: Card, fraction: float) -> Figure:
    tensor = "dense float16 tensor with float32 accumulation"
    what = tensor if card.capability else "bfloat16"
    return _peak((card.half or 0) * 1e12, fraction, card, what, "TFLOP/s", 1e12)


def _peak(peak: float, fraction: float, card: Card, what: str, unit: str, factor: float) -> Figure:
    published = f"{card.document}: {peak / factor:.4g} {unit} {what}"
    reached = f"{fraction:.2f} of it reached ({card.fractions.why})"
    return Figure(value=_round(peak * fraction), source=f"{published}; {reached}")


def _attention(card: Card, kernels: Kernels, xformers: bool = True) -> Iterator[AttentionRate]:
    dtype = "float16" if card.half else "float32"
    peak = (card.half or card.plain) * 1e12
    for batch, heads, tokens, head_dim in ATTENTION_SHAPES:
        shape = AttentionRate(
            implementation="sdpa",
            dtype=dtype,
            batch=batch,
            heads=heads,
            q_tokens=tokens,
            kv_tokens=tokens,
            head_dim=head_dim,
        )
        fraction = card.fractions.attention * HEAD_FACTORS[head_dim] * TOKEN_FACTORS[tokens]
        fused = Figure(
            value=_round(peak * fraction),
            source=f"estimate: {fraction:.2f} of {card.document}'s {peak / 1e12:.4g} TFLOP/s "
            f"for head size {head_dim} at {tokens} tokens ({card.fractions.why})",
        )
        statistics = 4 * batch * heads * tokens  # one float32 per row
        yield structs.replace(shape, flops_per_s=fused, extra_bytes=statistics)
        yield _xformers_like(shape, fused, statistics, xformers)
        yield _vanilla(shape, kernels)


def _xformers_like(
    shape: AttentionRate, fused: Figure, extra_bytes: int, works: bool
) -> AttentionRate:
    shape = structs.replace(shape, implementation="xformers")
    if not works:
        return structs.replace(shape, error="xFormers has no kernels for the CPU")
    source = f"on today's PyTorch it calls the same kernels as SDPA; {fused.source}"
    figure = Figure(value=fused.value, source=source)
    return structs.replace(shape, flops_per_s=figure, extra_bytes=extra_bytes)


def _vanilla(shape: AttentionRate, kernels: Kernels) -> AttentionRate:
    size = 2 if shape.dtype == "float16" else 4
    scores = shape.batch * shape.heads * shape.q_tokens * shape.kv_tokens
    flops = 4 * scores * shape.head_dim
    matmul = kernels.matmul_flops_per_s[shape.dtype].value
    seconds = flops / (VANILLA_MATMUL * TOKEN_FACTORS[shape.q_tokens] * matmul)
    seconds += VANILLA_PASSES * scores * size / kernels.memory_bytes_per_s.value
    figure = Figure(
        value=_round(flops / seconds),
        source="derived: two products at half the large-matmul rate, less for short sequences, "
        "plus four passes over the score matrix at memory bandwidth",
    )
    extra = 2 * scores * size  # scores and probabilities at once
    return structs.replace(shape, implementation="vanilla", flops_per_s=figure, extra_bytes=extra)


def _in_torch1(rate: AttentionRate, absent: str) -> AttentionRate:
    if rate.implementation == "sdpa":
        return structs.replace(rate, flops_per_s=None, extra_bytes=None, error=absent)
    if rate.implementation == "vanilla" or rate.flops_per_s is None:
        return rate
    value = _round(rate.flops_per_s.value * XFORMERS_TORCH1)
    source = rate.flops_per_s.source.partition("; ")[2]
    why = f"{XFORMERS_TORCH1:.2f} of today's kernels, for those of early 2023; {source}"
    return structs.replace(rate, flops_per_s=Figure(value=value, source=why))


def _only(figures: dict[str, Figure], names: tuple[str, ...]) -> dict[str, Figure]:
    return {name: figure for name, figure in figures.items() if name in names}


def _round(value: float) -> float:
    """Three digits: published figures carry no more."""
    return float(f"{value:.3g}")


def _path(machine: Machine) -> Path:
    return FOLDER / f"{machine.name}.json"


def _differs(machine: Machine) -> bool:
    path = _path(machine)
    return not path.is_file() or path.read_bytes() != encode_machine(machine)


if __name__ == "__main__":
    sys.exit(main())
