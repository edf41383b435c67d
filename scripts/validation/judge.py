"""What a recording says of predictions and choices, as the planner makes them today.

Pure: it reads a recording, asks the planner anew for the recorded machine and workloads, and
compares. Nothing is run, and torch is not imported.

Seconds add up over phases and the memory needed is that of the largest, so a set that was not
measured as a whole is put together of phases that were, each with exactly what it sees of the set;
how well that works is checked on the sets that were measured as a whole.
"""

from __future__ import annotations

import functools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from autotune.decide.allocator import DeviceMemoryError
from autotune.decide.decision import decide
from autotune.decide.history import History, Misfit, Observation, Observed
from autotune.decide.limits import allows, budget_within
from autotune.decide.metrics import expected
from autotune.decide.predict import Predictor
from autotune.decide.prediction import Budget, Prediction
from autotune.decide.search import execution_of
from autotune.errors import OptimizationError
from autotune.optimizations import find
from autotune.optimizations.base import Setting
from autotune.workload.workload import Workload
from validation.cases import ASKED, WITHOUT, Question
from validation.recording import Header, Line, PeerRun, Phases, Prepared, SetRun
from validation.rules import RULES, usable
from validation.sets import (
    Key,
    Names,
    Set,
    catalogue_of,
    coherent_sets,
    keys_of,
    names_of,
    offered_names,
    set_of,
)

SAME_TIME = 0.03
"""Times closer than this are not ranked: one optimization has to gain more."""

TRIES = 4
"""So often a choice is run and made again with what that taught."""


class Outcome(NamedTuple):
    """What a set came to, really.

    Attributes:
        seconds: One generation in steady state.
        once_s: What the first took longer, where something is compiled.
        peak_bytes: The allocator's peak.
        is_whole: It was measured as a whole, and not put together of phases.
    """

    seconds: float
    once_s: float
    peak_bytes: int
    is_whole: bool

    def mean_seconds(self, images: int) -> float:
        """With its share of what is done once."""
        return self.seconds + self.once_s / images


class Compared(NamedTuple):
    """A figure, predicted and measured: of a phase, or of a generation (``"all"``)."""

    case: str
    settings: Names
    phase: str
    metric: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Signed and relative."""
        return self.predicted / self.measured - 1


class Choice(NamedTuple):
    """What a plan comes to, without its reasons; ``budget_bytes`` is what there was for it."""

    settings: Set
    fits: bool
    needed_bytes: int
    budget_bytes: int


class Answer(NamedTuple):
    """What was chosen for a question, and what came of it.

    Attributes:
        case: Of which case.
        question: What was asked.
        choice: The planner's answer.
        outcome: What that set came to; ``None`` where it was not measured.
        ran_out: It was said to fit, and did not.
        best: The fastest set that fits, and its seconds; ``None`` where none does.
        peak_bytes: The set's on that card, where it was run there; else as of ``outcome``.
        is_tried: It was run on a card of that size, and not reckoned with.
        tries: How often it was run and chosen again.
    """

    case: str
    question: Question
    choice: Choice
    outcome: Outcome | None
    ran_out: bool
    best: tuple[Names, float] | None
    peak_bytes: int | None = None
    is_tried: bool = False
    tries: int = 0

    @property
    def regret(self) -> float | None:
        """How much longer than the best it takes; ``None`` where that cannot be said."""
        if self.outcome is None or self.best is None or self.ran_out or not self.choice.fits:
            return None
        return self.outcome.mean_seconds(self.question.images) / self.best[1] - 1

    @property
    def refused_in_vain(self) -> bool:
        """Nothing was said to fit, and something does."""
        return not self.choice.fits and self.best is not None

    @property
    def unused(self) -> float | None:
        """Share of the card that the chosen set leaves, the runtime's context not counted."""
        if self.peak_bytes is None or not self.choice.fits or self.ran_out:
            return None
        return (self.choice.budget_bytes - self.peak_bytes) / self.question.card_bytes


class Verdict(NamedTuple):
    """A set on a card: what was said of it, and what is so.

    Attributes:
        case: Of which case.
        card_bytes: The card's size.
        settings: The set.
        is_accepted: It was said to fit.
        fits: It does; ``None`` where that is not known.
        is_tried: It was run on a card of that size.
        short: How much more it was said to need than there is, relative; negative: less.
        spare: What its peak leaves of what there is, relative; ``None`` where it is not known.
    """

    case: str
    card_bytes: int
    settings: Names
    is_accepted: bool
    fits: bool | None
    is_tried: bool
    short: float
    spare: float | None


