"""What explanations and accounts call the same things."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from autotune.decide.prediction import Bottleneck, Budget, Prediction, Resource
from autotune.optimizations.rule import Rule
from autotune.units import format_bytes

RESOURCES: dict[Resource, str] = {
    "vram": "memory",
    "ram": "host RAM",
    "compute": "compute",
    "memory_bandwidth": "memory bandwidth",
    "transfer": "transfer over the link",
    "launch": "launch overhead of the host",
}
"""What people call them."""


DEVICE_MEMORY = "device memory"


class Memory(NamedTuple):
    """One of the memories that a set needs.

    Attributes:
        bottleneck: What it is where it lacks.
        name: What people call it.
        needed_bytes: By the set.
        available_bytes: Within the budget.
        text: The two in words: ``"decode needs 16.0 GiB of 3.45 GiB"``.
    """

    bottleneck: Bottleneck
    name: str
    needed_bytes: int
    available_bytes: int
    text: str

    @property
    def lacks(self) -> bool:
        """Whether it does not suffice."""
        return self.needed_bytes > self.available_bytes


def memories(needs: Prediction, budget: Budget) -> Iterator[Memory]:
    """The device's, the host's, other GPUs', and that of phases in which it ran out before."""
    needed, free = needs.needed_bytes, budget.device_bytes
    phase = needs.binding_phase.name
    text = f"{phase} needs {_of(needed, free)}"
    yield Memory(Bottleneck("vram", phase), DEVICE_MEMORY, needed, free, text)
    if budget.host_bytes is not None:
        needed, free = needs.host_bytes, budget.host_bytes
        text = f"the host needs {_of(needed, free)} of RAM"
        yield Memory(Bottleneck("ram", "load"), "host RAM", needed, free, text)
    for gpu, free in budget.elsewhere_bytes.items():
        phase, needed = needs.binding_phase_of(gpu).name, needs.elsewhere_bytes.get(gpu, 0)
        text = f"{phase} needs {_of(needed, free)} on cuda:{gpu}"
        yield Memory(Bottleneck("vram", phase), f"memory on cuda:{gpu}", needed, free, text)
    for phase, most in budget.phase_bytes.items():
        needed = needs.phase_needs.get(phase, 0)
        text = (
            f"{phase} needs {format_bytes(needed)}, and no more than that ran out of memory in it"
        )
        yield Memory(Bottleneck("vram", phase), f"memory in {phase}", needed, most, text)


def lacking(needs: Prediction, budget: Budget) -> tuple[Memory, ...]:
    """The memories that do not suffice."""
    return tuple(m for m in memories(needs, budget) if m.lacks)


def _of(needed: int, available: int) -> str:
    """The two, or their difference where they read the same."""
    if format_bytes(needed) != format_bytes(available):
        return f"{format_bytes(needed)} of {format_bytes(available)}"
    return f"{format_bytes(needed - available)} more than the {format_bytes(available)}"


_CLASH = "does not go with "


def clash_of(names: Sequence[str], rule: Rule) -> str:
    """``"does not go with compile: it cuts the graph into pieces"``."""
    return f"{_CLASH}{', '.join(names)}: {rule.reason}"


def said_once(texts: Iterable[str]) -> Iterator[str]:
    """The same, but why two do not go together is not said again of the next."""
    said = set()
    for text in texts:
        parts = text.split("; ")
        yield "; ".join(p.partition(": ")[0] if p in said else p for p in parts)
        said |= {p for p in parts if p.startswith(_CLASH)}
