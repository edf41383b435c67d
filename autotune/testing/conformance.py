"""The conformance suite: what every optimization promises, tried on small real pipelines.

It runs on the CPU: devices are moved to in name only, and ``standins`` has the rest. What only a
GPU does, such as copying while it computes, is not tried.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, ClassVar, NamedTuple

import msgspec
import torch

from autotune.decide.predict import Predictor
from autotune.decide.rules import PLACEMENTS, all_rules, transfer_dominates
from autotune.errors import AutotuneError
from autotune.optimizations import CATALOGUE
from autotune.optimizations.base import (
    QUALITIES,
    Optimization,
    Parameters,
    Setting,
    Undo,
    quality_of,
)
from autotune.optimizations.execution import Execution
from autotune.optimizations.plugins import flaw_of
from autotune.optimizations.rule import Clash, Rule
from autotune.optimizations.target import Target
from autotune.probe.machine import Machine
from autotune.probe.reference import load_machine
from autotune.testing.interruption import Interruption, OnPurpose, places
from autotune.testing.pipelines import build_flux, build_sd, call
from autotune.testing.standins import standing_in
from autotune.testing.state import differences, whole_state
from autotune.workload.architecture import describe_pipeline
from autotune.workload.live import pipeline_dtype
from autotune.workload.phases import trace_workload
from autotune.workload.workload import Request, Workload

ROUNDING = 1e-4
"""Largest difference of a pixel, of 1, between images that are drawn by the same mathematics."""

GAIN = 0.03
"""Share of the time that something must save to be worth having, as in the choice."""

Build = Callable[[], Any]
Active = tuple[Optimization, Setting]
"""An optimization and the setting that it is applied with."""


class _New(NamedTuple):
    """A pipeline that has drawn one image, since that leaves notes on it; the image; its state."""

    pipe: Any
    plain: torch.Tensor
    state: dict[str, Any]


class OptimizationConformance:
    """Tests of one optimization, for pytest: subclass it and name the optimization.

    Attributes:
        optimization: What is tested.
        pipelines: What it is tried on, wherever it is available; at least one must be.
        settings: Parameters to try, instead of those that it says are worth trying.
        side: Of the images drawn, in pixels; two are drawn at once.
        steps: Of the scheduler.
        machine: Says what is worth trying; of a GPU.
        partners: What it must go with, or clash with as the rules say; by default the catalogue.
    """

    optimization: ClassVar[Optimization]
    pipelines: ClassVar[Sequence[Build]] = (build_sd, build_flux)
    settings: ClassVar[Sequence[Parameters]] = ()
    side: ClassVar[int] = 64
    steps: ClassVar[int] = 2
    machine: ClassVar[Machine] = load_machine("rtx-3080-10gb")
    partners: ClassVar[Sequence[Optimization] | None] = None

    def draw(self, pipe: Any) -> torch.Tensor:
        """Images of one seed; override it for pipelines that are called in another way."""
        return call(pipe, self.steps, side=self.side, num_images_per_prompt=2)

    def setup_method(self) -> None:
        """Small pipelines are slower on several threads."""
        self._pipes: dict[Build, _New] = {}
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def teardown_method(self) -> None:
        """Restores the number of threads."""
        torch.set_num_threads(self._threads)

    # ---- what it says of itself -----------------------------------------------------------------

    def test_declares_itself(self) -> None:
        """Name, summary, class, quality, code and rules are complete, and settings read back."""
        optimization = self.optimization
        flaw = flaw_of(optimization)
        assert flaw is None, flaw
        assert inspect.getdoc(type(optimization)), "its class has no docstring"
        strictest = QUALITIES.index(quality_of(optimization.exactness))
        for setting in {str(s): s for _, s in self._all_settings()}.values():
            written = {k: str(v) for k, v in setting.parameters.items()}
            assert optimization.setting(dict(written)) == setting, f"{setting} reads back otherwise"
            quality = optimization.quality(setting.parameters)
            assert QUALITIES.index(quality) >= strictest, f"{setting} asks for {quality} only"
            lines = optimization.code(setting.parameters, _TARGET)
            assert lines and all(isinstance(line, str) and line for line in lines), "no code"
        for rule in optimization.rules:
            assert _is_sentence(rule.reason), f"rule {rule.id}: {rule.reason!r} is no sentence"

    def test_says_in_a_sentence_where_it_is_unavailable(self) -> None:
        """On machines with and without a GPU, and on each of the pipelines."""
        for machine in (load_machine("cpu-16-cores"), self.machine):
            for build in self.pipelines:
                reason = self.optimization.unavailable(machine, self._workload(build))
                assert reason is None or _is_sentence(reason), f"{reason!r} is no sentence"

    def test_is_planned_without_torch(self) -> None:
        """It is imported, asked and predicted in a process of its own."""
        build, setting = next(self._all_settings())
        given = (self._workload(build), self.machine, setting.parameters)
        cls = type(self.optimization)
        done = subprocess.run(
            [sys.executable, "-c", _PLAN, cls.__module__, cls.__qualname__],
            input=msgspec.json.encode(given),
            capture_output=True,
        )
        error = done.stderr.decode().strip().rpartition("\n")[2]
        assert done.returncode == 0, f"without torch: {error}"

    def test_configures_an_execution(self) -> None:
        """Another one than the default, the same when done twice, and one that can be predicted."""
        for build, setting in self._all_settings():
            once = self.optimization.configure(Execution(), setting.parameters)
            assert once != Execution(), f"{setting} changes nothing of the execution"
            twice = self.optimization.configure(once, setting.parameters)
            assert twice == once, f"{setting}, configured twice, is another execution"
            prediction = Predictor(self.machine, self._workload(build)).predict(once)
            assert prediction.seconds > 0, f"{setting} is predicted to take no time"

    # ---- what it does ---------------------------------------------------------------------------

    def test_draws_as_declared_and_leaves_nothing(self) -> None:
        """Images are equal within the declared class, repeatable, and as before once undone."""
        has_changed = False
        for build, settings in self._by_pipeline():
            pipe, plain, before = self._new(build)
            for setting in settings:
                random = torch.get_rng_state()
                with self._applied(pipe, self._with(setting)):
                    same = torch.equal(torch.get_rng_state(), random)
                    assert same, f"{setting} moves the global random state"
                    assert self.optimization.is_set(pipe), f"{setting} is not found on the pipeline"
                    image = self._image(pipe, self._with(setting))
                    is_last = setting == settings[-1]
                    again = self._image(pipe, self._with(setting)) if is_last else image
                assert torch.equal(image, again), f"{setting} draws two images of one seed"
                self._require_class(setting, plain, image)
                has_changed |= not torch.equal(image, plain)
                _require_as_before(before, pipe, f"{setting}, undone,")
                assert not self.optimization.is_set(pipe), f"{setting} is still found when undone"
            assert torch.equal(self.draw(pipe), plain), "another image is drawn once it is undone"
        if self.optimization.exactness == "lossy":
            assert has_changed, "it is declared lossy, and no image has changed"

    def test_applied_twice_is_applied_once(self) -> None:
        """And undone twice; a third time does nothing."""
        for build, settings in self._by_pipeline():
            setting = settings[-1]
            pipe, _, before = self._new(build)
            once = self._alone(build, self._with(setting))
            with standing_in((setting.name,)):
                undos = [_apply(pipe, self._with(setting)) for _ in range(2)]
                image = self._image(pipe, self._with(setting))
                for undo in (undos[1], undos[0], undos[0]):
                    undo()
            same = torch.allclose(image, once, rtol=0, atol=ROUNDING)
            assert same, f"{setting}, applied twice, draws another image"
            _require_as_before(before, pipe, f"{setting}, applied and undone twice,")

    def test_a_failure_half_way_leaves_the_pipeline_as_it_was(self) -> None:
        """Calls into the first pipeline's libraries fail, one after the other, in ``apply``."""
        build, settings = next(self._by_pipeline())
        setting = settings[-1]
        pipe, _, before = self._new(build)
        with standing_in((setting.name,)):
            self._interrupted(pipe, setting)  # the first time, modules may be imported
            for place in places(self._interrupted(pipe, setting)):
                self._interrupted(pipe, setting, place)
                _require_as_before(before, pipe, f"{setting}, failed at call {place},")

    def _interrupted(self, pipe: Any, setting: Setting, at: int = 0) -> int:
        """Apply with a failure at a call, and undo what is not stopped by it; the calls made."""
        interruption = Interruption(at)
        undo: Undo | None = None
        with suppress(OnPurpose, KeyboardInterrupt, AutotuneError), interruption:
            undo = _apply(pipe, self._with(setting))
        if undo is not None:
            undo()
        return interruption.calls

    # ---- what it goes with ----------------------------------------------------------------------

    def test_clashes_as_its_rules_say(self) -> None:
        """What rules forbid really raises, is overridden, is lost or gains nothing."""
        for rule, partner in self._forbidden():
            for build, active in self._side_by_side(partner):
                if rule.clash == "gains nothing":
                    self._require_no_gain(rule, build, active)
                if rule.clash in ("gains nothing", "hinders"):
                    continue
                orders = (active, tuple(reversed(active)))
                seen = set().union(*(self._clashes(build, order) for order in orders))
                # It may refuse, out loud, what would silently go wrong.
                assert seen & {rule.clash, "raises"}, (
                    f"rule {rule.id} says that {_names(active)} {rule.clash}; seen: "
                    f"{', '.join(sorted(seen)) or 'nothing'}"
                )

    def test_goes_with_every_other(self) -> None:
        """Whatever no rule forbids works together, in the order in which plans are applied."""
        for partner in self._others():
            pair = self._pair(partner)
            if any(rule.broken_by(pair) and not rule.by_hand for rule in self._rules()):
                continue
            for build, active in self._side_by_side(partner):
                seen = self._clashes(build, _ordered(active))
                assert not seen, (
                    f"{_names(active)} do not go together, and no rule says so: "
                    f"{', '.join(sorted(seen))}"
                )

    def _new(self, build: Build) -> _New:
        pipe = _built(build)
        plain = self.draw(pipe)
        return _New(pipe, plain, whole_state(pipe))

    # ---- pipelines and settings -----------------------------------------------------------------

    def _workload(self, build: Build) -> Workload:
        return _traced(build, self.side, self.steps)

    def _by_pipeline(self) -> Iterator[tuple[Build, tuple[Setting, ...]]]:
        """Where it is available, and what is worth trying there."""
        found = False
        for build in self.pipelines:
            settings = self._settings_of(self.optimization, build)
            if settings:
                found = True
                yield build, settings
        assert found, (
            f"{self.optimization.name} is available on none of the pipelines: name others in "
            "`pipelines`, or a larger `side`"
        )

    def _all_settings(self) -> Iterator[tuple[Build, Setting]]:
        for build, settings in self._by_pipeline():
            yield from itertools.product((build,), settings)

    def _settings_of(self, optimization: Optimization, build: Build) -> tuple[Setting, ...]:
        workload = self._workload(build)
        if optimization.unavailable(self.machine, workload) is not None:
            return ()
        given = self.settings if optimization is self.optimization else ()
        tried = given or optimization.worth_trying(self.machine, workload)
        return tuple(optimization.setting(p) for p in tried)

    def _with(self, setting: Setting) -> Active:
        return self.optimization, setting

    # ---- partners -------------------------------------------------------------------------------

    def _others(self) -> list[Optimization]:
        partners = CATALOGUE.values() if self.partners is None else self.partners
        return [p for p in partners if p.name != self.optimization.name]

    def _rules(self) -> tuple[Rule, ...]:
        """Its own, too, where it is not registered."""
        known = all_rules()
        return (*known, *(r for r in self.optimization.rules if r not in known))

    def _pair(self, partner: Optimization) -> frozenset[str]:
        return frozenset((self.optimization.name, partner.name))

    def _forbidden(self) -> Iterator[tuple[Rule, Optimization]]:
        for partner, rule in itertools.product(self._others(), self._rules()):
            if rule.broken_by(self._pair(partner)):
                yield rule, partner

    def _side_by_side(self, partner: Optimization) -> Iterator[tuple[Build, tuple[Active, ...]]]:
        """The first pipeline on which both are available, with the last setting of each."""
        for build in self.pipelines:
            mine, other = (self._settings_of(o, build) for o in (self.optimization, partner))
            if mine and other:
                yield build, (self._with(mine[-1]), (partner, other[-1]))
                return

    def _clashes(self, build: Build, active: tuple[Active, ...]) -> set[Clash]:
        """What is wrong with applying these in this order."""
        if build not in self._pipes:
            self._pipes[build] = self._new(build)
        pipe, plain, before = self._pipes.pop(build)
        try:
            with self._applied(pipe, *active):
                image = self._image(pipe, *active)
                set_ = [o.is_set(pipe) for o, _ in active]
        except Exception:  # libraries refuse each in their own way
            return {"raises"}
        _require_as_before(before, pipe, f"{_names(active)}, undone,")
        self._pipes[build] = _New(pipe, plain, before)  # as good as new for the next pair
        seen: set[Clash] = set() if all(set_) else {"overrides"}
        for one, other in itertools.permutations(active, 2):
            alone, without = self._alone(build, one), self._alone(build, other)
            if torch.equal(image, without) and not torch.equal(alone, plain):
                seen.add("is lost")
        if not torch.isfinite(image).all() or (
            all(o.exactness == "exact" for o, _ in active)
            and not torch.allclose(image, plain, rtol=0, atol=ROUNDING)
        ):
            seen.add("spoils")
        return seen

    def _require_no_gain(self, rule: Rule, build: Build, active: tuple[Active, ...]) -> None:
        predictor = Predictor(self.machine, self._workload(build))
        both = predictor.predict(_execution(active))
        if rule.while_transfer_dominates and not transfer_dominates(both.phases):
            return
        first = tuple(a for a in active if a[1].name in rule.first)
        alone = predictor.predict(_execution(first))
        assert both.seconds >= (1 - GAIN) * alone.seconds, (
            f"rule {rule.id} says that {_names(active)} gain nothing: {alone.seconds} s become "
            f"{both.seconds} s"
        )

    # ---- applying and drawing -------------------------------------------------------------------

    @contextmanager
    def _applied(self, pipe: Any, *active: Active) -> Iterator[None]:
        with standing_in(o.name for o, _ in active), ExitStack() as undos:
            for one in active:
                undos.callback(_apply(pipe, one))
            yield

    def _image(self, pipe: Any, *active: Active) -> torch.Tensor:
        for optimization, setting in active:
            optimization.before_image(pipe, setting.parameters, 0)
        return self.draw(pipe)

    def _alone(self, build: Build, *active: Active) -> torch.Tensor:
        """The image with these on a new pipeline; drawn once."""
        key = (
            build,
            self.side,
            self.steps,
            type(self).draw,
            *((type(o), str(s)) for o, s in active),
        )
        if key not in _IMAGES:
            pipe = _built(build)
            with self._applied(pipe, *active):
                _IMAGES[key] = self._image(pipe, *active)
        return _IMAGES[key]

    def _require_class(self, setting: Setting, plain: torch.Tensor, image: torch.Tensor) -> None:
        assert image.shape == plain.shape, f"{setting} draws images of another size"
        assert torch.isfinite(image).all(), f"{setting} draws no image"
        if self.optimization.exactness == "exact":
            error = float((image - plain).abs().max())
            assert error <= ROUNDING, f"{setting} is declared exact, and differs by {error:.2g}"


