"""A rule of coherence: what does not go together, and what happens if it is tried."""

from __future__ import annotations

from typing import Literal

import msgspec

Clash = Literal["raises", "overrides", "is lost", "spoils", "hinders", "gains nothing"]
"""What comes of a forbidden pair.

raises: an error, when they are applied or at the first image. overrides: one silently switches the
other off. is lost: one silently has no effect beside the other. spoils: another image is drawn than
by either. hinders: both work, but one takes from the other what it is for; tests of its own show
it. gains nothing: both work, but the second is predicted to save no time beside the first.
"""


class Rule(msgspec.Struct, frozen=True):
    """Any one of ``first`` does not go with any one of ``second``.

    Attributes:
        id: Stable name, printed with a refusal.
        reason: One sentence.
        first: Names of optimizations.
        second: Names of optimizations; the same set means "at most one of them".
        clash: What comes of such a pair, in one of the two orders; ``autotune.testing`` tries it.
        while_transfer_dominates: The rule holds only where moving weights takes longer than
            computing, which the prediction tells.
        by_hand: The rule holds only where one of ``first`` was set by hand before: a plan's own
            members are applied in an order that works.
    """

    id: str
    reason: str
    first: frozenset[str]
    second: frozenset[str]
    clash: Clash
    while_transfer_dominates: bool = False
    by_hand: bool = False

    def broken_by(self, names: frozenset[str]) -> bool:
        """Whether the set contains a forbidden pair."""
        if self.first == self.second:
            return len(self.first & names) > 1
        return bool(self.first & names and self.second & names)
