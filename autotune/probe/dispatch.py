"""What one operator inside a diffusers model costs the host, beside its own work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from autotune.probe.machine import Figure
from autotune.probe.replay import replay
from autotune.probe.samples import figure_of
from autotune.probe.timing import Timer
from autotune.units import MIB
from autotune.workload.workload import Trace

UNET_MODULE = "diffusers.models.unets.unet_2d_condition"


def host_seconds_per_operator(timer: Timer) -> Figure | None:
    """What one operator inside a diffusers model costs the host: modules, views, arguments.

    Measured on a UNet so narrow that its arithmetic is negligible. On the CPU, where the host also
    computes, the operators' own time is replayed and taken off.

    Returns:
        ``None`` where the deadline passed before that was done.
    """
    device = timer.device
    from autotune.workload.trace import trace

    call = _narrow_unet(device)
    traced = trace(torch.nn.Module(), _narrow_unet(torch.device("meta")), [])
    with torch.no_grad(), _one_thread():
        forward = timer.time(call, share=3.0)
        own = _sum_of(traced, timer) if device.type == "cpu" else 0.0
    if own is None:
        return None
    samples = [max(s - own, 0.0) / traced.dispatches for s in forward.samples]
    return figure_of(samples, forward.source, forward.disturbances)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Dispatching is one thread's work; on a busy CPU a pool would wait for its own threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _narrow_unet(device: torch.device) -> Callable[[], object]:
    """A call of SD 1.5's UNet with eight channels instead of 320 to 1280."""
    from diffusers import UNet2DConditionModel  # UNET_MODULE has it

    with torch.random.fork_rng(devices=[]):
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=2,
        )
    torch.nn.Module.to(unet, device).eval().requires_grad_(False)
    latent, text = torch.zeros(2, 4, 8, 8, device=device), torch.zeros(2, 8, 8, device=device)
    step = torch.tensor(1.0, device=device)
    return lambda: unet(latent, step, encoder_hidden_states=text, return_dict=False)


def _sum_of(traced: Trace, timer: Timer) -> float | None:
    """Seconds of all operators alone; ``None`` where time did not suffice."""
    times = replay(
        traced.operators,
        timer.device,
        known={},
        budget_s=min(3.0, timer.deadline.left_s),  # where nothing gets in the way, a tenth of it
        memory_bytes=64 * MIB,  # ten times what they need
        weight=lambda operator: operator.bytes,
    )
    if any(o.key not in times for o in traced.operators):
        return None
    return sum(o.count * (times[o.key].seconds or 0.0) for o in traced.operators)
