"""Machines and workloads of any kind, for hypothesis: valid, small, and often tied on purpose."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from autotune.probe.machine import (
    AttentionRate,
    Device,
    Figure,
    GpuProcess,
    Host,
    Kernels,
    Link,
    Machine,
    OtherGpu,
)
from autotune.units import GIB, MIB
from autotune.workload.workload import (
    AttentionShape,
    Component,
    ComponentRun,
    Operator,
    Phase,
    Request,
    Role,
    Trace,
    Workload,
)

DTYPES = ("float32", "float16")


def figures(low: float, high: float) -> st.SearchStrategy[Figure]:
    """A quantity anywhere between two powers of ten, or exactly the same as another one's."""
    exponents = st.one_of(st.floats(0, 1), st.sampled_from((0.0, 0.5, 1.0)))
    return exponents.map(lambda e: Figure(low * (high / low) ** e, source="invented"))


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    """A GPU with a link, one that shares the host's memory, or a CPU."""
    kind = draw(st.sampled_from(("cuda", "cuda", "cuda", "cuda", "unified", "cpu")))
    free = draw(st.integers(500, 24_000)) * MIB
    total = free + draw(st.integers(0, 4000)) * MIB
    return Machine(
        name="invented",
        source="datasheet",
        device=Device(
            kind="cpu" if kind == "cpu" else "cuda",
            name="Invented",
            total_bytes=total,
            free_bytes=free,
            compute_capability=draw(st.sampled_from(("7.5", "8.6"))),
            unified_memory=kind == "unified",
            processes=draw(processes),
        ),
        host=draw(hosts),
        kernels=draw(kernels()),
        link=draw(links()) if kind == "cuda" else None,
        attention=tuple(draw(attention_rates())),
        context_bytes=draw(st.sampled_from((0, 400 * MIB))),
        default_attention=draw(st.sampled_from(("sdpa", "vanilla"))),
        others=tuple(draw(other_gpus())) if kind == "cuda" else (),
    )


@st.composite
def other_gpus(draw: st.DrawFn) -> list[OtherGpu]:
    """Mostly none; else of the device's model, or of another."""
    count = draw(st.sampled_from((0, 0, 0, 1, 2)))
    return [
        OtherGpu(
            index=index,
            name=draw(st.sampled_from(("Invented", "Invented", "Another"))),
            total_bytes=28_000 * MIB,
            free_bytes=draw(st.integers(500, 24_000)) * MIB,
            compute_capability=draw(st.sampled_from(("7.5", "8.6"))),
        )
        for index in range(1, count + 1)
    ]


processes = st.lists(
    st.builds(
        GpuProcess,
        pid=st.integers(1, 99_999),
        used_bytes=st.none() | st.integers(1, 8 * GIB),
        name=st.none() | st.sampled_from(("chrome", "Xorg")),
    ),
    max_size=3,
    unique_by=lambda process: process.pid,
).map(tuple)

hosts = st.sampled_from((4, 64, 16)).map(
    lambda gib: Host("invented", 8, ram_total_bytes=64 * GIB, ram_available_bytes=gib * GIB, os="")
)


@st.composite
def kernels(draw: st.DrawFn) -> Kernels:
    """float16 may be slower than float32, and the layout of tensor cores may be unknown."""

    def rates(*more: str) -> dict[str, Figure]:
        return {dtype: draw(figures(1e11, 1e14)) for dtype in (*DTYPES, *more)}

    return Kernels(
        matmul_flops_per_s=rates(),
        convolution_flops_per_s=rates("bfloat16"),
        memory_bytes_per_s=draw(figures(2e10, 2e12)),
        dispatch_s=draw(figures(1e-6, 1e-3)),
        convolution_channels_last_flops_per_s=rates() if draw(st.booleans()) else {},
        offload_hook_s=draw(st.none() | figures(1e-5, 1e-3)),
    )


@st.composite
def links(draw: st.DrawFn) -> Link:
    """Pinned copies are faster than others; modules cross more slowly still."""
    pinned, pageable, module = (draw(figures(*r)) for r in ((5e9, 5e10), (2e9, 2e10), (2e8, 1e10)))
    return Link(pinned, pinned, pageable, pageable, module, module)


@st.composite
def attention_rates(draw: st.DrawFn) -> list[AttentionRate]:
    """Some implementations as measured at one shape; one that failed has its error."""
    names = draw(st.lists(st.sampled_from(("xformers", "sdpa", "vanilla", "sliced")), unique=True))
    rates = []
    for name in names:
        works = draw(st.sampled_from((True, True, False)))
        rates.append(
            AttentionRate(
                name,
                draw(st.sampled_from(DTYPES)),
                *(2, 8, 1024, 1024, 64),
                flops_per_s=draw(figures(1e11, 1e14)) if works else None,
                error=None if works else f"{name} failed",
            )
        )
    return rates


# ---- workloads ----------------------------------------------------------------------------------

