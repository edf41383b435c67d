"""Choose the smallest coherent set: enumerate, predict, keep what fits, then compare.

Among the sets that fit: those within 3 % of the fastest; of those the least lossy, then the fewest
optimizations, then the most memory headroom.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from autotune.decide.explain import explain_chosen, explain_rejected
from autotune.decide.plan import (
    Bottlenecks,
    Plan,
    PredictionReport,
    Rejection,
    summarize_machine,
    summarize_workload,
)
from autotune.decide.predict import Predictor, budget_of
from autotune.decide.prediction import Budget, Prediction, find_bottleneck
from autotune.decide.rules import broken_rule, require_coherent
from autotune.errors import OptimizationError, RequestError
from autotune.optimizations import CATALOGUE, find
from autotune.optimizations.base import EXACTNESS, Optimization, Parameters, Setting
from autotune.optimizations.execution import Execution
from autotune.probe.machine import Machine
from autotune.workload.workload import Workload

TOLERANCE = 0.03
"""A set must be faster than another by more than this to be worth one more optimization."""

QUALITIES = ("exact", "high", "balanced", "fast")


class Limits(msgspec.Struct, frozen=True):
    """What the user allows.

    Attributes:
        quality: ``exact``, ``high`` (near-exact too), ``balanced`` (mildly lossy too) or ``fast``.
        only: Consider these alone; empty means all.
        without: Leave these out.
        keep: Set by hand already, as found: neither proposed nor touched.
        vram_limit: Most bytes of device memory to use.
        reserve: Bytes to leave free for others.
    """

    quality: str = "exact"
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    keep: tuple[Setting, ...] = ()
    vram_limit: int | None = None
    reserve: int = 0


class Candidate(NamedTuple):
    """One coherent set and its prediction."""

    settings: tuple[Setting, ...]
    prediction: Prediction


def choose(
    machine: Machine,
    workload: Workload,
    limits: Limits | None = None,
    catalogue: Mapping[str, Optimization] = CATALOGUE,
) -> Plan:
    """Decide for a workload on a machine.

    Raises:
        RequestError: an unknown quality level.
        OptimizationError: an unknown name in ``only`` or ``without``.
    """
    limits = limits or Limits()
    check_limits(limits)
    predictor = Predictor(machine, workload)
    budget = budget_of(machine, limits.vram_limit, limits.reserve)
    refused, options = _options(machine, workload, limits, catalogue)
    kept, notes = _predictable(predictor, limits.keep)
    candidates = list(_candidates(predictor, tuple(options.values()), kept))
    chosen = _without_idlers(select(candidates, budget), candidates, budget)
    baseline = predictor.predict(Execution())
    context = _Context(predictor, kept, chosen, budget)
    fits = budget.holds(chosen.prediction)
    return Plan(
        machine=summarize_machine(machine),
        workload=summarize_workload(workload),
        quality=limits.quality,
        fits=fits,
        budget_bytes=budget.device_bytes,
        host_budget_bytes=budget.host_bytes,
        bottleneck=Bottlenecks(
            find_bottleneck(baseline, budget),
            find_bottleneck(chosen.prediction, budget),
        ),
        optimizations=chosen.settings,
        prediction=chosen.prediction,
        baseline=baseline,
        reasons=explain_chosen(chosen.settings, _predict_sets(context), budget),
        rejected=_rejections(context, options, refused),
        execution=execution_of((*kept, *chosen.settings)),
        kept=limits.keep,
        ways_out=_ways_out(machine, workload, limits, catalogue) if not fits else (),
        notes=(*workload.notes, *notes),
    )


def predict(
    machine: Machine,
    workload: Workload,
    settings: tuple[Setting, ...],
    limits: Limits | None = None,
) -> PredictionReport:
    """Predict a given set without choosing.

    Raises:
        OptimizationError: the set is incoherent, or cannot run on this machine at all.
    """
    limits = limits or Limits()
    require_coherent(settings)
    budget = budget_of(machine, limits.vram_limit, limits.reserve)
    prediction = Predictor(machine, workload).predict(execution_of(settings))
    unusable = ((s.name, find(s.name).unavailable(machine, workload)) for s in settings)
    notes = tuple(f"{name}: {reason}" for name, reason in unusable if reason)
    rule = broken_rule((s.name for s in settings), prediction)
    if rule is not None:
        notes += (f"{rule.reason} (rule {rule.id})",)
    notes += tuple(_idle(Predictor(machine, workload), settings, prediction))
    return PredictionReport(
        machine=summarize_machine(machine),
        workload=summarize_workload(workload),
        optimizations=settings,
        prediction=prediction,
        fits=budget.holds(prediction),
        budget_bytes=budget.device_bytes,
        host_budget_bytes=budget.host_bytes,
        notes=(*workload.notes, *notes),
    )


def _idle(predictor: Predictor, settings: tuple[Setting, ...], whole: Prediction) -> Iterator[str]:
    """Members of a set that change neither memory nor time."""
    for setting in settings:
        rest = execution_of(s for s in settings if s != setting)
        if predictor.predict(rest) == whole:
            yield f"{setting}: changes nothing here"


def execution_of(settings: Iterable[Setting]) -> Execution:
    """The execution that a set of optimizations amounts to."""
    execution = Execution()
    for setting in settings:
        execution = find(setting.name).configure(execution, setting.parameters)
    return execution


def select(candidates: list[Candidate], budget: Budget) -> Candidate:
    """The choice as the module's first lines say; if nothing fits, what is nearest to fitting."""
    fitting = [c for c in candidates if budget.holds(c.prediction)]
    if not fitting:
        least = min(budget.lacks(c.prediction) for c in candidates)
        nearest = least * (1 + TOLERANCE)
        fitting = [c for c in candidates if budget.lacks(c.prediction) <= nearest]
    fastest = min(c.prediction.seconds for c in fitting)
    close = [c for c in fitting if c.prediction.seconds <= fastest * (1 + TOLERANCE)]
    return min(close, key=_smallness)


