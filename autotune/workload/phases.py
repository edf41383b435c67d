"""From an architecture and a request to a ``Workload``: which component runs when, on which inputs.

Each component class that is known here gets the inputs its pipeline would give it, on the meta
device; the trace does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor, nn

from autotune.errors import ModelError, first_line
from autotune.units import format_bytes
from autotune.workload.architecture import Architecture
from autotune.workload.components import build_on_meta, describe
from autotune.workload.request import denoiser_calls, is_guided, latent_size
from autotune.workload.trace import trace
from autotune.workload.variants import decode_variants, switched
from autotune.workload.workload import ComponentRun, Phase, Request, Trace, Workload


class _Call(NamedTuple):
    """How to run a component once: the call, and the tensors it is given."""

    run: Callable[[], Any]
    inputs: list[Tensor]


def trace_workload(architecture: Architecture, request: Request) -> Workload:
    """Trace every phase of one generation.

    Args:
        architecture: The model's classes and configurations.
        request: A complete request (see ``complete_request``).

    Raises:
        ModelError: the pipeline has a component that cannot be built or traced.
    """
    _require_text_to_image(architecture)
    dtype = getattr(torch, request.dtype)
    modules = {n: build_on_meta(n, c, dtype) for n, c in architecture.components.items()}
    denoiser = _denoiser_name(architecture)
    height, width = latent_size(architecture, request)
    encode = Phase("encode", tuple(_encoder_runs(modules, architecture, request)))
    denoise = Phase("denoise", (_denoise_run(denoiser, modules[denoiser], architecture, request),))
    decode = Phase("decode", (_decode_run(modules["vae"], architecture, request),))
    phases = tuple(p for p in (encode, denoise, decode) if p.runs)
    return Workload(
        model=architecture.name,
        pipeline=architecture.pipeline,
        request=request,
        components=tuple(describe(n, m) for n, m in modules.items()),
        phases=phases,
        offload_order=_offload_order(architecture),
        latent_tokens=height * width,
        notes=tuple(_untraced(modules, phases)),
    )


_OTHER_TASKS = (
    "Img2Img", "Inpaint", "ControlNet", "Upscale", "Adapter", "Depth2Img", "Pix2Pix", "Video",
)  # fmt: skip


def _require_text_to_image(architecture: Architecture) -> None:
    task = next((t for t in _OTHER_TASKS if t in architecture.pipeline), None)
    if task is not None:
        raise ModelError(
            f"cannot plan for {architecture.pipeline} yet: only text-to-image is traced",
            "use the model's text-to-image pipeline",
        )


def _untraced(modules: dict[str, nn.Module], phases: tuple[Phase, ...]) -> Iterator[str]:
    """A note for each component that is loaded and may run, but is in no phase."""
    traced = {r.component for p in phases for r in p.runs}
    for name, module in modules.items():
        if name not in traced:
            size = format_bytes(describe(name, module).weight_bytes)
            yield f"{name}: its weights ({size}) are counted, its run is not traced"


def _denoiser_name(architecture: Architecture) -> str:
    for name in ("unet", "transformer"):
        component = architecture.components.get(name)
        if component and component.class_name in _DENOISERS and "vae" in architecture.components:
            return name
    classes = ", ".join(sorted(c.class_name for c in architecture.components.values()))
    raise ModelError(
        f"cannot trace {architecture.pipeline} yet (its modules: {classes})",
        f"pipelines with an AutoencoderKL and one of {', '.join(_DENOISERS)} are known",
    )


def _offload_order(architecture: Architecture) -> tuple[str, ...]:
    """The pipeline class's own ``model_cpu_offload_seq``, else the order of the components."""
    import diffusers

    cls = getattr(diffusers, architecture.pipeline, None)
    excluded = set(getattr(cls, "_exclude_from_cpu_offload", ()))
    sequence = getattr(cls, "model_cpu_offload_seq", None)
    named = sequence.split("->") if sequence else []
    rest = [n for n in architecture.components if n not in named and n not in excluded]
    return tuple(n for n in (*named, *rest) if n in architecture.components)


def _trace_call(name: str, module: nn.Module, call: _Call) -> Trace:
    try:
        return trace(module, call.run, call.inputs)
    except Exception as error:  # any operator without a meta kernel, any shape the model refuses
        raise ModelError(
            f"cannot trace {name} ({type(module).__name__}): {first_line(error)}",
            "check that the size suits the model; custom modules cannot be traced yet",
        ) from error


# ---- encode -------------------------------------------------------------------------------------


def _encoder_runs(
    modules: dict[str, nn.Module], architecture: Architecture, request: Request
) -> list[ComponentRun]:
    """Text encoders see one prompt per call; guidance adds a call for the negative prompt."""
    # SDXL's pipelines take zeros for the negative prompt that was not given.
    encodes_twice = is_guided(architecture, request) and "XL" not in architecture.pipeline
    calls = 2 if encodes_twice else 1
    encoders = {n: m for n, m in modules.items() if n.startswith("text_encoder")}
    return [
        ComponentRun(component=n, calls=calls, trace=_trace_call(n, m, _encode_call(m)))
        for n, m in encoders.items()
    ]


