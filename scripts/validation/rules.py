"""What people set by hand, as lists of sets to try in turn. Pure: imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from autotune.decide.decision import Catalogue
from autotune.optimizations import CATALOGUE, parse_settings
from autotune.optimizations.base import Setting
from autotune.probe.machine import Machine
from autotune.units import GIB
from autotune.workload.workload import Workload

Rungs = tuple[tuple[Setting, ...], ...]


class Rule(NamedTuple):
    """Named after what people call it; ``rungs`` by the workload and the card's size."""

    name: str
    rungs: Callable[[Workload, int], Rungs]


def _plain(workload: Workload, card_bytes: int) -> Rungs:
    return ((),)


def _ladder(workload: Workload, card_bytes: int) -> Rungs:
    return _parsed("", "model_cpu_offload", "sequential_cpu_offload")


def _presets(workload: Workload, card_bytes: int) -> Rungs:
    """The classic five, as guides name them for a model and a card."""
    is_large = workload.weight_bytes > 4 * GIB
    if card_bytes <= 6 * GIB and is_large:
        return _parsed("xformers,sequential_cpu_offload")
    if is_large:
        return _parsed("xformers,model_cpu_offload", "xformers,sequential_cpu_offload")
    return _parsed("xformers", "attention_slicing", "xformers,sequential_cpu_offload")


def _parsed(*sets: str) -> Rungs:
    return tuple(parse_settings(text) for text in sets)


RULES = (
    Rule("plain diffusers", _plain),
    Rule("ladder by hand", _ladder),
    Rule("classic presets", _presets),
)


def usable(
    rungs: Rungs, machine: Machine, workload: Workload, catalogue: Catalogue = CATALOGUE
) -> tuple[Rungs, list[str]]:
    """The rungs that can be tried here, and why others, or members of them, are not.

    xFormers is left out of a rung where it cannot run, as everybody does: SDPA is the same
    kernels. A rung without its offload would be another rung.
    """
    found: list[tuple[Setting, ...]] = []
    reasons: list[str] = []
    for rung in rungs:
        refused = {s.name: catalogue[s.name].unavailable(machine, workload) for s in rung}
        why = {name: reason for name, reason in refused.items() if reason}
        reasons += [f"{name}: {reason}" for name, reason in why.items()]
        if set(why) <= {"xformers"}:
            left = tuple(s for s in rung if s.name not in why)
            if left not in found:
                found.append(left)
    return tuple(found), list(dict.fromkeys(reasons))