def _without_idlers(chosen: Candidate, candidates: list[Candidate], budget: Budget) -> Candidate:
    """Drop members that buy less than the tolerance: close to the fastest, but not worth having."""
    by_set = {frozenset(map(str, c.settings)): c for c in candidates}
    for setting in chosen.settings:
        rest = by_set.get(frozenset(str(s) for s in chosen.settings if s != setting))
        if rest is None or budget.lacks(rest.prediction) > max(1, budget.lacks(chosen.prediction)):
            continue
        if rest.prediction.seconds <= chosen.prediction.seconds * (1 + TOLERANCE):
            return _without_idlers(rest, candidates, budget)
    return chosen


def _smallness(candidate: Candidate) -> tuple[object, ...]:
    levels = [EXACTNESS.index(find(s.name).exactness) for s in candidate.settings]
    lossy, near = levels.count(2), levels.count(1)
    prediction = candidate.prediction
    # The last members only make the order total, so that the same input gives the same plan.
    return (
        lossy,
        near,
        len(levels),
        prediction.needed_bytes,
        prediction.seconds,
        [str(s) for s in candidate.settings],
    )


def check_limits(limits: Limits) -> None:
    """Refuse unknown quality levels and names.

    Raises:
        RequestError: an unknown quality level.
        OptimizationError: an unknown name in ``only`` or ``without``.
    """
    if limits.quality not in QUALITIES:
        raise RequestError(f"unknown quality {limits.quality!r}", f"use {', '.join(QUALITIES)}")
    for name in (*limits.only, *limits.without):
        find(name)


# ---- candidates ---------------------------------------------------------------------------------


def _options(
    machine: Machine,
    workload: Workload,
    limits: Limits,
    catalogue: Mapping[str, Optimization],
) -> tuple[list[Rejection], dict[str, tuple[Setting, ...]]]:
    """Settings worth trying per optimization, and why the others are out from the start."""
    refused: list[Rejection] = []
    options: dict[str, tuple[Setting, ...]] = {}
    for name, optimization in catalogue.items():
        settings = _allowed_settings(optimization, machine, workload, limits)
        if isinstance(settings, str):
            refused.append(Rejection(name, settings))
        else:
            options[name] = settings
    return refused, options


def _allowed_settings(
    optimization: Optimization, machine: Machine, workload: Workload, limits: Limits
) -> tuple[Setting, ...] | str:
    """The settings to try, or the reason why there are none."""
    name = optimization.name
    if name in {s.name for s in limits.keep}:
        return "you set it by hand: left as it is"
    if name in limits.without:
        return "you left it out (--without)"
    if limits.only and name not in limits.only:
        return "not among the ones you allowed (--only)"
    unavailable = optimization.unavailable(machine, workload)
    if unavailable:
        return unavailable
    tried = optimization.worth_trying(machine, workload)
    allowed = [p for p in tried if _within(optimization, p, limits.quality)]
    if not allowed:
        needed = min((optimization.quality(p) for p in tried), key=QUALITIES.index)
        return f"{optimization.exactness}: needs --quality {needed}, you asked for {limits.quality}"
    return tuple(optimization.setting(p) for p in allowed)


def _within(optimization: Optimization, parameters: Parameters, quality: str) -> bool:
    return QUALITIES.index(optimization.quality(parameters)) <= QUALITIES.index(quality)


