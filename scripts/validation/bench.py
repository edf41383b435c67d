"""The run: every case, every job of it, the most valuable first, within the time there is."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from msgspec.structs import replace

from autotune.decide.choose import choose
from autotune.decide.corrections import replayable
from autotune.decide.predict import Predictor
from autotune.decide.rules import PLACEMENTS
from autotune.decide.search import execution_of
from autotune.errors import first_line
from autotune.optimizations.execution import Execution
from autotune.probe.attention import Shape, implementations_on, measure_shape
from autotune.probe.deadline import Deadline
from autotune.probe.live import identity, profile_key
from autotune.probe.machine import Machine
from autotune.probe.measure import measure_machine
from autotune.probe.timing import Timer
from autotune.profile.store import load_profile
from autotune.tuner import Measured, machine_here, plan_loaded, remember_machine
from autotune.workload.workload import AttentionShape, Workload
from validation.cases import (
    ASKED,
    CPU_CASES,
    GPU_CASES,
    TELLING_CARDS,
    TINY_CASES,
    WITHOUT,
    Case,
    Question,
)
from validation.device import Device, load_average
from validation.measure import DeviceLostError, Draw, Drawn, Subject, called_with, described
from validation.models import HOST, Model, architecture_of, copied
from validation.peers import SWITCHES, TOOLS, Tool
from validation.recording import (
    Header,
    Interrupted,
    KernelRun,
    LeftOut,
    Line,
    PeerRun,
    Pick,
    Prepared,
    Recording,
    SetRun,
    Started,
)
from validation.rules import RULES, Rule, Rungs, usable
from validation.sets import Set, coherent_sets, covering, names_of, offered_names

TURNS = (0.85, 0.92, 0.96, 1.0)
"""First what tells most of every case, then its whole list of sets, then sets again. Each turn must
end at that share of the time."""

PROBE_S = 30.0
"""At most: a machine that others use needs more than the usual nine."""

KERNEL_S = 1.0
"""For each shape of attention."""

SHAPES = 3
"""Of attention: those that compute most."""

FIXED_S = 0.5
"""What a job takes beside drawing: to turn a set on and off."""

MOVED_BYTES_S = 3e9
"""Weights between host RAM and the device, pageable."""

ATTEMPTS = 2
"""So often a job is begun in which the process dies."""

PREPARE_S = 60.0
"""About, until a case is loaded and traced."""

PATIENCE = 10
"""So many times what a job should take, and ``GRACE_S``: then it hangs, and its process ends."""

GRACE_S = 60.0
"""Behind the end of the run, too."""


class IncomparableError(Exception):
    """The recording was begun on another machine or by another clock."""


def probed(device: str) -> Measured:
    """This machine, its profile made with more time than a user waits for: nothing is left out."""
    key = identity(device)
    if load_profile(key) is None:
        machine = measure_machine(device, budget_s=PROBE_S)
        remember_machine(profile_key(machine), machine)
    return machine_here(device)


def cases_of(device: Device, models: Sequence[str], tiny: bool) -> tuple[Case, ...]:
    """What is drawn on this device."""
    if tiny:
        return TINY_CASES
    cases = CPU_CASES if device.draws_small else GPU_CASES
    return tuple(c for c in cases if not models or c.model in models)


Result = SetRun | PeerRun | KernelRun | LeftOut


class Job(NamedTuple):
    """Something to measure once.

    Attributes:
        empty: The line to record, without what comes of it.
        seconds: What it will take, about.
        do: Does it, and returns the line to record.
    """

    empty: Result
    seconds: float
    do: Callable[[], Line]

    @property
    def kind(self) -> tuple[type, bool]:
        """Jobs of one kind are as much slower than expected as each other."""
        return type(self.empty), getattr(self.empty, "card_bytes", None) is not None


class Bench:
    """Works through the cases.

    Args:
        recording: Where to.
        device: What is measured.
        clock: As ``Header.clock``.
        budget_s: Seconds on the wall; what is under way then is soon ended.
        say: Told in one line what is being done.
    """

    def __init__(
        self,
        recording: Recording,
        device: Device,
        clock: str,
        budget_s: float,
        say: Callable[[str], None],
    ) -> None:
        self._recording = recording
        self._device = device
        self._start, self._budget_s = time.monotonic(), budget_s
        self._say = say
        self._clock = clock
        self._slowness: dict[tuple[type, bool], float] = {}
        self._stages: dict[Case, _Stage] = {}

    @property
    def left_s(self) -> float:
        """Seconds."""
        return self._left_s(1.0)

    def _left_s(self, share: float) -> float:
        """Until that share of the budget is spent."""
        return self._start + share * self._budget_s - time.monotonic()

    def run(self, cases: Sequence[Case]) -> None:
        """As much as there is time for.

        Raises:
            IncomparableError: see there.
            DeviceLostError: only another process can go on.
        """
        with _watched(GRACE_S + PATIENCE * PROBE_S):
            measured = self._machine()
        for turn, until in enumerate(TURNS):
            for index, case in enumerate(cases):
                share = case.weight / sum(c.weight for c in cases[index:])
                left = self._left_s(until)
                if left > 0:
                    self._case(case, measured, turn, time.monotonic() + share * left)
        self._say(f"{self.left_s:.0f} s left")

    def _machine(self) -> Measured:
        measured = probed(str(self._device.device))
        header = self._recording.header
        if header is None:
            at = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            header = Header(
                measured.machine, self._clock, torch.get_num_threads(), at, load_average()
            )
            self._recording.add(header)
        then, now = header.machine, measured.machine
        for what, before, after in (
            ("machine", then.device.name, now.device.name),
            ("clock", header.clock, self._clock),
            ("PyTorch", then.software.get("torch"), now.software.get("torch")),
            ("number of threads", header.threads, torch.get_num_threads()),
        ):
            if before != after:
                raise IncomparableError(
                    f"{self._recording.path} has another {what}: {before}, not {after}; "
                    "begin another file"
                )
        known = header.machine.operators | measured.machine.operators
        return measured._replace(machine=replace(header.machine, operators=known))

    def _case(self, case: Case, measured: Measured, turn: int, end: float) -> None:
        if turn == 0:
            self._prepare(case, measured)
        stage = self._stages.get(case)
        if stage is None:
            return
        for line in stage.picks():
            if line.job not in self._recording.done:
                self._recording.add(line)
        for job in stage.jobs(turn):
            if job.empty.job not in self._recording.done:
                self._do(job, stage.model, min(end - time.monotonic(), self.left_s))
        stage.close()

    def _prepare(self, case: Case, measured: Measured) -> None:
        """A stage for the case, unless none can be made."""
        model = Model(architecture_of(case.model), case.dtype, self._device.device)
        empty = LeftOut(f"{case.name} | prepare", case.name)
        if case.name not in self._recording.prepared and empty.job not in self._recording.done:
            self._attempt(
                Job(empty, PREPARE_S, lambda: prepared(case, model, measured, self._device))
            )
        line = self._recording.prepared.get(case.name)
        if line is None:
            model.release()
            self._device.clean()
            return
        try:
            stage = _Stage(case, model, line, measured, self._recording, self._device)
        except Exception as error:  # the planner's, for any machine
            self._recording.add(replace(empty, error=described(error)))
        else:
            self._stages[case] = stage

    def _do(self, job: Job, model: Model, left_s: float) -> None:
        """A job that there is time for; its model may have to be built first."""
        slowness = self._slowness.get(job.kind, 1.0)
        seconds = model.build_s + job.seconds * slowness
        if seconds < left_s:
            start = time.monotonic() - model.spent_s
            self._attempt(job._replace(seconds=seconds))
            took = (time.monotonic() - model.spent_s - start) / job.seconds
            self._slowness[job.kind] = slowness + (max(1.0, took) - slowness) / 4

    def _attempt(self, job: Job) -> None:
        """A job, and its line in any case: a result, or an error.

        Raises:
            DeviceLostError: only another process can go on.
        """
        name = job.empty.job
        if self._recording.deaths(name) >= ATTEMPTS:
            self._recording.add(replace(job.empty, error="the process died"))
            return
        self._recording.add(Started(name))
        self._say(f"{self.left_s:4.0f} s left  {name}")
        try:
            with _watched(GRACE_S + min(PATIENCE * job.seconds, max(0.0, self.left_s))):
                line = job.do()
        except KeyboardInterrupt:
            self._recording.add(Interrupted(name))
            raise
        except Exception as error:  # the code of any pipeline, kernel or tool
            lost = isinstance(error, DeviceLostError) or self._device.is_lost(error)
            text = first_line(error) if isinstance(error, DeviceLostError) else described(error)
            self._say(f"{name}: {text}")
            self._recording.add(replace(job.empty, error=text))
            if lost:
                raise DeviceLostError(text) from error
        else:
            self._recording.add(line)
        self._device.clean()  # once nothing of the job is held


@contextlib.contextmanager
def _watched(seconds: float) -> Iterator[None]:
    """After so many seconds the process ends, whatever it hangs in, and says where."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def prepared(case: Case, model: Model, measured: Measured, device: Device) -> Prepared:
    """The case loaded and traced."""
    load = load_average()
    planned = plan_loaded(model.architecture, measured, case.ask, model.at(HOST))
    keys = {o.key for o in replayable(planned.workload)}
    known = planned.machine.operators
    plain = Predictor(planned.machine, planned.workload).predict(Execution())
    return Prepared(
        case.name,
        planned.workload,
        {key: known[key] for key in sorted(keys & known.keys())},
        device.cards(plain.needed_bytes, planned.machine),
        load,
        offered_names(planned.machine, planned.workload, WITHOUT),
    )