SIDES = (256, 512, 1024)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    """A text encoder, a UNet and a VAE of any size, with a handful of operators each."""
    dtype = draw(st.sampled_from(DTYPES))
    side = draw(st.sampled_from(SIDES))
    batch = draw(st.sampled_from((1, 1, 2, 4)))
    tokens = (side // 8) ** 2
    request = Request(side, side, batch, draw(st.integers(1, 30)), 7.5, dtype)
    parts = [
        draw(components("text_encoder", "CLIPTextModel")),
        draw(
            components("unet", draw(st.sampled_from(("UNet2DConditionModel", "FluxTransformer"))))
        ),
        draw(components("vae", "AutoencoderKL")),
    ]
    variants = ["tiled:256"] if side > 256 else []
    if batch > 1:
        variants += ["sliced", *(f"sliced+{v}" for v in variants)]
    return Workload(
        model="invented",
        pipeline=draw(seldom("StableDiffusionPipeline", "FluxPipeline")),
        request=request,
        components=tuple(parts),
        phases=(
            Phase("encode", (draw(runs("text_encoder", "encoder", dtype, tokens, 2)),)),
            Phase("denoise", (draw(runs("unet", "denoiser", dtype, tokens, request.steps)),)),
            Phase("decode", (draw(runs("vae", "autoencoder", dtype, tokens, 1, tuple(variants))),)),
        ),
        offload_order=("text_encoder", "unet", "vae"),
        latent_tokens=tokens,
    )


def seldom(usual: Any, other: Any) -> st.SearchStrategy[Any]:
    """What gives more to choose from makes the plain enumeration long."""
    return st.sampled_from((usual, usual, usual, usual, other))


@st.composite
def components(draw: st.DrawFn, name: str, class_name: str) -> Component:
    """Weights in some layers, the largest of which is at least the mean, and in some blocks."""
    layers = draw(st.integers(1, 50))
    weights = draw(st.integers(1, 3_000)) * MIB
    blocks = draw(st.integers(0, 4))
    return Component(
        name=name,
        class_name=class_name,
        parameters=weights // 2,
        weight_bytes=weights,
        largest_leaf_bytes=min(weights, weights // layers * draw(st.integers(1, 3)) + 1),
        leaf_count=layers,
        tensor_count=layers,
        block_bytes=(weights // (blocks + 1),) * blocks,
        casting_saves_bytes=draw(st.sampled_from((0, weights // 3))),
        linear_bytes=draw(seldom(0, weights // 2)),
        fusable_bytes=draw(seldom(0, weights // 8)),
        fusable_products=layers,
        abilities=draw(seldom((), ("repeated_blocks", "attention_backend"))),
        unmoved_bytes=draw(seldom(0, weights // 20)),
    )


@st.composite
def runs(
    draw: st.DrawFn,
    component: str,
    role: Role,
    dtype: str,
    tokens: int,
    calls: int,
    variants: tuple[str, ...] = (),
) -> ComponentRun:
    """Calls of one component; each variant of it is a trace of its own, or changes nothing."""
    own = traces(dtype, tokens if role == "denoiser" else 0)
    trace = draw(own)
    return ComponentRun(
        component=component,
        role=role,
        calls=calls,
        trace=trace,
        entry="decode" if role == "autoencoder" else "forward",
        variants={v: draw(st.one_of(own, st.just(trace))) for v in variants},
        upcast_bytes=draw(st.sampled_from((0, 100 * MIB))) if role == "autoencoder" else 0,
        is_estimated=draw(st.sampled_from((False, False, False, True))),
    )


@st.composite
def traces(draw: st.DrawFn, dtype: str, tokens: int) -> Trace:
    """A handful of operators; the most that is alive is at one of them or between two."""
    found = draw(st.lists(operators(dtype, tokens), min_size=1, max_size=4))
    alive = max(o.live_bytes for o in found)
    return Trace(
        operators=tuple(found),
        activation_bytes=alive + draw(st.sampled_from((0, alive // 4))),
        dispatches=sum(o.count for o in found),
    )


@st.composite
def operators(draw: st.DrawFn, dtype: str, tokens: int) -> Operator:
    """A convolution, a product, something that copies, or self-attention over latent tokens."""
    kind = draw(st.sampled_from(("attention", "convolution", "matmul", "memory")))
    read, written = (draw(st.integers(1, 500)) * MIB for _ in range(2))
    shape = None
    block_tokens = 0
    if kind == "attention" and tokens:
        block_tokens = tokens // draw(st.sampled_from((1, 4, 16)))
        shape = AttentionShape(draw(st.sampled_from((1, 2))), 8, block_tokens, block_tokens, 64)
    if kind == "attention" and not tokens:
        kind = "matmul"
    flops = shape.flops if shape else 0.0 if kind == "memory" else draw(st.floats(1e8, 1e12))
    weights = 0 if kind in ("memory", "attention") else draw(st.integers(0, 100)) * MIB
    count, fuses = draw(st.integers(1, 60)), kind == "memory" and draw(st.booleans())
    return Operator(
        name=f"aten.{kind}",
        kind=kind,
        signature=signature(kind, read // MIB, written // MIB, dtype),
        dtype=dtype,
        count=count,
        flops=flops,
        bytes=read + written + weights,
        live_bytes=read + written + draw(st.integers(0, 1500)) * MIB,
        in_bytes=read,
        out_bytes=written,
        attention=shape,
        block_tokens=block_tokens if shape else 0,
        region=draw(st.sampled_from(("", "block", "attention"))),
        fused_calls=count // 2 if fuses else count,
        fused_bytes=count * (written if fuses else read + written + weights),
    )


def signature(kind: str, read: int, written: int, dtype: str) -> str:
    """As a trace writes it: name, positional arguments, arguments by name."""
    image, weight = {"t": dtype, "s": [1, read, 64, 64]}, {"t": dtype, "s": [written, read, 3, 3]}
    tail = [None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1]
    arguments = [image, weight, *tail] if kind == "convolution" else [image]
    return json.dumps([f"aten.{kind}.default", arguments, {}])
