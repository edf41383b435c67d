"""Every coherent pair of optimizations as a plan: applied, drawn with, failed and undone.

``scripts/check_pairs.py`` tries all of them on several pipelines; the tests try a sample.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import msgspec
import torch

from autotune.decide.choose import choose
from autotune.decide.plan import Plan
from autotune.decide.rules import broken_rule
from autotune.errors import AutotuneError
from autotune.optimizations import CATALOGUE, find
from autotune.optimizations.attention import KERNELS
from autotune.optimizations.base import Parameters, Setting, Undo
from autotune.optimizations.tiny_autoencoder import WEIGHTS
from autotune.probe.machine import Machine
from autotune.probe.reference import load_machine
from autotune.probe.software import is_importable
from autotune.runtime.apply import apply_plan
from autotune.testing.interruption import LIBRARIES, Interruption, OnPurpose, places
from autotune.testing.pipelines import BUILDERS, SIDE, arguments, call
from autotune.testing.standins import standing_in
from autotune.testing.state import differences, random_state, whole_state
from autotune.workload.architecture import describe_pipeline
from autotune.workload.phases import trace_workload
from autotune.workload.workload import Request, Workload

Pair = tuple[Setting, Setting]

TELLING: dict[str, tuple[Parameters, ...]] = {
    "tome": ({"ratio": 0.5, "max_downsample": 4},),
    "vae_tiling": ({"tile": 64},),
    "first_block_cache": ({"threshold": 0.5},),
    "device_map": ({"encoders": 1, "autoencoder": 0},),
    "group_offload": ({"level": "block"}, {"level": "leaf", "disk": True}),
}
"""Parameters that change something in small pipelines, where the defaults change little."""

ROUNDED = frozenset({"tome", "first_block_cache", "taylorseer_cache"})
"""Rounding decides what they compare (another token is merged, another step left out), or is
multiplied by what they extrapolate."""

OURS = ("autotune.optimizations.", "autotune.runtime.")

ERRORS: tuple[BaseException, ...] = (RuntimeError("on purpose"), KeyboardInterrupt())


DRAWING = ("draws", "fails_to_draw")
TRIALS = (
    "comes_and_goes",
    "step_fails",
    "interrupted",
    "undo_fails",
    "undo_interrupted",
    *DRAWING,
)
"""What is tried with a pair."""


class _Kind(NamedTuple):
    build: Callable[[], Any]
    steps: int
    dtype: str
    """That the request is judged in: some optimizations are for narrow weights only."""

    rounding: float = 1e-4
    """Largest difference of a pixel, of 1, between images drawn by the same mathematics."""

    side: int = SIDE
    about: str = ""
    """The optimization that it is there for: only pairs with that one."""


def _half_sdxl() -> Any:
    """In float16, so that its decode is widened."""
    return BUILDERS["sdxl"]().to(torch.float16)


KINDS = {
    "sd": _Kind(BUILDERS["sd"], 1, "bfloat16"),
    "sdxl": _Kind(BUILDERS["sdxl"], 1, "bfloat16"),
    "sdxl-half": _Kind(_half_sdxl, 1, "float16", 0.1, 32, "vae_bfloat16"),
    "sd3": _Kind(BUILDERS["sd3"], 2, "bfloat16"),
    "flux": _Kind(BUILDERS["flux"], 4, "bfloat16"),
    "wan": _Kind(BUILDERS["wan"], 4, "bfloat16"),
}
"""A U-Net of one text encoder and of two, transformers for images, one for videos."""


class Subject:
    """One small pipeline that pairs are tried on, one after the other.

    Args:
        kind: One of ``KINDS``.
        tiny: Folder of a distilled autoencoder for latents of four channels.

    Attributes:
        failed: How many failures were put in so far.
    """

    def __init__(self, kind: str, tiny: str = "") -> None:
        self.kind = kind
        self._tiny = tiny
        self.failed = 0
        self._images: dict[str, torch.Tensor] = {}
        self._renew()
        self._plan, self._machine, self._workload = _planned(kind)

    def _renew(self) -> None:
        """A new pipeline that has drawn one image, since that leaves notes on it."""
        with one_thread():  # as pairs are tried
            self.pipe = KINDS[self.kind].build()
            self.plain = self._draw()
            self.before = whole_state(self.pipe)

    def _draw(self, settings: tuple[Setting, ...] = (), **changes: Any) -> torch.Tensor:
        for setting in settings:
            find(setting.name).before_image(self.pipe, setting.parameters, 0)
        kind = KINDS[self.kind]
        return call(self.pipe, kind.steps, side=kind.side, **changes)

    # ---- which pairs ---------------------------------------------------------------------------

    def settings(self) -> list[Setting]:
        """Of each optimization that is available, with parameters that tell."""
        found = []
        for name, optimization in CATALOGUE.items():
            if self._is_available(name):
                tried = TELLING.get(name) or (optimization.worth_trying(*self._where)[0],)
                found += [optimization.setting({**p, **self._weights(name)}) for p in tried]
        return found

    @property
    def _where(self) -> tuple[Machine, Workload]:
        return self._machine, self._workload

    def _is_available(self, name: str) -> bool:
        if name == "tiny_autoencoder":  # the small autoencoders are none that it was distilled from
            known = type(self.pipe).__name__.removesuffix("Pipeline") in WEIGHTS
            return known and bool(self._tiny)
        if name == "quantization" and not is_importable("torchao"):
            return False
        return find(name).unavailable(*self._where) is None

    def _weights(self, name: str) -> Parameters:
        return {"weights": self._tiny} if name == "tiny_autoencoder" else {}

    def pairs(self) -> list[Pair]:
        """Those that no rule forbids in the order in which a plan is applied."""
        pairs = [(p, {s.name for s in p}) for p in itertools.combinations(self.settings(), 2)]
        about = {KINDS[self.kind].about} - {""}
        return [p for p, n in pairs if len(n) == 2 and about <= n and broken_rule(n) is None]

    # ---- what is tried -------------------------------------------------------------------------

    def problems(self, pair: Pair, trials: Collection[str] = TRIALS) -> Iterator[str]:
        """What goes wrong with a pair, in one line each; a new pipeline is made after each.

        Args:
            pair: As from ``pairs``.
            trials: Names of those to make, of ``TRIALS``.
        """
        with standing_in(s.name for s in pair), one_thread(), own_folder() as folder:
            for trial in trials:
                try:
                    found = list(getattr(self, f"_{trial}")(pair))
                except Exception as error:  # whatever a pair raises is what is looked for
                    found = [f"raises {type(error).__name__}: {error}".split("\n")[0]]
                found += [f"{path.name} is left on the disk" for path in folder.iterdir()]
                for problem in found:
                    yield f"{self.kind} {pair[0]} + {pair[1]}: {trial}: {problem}"
                if found:
                    self._renew()

    def _apply(self, settings: tuple[Setting, ...]) -> Undo:
        plan = msgspec.structs.replace(self._plan, optimizations=settings)
        return apply_plan(self.pipe, plan, "cpu")

    def _left(self, what: str) -> Iterator[str]:
        self.failed += "fail" in what
        left = differences(self.before, whole_state(self.pipe))
        if left:
            yield f"{what} leaves {_line(left)}"

    def _comes_and_goes(self, pair: Pair) -> Iterator[str]:
        """Either order is the same; undone twice is undone once; the user may move it between."""
        random, shapes = random_state(), []
        for settings in (pair, pair[::-1]):
            undo = self._apply(settings)
            yield from (f"{s} is not found" for s in self._not_found(pair))
            if random_state() != random:
                yield "the random state has moved"
            shapes.append(_shape(self.pipe))
            _moved(self.pipe)
            undo()
            yield from self._left("undone, it")
            undo()
            yield from self._left("undone twice, it")
        if shapes[0] != shapes[1]:
            yield f"another order is another pipeline: {_line(differences(*shapes))}"

    def _not_found(self, pair: Pair) -> list[Setting]:
        """What is on the disk has no layout."""
        from_disk = any(s.parameters.get("disk") for s in pair)
        lost = {"channels_last"} if from_disk else set()
        return [s for s in pair if s.name not in lost and not find(s.name).is_set(self.pipe)]

    def _step_fails(self, pair: Pair) -> Iterator[str]:
        """Each handler's, and the move to the device; on purpose and by Ctrl-C."""
        steps = [(type(find(s.name)), "apply") for s in pair] + [(type(self.pipe), "to")]
        for (cls, name), error in itertools.product(steps, ERRORS):
            with patch.object(cls, name, side_effect=error):
                yield from self._stopped(pair, f"{cls.__name__}.{name} failing with {error!r}")

    def _stopped(self, pair: Pair, what: str, at: int = 0) -> Iterator[str]:
        undo, failing = None, Interruption(at, LIBRARIES + OURS) if at else nullcontext()
        with suppress(AutotuneError, OnPurpose, KeyboardInterrupt), failing:
            undo = self._apply(pair)
        if undo is not None:
            undo()
        yield from self._left(what)

    def _interrupted(self, pair: Pair) -> Iterator[str]:
        """Calls into the libraries and into our own handlers fail in ``apply_plan``."""
        with Interruption(modules=LIBRARIES + OURS) as counted:
            undo = self._apply(pair)
        undo()
        for place in places(counted.calls):
            yield from self._stopped(pair, f"a failure at call {place}", place)

    def _undo_fails(self, pair: Pair) -> Iterator[str]:
        """One step's undo raises once, or insistently until it is asked again."""
        for setting, times in itertools.product(pair, (1, 2)):
            cls = type(find(setting.name))
            with patch.object(cls, "apply", _failing_to_undo(cls.apply, times)):
                undo = self._apply(pair)
                said = False
                try:
                    undo()
                except OnPurpose:
                    said = True
                    undo()
                if said != (times == 2):
                    yield f"{times} failures to undo {setting} are {'' if said else 'not '}said"
                yield from self._left(f"undone after {times} failures to undo {setting}, it")

    def _undo_interrupted(self, pair: Pair) -> Iterator[str]:
        undo = self._apply(pair)
        with Interruption(modules=LIBRARIES + OURS) as counted:
            undo()
        for place in places(counted.calls):
            undo = self._apply(pair)
            with suppress(OnPurpose, KeyboardInterrupt), Interruption(place, LIBRARIES + OURS):
                undo()
            undo()
            yield from self._left(f"undone after an undo that failed at call {place}, it")

    def _draws(self, pair: Pair) -> Iterator[str]:
        """The same image in either order, and as before once undone."""
        images = []
        for settings in (pair, pair[::-1]):
            undo = self._apply(settings)
            images.append(self._draw(settings))
            undo()
        yield from self._left("drawn with and undone, it")
        if not torch.equal(*images):
            yield f"another order draws another image: {_apart(*images)}"
        if not torch.isfinite(images[0]).all():
            yield "it draws no image"
        yield from self._other_than_alone(pair, images[0])
        if not torch.equal(self._draw(), self.plain):
            yield "undone, it draws another image than before"

    def _other_than_alone(self, pair: Pair, image: torch.Tensor) -> Iterator[str]:
        """What is exact changes nothing about what the other does alone."""
        inexact = [s for s in pair if find(s.name).exactness != "exact"]
        if len(inexact) < 2 and not {s.name for s in inexact} & ROUNDED:
            expected = self._alone(inexact[0]) if inexact else self.plain
            error = float((image.float() - expected.float()).abs().max())
            if error > KINDS[self.kind].rounding:
                yield f"it draws another image than {inexact or 'none'}: {error:.2g} apart"

    def _alone(self, setting: Setting) -> torch.Tensor:
        """The image with this one; drawn once."""
        if str(setting) not in self._images:
            with standing_in((setting.name,)):
                undo = self._apply((setting,))
                self._images[str(setting)] = self._draw((setting,))
                undo()
        return self._images[str(setting)]

    def _fails_to_draw(self, pair: Pair) -> Iterator[str]:
        undo = self._apply(pair)
        with suppress(OnPurpose):
            self._draw(pair, callback_on_step_end=_fail)
        undo()
        if not torch.equal(self._draw(), self.plain):
            yield "undone after a failed draw, it draws another image than before"
        yield from self._left("undone after a failed draw, it")


