"""Coherence: which optimizations contradict or cancel one another, as data with reasons."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from autotune.decide.prediction import PhasePrediction, slowest_of
from autotune.errors import OptimizationError
from autotune.optimizations import CATALOGUE
from autotune.optimizations.base import Setting
from autotune.optimizations.rule import Rule

LAYER_OFFLOADS = frozenset({"sequential_cpu_offload", "group_offload"})
OFFLOADS = LAYER_OFFLOADS | {"model_cpu_offload", "text_encoder_offload"}
STEP_CACHES = frozenset(
    {"first_block_cache", "taylorseer_cache", "pyramid_attention_broadcast", "faster_cache"}
)
PLACEMENTS = OFFLOADS | {"device_map"}
"""What decides where the weights are."""
COMPUTE_SAVERS = STEP_CACHES | {"tome"}
KERNEL_TUNING = frozenset(
    {"channels_last", "fuse_qkv", "compile", "attention_backend", "sage_attention"}
)
PROCESSORS = frozenset({"xformers", "attention_slicing"})


RULES: tuple[Rule, ...] = (
    Rule(
        "slicing-alone",
        "attention slicing replaces a memory-efficient kernel instead of running on top of it, "
        "and is slower",
        frozenset({"xformers"}),
        frozenset({"attention_slicing"}),
        "overrides",
    ),
    Rule(
        "one-kernel",
        "each chooses the attention kernel: the last one wins, silently",
        frozenset({"attention_backend", "sage_attention"}),
        PROCESSORS,
        "overrides",
    ),
    Rule(
        "one-named-kernel",
        "each names the attention kernel of the same layers: the last one wins, silently",
        frozenset({"attention_backend"}),
        frozenset({"sage_attention"}),
        "overrides",
    ),
    Rule(
        "fused-processor",
        "both replace the attention processor: the last one wins, silently, and the fused weights "
        "stay for nothing",
        frozenset({"fuse_qkv"}),
        PROCESSORS,
        "overrides",
    ),
    Rule(
        "one-step-cache",
        "a network has one step cache: diffusers refuses a second",
        STEP_CACHES,
        STEP_CACHES,
        "overrides",
    ),
    Rule(
        "narrow-once",
        "both store the same weights in fewer bits",
        frozenset({"quantization"}),
        frozenset({"layerwise_casting"}),
        "hinders",
    ),
    Rule(
        "packed-weights-stay",
        "weights packed by quantization are no plain tensors that could be moved layer by layer",
        frozenset({"quantization"}),
        LAYER_OFFLOADS,
        "raises",
    ),
    Rule(
        "packed-weights-apart",
        "weights packed by quantization cannot be joined into one matrix",
        frozenset({"quantization"}),
        frozenset({"fuse_qkv"}),
        "raises",
    ),
    Rule(
        "graph-in-pieces",
        "what runs between the layers cuts the compiled graph into pieces",
        frozenset({"compile"}),
        LAYER_OFFLOADS
        | {"tome", "pyramid_attention_broadcast", "faster_cache", "layerwise_casting"},
        "hinders",
    ),
    Rule(
        "one-decoder",
        "the distilled decoder takes the place of the autoencoder that the other changes",
        frozenset({"tiny_autoencoder"}),
        frozenset({"vae_slicing", "vae_tiling", "vae_bfloat16"}),
        "is lost",
    ),
    Rule(
        "one-offload",
        "one offload strategy at a time: each moves the same weights",
        PLACEMENTS,
        PLACEMENTS,
        "overrides",
    ),
    Rule(
        "offload-or-merge",
        "while moving weights takes longer than computing, computing less costs quality and "
        "gains no time",
        OFFLOADS,
        COMPUTE_SAVERS,
        "gains nothing",
        while_transfer_dominates=True,
    ),
    Rule(
        "offload-or-tune",
        "while moving weights takes longer than computing, faster kernels have no return",
        OFFLOADS,
        KERNEL_TUNING,
        "gains nothing",
        while_transfer_dominates=True,
    ),
    Rule(
        "casting-lost-in-offload",
        "offload layer by layer loads the weights anew at every step, in the dtype they were "
        "stored in: a later cast is lost",
        LAYER_OFFLOADS,
        frozenset({"layerwise_casting"}),
        "is lost",
        by_hand=True,
    ),
    Rule(
        "layout-lost-in-offload",
        "sequential offload loads the weights anew at every step, in the layout they were stored "
        "in: a later one is lost",
        frozenset({"sequential_cpu_offload"}),
        frozenset({"channels_last"}),
        "is lost",
        by_hand=True,
    ),
    Rule(
        "fused-from-nothing",
        "of weights that sequential offload has moved away, the joined matrix would be random",
        frozenset({"sequential_cpu_offload"}),
        frozenset({"fuse_qkv"}),
        "spoils",
        by_hand=True,
    ),
    Rule(
        "fused-in-eight-bits",
        "weights stored in eight bits cannot be joined into one matrix",
        frozenset({"layerwise_casting"}),
        frozenset({"fuse_qkv"}),
        "raises",
    ),
)


@functools.cache
def all_rules() -> tuple[Rule, ...]:
    """Those above, and those that optimizations of other packages bring."""
    return (*RULES, *(rule for o in CATALOGUE.values() for rule in o.rules))


def broken_rule(
    names: Iterable[str], dominated: bool = False, kept: frozenset[str] = frozenset()
) -> Rule | None:
    """The first rule that a set breaks, or ``None`` when it is coherent.

    Args:
        names: Optimizations of the set.
        dominated: Whether ``transfer_dominates`` it; else rules that depend on that are left out.
        kept: Those that are set by hand already.
    """
    chosen = frozenset(names)
    for rule in all_rules():
        holds = dominated or not rule.while_transfer_dominates
        if rule.by_hand and not rule.first & kept:
            holds = False
        if holds and rule.broken_by(chosen):
            return rule
    return None


def transfer_dominates(phases: Iterable[PhasePrediction]) -> bool:
    """Whether the slowest phase spends more time moving weights than on everything else."""
    phase = slowest_of(phases)
    return phase.transfer_s > phase.seconds - phase.transfer_s


def require_coherent(settings: Iterable[Setting]) -> None:
    """Refuse an incoherent set.

    Raises:
        OptimizationError: with the rule's reason and id.
    """
    names = [s.name for s in settings]
    rule = broken_rule(names)
    if rule is not None:
        clashing = ", ".join(n for n in names if n in rule.first | rule.second)
        raise OptimizationError(
            f"{clashing} do not go together: {rule.reason} (rule {rule.id})",
            "leave one of them out",
        )
