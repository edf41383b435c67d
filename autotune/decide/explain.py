"""Why: one sentence with numbers for everything taken and everything left out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from autotune.decide.decision import TOLERANCE, Pool
from autotune.decide.plan import Reason, Rejection
from autotune.decide.prediction import (
    Bottleneck,
    Budget,
    Prediction,
    Resource,
    find_bottleneck,
)
from autotune.decide.wording import RESOURCES, as_much_ran_out, lack_elsewhere
from autotune.optimizations.base import Setting
from autotune.units import format_bytes, format_seconds


class Terms(NamedTuple):
    """What a set is compared with.

    Attributes:
        chosen: The choice.
        pool: What it was chosen from.
        budget: What must hold it.
    """

    chosen: Prediction
    pool: Pool
    budget: Budget


# ---- taken --------------------------------------------------------------------------------------


def explain_chosen(setting: Setting, without: Prediction, terms: Terms) -> Reason:
    """What a chosen optimization attacks, and what dropping it would do.

    Args:
        setting: The member.
        without: The prediction of the rest of the set.
        terms: The choice.
    """
    chosen = terms.chosen
    attacks = _attacked(without, terms)
    memory = _change(format_bytes(without.needed_bytes), format_bytes(chosen.needed_bytes))
    if chosen.binding_phase.name != without.binding_phase.name:
        memory += f" ({chosen.binding_phase.name})"
    elsewhere = chosen.elsewhere_bytes
    if elsewhere and not without.elsewhere_bytes:
        each = (f"{format_bytes(needed)} on cuda:{gpu}" for gpu, needed in elsewhere.items())
        memory += f" and {' and '.join(each)}"
    time = _change(format_seconds(without.mean_seconds), format_seconds(chosen.mean_seconds))
    what = f"{RESOURCES[attacks.resource]} in {attacks.phase}"
    return Reason(
        optimization=setting.name,
        text=f"{what}: {memory}, {time}; without it {_price_of_dropping(without, terms)}",
        attacks=attacks,
        before_bytes=without.needed_bytes,
        after_bytes=chosen.needed_bytes,
        before_seconds=without.mean_seconds,
        after_seconds=chosen.mean_seconds,
        fits_without=terms.budget.holds(without),
    )


def _change(before: str, after: str) -> str:
    return f"{before} → {after}" if before != after else f"{after} either way"


def _attacked(without: Prediction, terms: Terms) -> Bottleneck:
    """Memory that would not suffice; else the share of a phase's time that shrinks most."""
    if _lacks_more(without, terms):
        return find_bottleneck(without, terms.budget)
    shrunk: dict[tuple[Resource, str], float] = {}
    for before, after in zip(without.phases, terms.chosen.phases, strict=True):
        shrunk["compute", before.name] = before.compute_s - after.compute_s
        shrunk["memory_bandwidth", before.name] = before.memory_s - after.memory_s
        shrunk["transfer", before.name] = before.transfer_s - after.transfer_s
        shrunk["launch", before.name] = before.launch_s - after.launch_s
    most = max(shrunk, key=lambda key: shrunk[key])
    if without.mean_seconds > terms.chosen.mean_seconds and shrunk[most] > 0:
        return Bottleneck(*most)
    return Bottleneck("vram", without.binding_phase.name)


def _lacks_more(without: Prediction, terms: Terms) -> bool:
    """Whether the member is there for memory; where nothing fits, others make up for lost time."""
    budget, chosen = terms.budget, terms.chosen
    if budget.holds(without):
        return False
    is_slow = without.mean_seconds > terms.pool.fastest_seconds * (1 + TOLERANCE)
    is_as_near = budget.lacks(without) <= budget.lacks(chosen) * (1 + TOLERANCE)
    return budget.holds(chosen) or not (is_slow and is_as_near)


def _price_of_dropping(without: Prediction, terms: Terms) -> str:
    chosen = terms.chosen
    if _lacks_more(without, terms):
        return _shortage(without, terms)
    fastest = terms.pool.fastest_seconds
    if without.mean_seconds > fastest * (1 + TOLERANCE):
        return _loss(_SLOWER, without.mean_seconds, chosen.mean_seconds, fastest, format_seconds)
    least = terms.pool.least_bytes
    if without.needed_bytes > least * (1 + TOLERANCE):
        needed = without.needed_bytes
        return _loss(_LARGER, needed, chosen.needed_bytes, least, format_bytes)
    longest = format_seconds(terms.pool.longest_seconds)
    return f"longer than the {longest} that saving memory may take"


_SLOWER, _LARGER = ("slower", "times as long"), ("more memory", "times the memory")


def _loss(
    words: tuple[str, str],
    without: float,
    chosen: float,
    best: float,
    write: Callable[[float], str],
) -> str:
    """How much worse than the choice; than the best, from which the tolerance counts, if little."""
    more, times = words
    if without >= 2 * chosen:
        return f"{without / chosen:.1f} {times}"
    if without > chosen * (1 + TOLERANCE):
        return f"{_percent(without / chosen - 1)} {more}"
    return f"{_percent(without / best - 1)} {more} than the best set ({write(best)})"


