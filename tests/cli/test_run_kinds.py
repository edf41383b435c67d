"""``autotune run`` with pipelines of other kinds: videos, and pictures to start from."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]
import pytest
from PIL import Image
from typer.testing import CliRunner

from autotune.cli.app import app
from autotune.errors import AutotuneError
from autotune.testing.pipelines import BUILDERS, build_image, build_mask
from tests.cli.test_cli import schema
from tests.thorough import thoroughly


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small pipelines as ``save_pretrained`` writes them, and pictures."""
    where = tmp_path_factory.mktemp("kinds")
    for kind in ("animatediff", "sd-img2img", "sd", "svd"):
        BUILDERS[kind]().save_pretrained(where / kind)
    build_image(96).resize((160, 80)).save(where / "wide.jpg")
    build_mask(96).save(where / "mask.png")
    (where / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return where


@pytest.fixture(autouse=True)
def _here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One measurement for all."""
    monkeypatch.setenv("AUTOTUNE_CACHE", str(folder / "cache"))
    monkeypatch.chdir(tmp_path)


def drawn(model: Path, *arguments: str) -> dict:
    common = ("--steps", "4", "--seed", "1", "--verify", "never", "--json")
    done = CliRunner().invoke(app, ["run", str(model), *arguments, *common], catch_exceptions=False)
    shown = json.loads(done.stdout)
    jsonschema.validate(shown, schema("run.json"))
    assert {m["name"] for m in shown["measured"]} == {"encode", "denoise", "decode"}
    return shown


def size(file: str) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def test_a_video_by_the_files_ending(folder):
    shown = drawn(
        folder / "animatediff", "--prompt", "a cat", "--frames", "8", "--fps", "5", "-o", "a.gif"
    )
    assert (shown["images"], shown["videos"]) == ([], ["a.gif"])
    assert shown["workload"]["frames"] == 8
    with Image.open("a.gif") as gif:
        assert (gif.n_frames, gif.info["duration"], gif.size) == (8, 200, (64, 64))
    few = ("--frames", "4", "--batch", "2", "-o", "frames")
    shown = drawn(folder / "animatediff", "--prompt", "a cat", "--negative-prompt", "a dog", *few)
    assert shown["videos"] == ["frames-1", "frames-2"]
    for video in shown["videos"]:
        assert len(list(Path(video).iterdir())) == 4


@thoroughly
def test_a_video_from_a_picture_alone(folder):
    shown = drawn(folder / "svd", "--image", str(folder / "wide.jpg"), "-o", "a.gif")
    assert size(shown["videos"][0]) == (shown["workload"]["width"], shown["workload"]["height"])


def test_an_image_from_a_picture_in_its_proportions(folder):
    shown = drawn(
        folder / "sd-img2img", "--prompt", "a cat", "--image", str(folder / "wide.jpg"),
        "--call", "strength=0.5", "--batch", "2", "-o", "a.png",
    )  # fmt: skip
    assert shown["images"] == ["a-1.png", "a-2.png"]
    assert shown["workload"]["options"] == {"strength": 0.5}
    assert size("a-1.png") == size("a-2.png") == (96, 32)


def test_a_text_to_image_model_starts_from_a_picture_when_given_one(folder):
    given = ("--prompt", "a cat", "--image", str(folder / "wide.jpg"))
    shown = drawn(folder / "sd", *given, "--height", "64", "-o", "a.png")
    assert shown["workload"]["pipeline"] == "StableDiffusionImg2ImgPipeline"
    assert size("a.png") == (128, 64)
    shown = drawn(folder / "sd", *given, "--mask", str(folder / "mask.png"), "-o", "b.png")
    assert shown["workload"]["pipeline"] == "StableDiffusionInpaintPipeline"


BAD = {
    "no such image": ["sd-img2img", "--prompt", "a", "--image", "none.png"],
    "unreadable image": ["sd-img2img", "--prompt", "a", "--image", "broken.png"],
    "no image": ["sd-img2img", "--prompt", "a"],
    "mask without image": ["sd", "--prompt", "a", "--mask", "mask.png"],
    "image of no use": ["animatediff", "--prompt", "a", "--image", "wide.jpg"],
    "prompt of no use": ["svd", "--prompt", "a", "--image", "wide.jpg"],
    "negative prompt of no use": ["svd", "--negative-prompt", "a", "--image", "wide.jpg"],
    "no prompt": ["sd"],
    "video as image": ["animatediff", "--prompt", "a", "-o", "a.png"],
    "image as video": ["sd", "--prompt", "a", "-o", "a.gif"],
    "no ending at all": ["sd", "--prompt", "a", "-o", "a.txt"],
    "frames of an image": ["sd", "--prompt", "a", "--frames", "8"],
    "odd size": ["sd", "--prompt", "a", "--height", "63"],
    "call without a value": ["sd", "--prompt", "a", "--call", "strength"],
    "call of an option": ["sd", "--prompt", "a", "--call", "height=64"],
    "frame rate": ["animatediff", "--prompt", "a", "--fps", "0"],
}


@pytest.mark.parametrize("case", BAD, ids=lambda c: c.replace(" ", "-"))
def test_bad_input_is_refused_before_the_machine_is_measured(case, folder, tmp_path, monkeypatch):
    from autotune.cli import run

    monkeypatch.setattr(run, "this_machine", lambda _: pytest.fail("too late"))
    names = {f.name for f in folder.iterdir()}
    arguments = [str(folder / a) if a in names else a for a in BAD[case]]
    done = CliRunner().invoke(app, ["run", *arguments])
    assert isinstance(done.exception, AutotuneError), done.exception
    assert done.exception.hint
    assert not list(tmp_path.iterdir())


def test_an_unknown_argument_names_the_known_ones(folder):
    done = CliRunner().invoke(
        app, ["run", str(folder / "sd"), "--prompt", "a", "--call", "nonsense=3"]
    )
    assert isinstance(done.exception, AutotuneError)
    assert "nonsense" in done.exception.message
    assert "clip_skip" in done.exception.hint
