"""The parts of a machine that are measured apart from one another, and how they go together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, Literal, get_args

from msgspec.structs import replace

from autotune.probe.deadline import left_out_finding
from autotune.probe.machine import Kernels, Link, Machine

Part = Literal[
    "kernels", "attention", "dispatch", "link", "modules", "disk", "context", "operators"
]
"""``dispatch`` is all that the host spends: on launches, operators in models, offload hooks;
``modules`` what ``module.to()`` reaches, which is far from what the link does; ``operators`` the
replayed ones, timed when a model first needs them."""

EVERYTHING: Final[frozenset[Part]] = frozenset(get_args(Part))

_WORDS: Final[Mapping[str, Part]] = {
    "attention": "attention",
    "xFormers": "attention",
    "copies": "link",
    "operator in a model": "dispatch",
    "offload hook": "dispatch",
    "model cache": "disk",
    "kernels": "kernels",
    "products": "kernels",
    "convolutions": "kernels",
}
"""By which a note on something left out is one on a part."""


def part_of(note: str) -> Part | None:
    """The part that a note of ``Machine.left_out`` is on; ``None``: not one of this version's."""
    return next((part for words, part in _WORDS.items() if words in note), None)


def leaving_out(machine: Machine, notes: tuple[str, ...]) -> Machine:
    """The machine with other notes on what was left out, and the finding that tells them."""
    if notes == machine.left_out:
        return machine
    told = left_out_finding(machine.left_out)
    findings = [text for text in machine.findings if text != told]
    findings += [left_out_finding(notes)] if notes else []
    return replace(machine, left_out=notes, findings=tuple(findings))


def composed(kept: Machine, fresh: Machine, parts: Collection[Part]) -> Machine:
    """``fresh`` with all but some parts as they were.

    What identifies device and host, and what is free, is always the fresh one's. Of what was left
    out it says what is true of each part.

    Args:
        kept: Measured before, on the same machine.
        fresh: Measured now.
        parts: What to take from ``fresh``.
    """

    def of(part: Part) -> Machine:
        return fresh if part in parts else kept

    disk = of("disk").host.disk_read_bytes_per_s
    others = (note for note in kept.left_out if part_of(note) not in {*parts, None})
    notes = (*others, *(note for note in fresh.left_out if part_of(note) in {*parts, None}))
    machine = replace(
        fresh,
        host=replace(fresh.host, disk_read_bytes_per_s=disk),
        kernels=_kernels(of("kernels").kernels, of("dispatch").kernels),
        link=_link(of("link").link, of("modules").link),
        attention=of("attention").attention,
        context_bytes=of("context").context_bytes,
        operators=of("operators").operators,
    )
    return leaving_out(machine, notes)


def _kernels(rates: Kernels, costs: Kernels) -> Kernels:
    return replace(
        rates,
        dispatch_s=costs.dispatch_s,
        launch_s=costs.launch_s,
        offload_hook_s=costs.offload_hook_s,
    )


def _link(copies: Link | None, modules: Link | None) -> Link | None:
    if copies is None or modules is None:
        return copies or modules
    return replace(
        copies,
        module_h2d_bytes_per_s=modules.module_h2d_bytes_per_s,
        module_d2h_bytes_per_s=modules.module_d2h_bytes_per_s,
    )