_TARGET = Target(
    "StableDiffusionPipeline", "sd", "float16", 0, ("text_encoder",), ("unet",), ("vae",)
)

_IMAGES: dict[tuple[object, ...], torch.Tensor] = {}

_PLAN = """
import importlib, operator, sys
sys.modules["torch"] = None  # importing it fails
import msgspec
from autotune.decide.predict import Predictor
from autotune.optimizations.execution import Execution
from autotune.optimizations.target import Target
from autotune.probe.machine import Machine
from autotune.workload.workload import Workload
Given = tuple[Workload, Machine, dict[str, bool | int | float | str]]
workload, machine, given = msgspec.json.decode(sys.stdin.buffer.read(), type=Given)
module, name = sys.argv[1:]
optimization = operator.attrgetter(name)(importlib.import_module(module))()
parameters = optimization.setting(given).parameters
optimization.unavailable(machine, workload)
optimization.worth_trying(machine, workload)
optimization.code(parameters, Target(workload.pipeline, workload.model, "float32"))
optimization.quality(parameters)
Predictor(machine, workload).predict(optimization.configure(Execution(), parameters))
"""


def _built(build: Build) -> Any:
    """A new pipeline; what its weights start from is random, but not of the user's numbers."""
    with torch.random.fork_rng(devices=()):
        return build()


