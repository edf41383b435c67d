"""The usual script, for a pipeline that cannot be rehearsed: every encoder, every step, one decode.

It is what nearly every pipeline does, and says nothing of what this one does besides.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autotune.workload.architecture import Architecture
from autotune.workload.arguments import USUAL_TOKENS, prompt_width
from autotune.workload.components import weight_bytes
from autotune.workload.estimate import FRAME_FACTOR
from autotune.workload.live import is_denoiser
from autotune.workload.rehearsal import Call
from autotune.workload.request import vae_factor
from autotune.workload.stage import make_scheduler
from autotune.workload.workload import Request, Role

MOST_TOKENS = 512
"""That pipelines pad to, where the tokenizer has no limit of its own."""

ASSUMED = (
    "assumed: each text encoder once, and once more for guidance; each denoiser once a step, with "
    "twice the batch for guidance; one decode"
)


def usual_calls(
    architecture: Architecture, modules: Mapping[str, nn.Module], request: Request
) -> Iterator[tuple[Role, Call, int]]:
    """Calls, what they are for and how often they are made, in order."""
    guided = 2 if request.guidance_scale > 1 else 1
    limits = {n: min(limit, MOST_TOKENS) for n, limit in architecture.tokenizers.items()}
    tokens = max(limits.values(), default=USUAL_TOKENS)
    for name, module in modules.items():
        if name.startswith("text_encoder"):
            limit = limits.get(name.replace("text_encoder", "tokenizer"), tokens)
            ids = torch.zeros(request.batch, limit, dtype=torch.long, device="meta")
            yield "encoder", _forward(name, module, (ids,)), guided
    latents = _latents(architecture, modules, request)
    for name, module in _denoisers(modules).items():
        call = _denoise(name, module, latents, tokens, guided)
        yield "denoiser", call, _steps(architecture, request)
    for name, module in modules.items():
        if _decodes(module):
            decode: Any = module.decode
            call = Call(name, "decode", module, decode, (latents.to(_dtype(module)),), {})
            yield "autoencoder", call, 1


def _decodes(module: nn.Module) -> bool:
    return callable(getattr(module, "decode", None))


def _denoisers(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those that look like it, else the largest of what is for nothing else."""
    others = {
        n: m for n, m in modules.items() if not n.startswith("text_encoder") and not _decodes(m)
    }
    found = {n: m for n, m in others.items() if is_denoiser(n, m)}
    largest = sorted(others, key=lambda n: weight_bytes(others[n]))[-1:]
    return found or {n: others[n] for n in largest}


def _forward(name: str, module: nn.Module, args: tuple[Any, ...], **kwargs: Any) -> Call:
    return Call(name, "forward", module, module.forward, args, kwargs)


def _denoise(name: str, module: nn.Module, latents: Tensor, tokens: int, guided: int) -> Call:
    """The latents first, and the others by the names that nearly all denoisers give them."""
    batch, dtype = guided * latents.shape[0], _dtype(module)
    sample = latents.expand(guided, *latents.shape).flatten(0, 1).to(dtype)
    wanted = {
        "timestep": torch.zeros(batch, device="meta"),
        "encoder_hidden_states": torch.empty(batch, tokens, prompt_width(module), device="meta"),
    }
    taken = inspect.signature(type(module).forward).parameters
    named = {n: t.to(dtype) for n, t in wanted.items() if n in taken}
    return _forward(name, module, (sample,), **named)


def _latents(
    architecture: Architecture, modules: Mapping[str, nn.Module], request: Request
) -> Tensor:
    """As the autoencoder takes them; with frames where convolutions go over them."""
    config = architecture.config("vae")
    channels = next((config[n] for n in ("latent_channels", "z_dim") if n in config), 4)
    factor = vae_factor(architecture)
    frames = [(request.frames - 1) // FRAME_FACTOR + 1] if _has_frames(modules) else []
    shape = (request.batch, channels, *frames, request.height // factor, request.width // factor)
    return torch.empty(shape, device="meta")


def _has_frames(modules: Mapping[str, nn.Module]) -> bool:
    coders = (m for m in modules.values() if _decodes(m))
    return any(p.dim() == 5 for m in coders for p in m.parameters())


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters()), torch.float32)


def _steps(architecture: Architecture, request: Request) -> int:
    """As often as the scheduler steps: some take a step twice."""
    for component in architecture.schedulers.values():
        try:
            scheduler = make_scheduler(component)
            scheduler.set_timesteps(request.steps)
            return len(scheduler.timesteps)
        except Exception:  # a scheduler of the user's own, or one that asks for more
            continue
    return request.steps
