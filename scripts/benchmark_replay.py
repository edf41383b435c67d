#!/usr/bin/env python3
"""Predicted against real step time: operator replay plus host cost, beside a real forward.

For UNets, a diffusion transformer and a VAE decoder with random weights, on the device at hand.
Nothing of a model's forward is timed for its prediction: only its distinct operators, each alone.

    scripts/benchmark_replay.py             # a table
    scripts/benchmark_replay.py --json      # {"median_error", "worst_error", "rows"}
    scripts/benchmark_replay.py --cpu-time  # on a busy machine: one thread, by its own CPU time
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from autotune.probe.devices import choose_device
from autotune.probe.dispatch import host_seconds_per_operator
from autotune.probe.host import Neighbours, usable_cores
from autotune.probe.noise import FOREIGN_SHARE
from autotune.probe.replay import replay
from autotune.probe.timing import Timer, time_call
from autotune.workload.trace import trace

Make = Callable[[], nn.Module]
Call = Callable[[Any], object]


class Case(NamedTuple):
    """A model and a call of it; tensors are made on the default device."""

    name: str
    make: Make
    call: Call


def unet(channels: tuple[int, ...], side: int) -> Case:
    """A guided UNet with attention at all but the lowest level, on a latent of ``side``²."""
    levels = len(channels) - 1

    def make() -> nn.Module:
        return UNet2DConditionModel(
            sample_size=side,
            block_out_channels=channels,
            cross_attention_dim=256,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D",) * levels + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * levels,
        )

    def call(model: Any) -> object:
        latent, text = torch.zeros(2, 4, side, side), torch.zeros(2, 77, 256)
        step = torch.tensor(1.0)
        return model(latent, step, encoder_hidden_states=text, return_dict=False)

    return Case(f"UNet {'-'.join(map(str, channels))} at {side}²", make, call)


def transformer(layers: int, heads: int, side: int) -> Case:
    """An SD 3-like transformer on a latent of ``side``²."""

    def make() -> nn.Module:
        return SD3Transformer2DModel(
            sample_size=side,
            patch_size=2,
            in_channels=16,
            num_layers=layers,
            attention_head_dim=64,
            num_attention_heads=heads,
            joint_attention_dim=256,
            caption_projection_dim=64 * heads,
            pooled_projection_dim=128,
            out_channels=16,
            pos_embed_max_size=96,
        )

    def call(model: Any) -> object:
        return model(
            hidden_states=torch.zeros(2, 16, side, side),
            encoder_hidden_states=torch.zeros(2, 77, 256),
            pooled_projections=torch.zeros(2, 128),
            timestep=torch.ones(2),
            return_dict=False,
        )

    return Case(f"SD 3-like, {layers} layers of {heads} heads at {side}²", make, call)


def decoder(channels: tuple[int, ...], side: int) -> Case:
    """A KL autoencoder's decoder on a latent of ``side``²."""

    def make() -> nn.Module:
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            block_out_channels=channels,
            layers_per_block=2,
        )

    def call(model: Any) -> object:
        return model.decode(torch.zeros(1, 4, side, side))

    return Case(f"VAE decoder {'-'.join(map(str, channels))} at {side}²", make, call)


CASES = (
    unet((64, 128), 32),
    unet((128, 256), 32),
    unet((160, 320, 640), 32),
    unet((320, 640), 32),
    unet((160, 320), 64),
    transformer(6, 6, 32),
    transformer(4, 12, 64),
    decoder((64, 128, 256, 256), 32),
)


def measure(case: Case, device: torch.device, host_s: float) -> dict[str, Any]:
    """Predict the case, then run it; errors are relative to the real time."""
    with torch.device("meta"):
        shadow = case.make().eval()
        traced = trace(shadow, lambda: case.call(shadow), [])
    with device:
        model = case.make().eval()
    # Half of the real runs before the replay and half after: a machine that drifts shows in both.
    before = real_seconds(case, model, device)
    times = replay(
        traced.operators,
        device,
        known={},
        budget_s=30.0,
        memory_bytes=1 << 32,
        weight=lambda o: o.count * (o.flops + o.bytes),
    )
    after = real_seconds(case, model, device)
    timed = {key: time.seconds for key, time in times.items() if time.seconds is not None}
    kernels_s = sum(o.count * timed.get(o.key, 0.0) for o in traced.operators)
    dispatch_s = host_s * traced.dispatches
    predicted = kernels_s + dispatch_s if device.type == "cpu" else max(kernels_s, dispatch_s)
    real = statistics.median((*before, *after))
    return {
        "case": case.name,
        "operators": traced.dispatches,
        "distinct": len(traced.operators),
        "replayed": sum(o.key in timed for o in traced.operators),
        "predicted_s": predicted,
        "real_s": real,
        "real_spread": (max(*before, *after) - min(*before, *after)) / real,
        "error": predicted / real - 1,
    }


def real_seconds(case: Case, model: nn.Module, device: torch.device) -> tuple[float, ...]:
    """Samples of the real forward, in seconds."""
    with torch.no_grad(), device:
        return time_call(lambda: case.call(model), device, budget_s=1.0).samples


def main() -> None:
    """Measure all cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", help="cuda:1, cpu, …")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cpu-time", action="store_true", help="the CPU's, one thread, own time")
    options = parser.parse_args()
    device = choose_device("cpu" if options.cpu_time else options.device)
    if options.cpu_time:
        torch.set_num_threads(1)
        time.perf_counter = time.thread_time  # what all timing here reads
    neighbours = Neighbours()
    host = host_seconds_per_operator(Timer(device))
    if host is None:
        sys.exit("this machine is too busy to tell what an operator costs the host: try again")
    host_s = host.value
    rows = []
    for case in CASES:
        rows.append(measure(case, device, host_s))
        print(describe(rows[-1]), file=sys.stderr if options.json else sys.stdout, flush=True)
    errors = [abs(row["error"]) for row in rows]
    summary = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "clock": "cpu time" if options.cpu_time else "wall",
        "host_s_per_operator": host_s,
        "foreign_cores": neighbours.busy_cores(),
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "rows": rows,
    }
    if options.json:
        print(json.dumps(summary, indent=2))
    else:
        print(f"median error {summary['median_error']:.1%}, worst {summary['worst_error']:.1%}")
    if not options.cpu_time and summary["foreign_cores"] > FOREIGN_SHARE * usable_cores():
        print(
            f"Other processes kept {summary['foreign_cores']:.1f} of {usable_cores()} cores busy "
            "meanwhile: these errors are theirs as well. Run it again when it is quiet.",
            file=sys.stderr,
        )


def describe(row: dict[str, Any]) -> str:
    """One line of the table."""
    return (
        f"{row['case']:<42} predicted {row['predicted_s'] * 1e3:8.1f} ms   real "
        f"{row['real_s'] * 1e3:8.1f} ms   error {row['error']:+6.1%}   "
        f"(real runs differ by {row['real_spread']:.0%}; "
        f"{row['replayed']} of {row['distinct']} operators)"
    )


if __name__ == "__main__":
    main()