@functools.cache
def _planned(kind: str) -> tuple[Plan, Machine, Workload]:
    """Any plan for it, to put optimizations into; and what says which of them are available."""
    pipe = KINDS[kind].build()
    frames = min(arguments(pipe).get("num_frames", 1), 5)
    request = Request(128, 128, 2, 2, 5.0, KINDS[kind].dtype, frames)
    workload = trace_workload(describe_pipeline(pipe), request)
    machine = _with_kernels(load_machine("rtx-4090-24gb-x2"))
    return choose(load_machine("cpu-16-cores"), workload), machine, workload


def _with_kernels(machine: Machine) -> Machine:
    """A machine on which each of PyTorch's kernels was timed, and xFormers."""
    timed = next(r for r in machine.attention if r.flops_per_s)
    names = ("xformers", *(f"sdpa_{k}" for k in KERNELS))
    rates = [msgspec.structs.replace(timed, implementation=n, error=None) for n in names]
    return msgspec.structs.replace(machine, attention=(*machine.attention, *rates))


@contextmanager
def one_thread() -> Iterator[None]:
    """Small pipelines are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def own_folder() -> Iterator[Path]:
    """For weights that are offloaded to the disk: what they leave is not another process's."""
    with TemporaryDirectory() as folder, patch.object(tempfile, "tempdir", folder):
        yield Path(folder)


