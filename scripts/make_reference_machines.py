#!/usr/bin/env python3
"""Writes the reference machines of ``profiles/`` from ``reference_cards.py``'s published figures.

Nothing here was measured on the machine in question: every figure says which document gives the
peak, and what fraction of it real work reaches and why. ``--check`` only compares.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from msgspec import structs  # noqa: E402
from reference_cards import CARDS, CPU, PAIRS, Card  # noqa: E402

from autotune.probe.machine import (  # noqa: E402
    AttentionRate,
    Device,
    Figure,
    Host,
    Kernels,
    Link,
    Machine,
    OtherGpu,
)
from autotune.probe.pcie import line_rate  # noqa: E402
from autotune.probe.reference import encode_machine  # noqa: E402
from autotune.units import GIB, MIB, format_bytes  # noqa: E402

FOLDER = ROOT / "profiles"


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

FLOAT8_CAPABILITY = 8.9

PINNED, PAGEABLE = 0.80, 0.40
DESKTOP_DISPATCH_S, SERVER_DISPATCH_S, HOOK_S = 25e-6, 40e-6, 1.7e-3

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
    "sequential offload and 11.4 s without; what 5.3 GB a step at 12.6 GB/s do not explain, over "
    "1061 layers a step. accelerate empties the allocator's cache for every tensor that it "
    "places, so that segments are freed and asked for again; before it did, it was 0.25 ms "
    "(diffusers PR #2269: SD 1.5, 50 steps, 21.42 s against 3.18 s)"
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
    for card in PAIRS:
        yield in_pairs(card)
    yield with_torch1(machine_of(CARDS[0]))
    yield cpu_machine()


def machine_of(card: Card) -> Machine:
    """One card in its assumed host."""
    memory = _peak(card.memory * 1e9, card.fractions.memory, card, "memory bandwidth", "GB/s", 1e9)
    dispatch_s = DESKTOP_DISPATCH_S if card.desktop else SERVER_DISPATCH_S
    kernels = Kernels(
        matmul_flops_per_s=_by_dtype(card, _matmul) | _float8(card),
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


def in_pairs(card: Card) -> Machine:
    """Two of a card in one host."""
    machine = machine_of(card)
    device = machine.device
    second = OtherGpu(
        index=1,
        name=device.name,
        total_bytes=device.total_bytes,
        free_bytes=device.free_bytes,
        compute_capability=device.compute_capability,
    )
    return structs.replace(machine, others=(second,))


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
    card = CPU
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


def _float8(card: Card) -> dict[str, Figure]:
    """Ada, Hopper and Blackwell multiply float8 at twice the rate of float16."""
    if card.half is None or not card.capability or float(card.capability) < FLOAT8_CAPABILITY:
        return {}
    what = "dense float8 tensor with float32 accumulation"
    peak = 2 * card.half * 1e12
    return {"float8_e4m3fn": _peak(peak, card.fractions.matmul, card, what, "TFLOP/s", 1e12)}


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