def _encode_call(encoder: nn.Module) -> _Call:
    config: Any = encoder.config
    tokens = getattr(config, "max_position_embeddings", None) or 256
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    module: Any = encoder
    return _Call(lambda: module(ids, output_hidden_states=True), [ids])


# ---- denoise ------------------------------------------------------------------------------------


def _denoise_run(
    name: str, denoiser: nn.Module, architecture: Architecture, request: Request
) -> ComponentRun:
    make = _DENOISERS[type(denoiser).__name__]
    call = make(denoiser, architecture, request)
    return ComponentRun(
        component=name,
        calls=denoiser_calls(architecture, request.steps),
        trace=_trace_call(name, denoiser, call),
    )


def _unet_call(unet: Any, architecture: Architecture, request: Request) -> _Call:
    """A guided UNet sees the unconditional and the conditional half in one batch."""
    dtype = getattr(torch, request.dtype)
    config = unet.config
    batch = request.batch * (2 if is_guided(architecture, request) else 1)
    height, width = latent_size(architecture, request)
    tokens = architecture.config("text_encoder").get("max_position_embeddings", 77)
    latents = torch.empty(batch, config.in_channels, height, width, dtype=dtype, device="meta")
    text = torch.empty(batch, tokens, _context_width(config), dtype=dtype, device="meta")
    timestep = torch.empty((), dtype=torch.float32, device="meta")
    added = _added_conditions(config, batch, dtype)
    inputs = [latents, text, timestep, *added.values()]
    return _Call(
        lambda: unet(
            latents,
            timestep,
            encoder_hidden_states=text,
            added_cond_kwargs=added or None,
            return_dict=False,
        ),
        inputs,
    )


def _context_width(config: Any) -> int:
    width = config.cross_attention_dim
    return int(width[0] if isinstance(width, (list, tuple)) else width)


def _added_conditions(config: Any, batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """SDXL's pooled text embedding and size conditions (six time ids, five in the refiner)."""
    if config.addition_embed_type != "text_time":
        return {}
    ids = 5 if config.cross_attention_dim == 1280 else 6
    text_width = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
    return {
        "text_embeds": torch.empty(batch, text_width, dtype=dtype, device="meta"),
        "time_ids": torch.empty(batch, ids, dtype=dtype, device="meta"),
    }


_DENOISERS: dict[str, Callable[[Any, Architecture, Request], _Call]] = {
    "UNet2DConditionModel": _unet_call,
}


# ---- decode -------------------------------------------------------------------------------------


_SLICES_TRACED = 4
"""A sliced decode repeats itself: so many images are traced, the others are counted."""


def _decode_run(vae: nn.Module, architecture: Architecture, request: Request) -> ComponentRun:
    upcast = _decodes_in_float32(architecture, request)
    before = describe("vae", vae).weight_bytes
    if upcast:
        vae.float()
    whole = _trace_call("vae", vae, _decode_call(vae, architecture, request))
    variants = {v: _variant(vae, v, architecture, request) for v in decode_variants(request)}
    after = describe("vae", vae).weight_bytes
    if upcast:
        nn.Module.to(vae, getattr(torch, request.dtype))
    return ComponentRun(
        component="vae",
        calls=1,
        trace=whole,
        variants={name: trace for name, trace in variants.items() if trace != whole},
        upcast_bytes=after - before,
    )


def _variant(vae: nn.Module, variant: str, architecture: Architecture, request: Request) -> Trace:
    traced = request.batch
    if variant.startswith("sliced"):
        traced = min(request.batch, _SLICES_TRACED)
    few = msgspec.structs.replace(request, batch=traced)
    with switched(vae, variant):
        found = _trace_call("vae", vae, _decode_call(vae, architecture, few))
    image_bytes = 3 * request.height * request.width * next(vae.parameters()).element_size()
    return (
        found if traced == request.batch else _repeated(found, request.batch, traced, image_bytes)
    )


def _repeated(trace: Trace, batch: int, traced: int, image_bytes: int) -> Trace:
    """The trace of a few images as that of a batch: as much more work, and the images that wait."""
    waiting = (batch - traced) * image_bytes
    operators = tuple(
        msgspec.structs.replace(
            o, count=o.count * batch // traced, live_bytes=o.live_bytes + waiting
        )
        for o in trace.operators
    )
    return Trace(
        operators=operators,
        # At the end the images are joined: all of them, twice.
        activation_bytes=max(trace.activation_bytes + waiting, 2 * batch * image_bytes),
        dispatches=sum(o.count for o in operators),
    )


def _decodes_in_float32(architecture: Architecture, request: Request) -> bool:
    """SDXL's pipelines upcast a float16 VAE with ``force_upcast``; SD 1.5's ignore the flag."""
    forced = bool(architecture.config("vae").get("force_upcast", True))
    return "XL" in architecture.pipeline and forced and request.dtype == "float16"


def _decode_call(vae: Any, architecture: Architecture, request: Request) -> _Call:
    dtype = next(vae.parameters()).dtype
    shape = (request.batch, vae.config.latent_channels, *latent_size(architecture, request))
    latents = torch.empty(*shape, dtype=dtype, device="meta")
    return _Call(lambda: vae.decode(latents, return_dict=False), [latents])
