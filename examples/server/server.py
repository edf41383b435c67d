"""An image server: configured at start-up, one pipeline, a queue that ends, clear refusals.

    python examples/server/server.py --model demo --vram-limit 8GiB --places 32
    curl localhost:8000/generate -d '{"prompt": "a handwritten three", "format": "png"}' \\
        -H 'content-type: application/json' -o three.png

Every option can come from the environment instead: ``SERVER_VRAM_LIMIT=8GiB``.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import os
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from types import FrameType
from typing import Annotated, Any, Literal

import uvicorn
from drawing import Drawer, Drawn, Order, RefusedError, Tuned
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import autotune
from autotune.errors import MemoryShortageError


class Settings(BaseModel):
    """The server's options, of the command line or of the environment."""

    model_config = ConfigDict(extra="ignore")

    model: str = Field("demo", description="hub id, folder, or demo")
    height: int | None = Field(None, description="pixels to plan for; the model's by default")
    width: int | None = Field(None, description="pixels to plan for; the model's by default")
    steps: int | None = Field(None, ge=1, description="denoise steps unless a request says others")
    quality: str = Field("exact", description="exact, high, balanced or fast")
    vram_limit: str | None = Field(None, description="most device memory to use, such as 8GiB")
    verify: str = Field("auto", description="two short passes at start-up: auto, always or never")
    places: int = Field(32, ge=1, description="requests accepted at a time")
    timeout_s: float = Field(120, gt=0, description="most seconds that a request takes")
    grace_s: float = Field(20, ge=0, description="seconds that a stopping server goes on drawing")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, description="port to listen on")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """The settings of ``SERVER_MODEL``, ``SERVER_VRAM_LIMIT``, … and the defaults."""
        found = {name: environment.get(f"SERVER_{name.upper()}") for name in cls.model_fields}
        return cls.model_validate({name: text for name, text in found.items() if text is not None})

    def load(self) -> Tuned:
        """Plan before the weights are read, load, configure."""
        tuned: Tuned = autotune.load(
            self.model,
            height=self.height,
            width=self.width,
            steps=self.steps,
            quality=self.quality,
            vram_limit=self.vram_limit,
            verify=self.verify,
        )
        tuned.pipe.set_progress_bar_config(disable=True)
        return tuned


Pixels = Annotated[int, Field(ge=8, le=8192, multiple_of=8)]


class Wanted(BaseModel):
    """A request; what is left out is as the server was set up, and the seed drawn by lot."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=2000)
    seed: int | None = Field(None, ge=0, lt=2**53)
    height: Pixels | None = None
    width: Pixels | None = None
    steps: int | None = Field(None, ge=1, le=500)
    count: int = Field(1, ge=1, le=16)
    format: Literal["json", "png"] = "json"

    @model_validator(mode="after")
    def _one_png(self) -> Wanted:
        if self.format == "png" and self.count > 1:
            raise ValueError("a PNG is one image: ask for json, or for a count of 1")
        return self

    def order(self) -> Order:
        """The same for the drawer."""
        seed = secrets.randbits(32) if self.seed is None else self.seed
        return Order(self.prompt, seed, self.count, self.height, self.width, self.steps)


class Images(BaseModel):
    """A response: PNG files in base64, each with the seed that draws it again."""

    images: list[str]
    seeds: list[int]
    waited_s: float
    drawn_s: float


class Refusal(BaseModel):
    """Every response that is not an image."""

    error: str
    remedy: str


REFUSALS: dict[int | str, dict[str, Any]] = {
    422: {"model": Refusal, "description": "Impossible, or it does not fit in memory"},
    503: {
        "model": Refusal,
        "description": "Queue full, waited too long, ran out of memory, or stopping: Retry-After",
    },
    504: {"model": Refusal, "description": "Still being drawn when the time was up"},
}


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application, for this program and for ``uvicorn --factory server:create_app``."""
    settings = settings or Settings.from_environment()
    drawer = Drawer(settings.load, settings.places)
    outcomes: Counter[str] = Counter()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await drawer.start()
        try:
            yield
        finally:
            await drawer.stop()

    app = FastAPI(title="autotune image server", lifespan=lifespan)
    app.state.drawer = drawer

    @app.post("/generate", response_model=Images, responses=REFUSALS)
    async def generate(wanted: Wanted, request: Request) -> Response:
        order = wanted.order()
        drawn = await attend(drawer, order, request, settings.timeout_s)
        pngs = await asyncio.to_thread(encode, drawn)
        outcomes["drawn"] += 1
        if wanted.format == "png":
            return Response(pngs[0], media_type="image/png", headers={"X-Seed": str(order.seed)})
        images = Images(
            images=[base64.b64encode(png).decode() for png in pngs],
            seeds=list(range(order.seed, order.seed + order.count)),
            waited_s=drawn.waited_s,
            drawn_s=drawn.drawn_s,
        )
        return JSONResponse(images.model_dump())

    @app.get("/healthz", responses={503: {"model": Refusal}})
    async def healthz() -> dict[str, str]:
        if drawer.closing:
            raise drawer.refusal_when_stopping()
        return {"status": "ok"}

    @app.get("/plan")
    async def plan() -> dict[str, Any]:
        return {"explanation": drawer.tuned.explain(), "plan": drawer.tuned.plan.to_dict()}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse("".join(f"{line}\n" for line in measures(drawer, outcomes)))

    @app.exception_handler(RefusedError)
    async def refused(_: Request, no: RefusedError) -> JSONResponse:
        outcomes[no.outcome] += 1
        return refusal(no.status, no.message, no.remedy, no.retry_after_s)

    @app.exception_handler(autotune.AutotuneError)
    async def impossible(_: Request, error: autotune.AutotuneError) -> JSONResponse:
        if isinstance(error, MemoryShortageError) and error.__cause__ is not None:
            outcomes["ran_out"] += 1  # while it was drawn: the next try may find more memory
            return refusal(503, error.message, error.hint, drawer.retry_after_s())
        outcomes["impossible"] += 1
        return refusal(422, error.message, error.hint)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        outcomes["invalid"] += 1
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return refusal(422, f"{where}: {first['msg']}".removeprefix(": "), "see /docs")

    @app.exception_handler(Exception)  # the server's log has it in full
    async def failed(_: Request, error: Exception) -> JSONResponse:
        outcomes["failed"] += 1
        return refusal(500, f"drawing failed: {type(error).__name__}", "tell who runs this server")

    return app


