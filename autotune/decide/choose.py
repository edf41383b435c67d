"""Choose the smallest coherent set (``decision.py``) and say why: the plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from autotune.decide import residuals
from autotune.decide.decision import TOLERANCE, Catalogue, Decision, decide, select
from autotune.decide.explain import Terms, explain_chosen, explain_rejected
from autotune.decide.history import Applied, History
from autotune.decide.keeping import Kept, keeping, note_on, said_of_kept
from autotune.decide.limits import PRIORITIES, QUALITIES, Limits, budget_within, check_limits
from autotune.decide.placement import assumptions
from autotune.decide.plan import (
    Bottlenecks,
    Plan,
    PredictionReport,
    Reason,
    Rejection,
    summarize_machine,
    summarize_workload,
)
from autotune.decide.predict import Predictor
from autotune.decide.prediction import Prediction, find_bottleneck
from autotune.decide.rules import require_coherent
from autotune.decide.search import Judge, execution_of
from autotune.decide.validity import validity_of
from autotune.decide.ways_out import Rework, ways_out
from autotune.decide.wording import clash_of
from autotune.optimizations import CATALOGUE, find
from autotune.optimizations.base import Setting
from autotune.optimizations.execution import Execution
from autotune.probe.machine import Machine
from autotune.workload.workload import Workload

__all__ = [
    "PRIORITIES",
    "QUALITIES",
    "TOLERANCE",
    "Limits",
    "check_limits",
    "choose",
    "execution_of",
    "predict",
    "select",
]


def choose(
    machine: Machine,
    workload: Workload,
    limits: Limits | None = None,
    catalogue: Catalogue = CATALOGUE,
    rework: Rework | None = None,
    history: History | None = None,
    applied: Applied | None = None,
    retries: bool = False,
) -> Plan:
    """Decide for a workload on a machine.

    Args:
        machine: Measured or from a datasheet.
        workload: Traced.
        limits: What the user allows.
        catalogue: The optimizations by name.
        rework: Traces the same model for another request. Called a few times, and only where
            nothing fits: then smaller images are predicted as ways out.
        history: What the machine taught about the workload.
        applied: What is on: kept where changing it does not pay yet (``keeping.py``).
        retries: Whether what ran out of memory before may be tried again, where all else is out.

    Raises:
        RequestError: an unknown quality level or priority.
        OptimizationError: an unknown name in ``only`` or ``without``.
    """
    limits = limits or Limits()
    predictor = Predictor(machine, workload, limits.images, history)
    decision, postponed, is_kept = _decided(predictor, limits, catalogue, applied, retries)
    chosen = decision.chosen.settings
    terms = Terms(decision.space.predict(chosen), decision.pool, decision.budget)
    execution = execution_of((*decision.kept, *chosen))
    baseline = predictor.predict(Execution())
    remedies = () if decision.fits else ways_out(predictor, limits, catalogue, decision, rework)
    return Plan(
        machine=summarize_machine(machine),
        workload=summarize_workload(workload),
        quality=limits.quality,
        fits=decision.fits,
        budget_bytes=decision.budget.device_bytes,
        host_budget_bytes=decision.budget.host_bytes,
        bottleneck=Bottlenecks(
            find_bottleneck(baseline, decision.budget),
            find_bottleneck(terms.chosen, decision.budget),
        ),
        optimizations=chosen,
        prediction=terms.chosen,
        baseline=baseline,
        reasons=tuple(
            _reason(s, decision.space.predict(_others(chosen, s)), terms, is_kept) for s in chosen
        ),
        rejected=tuple(_rejections(decision, terms, limits.priority)),
        execution=execution,
        kept=limits.keep,
        ways_out=tuple(w.text for w in remedies),
        notes=(
            *workload.notes,
            *decision.notes,
            *(() if postponed is None else (note_on(postponed),)),
            *_caveats(predictor, execution),
        ),
        priority=limits.priority,
        fastest_seconds=decision.pool.fastest_seconds,
        remedies=remedies,
        phase_budget_bytes=dict(decision.budget.phase_bytes),
        elsewhere_budget_bytes=dict(decision.budget.elsewhere_bytes),
        validity=validity_of(decision, limits.priority),
        postponed=postponed,
    )


def _decided(
    predictor: Predictor,
    limits: Limits,
    catalogue: Catalogue,
    applied: Applied | None,
    retries: bool,
) -> Kept:
    decision = decide(predictor, limits, catalogue, retries)
    return Kept(decision) if applied is None else keeping(decision, applied, predictor.machine)


def _caveats(predictor: Predictor, execution: Execution) -> Iterator[str]:
    """What the prediction assumes, and what verified runs have changed in it."""
    yield from assumptions(predictor.machine, execution)
    yield from residuals.explain(predictor.residuals, predictor.corrections(execution))


def _reason(setting: Setting, without: Prediction, terms: Terms, is_kept: bool) -> Reason:
    reason = explain_chosen(setting, without, terms)
    return said_of_kept(reason, without, terms) if is_kept else reason


def _others(settings: tuple[Setting, ...], setting: Setting) -> tuple[Setting, ...]:
    return tuple(s for s in settings if s != setting)


def predict(
    machine: Machine,
    workload: Workload,
    settings: tuple[Setting, ...],
    limits: Limits | None = None,
    history: History | None = None,
) -> PredictionReport:
    """Predict a given set without choosing.

    Raises:
        OptimizationError: the set is incoherent, or cannot run on this machine at all.
    """
    require_coherent(settings)
    limits = limits or Limits()
    predictor = Predictor(machine, workload, limits.images, history)
    execution = execution_of(settings)
    prediction = predictor.predict(execution)
    budget = budget_within(machine, limits)
    return PredictionReport(
        machine=summarize_machine(machine),
        workload=summarize_workload(workload),
        optimizations=settings,
        prediction=prediction,
        fits=budget.holds(prediction),
        budget_bytes=budget.device_bytes,
        host_budget_bytes=budget.host_bytes,
        notes=(
            *workload.notes,
            *_notes(predictor, settings, prediction),
            *_caveats(predictor, execution),
        ),
        elsewhere_budget_bytes=dict(budget.elsewhere_bytes),
    )


def _notes(predictor: Predictor, settings: tuple[Setting, ...], whole: Prediction) -> Iterator[str]:
    """What cannot run here, does not go together or changes nothing."""
    for setting in settings:
        reason = find(setting.name).unavailable(predictor.machine, predictor.workload)
        if reason:
            yield f"{setting.name}: {reason}"
    rule = Judge(predictor, ()).rule_in(settings)
    if rule is not None:
        yield f"{rule.reason} (rule {rule.id})"
    for setting in settings:
        if predictor.predict(execution_of(_others(settings, setting))) == whole:
            yield f"{setting}: changes nothing here"


# ---- what was left out --------------------------------------------------------------------------


def _rejections(decision: Decision, terms: Terms, priority: str) -> Iterator[Rejection]:
    """The ones with numbers first, then those that quality forbids, then those out of question."""
    taken = {s.name for s in decision.chosen.settings}
    for name, settings in decision.options.items():
        if name not in taken:
            yield _reject(decision, terms, priority, name, settings)
    for refusal in decision.refused:
        if refusal.needs_quality:
            yield _with_numbers(decision, terms, priority, refusal)
        else:
            yield refusal


class _Added(NamedTuple):
    """A setting beside those of the choice that it goes with."""

    setting: Setting
    instead_of: tuple[Setting, ...]
    beside: tuple[Setting, ...]
    prediction: Prediction


def _reject(
    decision: Decision, terms: Terms, priority: str, name: str, settings: tuple[Setting, ...]
) -> Rejection:
    """The best setting on top of the choice, or what it comes to if it goes with no such set."""
    judge = decision.space.judge
    by_hand = [judge.rule_with(decision.kept, s) for s in settings]
    usable = [s for s, rule in zip(settings, by_hand, strict=True) if rule is None]
    if not usable:
        rule = by_hand[0]
        assert rule is not None
        return Rejection(name, rule.reason, rule.id)
    best = min((_added(decision, s) for s in usable), key=lambda a: _rank(a, terms))
    if not best.instead_of:
        return explain_rejected(best.setting, best.prediction, terms)
    rule = judge.rule_between(best.instead_of[0], best.setting)
    assert rule is not None
    replaced = tuple(s.name for s in best.instead_of)
    where, rejection, beside = _of_another_set(decision, terms, priority, best)
    return msgspec.structs.replace(
        rejection,
        text=f"{clash_of(replaced, rule)}; {where} {rejection.text}",
        rule=rule.id,
        instead_of=replaced,
        beside=beside,
    )


def _of_another_set(
    decision: Decision, terms: Terms, priority: str, added: _Added
) -> tuple[str, Rejection, tuple[Setting, ...]]:
    """What an optimization does that does not go with the choice: in words which set, what, and
    the others in it.

    That is the best set with it. Where no set is better for it, or quality forbids it: in place of
    what it does not go with, against the same without it if that fits, so that it is not credited
    with what leaving out the others does.
    """
    name = added.setting.name
    having = [c for c in decision.candidates if name in [s.name for s in c.settings]]
    if having:
        settings = select(having, decision.budget, priority).settings
        beside = tuple(s for s in settings if s.name != name)
        (setting,) = (s for s in settings if s.name == name)
        names = f" ({', '.join(s.name for s in settings)})" if beside else ""
        rejection = explain_rejected(setting, decision.space.predict(settings), terms)
        return f"the best set with it{names}", rejection, beside
    without = decision.space.predict(added.beside)
    if not terms.budget.holds(without):
        rejection = explain_rejected(added.setting, added.prediction, terms)
        if name in decision.options:
            rejection = msgspec.structs.replace(rejection, text="is any better with it")
            return "no set", rejection, added.beside
        return "in its place it", rejection, added.beside
    rejection = explain_rejected(added.setting, added.prediction, terms._replace(chosen=without))
    names = " and ".join(s.name for s in added.instead_of)
    return f"without {names} it", rejection, added.beside


def _added(decision: Decision, setting: Setting) -> _Added:
    chosen = decision.chosen.settings
    clashing = tuple(s for s in chosen if decision.space.judge.rule_between(s, setting))
    beside = tuple(s for s in chosen if s not in clashing)
    return _Added(setting, clashing, beside, decision.space.predict((*beside, setting)))


def _rank(added: _Added, terms: Terms) -> tuple[bool, bool, float]:
    fits = terms.budget.holds(added.prediction)
    return (not fits, bool(added.instead_of), added.prediction.mean_seconds)


def _with_numbers(decision: Decision, terms: Terms, priority: str, refusal: Rejection) -> Rejection:
    """What quality forbids, and what it would do if it were offered."""
    name = refusal.optimization
    mildest = tuple(s for s in decision.offered[name] if _needs(s) == refusal.needs_quality)
    rejection = _reject(decision, terms, priority, name, mildest)
    it = "" if rejection.rule else "it "
    return msgspec.structs.replace(
        rejection,
        text=f"{refusal.text}; {it}{rejection.text}",
        needs_quality=refusal.needs_quality,
    )


def _needs(setting: Setting) -> str:
    return find(setting.name).quality(setting.parameters)
