"""Token merging (ToMe): self-attention over fewer tokens, through the tomesd package."""

from __future__ import annotations

from typing import Any

import msgspec

from autotune.errors import OptimizationError
from autotune.optimizations.base import Optimization, Parameters, Undo, undone_on_failure
from autotune.optimizations.execution import Execution, TokenMerge
from autotune.optimizations.modules import (
    classes_of,
    denoisers,
    drop_bound_forwards,
    remember_hooks,
)
from autotune.optimizations.target import BEFORE_IMAGE, Target
from autotune.probe.machine import Machine
from autotune.workload.workload import Workload

DOWNSAMPLES = (1, 2, 4)

_MERGEABLE = frozenset({"UNet2DConditionModel", "ControlNetModel", "MultiControlNetModel"})
"""Denoisers whose blocks tomesd rewrites rightly. Of frames it takes the wrong sizes, a motion
module would lose its positions, and transformers have other blocks."""


RATIOS = (0.3, 0.5)
"""The most that is mildly lossy, and the most that every guide tries."""


class ToMe(Optimization):
    """Merge similar tokens before self-attention and spread the result afterwards."""

    name = "tome"
    summary = "merges similar tokens before self-attention, so that there is less to compute"
    relieves = "compute of denoise"
    exactness = "lossy"
    defaults = {"ratio": 0.3, "max_downsample": 1}

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        if not machine.has("tomesd"):
            return "the package tomesd is not installed: pip install tomesd"
        other = next((c for c in classes_of(workload, "denoiser") if c not in _MERGEABLE), None)
        if other is not None:
            return f"tomesd merges the tokens of image UNets only, and this is a {other}"
        if not merged_downsamples(workload, max(DOWNSAMPLES)):
            return "the UNet has no self-attention that tomesd could shorten"
        return None

    def worth_trying(self, machine: Machine, workload: Workload) -> tuple[Parameters, ...]:
        """The strongest of each quality level, at each depth that reaches further blocks.

        A weaker ratio needs the same level, and gains less.
        """
        found = merged_downsamples(workload, max(DOWNSAMPLES))
        depths = [d for d in DOWNSAMPLES if d in found]
        return tuple({"ratio": r, "max_downsample": d} for d in depths for r in RATIOS)

    def quality(self, parameters: Parameters) -> str:
        return "balanced" if float(parameters["ratio"]) <= RATIOS[0] else "fast"

    def check(self, parameters: Parameters) -> None:
        ratio, depth = float(parameters["ratio"]), int(parameters["max_downsample"])
        if not 0 < ratio <= 0.75:
            raise OptimizationError(
                f"tome:ratio={ratio} is out of range", "use 0.1 to 0.5; 0.75 is the most"
            )
        if depth not in (1, 2, 4, 8):
            raise OptimizationError(f"tome:max_downsample={depth} is unknown", "use 1, 2, 4 or 8")

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        merge = TokenMerge(float(parameters["ratio"]), int(parameters["max_downsample"]))
        return msgspec.structs.replace(execution, merge=merge)

    def code(self, parameters: Parameters, target: Target) -> tuple[str, ...]:
        ratio, depth = parameters["ratio"], parameters["max_downsample"]
        how = f"ratio={ratio}, max_downsample={depth}"
        return (
            "import tomesd",
            *(f"tomesd.apply_patch(pipe.{name}, {how})" for name in target.denoisers),
            f"{BEFORE_IMAGE}# ToMe's random numbers run on from image to image: a seed would not "
            "repeat",
            *(
                f'{BEFORE_IMAGE}pipe.{name}._tome_info["args"]["generator"] = '
                "torch.Generator(pipe._execution_device).manual_seed(0)"
                for name in target.denoisers
            ),
        )

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        import tomesd

        modules = denoisers(pipe)
        for module in modules:
            _require_mergeable(module)

        put_forwards_back = remember_hooks(modules)

        def undo() -> None:
            for module in modules:
                _remove(module)
            put_forwards_back()

        ratio, depth = float(parameters["ratio"]), int(parameters["max_downsample"])
        with undone_on_failure(undo):
            for module in modules:  # given the pipeline, tomesd would leave ControlNets out
                drop_bound_forwards(module)  # they would hide the patched class's
                tomesd.apply_patch(module, ratio=ratio, max_downsample=depth)
        return undo

    def found(self, pipe: Any) -> Parameters | None:
        infos = [m._tome_info for m in denoisers(pipe) if hasattr(m, "_tome_info")]
        return {k: infos[0]["args"][k] for k in self.defaults} if infos else None

    def before_image(self, pipe: Any, parameters: Parameters, seed: int) -> None:
        """Restart ToMe's generators: they run on from image to image, so seeds would not repeat."""
        import torch

        for module in denoisers(pipe):
            generator = torch.Generator(pipe._execution_device).manual_seed(seed)
            module._tome_info["args"]["generator"] = generator


def merged_downsamples(workload: Workload, max_downsample: int) -> set[int]:
    """Downsampling factors, up to a limit, at which the denoisers have self-attention blocks."""
    runs = workload.runs_as("denoiser")
    blocks = {o.block_tokens for r in runs for o in r.trace.operators if o.block_tokens}
    factors = {downsample(workload.latent_tokens, tokens) for tokens in blocks}
    return {f for f in factors if f <= max_downsample}


def downsample(latent_tokens: int, block_tokens: int) -> int:
    """The factor as tomesd computes it: the rounded-up root of the quotient of token counts."""
    quotient = latent_tokens // block_tokens
    root = int(quotient**0.5)
    return root if root * root >= quotient else root + 1


def _require_mergeable(module: Any) -> None:
    """Refuse what tomesd's copy of a block's forward leaves out.

    Raises:
        OptimizationError: which class.
    """
    blocks = [b for b in module.modules() if type(b).__name__ == "BasicTransformerBlock"]
    is_plain = all(
        getattr(b, "norm_type", "layer_norm") == "layer_norm"
        and getattr(b, "pos_embed", None) is None
        and not hasattr(b, "fuser")
        for b in blocks
    )
    if type(module).__name__ not in _MERGEABLE or not is_plain:
        raise OptimizationError(
            f"tomesd cannot merge the tokens of {type(module).__name__}", "add --without tome"
        )


def _remove(module: Any) -> None:
    import tomesd

    tomesd.remove_patch(module)
    # tomesd leaves its notes on every block; without them the module is as it was.
    for child in module.modules():
        child.__dict__.pop("_tome_info", None)