def _predictable(
    predictor: Predictor, keep: tuple[Setting, ...]
) -> tuple[tuple[Setting, ...], tuple[str, ...]]:
    """What was set by hand, as far as it can be predicted here, and a note on each."""
    kept: list[Setting] = []
    notes = []
    for setting in keep:
        try:
            predictor.predict(execution_of((*kept, setting)))
        except OptimizationError as error:
            notes.append(f"{setting} was set by hand and is kept, but not predicted: {error}")
        else:
            kept.append(setting)
            notes.append(f"{setting} was set by hand and is kept")
    return tuple(kept), tuple(notes)


def _ways_out(
    machine: Machine,
    workload: Workload,
    limits: Limits,
    catalogue: Mapping[str, Optimization],
) -> tuple[str, ...]:
    """What would make it fit: the next quality level that does, as predicted, and the usual."""
    ways = []
    for quality in QUALITIES[QUALITIES.index(limits.quality) + 1 :]:
        offered = choose(
            machine, workload, msgspec.structs.replace(limits, quality=quality), catalogue
        )
        if offered.fits:
            chosen = ", ".join(map(str, offered.optimizations))
            ways.append(f"quality {quality} ({chosen})")
            break
    if workload.request.batch > 1:
        ways.append("a smaller batch")
    return (*ways, "a smaller image", "closing programs that hold memory")


def _candidates(
    predictor: Predictor, options: tuple[tuple[Setting, ...], ...], kept: tuple[Setting, ...]
) -> Iterator[Candidate]:
    """Every coherent set with its prediction, on top of what the user had set by hand."""
    for settings in _coherent_sets(options, kept):
        prediction = predictor.predict(execution_of(settings))
        chosen = settings[len(kept) :]
        if not chosen or broken_rule((s.name for s in settings), prediction) is None:
            yield Candidate(chosen, prediction)


def _coherent_sets(
    options: tuple[tuple[Setting, ...], ...], chosen: tuple[Setting, ...]
) -> Iterator[tuple[Setting, ...]]:
    """Every combination, cut off as soon as a part of it is incoherent."""
    if not options:
        yield chosen
        return
    for setting in (None, *options[0]):
        extended = chosen if setting is None else (*chosen, setting)
        if setting is None or broken_rule(s.name for s in extended) is None:
            yield from _coherent_sets(options[1:], extended)


# ---- explanation --------------------------------------------------------------------------------


class _Context(NamedTuple):
    predictor: Predictor
    kept: tuple[Setting, ...]
    chosen: Candidate
    budget: Budget

    def predict(self, settings: Iterable[Setting]) -> Prediction:
        return self.predictor.predict(execution_of((*self.kept, *settings)))


def _predict_sets(context: _Context) -> dict[str, tuple[Prediction, Prediction]]:
    """For every chosen optimization: the prediction without it, and with the whole set."""
    chosen = context.chosen
    without = {}
    for setting in chosen.settings:
        rest = tuple(s for s in chosen.settings if s != setting)
        without[setting.name] = (context.predict(rest), chosen.prediction)
    return without


def _rejections(
    context: _Context, options: dict[str, tuple[Setting, ...]], refused: list[Rejection]
) -> tuple[Rejection, ...]:
    taken = {s.name for s in context.chosen.settings}
    out = [_reject(context, name, s) for name, s in options.items() if name not in taken]
    return (*out, *refused)


def _reject(context: _Context, name: str, settings: tuple[Setting, ...]) -> Rejection:
    """The best setting on top of the chosen set, or in place of what it does not go with."""
    chosen = context.chosen
    rule = broken_rule((*(s.name for s in (*context.kept, *chosen.settings)), name))
    rest = chosen.settings
    if rule is not None:
        rest = tuple(s for s in rest if s.name not in rule.first | rule.second)
        if rest == chosen.settings:  # it clashes with what the user set by hand
            return Rejection(name, rule.reason, rule.id)
    options = [(*rest, s) for s in settings]
    predicted = [Candidate(o, context.predict(o)) for o in options]
    fitting = [c for c in predicted if context.budget.holds(c.prediction)]
    best = min(fitting or predicted, key=lambda c: c.prediction.seconds)
    text = explain_rejected(best.prediction, chosen.prediction, context.budget)
    if rule is not None:
        replaced = ", ".join(s.name for s in chosen.settings if s not in rest)
        alternative = f"in place of {replaced} it {text}"
        return Rejection(
            name, f"does not go with {replaced}: {rule.reason}; {alternative}", rule.id
        )
    rule = broken_rule((s.name for s in best.settings), best.prediction)
    if rule is not None:
        return Rejection(name, rule.reason, rule.id)
    return Rejection(name, text)
