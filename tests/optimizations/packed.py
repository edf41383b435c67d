"""What holds of every way to pack weights, whichever package does it."""

from __future__ import annotations

import torch

from autotune.optimizations import find
from autotune.testing.pipelines import BUILDERS, call
from autotune.testing.state import differences, whole_state
from autotune.workload.components import weight_bytes


def require_packed_and_back(kind: str, scheme: str, atol: float) -> None:
    """Smaller, found, drawn nearly alike; undone, it is as it was to the bit."""
    pipe, quantization = BUILDERS[kind](), find("quantization")
    plain, before = call(pipe), whole_state(pipe)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    weighed = weight_bytes(denoiser)
    undo = quantization.apply(pipe, {"scheme": scheme}, "cpu")
    assert quantization.found(pipe) == {"scheme": scheme}
    assert weight_bytes(denoiser) < weighed
    drawn = call(pipe)
    assert not torch.equal(drawn, plain)
    torch.testing.assert_close(drawn, plain, atol=atol, rtol=0)
    undo()
    assert differences(before, whole_state(pipe)) == {}
    assert torch.equal(call(pipe), plain)
