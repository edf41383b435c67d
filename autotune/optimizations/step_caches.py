"""Steps of a transformer that reuse what an earlier step computed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import msgspec

from autotune.errors import OptimizationError
from autotune.optimizations.base import Optimization, Parameters, Undo, undone_on_failure
from autotune.optimizations.execution import Execution, StepCache
from autotune.optimizations.modules import denoisers, registries_of, remember_hooks
from autotune.optimizations.target import Target
from autotune.probe.machine import Machine
from autotune.workload.workload import Workload

_TELLING = frozenset(
    {
        "CogVideoXPipeline",
        "FluxPipeline",
        "HunyuanVideoPipeline",
        "LTXPipeline",
        "QwenImagePipeline",
        "WanPipeline",
    }
)


GUIDED_IN_BATCH = frozenset({"CogVideoXPipeline"})
"""They compute both guided passes in one call, as one batch; of the others some call twice."""

_CACHES = {
    "fbc_leader_block_hook": "FirstBlockCacheConfig",
    "taylorseer_cache": "TaylorSeerCacheConfig",
    "pyramid_attention_broadcast": "PyramidAttentionBroadcastConfig",
    "faster_cache_block": "FasterCacheConfig",
    "mag_cache_leader_block_hook": "MagCacheConfig",
    "sea_cache_leader_block": "SeaCacheConfig",
    "text_kv_cache_block": "TextKVCacheConfig",
}
"""diffusers' hook → the configuration that it is put on by (diffusers 0.42)."""


def foreign_caches(pipe: Any) -> tuple[str, ...]:
    """Caches set by hand that no optimization stands for, by their configurations' names."""
    known = {cls.config for cls in _Cache.__subclasses__()}
    return tuple(sorted({config for config, _ in _cache_hooks(pipe)} - known))


def _cache_hooks(pipe: Any) -> list[tuple[str, Any]]:
    """Configuration and hook: the caches' own functions leave no note on the network."""
    registries = (r for module in denoisers(pipe) for r in registries_of(module))
    named = ((name, hook) for r in registries for name, hook in r.hooks.items())
    return [(_CACHES[name], hook) for name, hook in named if name in _CACHES]


class _Cache(Optimization):
    """One of diffusers' caches; a network has at most one."""

    exactness = "lossy"
    relieves = "compute and memory bandwidth of denoise"
    method: ClassVar[Literal["first_block", "taylor", "attention", "faster"]]
    config: ClassVar[str]
    key: ClassVar[str]
    """Its parameter."""

    attribute: ClassVar[str]
    """Where diffusers' hook has it."""

    pipelines: ClassVar[frozenset[str]]
    """Those known to draw with it (diffusers 0.42). Others do not tell a network which guided pass
    it computes or at which timestep; or the cache does not know their blocks."""

    tried: ClassVar[tuple[int | float, ...]]
    least: ClassVar[float]
    most: ClassVar[float]

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        if workload.pipeline not in self.pipelines:
            named = workload.components_as("denoiser")
            without = next((c for c in named if "step_caches" not in c.abilities), None)
            if without is not None:
                return f"diffusers has no caches for the steps of {without.class_name}"
            return f"it has not been tried with {workload.pipeline}"
        if workload.request.steps < 2:
            return "a single step has no earlier one to reuse"
        return None

    def worth_trying(self, machine: Machine, workload: Workload) -> tuple[Parameters, ...]:
        return tuple({self.key: value} for value in self.tried)

    def check(self, parameters: Parameters) -> None:
        if not self.least <= float(parameters[self.key]) <= self.most:
            raise OptimizationError(
                f"{self.name}:{self.key}={parameters[self.key]} is out of range",
                f"use {self.least:g} to {self.most:g}",
            )

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        cache = StepCache(self.method, float(parameters[self.key]))
        return msgspec.structs.replace(execution, step_cache=cache)

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        targets = [m for m in denoisers(pipe) if not getattr(m, "is_cache_enabled", False)]
        done: list[Any] = []
        put_forwards_back = remember_hooks(targets)

        def undo() -> None:
            for module in done:
                if module.is_cache_enabled:
                    module.disable_cache()
                vars(module).pop("_cache_config", None)
            put_forwards_back()

        with undone_on_failure(undo):
            for module in targets:
                if not hasattr(module, "enable_cache"):
                    raise OptimizationError(
                        f"{type(module).__name__} has no step cache", f"add --without {self.name}"
                    )
                config = self._made(pipe, parameters)
                done.append(module)
                try:
                    module.enable_cache(config)
                except BaseException:
                    module._cache_config = config  # or the hooks it has set would not be found
                    raise
        return undo

    def code(self, parameters: Parameters, target: Target) -> tuple[str, ...]:
        made = f"{self.config}({self._options(parameters, target)})"
        return (
            f"from diffusers import {self.config}",
            *(f"pipe.{name}.enable_cache({made})" for name in target.denoisers),
        )

    @abstractmethod
    def _options(self, parameters: Parameters, target: Target) -> str:
        """The configuration's arguments, as ``_made`` gives them."""

    @abstractmethod
    def _made(self, pipe: Any, parameters: Parameters) -> Any:
        """diffusers' configuration."""

    def found(self, pipe: Any) -> Parameters | None:
        mine = [hook for config, hook in _cache_hooks(pipe) if config == self.config]
        return {self.key: getattr(mine[0], self.attribute)} if mine else None