class PeerOutcome(NamedTuple):
    """What a peer came to on a card, beside ours."""

    case: str
    peer: str
    card_bytes: int
    what: str
    outcome: Outcome | None
    ran_out: bool
    ours: Outcome | None

    @property
    def ratio(self) -> float | None:
        """Its time over ours."""
        if self.outcome is None or self.ran_out or self.ours is None:
            return None
        return self.outcome.seconds / self.ours.seconds

    @property
    def peak_ratio(self) -> float | None:
        """Its peak over ours."""
        if self.outcome is None or self.ran_out or self.ours is None:
            return None
        return self.outcome.peak_bytes / self.ours.peak_bytes


# ---- one case -----------------------------------------------------------------------------------


class Evidence:
    """All that was measured of one case.

    Args:
        header: The machine.
        prepared: The case.
        lines: Of the whole recording.
    """

    def __init__(self, header: Header, prepared: Prepared, lines: Sequence[Line]) -> None:
        self.case = prepared.case
        operators = header.machine.operators | prepared.operators
        self.machine = replace(header.machine, operators=operators)
        self.offered = prepared.offered
        self.catalogue = catalogue_of(prepared.offered)
        self.workload: Workload = prepared.workload
        self.cards = prepared.cards
        self.predictor = Predictor(self.machine, self.workload)
        self._predictors: dict[int, Predictor] = {}
        mine = [line for line in lines if isinstance(line, SetRun) and line.case == self.case]
        self.failed = [run for run in mine if run.error]
        self.peers = [p for p in lines if isinstance(p, PeerRun) and p.case == self.case]
        self._capped = {(r.settings, r.card_bytes): r for r in mine if r.card_bytes is not None}
        self._runs: dict[Names, list[Phases]] = defaultdict(list)
        self._seconds: dict[Key, list[float]] = defaultdict(list)
        self._peaks: dict[Key, list[int]] = defaultdict(list)
        self._compiled_first: dict[str, Names] = {}
        self._once: dict[str, float] = {}
        for run in mine:
            if run.card_bytes is None and not run.error:
                self._take(run)
        self.loads = [run.load for run in mine]

    def _take(self, run: SetRun) -> None:
        runs = run.runs
        if self.machine.device.kind == "cpu" and not _compiled(run.settings):
            runs = (run.first, *runs)  # a CPU has neither kernels to load nor algorithms to try
        self._runs[run.settings] += runs
        keys = keys_of(set_of(run.settings), self.machine, self.workload)
        for phase in (p for phases in runs for p in phases):
            self._seconds[keys[phase.name]].append(phase.seconds)
            if phase.peak_bytes is not None:
                self._peaks[keys[phase.name]].append(phase.peak_bytes)
        compiled = _compiled(run.settings)
        # The next sets find parts of what the first one left in the compiler's cache.
        if compiled and compiled not in self._once and len(run.wall_s) > 1:
            extra = run.wall_s[0] - statistics.median(run.wall_s[1:])
            self._once[compiled] = max(0.0, extra)
            self._compiled_first[compiled] = run.settings

    @property
    def measured(self) -> list[Names]:
        """Sets with generations of their own."""
        return list(self._runs)

    def spread(self, names: Names) -> float | None:
        """How far apart generations with the same set are, relative to their median."""
        totals = [sum(p.seconds for p in phases) for phases in self._runs[names]]
        if len(totals) < 2:
            return None
        return (max(totals) - min(totals)) / statistics.median(totals)

    def phase(self, names: Names, name: str) -> tuple[float, int | None]:
        """Median seconds and the peak of a phase, of all sets that look the same from there."""
        key = keys_of(set_of(names), self.machine, self.workload)[name]
        peaks = self._peaks.get(key)
        return statistics.median(self._seconds[key]), max(peaks) if peaks else None

    def whole(self, names: Names) -> Outcome | None:
        """Of a set as it was measured; its peak may be that of phases in other sets."""
        if names not in self._runs:
            return None
        totals = [sum(p.seconds for p in phases) for phases in self._runs[names]]
        peaks = [self.phase(names, p.name)[1] for p in self.workload.phases]
        if any(peak is None for peak in peaks):
            return None
        once = self._once_s(names)
        if once is None:
            return None
        return Outcome(statistics.median(totals), once, max(p for p in peaks if p), True)

    def composed(self, settings: Iterable[Setting]) -> Outcome | None:
        """Of a set, put together of its phases; ``None`` where one was not measured."""
        settings = tuple(settings)
        keys = keys_of(settings, self.machine, self.workload).values()
        if not all(k in self._seconds and k in self._peaks for k in keys):
            return None
        once = self._once_s(names_of(settings))
        if once is None:
            return None
        seconds = sum(statistics.median(self._seconds[k]) for k in keys)
        return Outcome(seconds, once, max(max(self._peaks[k]) for k in keys), False)

    def _once_s(self, names: Names) -> float | None:
        """What is done once: about the same for all sets that are compiled in the same way."""
        compiled = _compiled(names)
        return self._once.get(compiled) if compiled else 0.0

    def outcome(self, settings: Iterable[Setting]) -> Outcome | None:
        """Phases are measured in more sets than any set as a whole: their medians are better."""
        settings = tuple(settings)
        return self.composed(settings) or self.whole(names_of(settings))

    def fits(self, settings: Iterable[Setting], card_bytes: int) -> bool | None:
        """Whether it ran on that card; where it was not tried, whether its peak is within it.

        A GPU's libraries take workspace because there is memory, and do with less where there is
        not: a peak above the card says nothing there. A CPU's is the same under any limit.
        """
        settings = tuple(settings)
        tried = self._tried(settings, card_bytes)
        if tried is not None:
            return not tried.ran_out
        outcome = self.outcome(settings)
        if outcome is None:
            return None
        is_within = outcome.peak_bytes <= card_bytes - self.machine.context_bytes
        return is_within if is_within or self.is_reckoned else None

    @property
    def is_reckoned(self) -> bool:
        """There are no cards here: what fits is reckoned, exactly, from peaks."""
        return self.machine.device.kind == "cpu"

    def _tried(self, settings: Iterable[Setting], card_bytes: int) -> SetRun | None:
        """The run on a card of that size, that ended or ran out of memory."""
        run = self._capped.get((names_of(settings), card_bytes))
        return None if run is None or (run.error and not run.ran_out) else run

    def _peak_on(self, settings: Set, card_bytes: int) -> int | None:
        """Where it was run on that card, its peak there."""
        run = self._tried(settings, card_bytes)
        peaks = [p.peak_bytes for phases in run.runs for p in phases] if run else []
        known = [peak for peak in peaks if peak is not None]
        outcome = self.outcome(settings)
        return max(known) if known else outcome.peak_bytes if outcome else None

    # ---- predictions ----------------------------------------------------------------------------

    @functools.cached_property
    def comparisons(self) -> list[Compared]:
        """Predicted against measured, of each measured set."""
        rows: list[Compared] = []
        seen: set[Key] = set()
        for names in self.measured:
            prediction = self._predicted(names)
            if prediction is None:
                continue
            rows += self._of_phases(names, prediction, seen)
            rows += self._of_generation(names, prediction)
        return rows

    def _of_phases(
        self, names: Names, prediction: Prediction, seen: set[Key]
    ) -> Iterable[Compared]:
        keys = keys_of(set_of(names), self.machine, self.workload)
        for phase in prediction.phases:
            if keys[phase.name] in seen or keys[phase.name] not in self._seconds:
                continue
            seen.add(keys[phase.name])
            seconds, peak = self.phase(names, phase.name)
            yield Compared(self.case, names, phase.name, "seconds", phase.seconds, seconds)
            if peak is not None:
                yield Compared(self.case, names, phase.name, "allocated", phase.peak_bytes, peak)

    def _of_generation(self, names: Names, prediction: Prediction) -> Iterable[Compared]:
        whole = self.whole(names)
        if whole is None:
            return
        yield Compared(self.case, names, "all", "seconds", prediction.seconds, whole.seconds)
        yield Compared(
            self.case, names, "all", "allocated", prediction.peak_bytes, whole.peak_bytes
        )
        if self._compiled_first.get(_compiled(names)) == names:
            yield Compared(self.case, names, "all", "once", prediction.once_s, whole.once_s)
        yield from self._of_device(names)

    def _of_device(self, names: Names) -> Iterable[Compared]:
        phases = [p for run in self._runs[names] for p in run]
        reserved = max((p.reserved_bytes or 0 for p in phases), default=0)
        device = max((p.device_bytes or 0 for p in phases), default=0)
        if not reserved:
            return
        try:
            peaks = expected(self.predictor, execution_of(set_of(names)))
        except (DeviceMemoryError, OptimizationError):
            return
        yield Compared(self.case, names, "all", "reserved", peaks.reserved_bytes, reserved)
        if device:
            yield Compared(self.case, names, "all", "device", peaks.device_bytes, device)

    def additivity(self) -> list[float]:
        """Of sets measured as a whole: what their phases in *other* sets add up to, relative."""
        errors = []
        for names in self.measured:
            keys = keys_of(set_of(names), self.machine, self.workload)
            own = {p.name: [] for p in self.workload.phases}  # type: dict[str, list[float]]
            for phases in self._runs[names]:
                for phase in phases:
                    own[phase.name].append(phase.seconds)
            others = {n: _without(self._seconds[k], own[n]) for n, k in keys.items()}
            if all(others.values()):
                total = sum(statistics.median(o) for o in others.values())
                whole = self.whole(names)
                if whole is not None:
                    errors.append(total / whole.seconds - 1)
        return errors

    @property
    def typical_spread(self) -> float:
        """How far apart generations with the same set are, in the middle of all sets."""
        spreads = [s for n in self.measured if (s := self.spread(n)) is not None]
        return statistics.median(spreads) if spreads else 0.0

    def kendall_tau(self) -> float | None:
        """How well the planner ranks the measured sets by time, from -1 to 1.

        Sets closer together than generations with one set are not ranked.
        """
        pairs = [(c.predicted, c.measured) for c in self.comparisons if _is_total(c)]
        return tau(pairs, max(SAME_TIME, 2 * self.typical_spread))

    # ---- choices --------------------------------------------------------------------------------

    def answers(self, verify: bool) -> list[Answer]:
        """To every question of the case."""
        questions = [Question(card, *asked) for card in self.cards for asked in ASKED]
        return [self._answer(q, self._known, verify) for q in questions]

    @functools.cached_property
    def _everything(self) -> list[Set]:
        return coherent_sets(self.predictor, WITHOUT, self.catalogue)

    @functools.cached_property
    def _known(self) -> list[tuple[Set, Outcome]]:
        return [(s, o) for s in self._everything if (o := self.outcome(s)) is not None]

    def scored(self) -> tuple[int, int]:
        """Coherent sets whose outcome is known, and how many there are in the bounded list."""
        return len(self._known), len(self._everything)

    def offers_changed(self) -> tuple[list[str], list[str]]:
        """Settings that are tried today and were not then, and those of then that are not today.

        What packages are needed for is in it where the recorded machine does not say that it lacks
        them. Empty where the recording does not tell what was tried.
        """
        if not self.offered:
            return [], []
        today = offered_names(self.machine, self.workload, WITHOUT)
        new = [name for name in today if name not in self.offered]
        return new, [name for name in self.offered if name not in today]

    @functools.cached_property
    def verdicts(self) -> list[Verdict]:
        """Of every set whose outcome is known, and of every one that was run there, on each card.

        Whether a plan is asked for does not matter: a set is accepted or refused by its need.
        """
        budgets = {
            card: budget_within(self.machine, Question(card, "exact", 1).limits)
            for card in self.cards
        }
        sets = {names_of(s) for s in self._everything} | {names for names, _ in self._capped}
        return [v for names in sorted(sets) for v in self._verdicts(names, budgets)]

    def _verdicts(self, names: Names, budgets: dict[int, Budget]) -> Iterator[Verdict]:
        settings, prediction = set_of(names), self._predicted(names)
        if prediction is None:
            return
        for card, budget in budgets.items():
            peak, tried = self._peak_on(settings, card), self._tried(settings, card)
            if peak is None and tried is None:
                continue
            yield Verdict(
                self.case,
                card,
                names,
                budget.holds(prediction),
                self.fits(settings, card),
                tried is not None,
                budget.lacks(prediction) - 1,
                None if peak is None else 1 - peak / max(budget.device_bytes, 1),
            )

    def _predicted(self, names: Names) -> Prediction | None:
        """``None`` where it needs a code path that was not traced."""
        try:
            return self.predictor.predict(execution_of(set_of(names)))
        except OptimizationError:
            return None

    def _answer(self, question: Question, known: list[tuple[Set, Outcome]], verify: bool) -> Answer:
        choice, tries = self._choice(question, verify)
        fits = self.fits(choice.settings, question.card_bytes)
        outcome = self.outcome(choice.settings)
        # The list is bounded, and the planner is not: nothing is better than the best.
        own = [(choice.settings, outcome)] if outcome is not None else []
        return Answer(
            self.case,
            question,
            choice,
            outcome,
            choice.fits and fits is False,
            self._best(question, [*known, *own]),
            self._peak_on(choice.settings, question.card_bytes),
            self._tried(choice.settings, question.card_bytes) is not None,
            tries,
        )

    def _best(
        self, question: Question, known: list[tuple[Set, Outcome]]
    ) -> tuple[Names, float] | None:
        fitting = [
            (names_of(s), o.mean_seconds(question.images))
            for s, o in known
            if self.fits(s, question.card_bytes)
            and all(allows(question.quality, find(x.name), x.parameters) for x in s)
        ]
        return min(fitting, key=lambda f: f[1], default=None)

    def choose(self, question: Question, history: History | None = None) -> Choice:
        """As a plan is made for it."""
        predictor = self._predictors.get(question.images)
        if predictor is None or history is not None:
            predictor = Predictor(self.machine, self.workload, question.images, history)
        if history is None:
            self._predictors[question.images] = predictor
        decision = decide(predictor, question.limits, self.catalogue)
        chosen = decision.chosen
        budget = decision.available.device_bytes
        return Choice(chosen.settings, decision.fits, chosen.needed_bytes, budget)

    def _choice(self, question: Question, verify: bool) -> tuple[Choice, int]:
        """With verification, a choice is run, and made again with what that taught."""
        history = History()
        choice = self.choose(question)
        for tries in range(TRIES if verify else 0):
            taught = self._taught(choice, question.card_bytes, history)
            if taught == history:
                return choice, tries
            history = taught
            again = self.choose(question, history)
            if again.settings == choice.settings:
                return again, tries + 1
            choice = again
        return choice, TRIES if verify else 0

    def _taught(self, choice: Choice, card_bytes: int, history: History) -> History:
        """What a run of the choice adds to the history."""
        outcome = self.outcome(choice.settings)
        if outcome is None or not choice.fits:
            return history
        if self.fits(choice.settings, card_bytes) is False:
            misfit = Misfit(choice.settings, choice.budget_bytes)
            if misfit in history.misfits:
                return history
            return replace(history, misfits=(*history.misfits, misfit))
        names = names_of(choice.settings)
        if any(names_of(o.settings) == names for o in history.observations):
            return history
        phases = []
        for phase in self.workload.phases:
            seconds, peak = self.phase(names, phase.name)
            phases.append(Observed(phase.name, seconds, peak))
        seen = Observation(choice.settings, tuple(phases))
        return replace(history, observations=(*history.observations, seen))

    # ---- peers ----------------------------------------------------------------------------------

    def peer_outcomes(self) -> list[PeerOutcome]:
        """Rules of thumb, looked up; then tools, as they ran; beside ours at exact quality."""
        rows = []
        for card in self.cards:
            choice = self.choose(Question(card, "exact", 1))
            ours = self._outcome_on(choice.settings, card) if choice.fits else None
            rows += [self._by_rule(rule, card, ours) for rule in RULES]
            rows += [
                self._by_tool(p, card, ours) for p in self.peers if p.card_bytes in (card, None)
            ]
        return rows

    def _by_rule(self, rule: object, card: int, ours: Outcome | None) -> PeerOutcome:
        name, rungs_of = rule  # type: ignore[misc]
        rungs, reasons = usable(
            rungs_of(self.workload, card), self.machine, self.workload, self.catalogue
        )
        # The first that does not run out, or of which nobody knows whether it does.
        last = next((s for s in rungs if self.fits(s, card) is not False), None)
        if not rungs:
            return PeerOutcome(self.case, name, card, "; ".join(reasons), None, False, ours)
        if last is None:
            what = _named(rungs[-1])
            return PeerOutcome(self.case, name, card, what, self.outcome(rungs[-1]), True, ours)
        if self.fits(last, card) is None:
            what = f"{_named(last)}: not run on every limit"
            return PeerOutcome(self.case, name, card, what, None, False, ours)
        outcome = self._outcome_on(last, card)
        return PeerOutcome(self.case, name, card, _named(last), outcome, False, ours)

    def _outcome_on(self, settings: Set, card: int) -> Outcome | None:
        """``None`` where it did not run there; its peak is that on the card, where it was tried."""
        outcome, peak = self.outcome(settings), self._peak_on(settings, card)
        if outcome is None or peak is None or self.fits(settings, card) is False:
            return None
        return outcome._replace(peak_bytes=peak)

    def _by_tool(self, run: PeerRun, card: int, ours: Outcome | None) -> PeerOutcome:
        if run.error or not run.runs:
            return PeerOutcome(self.case, run.peer, card, run.error, None, run.ran_out, ours)
        totals = [sum(p.seconds for p in phases) for phases in run.runs]
        peak = max(p.peak_bytes or 0 for phases in run.runs for p in phases)
        outcome = Outcome(statistics.median(totals), 0.0, peak, True)
        out = run.ran_out or (self.is_reckoned and peak > card)
        return PeerOutcome(self.case, run.peer, card, run.chose, outcome, out, ours)


