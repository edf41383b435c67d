"""An optimization is a small value (``Setting``) and a registered handler (``Optimization``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from autotune.errors import OptimizationError
from autotune.optimizations.execution import Execution
from autotune.optimizations.rule import Rule
from autotune.optimizations.target import Target
from autotune.probe.machine import Machine, Value
from autotune.workload.workload import Workload

Parameter = bool | int | float | str
Parameters = dict[str, Parameter]
Undo = Callable[[], None]

Exactness = Literal["exact", "near-exact", "lossy"]
"""exact: the same mathematics, rounding may differ. near-exact: differences few people can see.
lossy: another image."""

EXACTNESS: tuple[Exactness, ...] = ("exact", "near-exact", "lossy")

QUALITIES = ("exact", "high", "balanced", "fast")
"""What a user offers of the quality; each level allows more than the one before."""


def quality_of(exactness: Exactness) -> str:
    """The strictest quality level that allows optimizations of this class."""
    return QUALITIES[EXACTNESS.index(exactness)]


class Setting(Value, frozen=True):
    """An optimization with its parameters: ``tome:ratio=0.3,max_downsample=1``."""

    name: str
    parameters: Parameters = {}

    def __str__(self) -> str:
        values = ",".join(f"{k}={v}" for k, v in self.parameters.items())
        return f"{self.name}:{values}" if values else self.name


class Optimization(ABC):
    """One way to run faster or smaller.

    A handler is stateless and importable without torch: only ``apply`` and ``before_image`` may
    import it. Subclasses set the class variables and say when they are unavailable.

    Attributes:
        name: As written on the command line.
        summary: What it does, in one sentence.
        relieves: Resource and phase it relieves, such as ``"vram of denoise"``.
        exactness: How the image may change.
        defaults: Parameters with their default values.
        before_moving: Whether it shrinks weights, so that it comes before they are moved.
        packs_from_files: Whether it takes layers that were left in their files as they are; before
            anything else, they are read.
        replaces: Whether it puts a component in the place of another, so that it comes first.
        rules: What it does not go with. The built-in ones have theirs in ``decide/rules.py``.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    relieves: ClassVar[str]
    exactness: ClassVar[Exactness] = "exact"
    defaults: ClassVar[Parameters] = {}
    before_moving: ClassVar[bool] = False
    packs_from_files: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    rules: ClassVar[tuple[Rule, ...]] = ()

    @abstractmethod
    def unavailable(self, machine: Machine, workload: Workload) -> str | None:
        """Why it cannot be used here (the missing package, hardware or effect), or ``None``."""

    @abstractmethod
    def configure(self, execution: Execution, parameters: Parameters) -> Execution:
        """The execution with this optimization on."""

    @abstractmethod
    def apply(self, pipe: Any, parameters: Parameters, device: str) -> Undo:
        """Turn it on, on a loaded pipeline, through diffusers' public methods.

        Args:
            pipe: The pipeline, wherever its weights are.
            parameters: Complete parameters.
            device: Where it will run, ``"cuda:0"``.

        Returns:
            A function that puts back what was there; called again, also after it was interrupted,
            it does what is left to do. Where ``apply`` fails, it has done so itself.
        """

    def found(self, pipe: Any) -> Parameters | None:
        """The parameters with which the pipeline already has it, set by hand; ``None`` if not."""
        return None

    def is_set(self, pipe: Any) -> bool:
        """Whether the pipeline already has it."""
        return self.found(pipe) is not None

    def worth_trying(self, machine: Machine, workload: Workload) -> tuple[Parameters, ...]:
        """Parameter values that the search should consider."""
        return (dict(self.defaults),)

    def quality(self, parameters: Parameters) -> str:
        """The strictest quality level that allows it with these parameters."""
        return quality_of(self.exactness)

    def before_image(self, pipe: Any, parameters: Parameters, seed: int) -> None:
        """What must be reset before each image (most need nothing)."""
        return

    def code(self, parameters: Parameters, target: Target) -> tuple[str, ...]:
        """The lines that a user would write instead, the pipeline being called ``pipe``.

        Lines that begin with ``from_pretrained: `` are arguments of that call, and those that
        begin with ``before_image: `` come before each image: see ``target.py``.
        """
        return (f"# {self.name} has no equivalent in plain diffusers",)

    def setting(self, parameters: Parameters | None = None) -> Setting:
        """This optimization with the given parameters over its defaults.

        Raises:
            OptimizationError: a parameter is unknown or of the wrong kind.
        """
        given = parameters or {}
        unknown = sorted(set(given) - set(self.defaults))
        if unknown:
            known = ", ".join(self.defaults) or "none"
            raise OptimizationError(
                f"{self.name} has no parameter {unknown[0]!r}", f"it has: {known}"
            )
        merged = {k: _convert(self.name, k, given.get(k, v), v) for k, v in self.defaults.items()}
        self.check(merged)
        return Setting(self.name, merged)

    def check(self, parameters: Parameters) -> None:
        """Raise ``OptimizationError`` for a value out of range."""
        return


@contextmanager
def undone_on_failure(undo: Undo) -> Iterator[None]:
    """What ``apply`` changes inside is put back when it cannot be completed."""
    try:
        yield
    except BaseException:
        insist(undo)
        raise


def insist(undo: Undo) -> None:
    """Undo; where that is stopped half-way, once more: what is undone already is not harmed.

    Raises:
        BaseException: it fails twice, or Ctrl-C came in between; then it is undone all the same.
    """
    try:
        undo()
    except BaseException as error:
        undo()
        if not isinstance(error, Exception):
            raise


def _convert(name: str, key: str, value: Parameter, default: Parameter) -> Parameter:
    """The value in the type of the default; command lines give text."""
    if isinstance(default, bool):
        text = str(value).lower()
        if text in ("true", "1", "yes", "on", "false", "0", "no", "off"):
            return text in ("true", "1", "yes", "on")
    elif isinstance(default, str):
        return str(value)
    else:
        try:
            number = float(value)
            if isinstance(default, float) or number == int(number):
                return type(default)(number)
        except (ValueError, OverflowError):
            pass
    raise OptimizationError(
        f"{name}:{key}={value} is not a valid value", f"write it like {name}:{key}={default}"
    )
