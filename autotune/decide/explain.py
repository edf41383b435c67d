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
)
from autotune.decide.wording import DEVICE_MEMORY, RESOURCES, Memory, lacking, memories
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
    time = _change(*_beside(without.mean_seconds, chosen.mean_seconds))
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


def _beside(one: float, other: float) -> tuple[str, str]:
    """Two times in units that compare."""
    return format_seconds(one, other), format_seconds(other, one)


def _change(before: str, after: str) -> str:
    return f"{before} → {after}" if before != after else f"{after} either way"


def _attacked(without: Prediction, terms: Terms) -> Bottleneck:
    """Memory that would lack more; else the share of a phase's time that shrinks most."""
    lack = _lack_of(without, terms)
    if lack is not None:
        return lack.bottleneck
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


def _lack_of(without: Prediction, terms: Terms) -> Memory | None:
    """The first memory that lacks more without a member; ``None`` where it is not for memory."""
    pairs = zip(memories(without, terms.budget), memories(terms.chosen, terms.budget), strict=True)
    more = (w for w, chosen in pairs if w.lacks and w.needed_bytes > chosen.needed_bytes)
    return next(more, None)


def _price_of_dropping(without: Prediction, terms: Terms) -> str:
    chosen = terms.chosen
    lack = _lack_of(without, terms)
    if lack is not None:
        return _said_of_lack(lack, terms)
    fastest = terms.pool.fastest_seconds
    if without.mean_seconds > fastest * (1 + TOLERANCE):
        return _loss(_SLOWER, without.mean_seconds, chosen.mean_seconds, fastest, format_seconds)
    least = terms.pool.least_bytes
    if least and without.needed_bytes > least * (1 + TOLERANCE):
        needed = without.needed_bytes
        return _loss(_LARGER, needed, chosen.needed_bytes, least, format_bytes)
    longest = terms.pool.longest_seconds
    if not math.isfinite(longest):  # it is tried again after it ran out of memory
        return "more would be needed of what ran out of memory before"
    longer = format_seconds(without.mean_seconds - longest)
    return f"{longer} longer than the {format_seconds(longest)} that saving memory may take"


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


def _said_of_lack(lack: Memory, terms: Terms) -> str:
    lacking_anyway = [m.name for m in lacking(terms.chosen, terms.budget)]
    if lack.name in lacking_anyway:
        return f"even further from fitting: {lack.text}"
    if lack.name != DEVICE_MEMORY:
        return lack.text
    either = " either" if lacking_anyway else ""
    return f"{lack.bottleneck.phase} does not fit in {format_bytes(lack.available_bytes)}{either}"


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
    lacks = lacking(added, budget)
    if not budget.holds(chosen):
        if not lacks:
            needed, seconds = format_bytes(added.needed_bytes), format_seconds(added.mean_seconds)
            return f"would make it fit: needs {needed}, {seconds}"
        return f"would not make it fit: {_still_lacking(added, terms)}"
    if lacks:
        return f"would not fit: {lacks[0].text}"
    if added == chosen:
        needed, seconds = format_bytes(chosen.needed_bytes), format_seconds(chosen.mean_seconds)
        return f"changes nothing: {seconds} and {needed} with and without it"
    memory = _memory_verdict(added, terms)
    time = _time_verdict(added, terms)
    is_faster = added.mean_seconds < chosen.mean_seconds
    return time if is_faster and memory == _SAVES_NONE else f"{time}; {memory}"


_SAVES_NONE = "it saves no memory"


def _still_lacking(added: Prediction, terms: Terms) -> str:
    """What it does to the memory that lacks, where nothing fits."""
    budget = terms.budget
    pairs = zip(memories(added, budget), memories(terms.chosen, budget), strict=True)
    after, before = next((a, b) for a, b in pairs if b.lacks)
    if after.lacks and after.name == DEVICE_MEMORY:
        return _memory_verdict(added, terms)
    saved = before.needed_bytes - after.needed_bytes
    if saved < 0:
        return f"it needs {format_bytes(-saved)} more of {after.name}, which is what lacks"
    if saved == 0:
        return f"it saves no {after.name}, which is what lacks"
    saves = f"it saves {format_bytes(saved)} of {after.name}"
    if after.lacks:
        return f"{saves}, which is not enough"
    return f"{saves}, but {lacking(added, budget)[0].text}"


def _time_verdict(added: Prediction, terms: Terms) -> str:
    chosen = terms.chosen
    once, saved = added.once_s - chosen.once_s, chosen.seconds - added.seconds
    if once > 0 and saved > TOLERANCE * chosen.seconds:
        return (
            f"would take {format_seconds(once)} once and save {format_seconds(saved)} each time: "
            f"gains {TOLERANCE:.0%} from {_pays_from(added, chosen)} images on (--images)"
        )
    gain = 1 - added.mean_seconds / chosen.mean_seconds
    after, now = _beside(added.mean_seconds, chosen.mean_seconds)
    if after == now or 0 <= gain < _LEAST_SHARE:
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


_LEAST_SHARE = 0.0005
"""What is less than this would be written as 0.0%."""


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"