class FirstBlockCache(_Cache):
    """Skip all blocks but the first while its result hardly changes from step to step."""

    name = "first_block_cache"
    summary = "steps on which the first block changes little reuse what the other blocks added"
    pipelines = _TELLING
    method, config, key = "first_block", "FirstBlockCacheConfig", "threshold"
    attribute = "threshold"
    defaults = {"threshold": 0.08}
    tried, least, most = (0.06, 0.08, 0.12), 0.01, 0.5

    def quality(self, parameters: Parameters) -> str:
        return "balanced" if float(parameters["threshold"]) <= 0.08 else "fast"

    def _options(self, parameters: Parameters, target: Target) -> str:
        return f"threshold={parameters['threshold']}"

    def _made(self, pipe: Any, parameters: Parameters) -> Any:
        from diffusers import FirstBlockCacheConfig

        return FirstBlockCacheConfig(threshold=parameters["threshold"])


class TaylorSeerCache(_Cache):
    """Compute one step in so many; extrapolate the result of the others."""

    name = "taylorseer_cache"
    summary = "one step in so many is computed, the results of the others are extrapolated"
    pipelines = _TELLING
    method, config, key = "taylor", "TaylorSeerCacheConfig", "interval"
    attribute = "cache_interval"
    defaults = {"interval": 3}
    tried, least, most = (3, 5), 2, 10

    def quality(self, parameters: Parameters) -> str:
        return "fast"

    def _options(self, parameters: Parameters, target: Target) -> str:
        return f"cache_interval={parameters['interval']}, use_lite_mode=True"

    def _made(self, pipe: Any, parameters: Parameters) -> Any:
        from diffusers import TaylorSeerCacheConfig

        return TaylorSeerCacheConfig(cache_interval=int(parameters["interval"]), use_lite_mode=True)


class PyramidAttentionBroadcast(_Cache):
    """Reuse the result of attention layers on steps in the middle of the schedule."""

    name = "pyramid_attention_broadcast"
    summary = "in the middle of the schedule, attention is computed on one step in so many"
    pipelines = (_TELLING | {"ChromaPipeline"}) - {"QwenImagePipeline"}
    method, config, key = "attention", "PyramidAttentionBroadcastConfig", "range"
    attribute = "block_skip_range"
    defaults = {"range": 2}
    tried, least, most = (2, 3), 2, 8

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        return super().unavailable(machine, workload) or _mixes_passes(workload)

    def quality(self, parameters: Parameters) -> str:
        return "balanced" if parameters["range"] == 2 else "fast"

    def _options(self, parameters: Parameters, target: Target) -> str:
        return (
            f"spatial_attention_block_skip_range={parameters['range']}, "
            "current_timestep_callback=lambda: pipe.current_timestep"
        )

    def _made(self, pipe: Any, parameters: Parameters) -> Any:
        from diffusers import PyramidAttentionBroadcastConfig

        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=int(parameters["range"]),
            current_timestep_callback=_clock_of(pipe, self.name),
        )


class FasterCache(_Cache):
    """Late in the schedule, extrapolate attention, and of guided passes the one without prompt."""

    name = "faster_cache"
    summary = "late in the schedule, attention and most unguided passes are extrapolated"
    pipelines = _TELLING - {"LTXPipeline", "QwenImagePipeline"} | {"ChromaPipeline"}
    method, config, key = "faster", "FasterCacheConfig", "range"
    attribute = "block_skip_range"
    defaults = {"range": 2}
    tried, least, most = (2,), 2, 8

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        if reason := super().unavailable(machine, workload) or _mixes_passes(workload):
            return reason
        if workload.pipeline in GUIDED_IN_BATCH and workload.request.guidance_scale <= 1:
            return "without guidance there is one pass, and it would be cut in two"
        return None

    def quality(self, parameters: Parameters) -> str:
        return "fast"

    def _options(self, parameters: Parameters, target: Target) -> str:
        return (
            f"spatial_attention_block_skip_range={parameters['range']}, "
            'tensor_format="BFCHW", attention_weight_callback=lambda _: 0.5, '
            f"is_guidance_distilled={target.pipeline not in GUIDED_IN_BATCH}, "
            "current_timestep_callback=lambda: pipe.current_timestep"
        )

    def _made(self, pipe: Any, parameters: Parameters) -> Any:
        from diffusers import FasterCacheConfig

        return FasterCacheConfig(
            spatial_attention_block_skip_range=int(parameters["range"]),
            tensor_format="BFCHW",  # CogVideoX's; read where guided passes are a batch
            attention_weight_callback=lambda _: 0.5,  # diffusers' default, which it warns of
            is_guidance_distilled=type(pipe).__name__ not in GUIDED_IN_BATCH,
            current_timestep_callback=_clock_of(pipe, self.name),
        )


def _mixes_passes(workload: Workload) -> str | None:
    """What keeps results from step to step does not know which guided pass they are of."""
    if workload.guided_passes > 1:
        return "it would give the results of one guided pass to the other"
    return None


def _clock_of(pipe: Any, name: str) -> Callable[[], int]:
    """Says at which timestep a pipeline is.

    Raises:
        OptimizationError: it does not say so.
    """
    if not hasattr(type(pipe), "current_timestep"):
        raise OptimizationError(
            f"{type(pipe).__name__} does not say at which timestep it is", f"add --without {name}"
        )
    return lambda: pipe.current_timestep
