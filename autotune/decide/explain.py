"""Why: one sentence with numbers for everything taken and everything left out."""

from __future__ import annotations

from collections.abc import Mapping

from autotune.decide.plan import Reason
from autotune.decide.prediction import Budget, Prediction
from autotune.optimizations.base import Setting
from autotune.units import format_bytes, format_seconds


def explain_chosen(
    settings: tuple[Setting, ...],
    predictions: Mapping[str, tuple[Prediction, Prediction]],
    budget: Budget,
) -> tuple[Reason, ...]:
    """What dropping each chosen optimization would do.

    Args:
        settings: The chosen set.
        predictions: Name → (prediction without it, prediction of the whole set).
        budget: Bytes available on device and host.
    """
    return tuple(Reason(s.name, _reason(*predictions[s.name], budget)) for s in settings)


def _reason(without: Prediction, chosen: Prediction, budget: Budget) -> str:
    binding = without.binding_phase
    if without.needed_bytes > budget.device_bytes:
        now = chosen.binding_phase
        return (
            f"without it {binding.name} needs {format_bytes(binding.needed_bytes)} and "
            f"{format_bytes(budget.device_bytes)} are available; with it the most is "
            f"{format_bytes(now.needed_bytes)} ({now.name})"
        )
    if not budget.host_holds(without):
        return (
            f"without it {format_bytes(without.host_bytes)} of host RAM are needed and "
            f"{format_bytes(budget.host_bytes or 0)} are available"
        )
    return (
        f"without it {format_seconds(without.seconds)} instead of {format_seconds(chosen.seconds)} "
        f"({_percent(without.seconds, chosen.seconds)})"
    )


def explain_rejected(added: Prediction, chosen: Prediction, budget: Budget) -> str:
    """What adding an optimization to the chosen set would do to time and memory."""
    if added.needed_bytes > budget.device_bytes >= chosen.needed_bytes:
        binding = added.binding_phase
        return (
            f"would not fit: {binding.name} needs {format_bytes(binding.needed_bytes)} of "
            f"{format_bytes(budget.device_bytes)}"
        )
    if budget.host_holds(chosen) and not budget.host_holds(added):
        return (
            f"would not fit: needs {format_bytes(added.host_bytes)} of host RAM, "
            f"{format_bytes(budget.host_bytes or 0)} are available"
        )
    gain = chosen.seconds - added.seconds
    time = f"{format_seconds(added.seconds)} instead of {format_seconds(chosen.seconds)}"
    if gain > 0.001 * chosen.seconds:
        verdict = f"would gain {gain / chosen.seconds:.1%} ({time})"
    elif gain < -0.001 * chosen.seconds:
        verdict = f"would be slower: {time}"
    else:
        verdict = f"would gain no time ({time})"
    return f"{verdict}; {_memory_verdict(added, chosen, budget)}"


def _memory_verdict(added: Prediction, chosen: Prediction, budget: Budget) -> str:
    """Whether the memory it saves is memory that anybody waits for."""
    saved = [
        (a, c.needed_bytes - a.needed_bytes)
        for a, c in zip(added.phases, chosen.phases, strict=True)
    ]
    phase, most = max(saved, key=lambda s: s[1])
    binding = chosen.binding_phase.name
    if most <= 0:
        return "it saves no memory"
    if phase.name != binding and added.needed_bytes >= chosen.needed_bytes:
        return f"it saves {format_bytes(most)} in {phase.name}, but {binding} is binding"
    if chosen.needed_bytes <= budget.device_bytes:
        return f"it saves {format_bytes(most)} in {phase.name}, which fits without it"
    return f"it saves {format_bytes(most)} in {phase.name}, which is not enough"


def _percent(value: float, reference: float) -> str:
    change = value / reference - 1
    return f"{change:+.0%}" if abs(change) >= 0.1 else f"{change:+.1%}"