def _shortage(without: Prediction, terms: Terms) -> str:
    budget = terms.budget
    device = format_bytes(budget.device_bytes)
    if without.needed_bytes <= budget.device_bytes:
        gpu = budget.short_gpu(without)
        if gpu is not None:
            return lack_elsewhere(without, budget, gpu)
        phase = budget.short_phase(without)
        if phase is not None:
            return as_much_ran_out(without, phase)
        return _host_shortage(without, budget)
    if not budget.holds(terms.chosen):
        return f"even further from fitting in {device}"
    return f"{without.binding_phase.name} does not fit in {device}"


def _host_shortage(needs: Prediction, budget: Budget) -> str:
    return (
        f"{format_bytes(needs.host_bytes)} of host RAM are needed of "
        f"{format_bytes(budget.host_bytes or 0)}"
    )


# ---- left out -----------------------------------------------------------------------------------


def explain_rejected(setting: Setting, added: Prediction, terms: Terms) -> Rejection:
    """What adding an optimization to the choice would do to time and memory.

    Args:
        setting: It, with the parameters that were predicted.
        added: The prediction with it.
        terms: The choice.
    """
    phase, saved = _most_saved(added, terms.chosen)
    return Rejection(
        optimization=setting.name,
        text=_verdict(added, terms),
        setting=setting,
        seconds=added.mean_seconds,
        needed_bytes=added.needed_bytes,
        saved_bytes=saved,
        saved_in=phase,
        fits=terms.budget.holds(added),
    )


def _most_saved(added: Prediction, chosen: Prediction) -> tuple[str, int]:
    """The phase in which most device memory is saved, and how much."""
    pairs = zip(added.phases, chosen.phases, strict=True)
    saved = ((a.name, c.needed_bytes - a.needed_bytes) for a, c in pairs)
    return max(saved, key=lambda s: s[1])


def _verdict(added: Prediction, terms: Terms) -> str:
    budget, chosen = terms.budget, terms.chosen
    memory = _memory_verdict(added, terms)
    if not budget.holds(chosen):
        if budget.holds(added):
            needed, seconds = format_bytes(added.needed_bytes), format_seconds(added.mean_seconds)
            return f"would make it fit: needs {needed}, {seconds}"
        return f"would not make it fit: {memory}"
    if added.needed_bytes > budget.device_bytes:
        needed, free = format_bytes(added.needed_bytes), format_bytes(budget.device_bytes)
        return f"would not fit: {added.binding_phase.name} needs {needed} of {free}"
    if not budget.host_holds(added):
        return f"would not fit: {_host_shortage(added, budget)}"
    gpu = budget.short_gpu(added)
    if gpu is not None:
        return f"would not fit: {lack_elsewhere(added, budget, gpu)}"
    phase = budget.short_phase(added)
    if phase is not None:
        return f"would not fit: {as_much_ran_out(added, phase)}"
    if added == chosen:
        needed, seconds = format_bytes(chosen.needed_bytes), format_seconds(chosen.mean_seconds)
        return f"changes nothing: {seconds} and {needed} with and without it"
    time = _time_verdict(added, terms)
    is_faster = added.mean_seconds < chosen.mean_seconds
    return time if is_faster and memory == _SAVES_NONE else f"{time}; {memory}"


_SAVES_NONE = "it saves no memory"


def _time_verdict(added: Prediction, terms: Terms) -> str:
    chosen = terms.chosen
    once, saved = added.once_s - chosen.once_s, chosen.seconds - added.seconds
    if once > 0 and saved > TOLERANCE * chosen.seconds:
        return (
            f"would take {format_seconds(once)} once and save {format_seconds(saved)} each time: "
            f"gains {TOLERANCE:.0%} from {_pays_from(added, chosen)} images on (--images)"
        )
    gain = 1 - added.mean_seconds / chosen.mean_seconds
    after, now = format_seconds(added.mean_seconds), format_seconds(chosen.mean_seconds)
    if after == now:
        return f"would gain no time ({now})"
    if gain < 0:
        return f"would be slower: {after} instead of {now}"
    small = f", less than {TOLERANCE:.0%}" if gain < TOLERANCE else ""
    return f"would gain {_percent(gain)}{small} ({after} instead of {now})"


def _pays_from(added: Prediction, chosen: Prediction) -> int:
    """Images over which what is done once must be spread to be worth an optimization."""
    once = added.once_s - chosen.once_s
    return math.ceil(once / (chosen.seconds * (1 - TOLERANCE) - added.seconds))


def _memory_verdict(added: Prediction, terms: Terms) -> str:
    """Whether the memory it saves is memory that anybody waits for."""
    chosen = terms.chosen
    phase, most = _most_saved(added, chosen)
    binding = chosen.binding_phase.name
    if added.needed_bytes > chosen.needed_bytes:
        more = format_bytes(added.needed_bytes - chosen.needed_bytes)
        return f"it needs {more} more in {added.binding_phase.name}"
    if most <= 0:
        return _SAVES_NONE
    saves = f"it saves {format_bytes(most)} in {phase}"
    if added.needed_bytes == chosen.needed_bytes and phase != binding:
        return f"{saves}, but {binding} is binding"
    if not terms.budget.holds(chosen):
        return f"{saves}, which is not enough"
    return saves if terms.pool.least_bytes else f"{saves}, which fits without it"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"
