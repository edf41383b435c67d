"""From rates to replayed times: what an operator really took, relative to what rates say.

A rate is one number for all shapes; replay knows some operators exactly. An operator that was not
replayed (another tile, a merged token count) is corrected like its replayed kin, so that
alternatives are compared by the same yardstick: like those of its own name, which compute the same
of each byte (a CPU takes several times as long for a ``silu`` as for an addition), else like all of
its kind. Where a request is planned for in the middle of others, none of its own has been replayed:
then its kin are those of another request of the same model.

Convolutions, and norms over groups of channels, are replayed in both layouts: what another one
takes depends on more than a rate says (oneDNN copies a large image that is not channels last, and
asks the system for the memory). What was not replayed in the second layout gains by it as its kin
did.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from autotune.probe.machine import OperatorTime
from autotune.workload.workload import Operator, Workload


class Corrections:
    """Factors on rate-based seconds, one per operator.

    Args:
        times: Replayed operators by ``Operator.key``.
        estimates: Operators, of which some were replayed, and seconds of one call of each as they
            would be without the replay.
    """

    def __init__(
        self,
        times: dict[str, OperatorTime],
        estimates: Iterable[tuple[Operator, float]],
    ) -> None:
        self._factors: dict[str, float] = {}
        kin: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for operator, estimated in estimates:
            measured = times.get(operator.key)
            if measured is None or measured.seconds is None or estimated <= 0:
                continue
            self._factors[operator.key] = measured.seconds / estimated
            for name in (operator.name, operator.kind):
                sums = kin[name, operator.dtype]
                sums[0] += measured.seconds * operator.count
                sums[1] += estimated * operator.count
        self._kin = {key: measured / estimated for key, (measured, estimated) in kin.items()}

    def factor(self, operator: Operator) -> float:
        """The operator's own factor, else that of its name, else of its kind, else 1."""
        if not self._factors:
            return 1.0
        own = self._factors.get(operator.key)
        if own is not None:
            return own
        alike = self._kin.get((operator.name, operator.dtype))
        return alike if alike is not None else self.of_kind(operator.kind, operator.dtype)

    def of_kind(self, kind: str, dtype: str) -> float:
        """Of all operators of a kind together; 1 where none was replayed."""
        return self._kin.get((kind, dtype), 1.0)


def plain_operators(workload: Workload) -> list[Operator]:
    """The operators of every phase as diffusers runs it when nothing is set."""
    return [o for r in workload.runs for o in r.trace.operators]


def replayable(workload: Workload) -> list[Operator]:
    """All that is worth timing: the plain operators, and some in the other layout, too."""
    plain = plain_operators(workload)
    return [*plain, *(o.in_channels_last() for o in plain if o.depends_on_layout)]
