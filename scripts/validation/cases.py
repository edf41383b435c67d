"""What is drawn, on which cards, and what is asked of the planner about it."""

from __future__ import annotations

from typing import NamedTuple

from autotune.decide.limits import Limits
from autotune.tuner import Ask

WITHOUT = ("tiny_autoencoder", "first_block_cache")
"""Left out everywhere: the one needs weights that no configuration has, and what the other saves
depends on what the network draws, which random weights do not tell."""


class Case(NamedTuple):
    """A model and a request.

    Attributes:
        model: As ``models.architecture_of`` knows it.
        side: Height and width in pixels.
        batch: Images at once.
        steps: Denoise steps; few, since each costs the same.
        dtype: What is computed in.
        weight: Its part of the time, relative to the others'.
    """

    model: str
    side: int
    batch: int
    steps: int
    dtype: str
    weight: float = 1.0

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return f"{self.model} {self.side}² ×{self.batch}"

    @property
    def ask(self) -> Ask:
        """The same as the planner is asked."""
        return Ask(self.side, self.side, self.batch, self.steps, dtype=self.dtype)


class Question(NamedTuple):
    """What a user could ask for: how much memory, which quality, how many images."""

    card_bytes: int
    quality: str
    images: int

    @property
    def limits(self) -> Limits:
        """The same as the planner takes it."""
        return Limits(self.quality, vram_limit=self.card_bytes, images=self.images, without=WITHOUT)


ASKED = (("exact", 1), ("high", 1), ("fast", 1), ("exact", 500), ("fast", 500))
"""Qualities and numbers of images: 500 pay for a compiler, one does not."""

CPU_CASES = (
    Case("sd15-small", 256, 1, 2, "float32"),
    Case("sdxl-small", 256, 2, 2, "float32"),
    Case("sd3-medium-small", 256, 2, 2, "float32"),
    Case("flux-dev-small", 256, 2, 2, "float32"),
)

GPU_CASES = (
    Case("sdxl", 1024, 1, 8, "float16", weight=4),
    Case("sd15", 512, 4, 8, "float16", weight=2),
    Case("sd3-medium", 1024, 1, 8, "float16", weight=1.5),
    Case("flux-dev", 1024, 1, 4, "bfloat16"),
    Case("sdxl", 1024, 4, 8, "float16", weight=0.5),
)

TINY_CASES = (Case("sd15-small", 64, 2, 1, "float32"), Case("flux-dev-small", 64, 1, 1, "float32"))
"""For testing the scripts themselves in seconds; what they measure says nothing."""

CPU_SHARES = (1.25, 1.02, 0.97, 0.9, 0.8, 0.7, 0.62)
"""Memory limits on the CPU, as shares of what the plain pipeline is predicted to need: the first
holds everything, the last next to nothing, and two are as near to the edge as predictions claim."""

GPU_CARDS_GB = (8, 12, 24, 6, 4, 10, 16)
"""Card sizes in GB of 2³⁰ bytes, the most telling first."""

TELLING_CARDS = 3
"""So many of them come before the bounded list of sets."""
