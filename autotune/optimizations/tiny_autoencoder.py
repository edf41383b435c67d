"""A distilled decoder in the place of the autoencoder."""

from __future__ import annotations

from typing import Any

import msgspec

from autotune.errors import OptimizationError, first_line
from autotune.optimizations.base import Optimization, Parameters, Undo, undone_on_failure
from autotune.optimizations.execution import Execution
from autotune.optimizations.modules import device_of, random_state_kept
from autotune.optimizations.target import Target
from autotune.probe.machine import Machine
from autotune.workload.variants import DISTILLED
from autotune.workload.workload import Workload

WEIGHTS = {
    "StableDiffusion": "madebyollin/taesd",
    "StableDiffusionXL": "madebyollin/taesdxl",
    "StableDiffusion3": "madebyollin/taesd3",
    "Flux": "madebyollin/taef1",
}
"""Pipeline, without the word ``Pipeline`` → hub repository of its distilled autoencoder: each is
trained for one latent space."""


class TinyAutoencoder(Optimization):
    """TAESD: 1.2 million parameters decode what 50 million did, with less detail.

    The pipeline's own autoencoder waits in host RAM meanwhile.
    """

    name = "tiny_autoencoder"
    summary = "a small distilled decoder in the place of the autoencoder (weights from the hub)"
    relieves = "vram and time of decode"
    exactness = "lossy"
    defaults = {"weights": ""}
    replaces = True

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        runs = workload.runs_as("autoencoder")
        if any(r.entry == "encode" for r in runs):
            return "it is tried for decoding only, and this pipeline encodes a picture too"
        if _family(workload.pipeline) and all("tiny" in r.variants for r in runs):
            return None
        return f"no distilled autoencoder is known for the latents of this {workload.pipeline}"

    def quality(self, parameters: Parameters) -> str:
        return "fast"

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        return msgspec.structs.replace(execution, decoder="tiny")

    def code(self, parameters: Parameters, target: Target) -> tuple[str, ...]:
        weights = parameters["weights"] or _family(target.pipeline)
        return (
            "from diffusers import AutoencoderTiny",
            *(() if weights else (f"# none is known for the latents of {target.pipeline}",)),
            f'pipe.vae = AutoencoderTiny.from_pretrained("{weights or "path/to/one"}", '
            "torch_dtype=pipe.vae.dtype)",
        )

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        own = pipe.vae
        where = device_of(own)
        with random_state_kept(device):
            tiny = _loaded(type(pipe).__name__, str(parameters["weights"]), own)

        def undo() -> None:
            pipe.vae = own.to(where)

        with undone_on_failure(undo):
            pipe.vae = tiny.to(where)
            own.to("cpu")
        return undo

    def found(self, pipe: Any) -> Parameters | None:
        is_tiny = type(getattr(pipe, "vae", None)).__name__ == "AutoencoderTiny"
        return {"weights": ""} if is_tiny else None


def _family(pipeline: str) -> str | None:
    return WEIGHTS.get(pipeline.removesuffix("Pipeline"))


def _loaded(pipeline: str, weights: str, own: Any) -> Any:
    """The distilled autoencoder, in the dtype of the pipeline's own.

    Raises:
        OptimizationError: none is known, it cannot be read, or it is for other latents.
    """
    from diffusers import AutoencoderTiny

    is_known = sum(p.numel() for p in own.parameters()) in DISTILLED
    source = weights or (_family(pipeline) if is_known else None)
    if source is None:
        raise OptimizationError(
            f"no distilled autoencoder is known for the latents of this {pipeline}",
            "name one: tiny_autoencoder:weights=FOLDER_OR_HUB_ID",
        )
    try:
        tiny = AutoencoderTiny.from_pretrained(source, torch_dtype=own.dtype)
    except Exception as error:  # the hub and safetensors raise all sorts
        raise OptimizationError(
            f"cannot load the distilled autoencoder {source}: {first_line(error)}",
            "download it, or add --without tiny_autoencoder",
        ) from error
    if tiny.config.latent_channels != own.config.latent_channels:
        raise OptimizationError(
            f"{source} is for latents of {tiny.config.latent_channels} channels, "
            f"{pipeline}'s have {own.config.latent_channels}",
            "name another: tiny_autoencoder:weights=FOLDER_OR_HUB_ID",
        )
    return tiny.eval()