async def attend(drawer: Drawer, order: Order, request: Request, timeout_s: float) -> Drawn:
    """Have an order drawn, for as long as anybody waits for it.

    What is being drawn is never interrupted: between two steps, some pipelines hold state that
    would leak into the next image.

    Raises:
        RefusedError: the queue is full, the time is up, nobody waits, or the server is stopping.
        AutotuneError: it does not fit, or is impossible.
    """
    job = drawer.submit(order)
    drawing = asyncio.wrap_future(job)
    gone = asyncio.ensure_future(disconnection(request))
    either: set[asyncio.Future[Any]] = {drawing, gone}
    try:
        await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        dropped = job.cancel()  # unless it has begun
    if drawing.done():
        if drawing.cancelled():
            raise drawer.refusal_when_stopping()
        return drawing.result()
    drawing.add_done_callback(lambda late: late.cancelled() or late.exception())
    if gone.done():
        raise RefusedError(499, "abandoned", "the client closed the connection", "stay")
    if dropped:
        message = f"waited {timeout_s:g} s, and its turn has not come"
        raise RefusedError(503, "timed_out", message, "ask again later", drawer.retry_after_s())
    raise RefusedError(504, "timed_out", f"not drawn within {timeout_s:g} s", "ask for less")


async def disconnection(request: Request) -> None:
    """Wait until the client has closed the connection; the request's body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def encode(drawn: Drawn) -> list[bytes]:
    """The images as PNG files."""
    files = []
    for image in drawn.images:
        file = io.BytesIO()
        image.save(file, "PNG")
        files.append(file.getvalue())
    return files


def refusal(
    status: int, message: str, remedy: str, retry_after_s: int | None = None
) -> JSONResponse:
    """A ``Refusal``, with the header that says when to ask again."""
    headers = None if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    body = Refusal(error=message, remedy=remedy)
    return JSONResponse(body.model_dump(), status, headers)


def measures(drawer: Drawer, outcomes: Mapping[str, int]) -> list[str]:
    """Counters and gauges in the text format of Prometheus."""
    counted = [
        f'autotune_requests_total{{outcome="{name}"}} {n}' for name, n in sorted(outcomes.items())
    ]
    gauges = [f"autotune_requests_waiting {drawer.waiting()}", f"autotune_places {drawer.places}"]
    return [*counted, *gauges]


class Server(uvicorn.Server):
    """Lets what is accepted be drawn when it is told to stop, for so long; then refuses it."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        super().__init__(uvicorn.Config(app, host=settings.host, port=settings.port))
        self._drawer: Drawer = app.state.drawer
        self._settings = settings

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal: SIGINT or SIGTERM."""
        self._drawer.close(self._settings.grace_s)
        super().handle_exit(sig, frame)


def parse_settings(arguments: Sequence[str] | None) -> Settings:
    """The command line over the environment; a mistake ends the program with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, option in Settings.model_fields.items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=option.description)
    given = {name: text for name, text in vars(parser.parse_args(arguments)).items() if text}
    try:
        environment = Settings.from_environment().model_dump(exclude_unset=True)
        return Settings.model_validate(environment | given)
    except ValidationError as error:
        first = error.errors()[0]
        parser.error(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until told to stop."""
    settings = parse_settings(arguments)
    Server(create_app(settings), settings).run()


if __name__ == "__main__":
    main()
