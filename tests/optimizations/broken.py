"""Optimizations that break one promise each, for the tests of the suite; torch is not imported."""

from __future__ import annotations

from typing import Any

import msgspec

from autotune.optimizations.base import Optimization, Parameters, Undo
from autotune.optimizations.execution import Effect, Execution
from autotune.optimizations.modules import denoisers
from autotune.optimizations.rule import Rule
from autotune.probe.machine import Machine
from autotune.workload.workload import Workload


class Marked(Optimization):
    """Marks the denoisers and does nothing else: it keeps to everything."""

    name = "marked"
    summary = "marks the denoisers, and does nothing else"
    relieves = "nothing"

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        return None

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        return msgspec.structs.replace(execution, effects=(Effect("denoiser", time=0.9),))

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        module = denoisers(pipe)[0]
        was = getattr(module, "marked", None)
        module.marked = True

        def undo() -> None:
            module.marked = was
            if was is None:
                vars(module).pop("marked", None)

        return undo

    def found(self, pipe: Any) -> Parameters | None:
        return {} if hasattr(denoisers(pipe)[0], "marked") else None


class Forgets(Marked):
    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        pipe.unet.forgotten = True
        return super().apply(pipe, parameters, device)


class Unfindable(Marked):
    def found(self, pipe: Any) -> Parameters | None:
        return None


class Blurs(Marked):
    """Says that it is exact, and is not."""

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        undo_mark = super().apply(pipe, parameters, device)
        handle = pipe.unet.register_forward_hook(lambda _, __, out: (out[0] * 0.9,))

        def undo() -> None:
            handle.remove()
            undo_mark()

        return undo


class Harmless(Marked):
    """Says that it is lossy, and is not."""

    exactness = "lossy"


class Rounds(Marked):
    """Undone, its weights are no longer what they were."""

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        undo_mark = super().apply(pipe, parameters, device)

        def undo() -> None:
            undo_mark()
            pipe.unet.bfloat16().float()

        return undo


class Gambles(Marked):
    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        import torch

        torch.rand(1)
        return super().apply(pipe, parameters, device)


class Wavers(Blurs):
    """One seed draws two images."""

    exactness = "lossy"

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        undo_mark = Marked.apply(self, pipe, parameters, device)
        drawn: list[int] = []

        def hook(_: Any, __: Any, out: Any) -> Any:
            drawn.append(1)
            return (out[0] * (1 - 0.1 * len(drawn)),)

        handle = pipe.unet.register_forward_hook(hook)

        def undo() -> None:
            handle.remove()
            undo_mark()

        return undo


class Piles(Blurs):
    """Applied twice, it does twice as much."""

    exactness = "lossy"


class Adds(Marked):
    """Configured twice, it is twice as fast."""

    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        effects = (*execution.effects, Effect("denoiser", time=0.9))
        return msgspec.structs.replace(execution, effects=effects)


class Idle(Marked):
    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        return execution


class Stumbles(Marked):
    """A failure half way is not undone."""

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        undo = super().apply(pipe, parameters, device)
        pipe.unet.requires_grad_(False)
        return undo


class Heavy(Marked):
    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        import torch

        return None if torch.__version__ else "no torch"


class Curt(Marked):
    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        return "no." if machine.device.kind == "cpu" else None


class Mute(Marked):
    summary = ""


class Replaces(Marked):
    """Takes the place of the attention processors, as slicing does, and says nothing of it."""

    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        from diffusers.models.attention_processor import AttnProcessor

        unet = pipe.unet
        before = dict(unet.attn_processors)
        unet.set_attn_processor(AttnProcessor())
        return lambda: unet.set_attn_processor(dict(before))

    def found(self, pipe: Any) -> Parameters | None:
        return {} if "AttnProcessor" in {type(p).__name__ for p in processors(pipe)} else None


class Accuses(Marked):
    """Its rule is about a pair that works."""

    rules = (
        Rule(
            "marked-alone",
            "a marked denoiser does not go with sliced decodes",
            frozenset({"marked"}),
            frozenset({"vae_slicing"}),
            "overrides",
        ),
    )


def processors(pipe: Any) -> list[Any]:
    return list(pipe.unet.attn_processors.values())


class Absent(Marked):
    """Nowhere available."""

    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        return "it is not available on anything"
