"""One pipeline, the one thread that owns it, and a queue in front of it that ends."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class Tuned(Protocol):
    """As much as is used here of what ``autotune.load`` and ``autotune.configure`` return."""

    pipe: Any
    plan: Any

    def __call__(self, prompt: str, **options: Any) -> Any: ...
    def explain(self) -> str: ...
    def undo(self) -> None: ...


@dataclass(frozen=True)
class Order:
    """What to draw. Sizes in pixels; what is ``None`` is as it was planned at start-up.

    Image ``i`` of ``count`` has the seed ``seed + i``, so that each can be drawn again alone.
    """

    prompt: str
    seed: int
    count: int = 1
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    ordered_at: float = field(default_factory=time.perf_counter)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the pipeline, but for those that were planned."""
        given = {"height": self.height, "width": self.width, "num_inference_steps": self.steps}
        named = {name: value for name, value in given.items() if value is not None}
        if self.count == 1:
            return named | {"seed": self.seed}
        seeds = range(self.seed, self.seed + self.count)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        return named | {"num_images_per_prompt": self.count, "generator": generators}


@dataclass(frozen=True)
class Drawn:
    """Images as PIL has them, the seconds that they waited for their turn, and those they took."""

    images: list[Any]
    waited_s: float
    drawn_s: float


class RefusedError(Exception):
    """A clear no, as HTTP says it.

    Attributes:
        status: HTTP's.
        outcome: What the counters call it.
        message: What is wrong.
        remedy: What to do about it.
        retry_after_s: When it is worth asking again; ``None`` where it is not.
    """

    def __init__(
        self, status: int, outcome: str, message: str, remedy: str, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.outcome = outcome
        self.message = message
        self.remedy = remedy
        self.retry_after_s = retry_after_s


class Drawer:
    """Draws one order after the other, in the order they came.

    Everything that touches the pipeline happens in one thread: loading, drawing and undoing. That
    thread's own queue is the queue; here it is only given an end.

    Args:
        load: Loads and configures the pipeline.
        places: Most orders accepted at a time, the one being drawn included.
    """

    def __init__(self, load: Callable[[], Tuned], places: int) -> None:
        self.places = places
        self._load = load
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="drawer")
        self._jobs: list[Future[Drawn]] = []
        self._tuned: Tuned | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.closing = False

    @property
    def tuned(self) -> Tuned:
        """The configured pipeline; to be called in the drawer's thread only."""
        assert self._tuned is not None, "the drawer was not started"
        return self._tuned

    async def start(self) -> None:
        """Load and configure.

        Raises:
            AutotuneError: the model cannot be read, or does not fit.
        """
        self._loop = asyncio.get_running_loop()
        self._tuned = await self._loop.run_in_executor(self._thread, self._load)

    async def stop(self) -> None:
        """Draw what was accepted, then put the pipeline back and end the thread."""
        self.closing = True
        await asyncio.get_running_loop().run_in_executor(self._thread, self._undo)
        self._thread.shutdown()

    def close(self, grace_s: float) -> None:
        """Accept no more; what has not begun in so many seconds is refused. For signal handlers."""
        self.closing = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.call_later, grace_s, self._drop_waiting)

    def waiting(self) -> int:
        """Orders accepted and not done, the one being drawn included."""
        self._jobs = [job for job in self._jobs if not job.done()]
        return len(self._jobs)

    def retry_after_s(self) -> int:
        """Seconds until all that is accepted should be drawn, by the plan's prediction."""
        seconds: float = self.tuned.plan.prediction.seconds
        return max(1, math.ceil(self.waiting() * seconds))

    def submit(self, order: Order) -> Future[Drawn]:
        """Accept an order. Cancelled before its turn, it is not drawn.

        Raises:
            RefusedError: the queue is full, or the server is stopping.
        """
        if self.closing:
            raise self.refusal_when_stopping()
        if self.waiting() >= self.places:
            raise RefusedError(
                503,
                "full",
                f"all {self.places} places of the queue are taken",
                "ask again later",
                self.retry_after_s(),
            )
        job = self._thread.submit(self._draw, order)
        self._jobs.append(job)
        return job

    def refusal_when_stopping(self) -> RefusedError:
        """What is said to orders that a stopping server does not draw any more."""
        return RefusedError(503, "stopping", "the server is stopping", "ask again later", 5)

    def _draw(self, order: Order) -> Drawn:
        begin = time.perf_counter()
        images = self.tuned(order.prompt, **order.options()).images
        end = time.perf_counter()
        return Drawn(images, begin - order.ordered_at, end - begin)

    def _drop_waiting(self) -> None:
        for job in self._jobs:
            job.cancel()  # leaves alone what is being drawn

    def _undo(self) -> None:
        if self._tuned is not None:
            self._tuned.undo()
