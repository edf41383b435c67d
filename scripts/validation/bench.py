"""The run: every case, every job of it, the most valuable first, within the time there is."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from msgspec.structs import replace

from autotune.decide.choose import choose
from autotune.decide.corrections import replayable
from autotune.decide.plan import Plan
from autotune.decide.predict import Predictor
from autotune.decide.search import execution_of
from autotune.errors import AutotuneError, first_line
from autotune.optimizations.execution import Execution
from autotune.probe.attention import Shape, implementations_on, measure_shape
from autotune.probe.deadline import Deadline
from autotune.probe.live import identity, profile_key
from autotune.probe.machine import Machine
from autotune.probe.measure import measure_machine
from autotune.probe.timing import Timer
from autotune.profile.store import load_profile
from autotune.tuner import Measured, device_name, machine_here, plan_loaded, remember_machine
from autotune.workload.workload import AttentionShape, Workload
from validation.cases import ASKED, CPU_CASES, GPU_CASES, TINY_CASES, WITHOUT, Case, Question
from validation.device import Device, load_average
from validation.measure import Draw, Subject, called_with, described
from validation.models import architecture_of, build_modules, copied, pipeline_around
from validation.peers import SWITCHES, TOOLS, Tool
from validation.recording import (
    Header,
    KernelRun,
    PeerRun,
    Pick,
    Prepared,
    Recording,
    SetRun,
    Started,
)
from validation.rules import RULES, usable
from validation.sets import Set, coherent_sets, covering, names_of, offered_names

TURNS = (0.7, 0.8, 0.9, 1.0)
"""First everything once; then the peers; then the sets again, in another order. Each turn must end
at that share of the time."""

PEERS_TURN = 1

PROBE_S = 30.0
"""At most: a machine that others use needs more than the usual nine."""

KERNEL_S = 1.0
"""For each shape of attention."""

SHAPES = 3
"""Of attention: those that compute most."""


class IncomparableError(Exception):
    """The recording was begun on another machine or by another clock."""


def probed(device: str | None) -> Measured:
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
    cases = CPU_CASES if device.kind == "cpu" else GPU_CASES
    return tuple(c for c in cases if not models or c.model in models)


class Job(NamedTuple):
    """Something to do once.

    Attributes:
        name: Of the job, in the recording.
        seconds: What it will take, about.
        do: Does it, and returns the line to record.
    """

    name: str
    seconds: float
    do: Callable[[float], Any]


class Bench:
    """Works through the cases.

    Args:
        recording: Where to.
        device: What is measured.
        clock: As ``Header.clock``.
        budget_s: Seconds on the wall; what is under way then is ended.
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
        self._slowness = 1.0

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
        self._note_the_dead()
        measured = self._machine()
        for turn, until in enumerate(TURNS):
            for index, case in enumerate(cases):
                share = case.weight / sum(c.weight for c in cases[index:])
                left = self._left_s(until)
                if left > 0:
                    self._case(case, measured, turn, time.monotonic() + share * left)
        self._say(f"{self.left_s:.0f} s left")

    def _note_the_dead(self) -> None:
        for job in self._recording.abandoned:
            case = job.partition(" | ")[0]
            self._recording.add(SetRun(job, case, (), None, error="the process died"))

    def _machine(self) -> Measured:
        measured = probed("cpu" if self._device.kind == "cpu" else None)
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
        if turn and case.name not in self._recording.prepared:
            return
        try:
            stage = _Stage(case, measured, self._recording, self._device)
        except (AutotuneError, torch.OutOfMemoryError) as error:
            self._say(f"{case.name}: left out: {first_line(error)}")
            return
        for job in stage.jobs(turn):
            if job.name not in self._recording.done:
                self._do(job, min(end - time.monotonic(), self.left_s))
        stage.close()

    def _do(self, job: Job, left_s: float) -> None:
        """A job that there is time for."""
        if job.seconds == 0:
            self._recording.add(job.do(0.0))
        elif job.seconds * self._slowness < left_s:
            self._recording.add(Started(job.name))
            self._say(f"{self.left_s:4.0f} s left  {job.name}")
            start = time.monotonic()
            self._recording.add(job.do(load_average()))
            took = (time.monotonic() - start) / job.seconds
            self._slowness += (max(1.0, took) - self._slowness) / 4