class _Stage:
    """One case: its jobs. Its weights are loaded with the first of them."""

    def __init__(
        self,
        case: Case,
        model: Model,
        line: Prepared,
        measured: Measured,
        recording: Recording,
        device: Device,
    ) -> None:
        self._case = case
        self.model = model
        self._recording = recording
        self._device = device
        operators = measured.machine.operators | line.operators
        self.machine: Machine = replace(measured.machine, operators=operators)
        self.workload: Workload = line.workload
        self._cards = line.cards
        self._predictor = Predictor(self.machine, self.workload)
        self._plan = choose(self.machine, self.workload)
        plain = self._predictor.predict(Execution())
        holds = plain.needed_bytes < self.machine.device.free_bytes
        self._home = device.device if holds else HOST
        questions = [Question(card, *asked) for card in self._cards for asked in ASKED]
        self._plans = {q: choose(self.machine, self.workload, q.limits) for q in questions}
        self._all = coherent_sets(self._predictor, WITHOUT)

    def close(self) -> None:
        """Let its weights go."""
        self.model.release()
        self._device.clean()

    def picks(self) -> Iterator[Pick]:
        """What is answered."""
        for question, plan in self._plans.items():
            yield Pick(
                self._name("pick", *question),
                self._case.name,
                *question,
                names_of(plan.optimizations),
                plan.fits,
                plan.prediction.mean_seconds,
                plan.prediction.needed_bytes,
            )

    # ---- jobs -----------------------------------------------------------------------------------

    def jobs(self, turn: int) -> Iterator[Job]:
        """In order of their value: what there was no time for before comes first."""
        yield from self._telling_jobs()
        if turn > 0:
            for card in self._cards[TELLING_CARDS:]:
                yield from self._card_jobs(card)
            yield from (self._set_job(settings, None, 0) for settings in self._sets())
            for card in self._cards[TELLING_CARDS:]:
                yield from self._card_peers(card)
        if turn > 1:
            for settings in self._sets():
                if not _compiles(settings):
                    yield self._set_job(settings, None, turn)
            yield from self._whole_jobs(turn)

    def _telling_jobs(self) -> Iterator[Job]:
        """What is chosen, on the whole device and on cards, and what others make of those."""
        picked = [p.optimizations for p in self._plans.values()]
        quick = [s for s in ((), *picked) if not _compiles(s)]
        yield from (self._set_job(settings, None, 0) for settings in quick)
        if self._device.simulates:  # a CPU has no size that a tool could ask for
            others = (t for t in (*TOOLS, *SWITCHES) if not t.is_told_the_size)
            yield from (self._peer_job(tool, None) for tool in others)
        for card in self._cards[:TELLING_CARDS]:
            yield from self._card_jobs(card)
            yield from self._card_peers(card)
        by_hand = [
            rung for card in self._cards for rule in RULES for rung in self._rungs(rule, card)
        ]
        yield from (self._set_job(settings, None, 0) for settings in (*by_hand, *picked))
        yield from self._kernel_jobs()

    def _card_jobs(self, card: int) -> Iterator[Job]:
        """What was chosen for a card, on that card; then what people try there.

        Nothing that is compiled: that takes little memory, and long.
        """
        if self._device.simulates:
            return
        for asked in ASKED:
            plan = self._plans[Question(card, *asked)]
            if plan.fits and not _compiles(plan.optimizations):
                yield self._set_job(plan.optimizations, card, 0)
        for rule in RULES:
            for rung in self._rungs(rule, card):
                job = self._set_job(rung, card, 0)
                yield job
                if self._recording.ran(job.empty.job):
                    break

    def _card_peers(self, card: int) -> Iterator[Job]:
        for tool in TOOLS:
            if tool.is_told_the_size or not self._device.simulates:
                yield self._peer_job(tool, card)

    def _rungs(self, rule: Rule, card: int) -> Rungs:
        return usable(rule.rungs(self.workload, card), self.machine, self.workload)[0]

    def _sets(self) -> list[Set]:
        first: dict[Any, Set] = {(): ()}
        first |= {names_of(p.optimizations): p.optimizations for p in self._plans.values()}
        for rule in RULES:
            for card in self._cards:
                first |= {names_of(r): r for r in self._rungs(rule, card)}
        return covering(self._predictor, self._all, list(first.values()))

    def _whole_jobs(self, turn: int) -> Iterator[Job]:
        """Sets taken at random: what phases measured in other sets add up to is checked on them."""
        generator = torch.Generator("cpu").manual_seed(turn)
        plain = [s for s in self._all if not _compiles(s)]
        for index in torch.randperm(len(plain), generator=generator, device="cpu")[:3].tolist():
            yield self._set_job(plain[index], None, turn)

    def _name(self, *parts: object) -> str:
        return " | ".join((self._case.name, *map(str, parts)))

    def _subject(self, pipe: Any) -> Subject:
        return Subject(pipe, self.workload, self._plan, self._device)

    @property
    def _moving_s(self) -> float:
        """All weights, once."""
        return 0.0 if self._device.simulates else self.workload.weight_bytes / MOVED_BYTES_S

    def _set_job(self, settings: Set, card: int | None, turn: int) -> Job:
        names = names_of(settings)
        name = self._name("set", ",".join(names) or "plain", card or "whole", turn)
        times = 1 if turn == 0 and not _compiles(settings) else 2
        peaks = turn == 0
        runs = 1 + times + 3 * (peaks and self._device.simulates)
        prediction = self._predictor.predict(execution_of(settings))
        moves = card is not None or any(s.name in PLACEMENTS for s in settings)
        seconds = FIXED_S + prediction.once_s + runs * prediction.seconds
        empty = SetRun(name, self._case.name, names, card, load=load_average())

        def do() -> SetRun:
            subject = self._subject(self.model.at(self._home if card is None else HOST))
            with self._device.card(card, self.machine):
                drawn = subject.drawn_with(settings, times, peaks)
            return replace(empty, **drawn._asdict())

        return Job(empty, seconds + 2 * moves * self._moving_s, do)

    # ---- others ---------------------------------------------------------------------------------

    def _peer_job(self, tool: Tool, card: int | None) -> Job:
        name = self._name("peer", tool.name, card or "whole")
        alike = self._plans[Question(card or self._cards[0], *ASKED[0])].prediction.seconds
        runs = 5 if self._device.simulates else 2
        empty = PeerRun(name, self._case.name, tool.name, card, load=load_average())

        def do() -> PeerRun:
            chose: list[str] = []
            try:
                drawn = self._drawn_by(tool, card, chose)
            finally:
                tool.leave()
            found = drawn._asdict()
            found.pop("wall_s")
            return replace(empty, chose="".join(chose), **found)

        # Copied, moved there and back, and with some tools quantized and pinned, too.
        return Job(empty, FIXED_S + runs * alike + 5 * self._moving_s, do)

    def _drawn_by(self, tool: Tool, card: int | None, chose: list[str]) -> Drawn:
        """With a pipeline of its own, which nothing holds afterwards."""
        pipe = copied(self.model.at(HOST), self.model.architecture)

        def apply() -> Draw:
            chose.append(tool.set_up(pipe, self._device.device, card))
            return called_with(pipe, self.workload)

        with self._device.card(card, self.machine):
            return self._subject(pipe).drawn(apply, 1, True, casts=True)

    # ---- attention ------------------------------------------------------------------------------

    def _kernel_jobs(self) -> Iterator[Job]:
        for shape in self._shapes():
            yield self._kernel_job(shape)

    def _shapes(self) -> list[AttentionShape]:
        found: dict[str, tuple[float, AttentionShape]] = {}
        for run in self.workload.runs_as("denoiser"):
            for operator in run.trace.operators:
                if operator.attention is not None:
                    done = found.get(str(operator.attention), (0.0, operator.attention))[0]
                    work = operator.attention.flops * operator.count
                    found[str(operator.attention)] = (done + work, operator.attention)
        heaviest = sorted(found.values(), key=lambda f: f[0], reverse=True)
        return [shape for _, shape in heaviest[:SHAPES]]

    def _kernel_job(self, shape: AttentionShape) -> Job:
        sizes = (shape.batch, shape.heads, shape.q_tokens, shape.kv_tokens, shape.head_dim)
        name = self._name("kernels", *sizes)

        empty = KernelRun(name, self._case.name, load=load_average())

        def do() -> KernelRun:
            timer = Timer(self._device.device, 0.1, Deadline(KERNEL_S))
            dtype = getattr(torch, self._case.dtype)
            rates = measure_shape(timer, Shape(*sizes), dtype, implementations_on(timer.device))
            return replace(empty, rates=tuple(rates))

        return Job(empty, KERNEL_S, do)


def _compiles(settings: Set) -> bool:
    """Once turned on again, it would be compiled again."""
    return any(s.name == "compile" for s in settings)