def _moved(pipe: Any) -> None:
    """As a user may; diffusers and PyTorch refuse where hooks place the weights."""
    with suppress(ValueError, NotImplementedError):
        pipe.to("cpu")


def _shape(pipe: Any) -> dict[str, Any]:
    """What the pipeline is like, hooks and processors by their classes."""
    found = {}
    for component, root in pipe.components.items():
        for path, module in getattr(root, "named_modules", tuple)():
            hooks = getattr(vars(module).get("_diffusers_hook"), "hooks", {})
            tensors = (*module._parameters.items(), *module._buffers.items())
            found[f"{component}.{path}"] = (
                type(module).__qualname__,  # tomesd makes its classes anew
                type(vars(module).get("_hf_hook")),
                type(vars(module).get("processor")),
                list(hooks),
                {n: (t.dtype, t.device, t.stride()) for n, t in tensors if t is not None},
            )
    return found


def _failing_to_undo(apply: Callable[..., Undo], times: int) -> Callable[..., Undo]:
    def applied(*arguments: Any) -> Undo:
        undo, failures = apply(*arguments), [OnPurpose("on purpose")] * times

        def fails_first() -> None:
            if failures:
                raise failures.pop()
            undo()

        return fails_first

    return applied


def _fail(*_: Any) -> Any:
    raise OnPurpose


def _line(left: dict[str, Any]) -> str:
    text = "; ".join(f"{k}: {v}" for k, v in left.items())
    return " ".join(text.split())[:300]


def _apart(one: torch.Tensor, other: torch.Tensor) -> str:
    return f"{float((one - other).abs().max()):.2g} apart"
