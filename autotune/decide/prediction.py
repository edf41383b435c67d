"""The ``Prediction``: memory and time of one way to run a workload, per phase."""

from __future__ import annotations

from typing import Literal

import msgspec

Resource = Literal["vram", "compute", "memory_bandwidth", "transfer", "launch"]


class PhasePrediction(msgspec.Struct, frozen=True):
    """One phase. Bytes are what torch's allocator holds; seconds are of one whole generation.

    Attributes:
        resident_bytes: Weights on the device while it runs.
        activation_bytes: Peak of the activations, the attention kernel's own memory included.
        workspace_bytes: What libraries take besides while memory is free: convolution layout
            copies, cuBLAS.
        margin_bytes: For fragmentation: counted when asking whether it fits, not part of the peak.
        peak_bytes: resident + activation + workspace: the peak to expect where memory is free.
        needed_bytes: What must be free: like the peak, but with the margin instead of the
            workspace that the libraries can do without.
        seconds: The sum of the four shares below.
        compute_s: Operators bound by arithmetic.
        memory_s: Operators bound by memory bandwidth.
        transfer_s: Weights crossing the link.
        launch_s: Time in which the host, not the device, sets the pace.
    """

    name: str
    resident_bytes: int
    activation_bytes: int
    workspace_bytes: int
    margin_bytes: int
    peak_bytes: int
    needed_bytes: int
    seconds: float
    compute_s: float
    memory_s: float
    transfer_s: float
    launch_s: float


class Prediction(msgspec.Struct, frozen=True):
    """One way to run a workload.

    It fits when ``needed_bytes``, the largest of the phases', is within the budget.
    """

    peak_bytes: int
    needed_bytes: int
    seconds: float
    phases: tuple[PhasePrediction, ...]

    @property
    def binding_phase(self) -> PhasePrediction:
        """The phase that needs the most memory: shrinking another one changes nothing."""
        return max(self.phases, key=lambda p: p.needed_bytes)

    @property
    def slowest_phase(self) -> PhasePrediction:
        """The phase that takes the most time."""
        return max(self.phases, key=lambda p: p.seconds)


class Bottleneck(msgspec.Struct, frozen=True):
    """What holds a generation back, and in which phase."""

    resource: Resource
    phase: str


def find_bottleneck(prediction: Prediction, budget_bytes: int) -> Bottleneck:
    """Memory while it does not fit; else the largest share of the slowest phase's time."""
    if prediction.needed_bytes > budget_bytes:
        return Bottleneck("vram", prediction.binding_phase.name)
    phase = prediction.slowest_phase
    shares: dict[Resource, float] = {
        "compute": phase.compute_s,
        "memory_bandwidth": phase.memory_s,
        "transfer": phase.transfer_s,
        "launch": phase.launch_s,
    }
    return Bottleneck(max(shares, key=lambda r: shares[r]), phase.name)