class _Stage:
    """One case, loaded: its jobs."""

    def __init__(
        self, case: Case, measured: Measured, recording: Recording, device: Device
    ) -> None:
        self._case = case
        self._device = device
        self._architecture = architecture_of(case.model)
        self._pipe = pipeline_around(
            self._architecture, build_modules(self._architecture, case.dtype, device.device)
        )
        device.clean()
        prepared = recording.prepared.get(case.name)
        if prepared is None:
            prepared = self._prepared(measured)
            recording.add(prepared)
        operators = measured.machine.operators | prepared.operators
        self.machine: Machine = replace(measured.machine, operators=operators)
        self.workload: Workload = prepared.workload
        self._cards = prepared.cards
        self._predictor = Predictor(self.machine, self.workload)
        plan = choose(self.machine, self.workload)
        self._subject = Subject(self._pipe, self.workload, plan, device)

    def close(self) -> None:
        """Let its weights go."""
        self._subject = None  # type: ignore[assignment]
        self._pipe = None
        self._device.clean()

    def _prepared(self, measured: Measured) -> Prepared:
        load = load_average()
        planned = plan_loaded(self._architecture, measured, self._case.ask, self._pipe)
        keys = {o.key for o in replayable(planned.workload)}
        known = planned.machine.operators
        plain = Predictor(planned.machine, planned.workload).predict(Execution())
        return Prepared(
            self._case.name,
            planned.workload,
            {key: known[key] for key in sorted(keys & known.keys())},
            self._device.cards(plain.needed_bytes, planned.machine),
            load,
            offered_names(planned.machine, planned.workload, WITHOUT),
        )

    # ---- jobs -----------------------------------------------------------------------------------

    def jobs(self, turn: int) -> Iterator[Job]:
        """In order of their value."""
        if turn == PEERS_TURN:
            yield from self._peer_jobs()
            return
        questions = [Question(card, *asked) for card in self._cards for asked in ASKED]
        plans = {q: choose(self.machine, self.workload, q.limits) for q in questions}
        if turn == 0:
            yield from (self._pick_job(q, p) for q, p in plans.items())
        sets = self._sets(list(plans.values()))
        capped = [] if turn or self._device.simulates else list(self._capped_jobs(plans))
        if capped:
            yield self._set_job((), None, turn)
            yield from capped[: len(self._cards)]
        for settings in sets if turn % 2 == 0 else reversed(sets):
            if turn == 0 or not _compiles(settings):
                yield self._set_job(settings, None, turn)
        if turn == 0:
            yield from self._kernel_jobs()
            yield from capped[len(self._cards) :]
        else:
            yield from self._whole_jobs(turn)

    def _sets(self, plans: list[Plan]) -> list[Set]:
        self._all = coherent_sets(self._predictor, WITHOUT)
        first: dict[Any, Set] = {(): ()}
        first |= {names_of(p.optimizations): p.optimizations for p in plans}
        for rule in RULES:
            for card in self._cards:
                rungs, _ = usable(rule.rungs(self.workload, card), self.machine, self.workload)
                first |= {names_of(r): r for r in rungs}
        return covering(self._predictor, self._all, list(first.values()))

    def _whole_jobs(self, turn: int) -> Iterator[Job]:
        """Sets taken at random: what phases measured in other sets add up to is checked on them."""
        generator = torch.Generator().manual_seed(turn)
        plain = [s for s in self._all if not _compiles(s)]
        for index in torch.randperm(len(plain), generator=generator)[:3].tolist():
            yield self._set_job(plain[index], None, turn)

    def _name(self, *parts: object) -> str:
        return " | ".join((self._case.name, *map(str, parts)))

    def _predicted_s(self, settings: Set) -> float:
        prediction = self._predictor.predict(execution_of(settings))
        return prediction.seconds + prediction.once_s

    def _pick_job(self, question: Question, plan: Plan) -> Job:
        name = self._name("pick", *question)

        def do(_: float) -> Pick:
            return Pick(
                name,
                self._case.name,
                *question,
                names_of(plan.optimizations),
                plan.fits,
                plan.prediction.mean_seconds,
                plan.prediction.needed_bytes,
            )

        return Job(name, 0.0, do)

    def _set_job(self, settings: Set, card: int | None, turn: int) -> Job:
        names = names_of(settings)
        name = self._name("set", ",".join(names) or "plain", card or "whole", turn)
        times = 1 if turn == 0 and not _compiles(settings) else 2
        peaks = turn == 0
        runs = 1 + times + 3 * (peaks and self._device.simulates)

        def do(load: float) -> SetRun:
            with self._device.card(card, self.machine):
                drawn = self._subject.drawn_with(settings, times, peaks)
            return SetRun(name, self._case.name, names, card, *drawn, load=load)

        return Job(name, runs * self._predicted_s(settings), do)

    def _capped_jobs(self, plans: dict[Question, Plan]) -> Iterator[Job]:
        """What was chosen for a small card, on that card; then what people try there.

        Nothing that is compiled: that takes little memory, and long.
        """
        tried: dict[tuple[Any, int], Set] = {}
        for quality, images in ASKED:
            for card in self._cards:
                chosen = plans[Question(card, quality, images)]
                if chosen.fits:
                    settings = chosen.optimizations
                    tried.setdefault((names_of(settings), card), settings)
        for card in self._cards:
            for rule in RULES:
                rungs, _ = usable(rule.rungs(self.workload, card), self.machine, self.workload)
                for rung in rungs:
                    tried.setdefault((names_of(rung), card), rung)
        for (_, card), settings in tried.items():
            if not _compiles(settings):
                yield self._set_job(settings, card, 0)

    # ---- others ---------------------------------------------------------------------------------

    def _peer_jobs(self) -> Iterator[Job]:
        if self._device.simulates:  # a CPU has no size that a tool could ask for
            others = (t for t in (*TOOLS, *SWITCHES) if not t.is_told_the_size)
            yield from (self._peer_job(tool, None) for tool in others)
        tools = [t for t in TOOLS if t.is_told_the_size or not self._device.simulates]
        for card in self._cards:
            yield from (self._peer_job(tool, card) for tool in tools)

    def _peer_job(self, tool: Tool, card: int | None) -> Job:
        name = self._name("peer", tool.name, card or "whole")
        seconds = (3 if card is None else 6) * self._predicted_s(())  # most refuse at once

        def do(load: float) -> PeerRun:
            made = PeerRun(name, self._case.name, tool.name, card, load=load)
            pipe = copied(self._pipe, self._architecture)
            chose: list[str] = []

            def apply() -> Draw:
                device = torch.device(device_name(self.machine))
                chose.append(tool.set_up(pipe, device, card))
                return called_with(pipe, self.workload)

            with self._device.card(card, self.machine):
                drawn = self._subject._replace(pipe=pipe).drawn(apply, 1, True, casts=True)
            self._device.clean()
            return replace(
                made,
                chose="".join(chose),
                first=drawn.first,
                runs=drawn.runs,
                error=drawn.error,
                ran_out=drawn.ran_out,
            )

        return Job(name, seconds, do)

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

        def do(load: float) -> KernelRun:
            timer = Timer(self._device.device, 0.1, Deadline(KERNEL_S))
            dtype = getattr(torch, self._case.dtype)
            calls = implementations_on(self._device.device)
            try:
                rates = measure_shape(timer, Shape(*sizes), dtype, calls)
            except (RuntimeError, MemoryError) as error:
                return KernelRun(name, self._case.name, error=described(error), load=load)
            return KernelRun(name, self._case.name, tuple(rates), load=load)

        return Job(name, KERNEL_S, do)


def _compiles(settings: Set) -> bool:
    """Once turned on again, it would be compiled again."""
    return any(s.name == "compile" for s in settings)