def _named(settings: Set) -> str:
    return ", ".join(names_of(settings)) or "all on the device"


def _compiled(names: Names) -> str:
    """The set's own name for how it is compiled; empty where it is not."""
    return next((name for name in names if name.startswith("compile")), "")


def _without(samples: list[float], own: list[float]) -> list[float]:
    left = list(samples)
    for sample in own:
        left.remove(sample)
    return left


def _is_total(row: Compared) -> bool:
    return row.phase == "all" and row.metric == "seconds"


def tau(pairs: list[tuple[float, float]], same: float = SAME_TIME) -> float | None:
    """Kendall's, of predicted and measured times; those that differ by less are not ranked."""
    agree = disagree = 0
    for i, (predicted, measured) in enumerate(pairs):
        for other_predicted, other_measured in pairs[i + 1 :]:
            larger = max(measured, other_measured)
            if abs(measured - other_measured) <= same * larger:
                continue
            product = (predicted - other_predicted) * (measured - other_measured)
            agree, disagree = agree + (product > 0), disagree + (product <= 0)
    ranked = agree + disagree
    return (agree - disagree) / ranked if ranked else None


# ---- a recording --------------------------------------------------------------------------------


def evidence_of(lines: Sequence[Line]) -> list[Evidence]:
    """Each case of a recording, as far as anything was measured of it."""
    header = next((line for line in lines if isinstance(line, Header)), None)
    if header is None:
        return []
    prepared = [line for line in lines if isinstance(line, Prepared)]
    found = [Evidence(header, p, lines) for p in prepared]
    return [e for e in found if e.measured]


def mape(rows: Iterable[Compared]) -> float | None:
    """Mean absolute error."""
    errors = [abs(r.error) for r in rows]
    return statistics.fmean(errors) if errors else None


class Bars(NamedTuple):
    """The figures that are held.

    Attributes:
        memory: MAPE of what a generation allocates at its peak, over measured sets.
        phases: The same of each phase.
        seconds: MAPE of a generation's seconds.
        regret: Mean over the answers that have one.
        ran_out: Answers that were said to fit and did not.
    """

    memory: float | None
    phases: float | None
    seconds: float | None
    regret: float | None
    ran_out: int


def bars_of(rows: Sequence[Compared], answers: Sequence[Answer]) -> Bars:
    """Over any number of cases."""
    regrets = [a.regret for a in answers if a.regret is not None]
    return Bars(
        mape(r for r in rows if r.phase == "all" and r.metric == "allocated"),
        mape(r for r in rows if r.phase != "all" and r.metric == "allocated"),
        mape(r for r in rows if r.phase == "all" and r.metric == "seconds"),
        statistics.fmean(regrets) if regrets else None,
        sum(a.ran_out for a in answers),
    )
