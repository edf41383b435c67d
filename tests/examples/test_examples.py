"""The examples in ``examples/``, run as their users run them, with the demo model."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import io
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import numpy
import pytest
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image

from autotune.demo import model_path
from tests.thorough import thoroughly

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPT = "a handwritten three"


@pytest.fixture(scope="module")
def warm_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder in which this machine is measured, quickly."""
    from autotune.probe.live import profile_key
    from autotune.probe.measure import measure_machine
    from autotune.tuner import remember_machine

    folder = tmp_path_factory.mktemp("examples-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOTUNE_CACHE", str(folder))
        machine = measure_machine("cpu", quick=True)
        remember_machine(profile_key(machine), machine)
    return folder


@pytest.fixture(autouse=True)
def _warm(warm_cache: Path, _own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOTUNE_CACHE", str(warm_cache))


@pytest.fixture(autouse=True)
def reached(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No example reaches for anything outside this machine."""
    outside: list[Any] = []
    connect = socket.socket.connect

    def connect_inside(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            outside.append(address)
            raise OSError(f"outside: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_inside)
    yield
    assert outside == []


@cache
def example(path: str) -> ModuleType:
    """An example's file as a module; those beside it can be imported as when it is run."""
    file = EXAMPLES / path
    name = f"example_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where annotations are looked up
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    return module


@pytest.fixture(scope="module")
def alone() -> Callable[..., NDArray[Any]]:
    """Draws with diffusers alone: one image, one seed, one call."""
    pipe = StableDiffusionPipeline.from_pretrained(model_path())
    pipe.set_progress_bar_config(disable=True)

    @cache
    def draw(seed: int, side: int = 64, steps: int = 1, prompt: str = PROMPT) -> NDArray[Any]:
        output = pipe(
            prompt,
            height=side,
            width=side,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(seed),
        )
        return pixels(output.images[0])

    return draw


def pixels(image: Any) -> NDArray[Any]:
    return numpy.asarray(image, numpy.int16)


def same(image: Any, wanted: NDArray[Any]) -> bool:
    """Whether it is that image, but for rounding: another seed's is off by far more."""
    drawn = pixels(image)
    return drawn.shape == wanted.shape and int(abs(drawn - wanted).max()) <= 1


def test_another_seed_is_another_image(alone: Callable[..., NDArray[Any]]) -> None:
    assert not same(alone(0), alone(1))


# ---- the script ----------------------------------------------------------------------------------

SMALL = ("--height", "64", "--width", "64", "--steps", "1")


def test_script(
    alone: Callable[..., NDArray[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "a handwritten seven"
    output = ["--output", str(tmp_path / "new")]
    assert example("script/draw.py").main([PROMPT, other, "--seed", "5", *SMALL, *output]) == 0
    assert "bottleneck" in capsys.readouterr().out
    assert same(Image.open(tmp_path / "new" / "5.png"), alone(5))
    assert same(Image.open(tmp_path / "new" / "6.png"), alone(6, prompt=other))


def test_script_says_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert example("script/draw.py").main([PROMPT, *SMALL, "--vram-limit", "1MiB"]) == 1
    said = capsys.readouterr().err
    assert "does not fit" in said
    assert "try: " in said


# ---- the server ----------------------------------------------------------------------------------

LIMIT = "24MiB"
TOO_LARGE = {"height": 256, "width": 256}
"""Needs 35 MiB to decode."""


class Running:
    """A server that runs, and how to talk to it."""

    def __init__(self, server: Any, settings: Any, thread: threading.Thread) -> None:
        port = server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.server = server
        self.settings = settings
        self.thread = thread
        self.drawer = server.config.app.state.drawer

    def client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits)

    def post(self, **wanted: Any) -> httpx.Response:
        body = {"prompt": PROMPT} | wanted
        return httpx.post(f"{self.url}/generate", json=body, timeout=120)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}")

    def outcomes(self) -> dict[str, int]:
        """``{"drawn": 92, "full": 8}``."""
        lines = self.get("/metrics").text.splitlines()
        counted = [line.split('"') for line in lines if line.startswith("autotune_requests_total")]
        return {name: int(value.strip("} ")) for _, name, value in counted}

    def stop(self) -> None:
        if not self.thread.is_alive():
            return
        self.server.handle_exit(signal.SIGTERM, None)
        self.thread.join(60)
        assert not self.thread.is_alive()


@contextmanager
def serving(**options: Any) -> Iterator[Running]:
    """The server of the example with the demo, on a port of its own, in a thread."""
    module = example("server/server.py")
    fixed = {"height": 64, "width": 64, "steps": 1, "vram_limit": LIMIT, "port": 0}
    settings = module.Settings(**fixed, verify="never", **options)
    server = module.Server(module.create_app(settings), settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    running = Running(server, settings, thread)
    try:
        yield running
    finally:
        running.stop()


def image_of(response: httpx.Response, place: int = 0) -> Any:
    return Image.open(io.BytesIO(base64.b64decode(response.json()["images"][place])))


def is_clear(response: httpx.Response) -> bool:
    """Whether a refusal says what is wrong, and what to do about it."""
    body = response.json()
    later = response.status_code != 503 or int(response.headers["Retry-After"]) >= 1
    return bool(body["error"]) and bool(body["remedy"]) and later


async def flood(running: Running, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    """All at the same time."""
    async with running.client() as client:
        sent = (client.post("/generate", json={"prompt": PROMPT} | body) for body in bodies)
        return await asyncio.gather(*sent)


def check(body: dict[str, Any], response: httpx.Response, alone: Callable[..., Any]) -> None:
    """It is the image that was asked for, or a clear no."""
    if response.status_code == 200:
        assert "height" not in body
        assert same(image_of(response), alone(body["seed"]))
    else:
        assert response.status_code in ((422, 503) if "height" in body else (503,))
        assert is_clear(response)


@thoroughly
def test_a_hundred_at_once_with_few_places(alone: Callable[..., NDArray[Any]]) -> None:
    bodies = [{"seed": i % 7} | (TOO_LARGE if i % 5 == 0 else {}) for i in range(100)]
    with serving(places=8) as running:
        responses = asyncio.run(flood(running, bodies))
        for body, response in zip(bodies, responses, strict=True):
            check(body, response, alone)
        statuses = Counter(r.status_code for r in responses)
        refused = [b for b, r in zip(bodies, responses, strict=True) if r.status_code == 503]
        assert statuses.total() == 100
        assert statuses[503] > 0
        assert running.outcomes() == {
            name: statuses[status]
            for name, status in (("drawn", 200), ("full", 503), ("impossible", 422))
            if statuses[status]
        }
        # Asked again, no more at a time than there are places, every one of them is settled.
        for start in range(0, len(refused), 8):
            part = refused[start : start + 8]
            for body, response in zip(part, asyncio.run(flood(running, part)), strict=True):
                assert response.status_code == (422 if "height" in body else 200)
                check(body, response, alone)
        assert running.outcomes() == {"drawn": 80, "full": statuses[503], "impossible": 20}
        refusal = running.post(**TOO_LARGE).json()
        assert "does not fit" in refusal["error"]
        assert "128x128" in refusal["remedy"]
        assert same(image_of(running.post(seed=1)), alone(1))  # usable as before


def test_a_hundred_at_once_with_places_for_all(alone: Callable[..., NDArray[Any]]) -> None:
    bodies = [{"seed": i % 7} for i in range(100)]
    with serving(places=100) as running:
        for body, response in zip(bodies, asyncio.run(flood(running, bodies)), strict=True):
            assert response.status_code == 200
            assert same(image_of(response), alone(body["seed"]))
        assert running.outcomes() == {"drawn": 100}
    pipe = running.drawer.tuned.pipe  # stopped: the pipeline is there, as it was
    output = pipe(
        PROMPT, height=64, width=64, num_inference_steps=1, generator=torch.manual_seed(3)
    )
    assert same(output.images[0], alone(3))


def test_what_the_server_answers(alone: Callable[..., NDArray[Any]]) -> None:
    with serving() as running:
        png = running.post(seed=4, format="png")
        assert png.headers["content-type"] == "image/png"
        assert png.headers["X-Seed"] == "4"
        assert same(Image.open(io.BytesIO(png.content)), alone(4))
        several = running.post(seed=4, count=3, height=64, width=64, steps=2)
        assert several.json()["seeds"] == [4, 5, 6]
        assert all(same(image_of(several, i), alone(4 + i, steps=2)) for i in range(3))
        chosen = running.post()
        assert same(image_of(chosen), alone(chosen.json()["seeds"][0]))
        plan = running.get("/plan").json()
        assert "bottleneck" in plan["explanation"]
        assert plan["plan"]["fits"] is True
        assert running.get("/healthz").json() == {"status": "ok"}
        assert running.get("/openapi.json").status_code == 200
        for wrong in ({"steps": 0}, {"promt": "?"}, {"height": 65}, {"count": 2, "format": "png"}):
            response = running.post(**wrong)
            assert response.status_code == 422
            assert is_clear(response)
        assert running.outcomes() == {"drawn": 3, "invalid": 4}


def test_memory_that_ran_out_is_a_reason_to_ask_again(alone: Callable[..., NDArray[Any]]) -> None:
    """Unlike what never fits: others may have left by then."""

    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with serving() as running:
        handle = running.drawer.tuned.pipe.unet.register_forward_pre_hook(run_out)
        response = running.post(seed=4)
        handle.remove()
        assert response.status_code == 503
        assert int(response.headers["Retry-After"]) >= 1
        assert is_clear(response)
        assert same(image_of(running.post(seed=4)), alone(4))
        assert running.outcomes() == {"drawn": 1, "ran_out": 1}


def until(condition: Callable[[], bool]) -> None:
    """Wait for what is bound to come."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def busy(running: Running, steps: int = 80) -> Iterator[list[httpx.Response]]:
    """The server draws for a second or more; the response is in the list afterwards."""
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(running.post(seed=0, steps=steps)))
    thread.start()
    until(lambda: running.drawer.waiting() == 1)
    yield answers
    thread.join()


def test_who_goes_away_is_not_drawn_for() -> None:
    with serving() as running:
        with busy(running):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{running.url}/generate", json={"prompt": PROMPT}, timeout=0.1)
            until(lambda: running.outcomes() == {"abandoned": 1})
            assert running.drawer.waiting() == 1  # the place is free again
        assert running.outcomes() == {"abandoned": 1, "drawn": 1}


def test_nobody_waits_longer_than_said() -> None:
    with serving() as running:
        running.settings.timeout_s = 0.2
        with busy(running) as answers:
            late = running.post()
            assert late.status_code == 503
            assert is_clear(late)
        assert answers[0].status_code == 504
        assert is_clear(answers[0])
        running.settings.timeout_s = 60
        assert running.post().status_code == 200
        assert running.outcomes() == {"timed_out": 2, "drawn": 1}


def test_a_server_that_stops_draws_or_refuses_what_it_accepted() -> None:
    with serving(grace_s=0) as running, busy(running) as answers:
        queued: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: queued.append(running.post())) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: running.drawer.waiting() == 4)
        running.stop()
        for thread in threads:
            thread.join()
        assert [r.status_code for r in queued] == [503] * 3
        assert all(is_clear(r) for r in queued)
        assert "stopping" in queued[0].json()["error"]
    assert answers[0].status_code == 200


def test_with_time_enough_all_is_drawn_before_the_server_stops() -> None:
    with serving(grace_s=60) as running, busy(running, steps=20) as answers:
        queued: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: queued.append(running.post()))
        thread.start()
        until(lambda: running.drawer.waiting() == 2)
        running.stop()
        thread.join()
    assert [r.status_code for r in (*answers, *queued)] == [200, 200]


def test_settings_of_the_command_line_and_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parse = example("server/server.py").parse_settings
    monkeypatch.setenv("SERVER_PLACES", "3")
    monkeypatch.setenv("SERVER_VRAM_LIMIT", "8GiB")
    settings = parse(["--places", "5", "--timeout-s", "2.5"])
    assert (settings.places, settings.vram_limit, settings.timeout_s) == (5, "8GiB", 2.5)
    with pytest.raises(SystemExit):
        parse(["--places", "0"])
    assert "places" in capsys.readouterr().err


# ---- the page ------------------------------------------------------------------------------------


def test_page(
    alone: Callable[..., NDArray[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    module = example("gradio/app.py")
    studio = module.Studio(module.load_pipeline("demo"), 64, 1, "16MiB")
    page = module.build(studio, 64)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    try:
        client = Client(url, verbose=False, download_files=str(tmp_path))

        def draw(size: int, quality: str) -> Any:
            return client.predict(PROMPT, size, quality, 2, api_name="/draw")

        image, seconds, account = draw(64, "exact")
        assert same(Image.open(image), alone(2))
        assert re.fullmatch(r"predicted \d+\.\d\d s, measured \d+\.\d\d s \(.+%\)", seconds)
        assert "64x64" in account
        with pytest.raises(AppError, match="does not fit"):
            draw(128, "exact")
        image, _, account = draw(64, "fast")  # configured anew, after what did not fit
        assert pixels(Image.open(image)).shape == alone(2).shape
        assert "64x64" in account
    finally:
        page.close()
        studio.undo()
