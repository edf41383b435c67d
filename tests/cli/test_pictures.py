"""Pictures that a pipeline starts from, and the files for what it draws."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from autotune.cli import outputs, pictures
from autotune.cli.outputs import files_for, save
from autotune.cli.pictures import (
    Size,
    needs_picture,
    picture_arguments,
    pipeline_for,
    read_picture,
    size_for,
)
from autotune.errors import RequestError
from autotune.workload.architecture import find_architecture

# ---- which pipeline, which arguments -------------------------------------------------------------


@pytest.mark.parametrize(
    ("pipeline", "mask", "expected"),
    [
        ("StableDiffusionXLPipeline", False, "StableDiffusionXLImg2ImgPipeline"),
        ("StableDiffusionXLPipeline", True, "StableDiffusionXLInpaintPipeline"),
        ("StableDiffusionXLImg2ImgPipeline", True, "StableDiffusionXLInpaintPipeline"),
        ("FluxPipeline", False, "FluxImg2ImgPipeline"),
        ("StableDiffusionUpscalePipeline", False, "StableDiffusionUpscalePipeline"),
        ("StableDiffusionXLControlNetPipeline", False, "StableDiffusionXLControlNetPipeline"),
        ("FluxKontextPipeline", False, "FluxKontextPipeline"),
        ("AnimateDiffPipeline", False, "AnimateDiffPipeline"),
        ("SomebodysOwnPipeline", False, "SomebodysOwnPipeline"),
    ],
)
def test_a_picture_chooses_the_pipeline_that_starts_from_one(pipeline, mask, expected):
    assert pipeline_for(pipeline, True, mask) == expected
    assert pipeline_for(pipeline, False, False) == pipeline


@pytest.mark.parametrize(
    ("pipeline", "argument", "needed"),
    [
        ("StableDiffusionImg2ImgPipeline", "image", True),
        ("StableDiffusionInpaintPipeline", "mask_image", True),
        ("StableDiffusion3ControlNetPipeline", "control_image", True),
        ("StableDiffusionUpscalePipeline", "image", True),
        ("StableVideoDiffusionPipeline", "image", True),
        ("WanImageToVideoPipeline", "image", True),
        ("QwenImageEditPipeline", "image", True),
        ("FluxFillPipeline", "mask_image", True),
        ("FluxKontextPipeline", "image", False),
        ("Flux2Pipeline", "image", False),
        ("StableDiffusionPipeline", "image", False),
    ],
)
def test_what_cannot_do_without_a_picture(pipeline, argument, needed):
    assert needs_picture(pipeline, argument) is needed


def test_pictures_are_scaled_to_what_is_drawn():
    picture, mask = Image.new("RGB", (100, 50)), Image.new("L", (10, 10))
    given = picture_arguments("StableDiffusionXLInpaintPipeline", picture, mask, Size(64, 128))
    assert {name: p.size for name, p in given.items()} == {
        "image": (128, 64),
        "mask_image": (128, 64),
    }
    upscaled = picture_arguments("StableDiffusionUpscalePipeline", picture, None, Size(256, 512))
    assert upscaled["image"].size == (128, 64)
    control = picture_arguments("FluxControlNetPipeline", picture, None, Size(None, None))
    assert control["control_image"].size == (100, 50)


@pytest.mark.parametrize(
    ("pipeline", "image", "mask", "said"),
    [
        ("StableDiffusionImg2ImgPipeline", None, None, "--image FILE"),
        ("StableDiffusionInpaintPipeline", "RGB", None, "--mask FILE"),
        ("AnimateDiffPipeline", "RGB", None, "leave it out"),
        ("FluxKontextPipeline", "RGB", "L", "leave it out"),
    ],
)
def test_pictures_that_do_not_fit_the_pipeline(pipeline, image, mask, said):
    given = (mode and Image.new(mode, (8, 8)) for mode in (image, mask))
    with pytest.raises(RequestError, match=said):
        picture_arguments(pipeline, *given, Size(None, None))


@pytest.mark.parametrize(
    ("model", "picture", "asked", "drawn"),
    [
        ("sdxl-refiner", (4000, 4000), Size(None, None), Size(1024, 1024)),
        ("sdxl-refiner", (300, 300), Size(None, None), Size(1024, 1024)),
        ("sdxl-refiner", (4000, 3000), Size(None, None), Size(896, 1184)),
        ("sdxl-refiner", (4000, 2000), Size(512, None), Size(512, 1024)),
        ("sdxl-refiner", (4000, 2000), Size(None, 512), Size(256, 512)),
        ("sdxl-refiner", (4000, 2000), Size(640, 640), Size(640, 640)),
        ("sdxl-refiner", (20000, 1), Size(512, None), Size(512, 10240000)),
        ("sd-x4-upscaler", (128, 64), Size(None, None), Size(256, 512)),
        ("sd-x4-upscaler", (130, 64), Size(None, None), Size(256, 512)),
    ],
)
def test_what_is_drawn_has_the_pictures_proportions(model, picture, asked, drawn):
    assert size_for(find_architecture(model), Image.new("1", picture), asked) == drawn


def test_without_a_picture_the_size_is_as_asked():
    assert size_for(find_architecture("sdxl"), None, Size(512, None)) == Size(512, None)


def test_a_photograph_is_read_upright(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (40, 20)).save(tmp_path / "photo.jpg", exif=exif)
    assert read_picture(tmp_path / "photo.jpg").size == (20, 40)
    Image.new("RGBA", (4, 4)).save(tmp_path / "mask.png")
    assert read_picture(tmp_path / "mask.png", "L").mode == "L"


def test_what_is_no_picture(tmp_path: Path):
    (tmp_path / "text.png").write_text("not one")
    (tmp_path / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    for file in (tmp_path, tmp_path / "none.png", tmp_path / "text.png", tmp_path / "half.png"):
        with pytest.raises(RequestError, match=file.name) as caught:
            read_picture(file)
        assert caught.value.hint


# ---- files ---------------------------------------------------------------------------------------


@pytest.fixture
def encoders(monkeypatch: pytest.MonkeyPatch):
    """Say which video packages are installed."""

    def set_installed(*names: str) -> None:
        monkeypatch.setattr(outputs, "is_importable", lambda module: module in names)

    return set_installed


FRAMES = [Image.new("RGB", (16, 16), (i * 20, 0, 0)) for i in range(5)]


def test_files_are_named_and_numbered(tmp_path: Path, encoders, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert files_for(None, False, 1) == [Path("autotune.png")]
    assert files_for(Path("a.jpg"), False, 2) == [Path("a-1.jpg"), Path("a-2.jpg")]
    assert files_for(Path("frames"), True, 2) == [Path("frames-1"), Path("frames-2")]
    encoders()
    assert files_for(None, True, 1) == [Path("autotune.gif")]
    encoders("imageio", "imageio_ffmpeg")
    assert files_for(None, True, 1) == [Path("autotune.mp4")]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("installed", "suffix", "can"),
    [
        ((), ".mp4", False),
        (("cv2",), ".mp4", True),
        (("cv2",), ".webm", False),
        (("imageio",), ".mp4", False),
        (("imageio", "cv2"), ".mp4", False),  # diffusers asks imageio where there is one
        (("imageio", "imageio_ffmpeg"), ".webm", True),
    ],
)
def test_a_missing_encoder_is_named_before_the_work(tmp_path, encoders, installed, suffix, can):
    encoders(*installed)
    target = tmp_path / f"video{suffix}"
    if can:
        assert files_for(target, True, 1) == [target]
        return
    with pytest.raises(RequestError, match="diffusers-autotune\\[video\\]"):
        files_for(target, True, 1)


def test_names_that_do_not_fit(tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "0001.png").touch()
    (tmp_path / "folder.png").mkdir()
    for name, is_video in (
        ("a.png", True),
        ("a.gif", False),
        ("a", False),
        ("full", True),
        ("folder.png", False),
        ("none/a.png", False),
    ):
        with pytest.raises(RequestError) as caught:
            files_for(tmp_path / name, is_video, 1)
        assert caught.value.hint
    with pytest.raises(RequestError):
        outputs.check_suffix(Path("a.txt"))
    outputs.check_suffix(Path("folder"))


def test_a_video_as_gif_and_as_frames(tmp_path: Path):
    empty = tmp_path / "frames-2"
    empty.mkdir()
    files = [tmp_path / "a.gif", tmp_path / "frames", empty]
    assert save([FRAMES] * 3, files, fps=10) == files
    with Image.open(files[0]) as gif:
        assert (gif.n_frames, gif.info["duration"]) == (5, 100)
    for folder in files[1:]:
        names = sorted(f.name for f in folder.iterdir())
        assert names == ["0001.png", "0002.png", "0003.png", "0004.png", "0005.png"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.gif", "frames", "frames-2"]


def test_fewer_drawn_than_asked(tmp_path: Path):
    files = [tmp_path / "a-1.png", tmp_path / "a-2.png"]
    assert save(FRAMES[:1], files, fps=10) == files[:1]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    for name in ("a.png", "a.gif", "frames"):
        with pytest.raises(RequestError, match="No space left"):
            save([FRAMES if name != "a.png" else FRAMES[0]], [tmp_path / name], fps=10)
    assert not list(tmp_path.iterdir())


def test_the_module_knows_what_diffusers_has():
    """The names of arguments and pipelines above are diffusers', which may rename them."""
    for pipeline in ("StableDiffusionXLImg2ImgPipeline", "FluxInpaintPipeline"):
        assert "image" in (pictures.parameters_of(pipeline) or {})