@functools.cache
def _traced(build: Build, side: int, steps: int) -> Workload:
    pipe = _built(build)
    request = Request(side, side, 2, steps, 5.0, pipeline_dtype(pipe))
    return trace_workload(describe_pipeline(pipe), request)


def _apply(pipe: Any, active: Active) -> Undo:
    optimization, setting = active
    return optimization.apply(pipe, setting.parameters, "cpu")


def _execution(active: Iterable[Active]) -> Execution:
    execution = Execution()
    for optimization, setting in active:
        execution = optimization.configure(execution, setting.parameters)
    return execution


def _ordered(active: Iterable[Active]) -> tuple[Active, ...]:
    """As a plan is applied: first what shrinks weights, last what moves them."""
    return tuple(sorted(active, key=lambda a: (not a[0].before_moving, a[1].name in PLACEMENTS)))


def _names(active: Iterable[Active]) -> str:
    return " and ".join(str(s) for _, s in active)


def _is_sentence(text: str) -> bool:
    return 10 < len(text) < 160 and not text.endswith(".") and "\n" not in text


def _require_as_before(before: dict[str, Any], pipe: Any, what: str) -> None:
    left = differences(before, whole_state(pipe))
    shown = "; ".join(f"{k}: {v}" for k, v in left.items())
    assert not left, f"{what} leaves behind {shown[:500]}"
