"""Operator replay: run each distinct operator of a trace on random data, and note its time.

A model's step is then predicted without its weights: the sum of its operators, plus what the Python
around them costs (``host_seconds_per_operator``).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as functional

from autotune.probe.machine import Figure, OperatorTime
from autotune.probe.timing import block_seconds, synchronize, time_call
from autotune.workload.workload import Operator, Trace

_SERIES_S = 0.02
"""Time given to one operator's samples; longer operators get one or two."""


def replay(
    operators: Iterable[Operator],
    device: torch.device,
    *,
    known: Mapping[str, OperatorTime],
    budget_s: float,
    weight: Callable[[Operator], float],
) -> dict[str, OperatorTime]:
    """Time distinct operators, the heaviest first, until the budget is spent.

    Args:
        operators: Of any number of traces; equal ones are run once.
        device: Where to run them.
        known: Timed before: not run again.
        budget_s: Seconds to spend; what is not reached is left out.
        weight: Estimated seconds of all calls of an operator.

    Returns:
        New times by ``Operator.key``. Operators that cannot be run alone are left out.
    """
    deadline = time.perf_counter() + budget_s
    wanted = {o.key: o for o in operators if o.key not in known}
    found: dict[str, OperatorTime] = {}
    for operator in sorted(wanted.values(), key=weight, reverse=True):
        if time.perf_counter() > deadline:
            break
        measured = _replay_one(operator, device)
        if measured is not None:
            found[operator.key] = measured
    return found


def host_seconds_per_operator(device: torch.device) -> Figure:
    """What one operator inside a diffusers model costs the host: modules, views, arguments.

    Measured on a UNet so narrow that its arithmetic is negligible. On the CPU, where the host also
    computes, the operators' own time is replayed and taken off.
    """
    from autotune.workload.trace import trace

    unet, call = _narrow_unet(device)
    shadow, shadow_call = _narrow_unet(torch.device("meta"))
    operators = trace(shadow, shadow_call, [])
    with torch.no_grad():
        forward = time_call(call, device, budget_s=0.3)
        own = _sum_of(operators, device) if device.type == "cpu" else 0.0
    per_operator = [max(s - own, 0.0) / operators.dispatches for s in forward.samples]
    value = max(forward.value - own, 0.0) / operators.dispatches
    del unet
    return Figure(value=value, samples=tuple(per_operator))


def _narrow_unet(device: torch.device) -> tuple[torch.nn.Module, Callable[[], object]]:
    """SD 1.5's UNet with a hundredth of its channels, and a call of it."""
    from diffusers import UNet2DConditionModel

    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu" if device.type != "meta" else "meta"),
    ):
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 8, 8, 8), norm_num_groups=4,
            cross_attention_dim=8, attention_head_dim=2,
        )  # fmt: skip
    unet = unet.to(device).eval().requires_grad_(False)
    latent, text = torch.zeros(2, 4, 8, 8, device=device), torch.zeros(2, 8, 8, device=device)
    step = torch.tensor(1.0, device=device)
    return unet, lambda: unet(latent, step, encoder_hidden_states=text, return_dict=False)


def _sum_of(operators: Trace, device: torch.device) -> float:
    total = 0.0
    for operator in operators.operators:
        measured = _replay_one(operator, device)
        total += operator.count * (measured.seconds if measured else 0.0)
    return total


def _replay_one(operator: Operator, device: torch.device) -> OperatorTime | None:
    try:
        call = rebuild(operator.signature, device)
        with torch.no_grad():
            seconds = _seconds(call, device)
            return OperatorTime(seconds=seconds, workspace_bytes=_workspace(call, device))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return None  # its values matter (an index, a mask): rates stand in for it


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The median for quick operators; long ones are run once more after their warm-up."""
    call()
    once = block_seconds(call, device, 1)
    if once > _SERIES_S:
        return min(once, block_seconds(call, device, 1))
    return time_call(call, device, budget_s=_SERIES_S).value


def _workspace(call: Callable[[], Any], device: torch.device) -> int | None:
    """What the operator allocates besides its output; only CUDA's allocator tells."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    out = call()
    synchronize(device)
    held = torch.cuda.memory_allocated(device) - before
    peak = torch.cuda.max_memory_allocated(device) - before
    del out
    return peak - held


# ---- from a signature back to a call -------------------------------------------------------------


def rebuild(signature: str, device: torch.device) -> Callable[[], Any]:
    """The operator with random arguments of the recorded shapes, dtypes and strides.

    Args:
        signature: As ``Operator.signature``.
        device: Where the tensors live.

    Raises:
        AttributeError: this PyTorch has no such operator.
    """
    name, arguments, keywords = json.loads(signature)
    positional = [_value(a, device) for a in arguments]
    named = {k: _value(v, device) for k, v in keywords.items()}
    function: Any = functional.scaled_dot_product_attention
    if name != "attention":
        function = torch.ops
        for part in name.split("."):
            function = getattr(function, part)
    return lambda: function(*positional, **named)


def _value(plain: Any, device: torch.device) -> Any:
    if isinstance(plain, list):
        return [_value(v, device) for v in plain]
    if not isinstance(plain, dict):
        return plain
    if "t" in plain:
        return _tensor(plain, device)
    text = str(plain["o"])
    if text.startswith("torch."):
        return getattr(torch, text.removeprefix("torch."))
    return device  # the only other values that operators take are devices ("meta")


def _tensor(plain: dict[str, Any], device: torch.device) -> torch.Tensor:
    dtype = getattr(torch, plain["t"])
    shape, stride = plain["s"], plain.get("st")
    if stride is None:
        tensor = torch.empty(shape, dtype=dtype, device=device)
    else:
        tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    if not dtype.is_floating_point:
        return tensor.zero_()  # valid as index, id and mask alike
    return tensor.normal_(0, 1, generator=torch.Generator(device).manual_seed(0))
