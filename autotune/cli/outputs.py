"""Files for images and videos: checked before the work, written whole or not at all."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from autotune.errors import RequestError, first_line
from autotune.probe.software import is_importable

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".webm", ".gif")


def check_suffix(output: Path | None) -> None:
    """Refuse what can be neither an image nor a video, before it is known which is drawn.

    Raises:
        RequestError: the name ends in something else.
    """
    if output is not None and output.suffix.lower() not in ("", *IMAGE_SUFFIXES, *VIDEO_SUFFIXES):
        raise RequestError(
            f"{output} is no image or video file name",
            f"end it in {', '.join((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))}, "
            "or give a folder for the frames of a video",
        )


def files_for(output: Path | None, is_video: bool, count: int) -> list[Path]:
    """The files (for frames: folders) to write, after making sure that they can be written.

    Args:
        output: What the user named; several are numbered.
        is_video: What is drawn.
        count: Images or videos.

    Raises:
        RequestError: the folder is missing or not writable, the name does not fit what is drawn,
            or the packages that encode a video are not installed.
    """
    if output is None:
        output = Path("autotune.png")
        if is_video:
            output = Path("autotune.mp4" if _can_encode(".mp4") else "autotune.gif")
    _check_kind(output, is_video)
    folder = output.parent
    if not folder.is_dir():
        raise RequestError(f"there is no folder {folder}", f"mkdir -p {folder}")
    _require_writable(folder)
    if count == 1:
        files = [output]
    else:
        files = [output.with_name(f"{output.stem}-{i + 1}{output.suffix}") for i in range(count)]
    for file in files:
        _check_folder(file, is_frames=not output.suffix)
    return files


def _check_kind(output: Path, is_video: bool) -> None:
    suffix = output.suffix.lower()
    fitting = ("", *VIDEO_SUFFIXES) if is_video else IMAGE_SUFFIXES
    if suffix not in fitting:
        what, ends = ("a video", VIDEO_SUFFIXES) if is_video else ("an image", IMAGE_SUFFIXES)
        folder = ", or give a folder for its frames" if is_video else ""
        raise RequestError(
            f"{output} is no file name for {what}", f"end it in {', '.join(ends)}{folder}"
        )
    if not _can_encode(suffix):
        raise RequestError(
            f"{suffix} files are written by imageio and imageio-ffmpeg, which are not installed",
            "pip install 'diffusers-autotune[video]', or end the name in .gif, or give a folder",
        )


def _can_encode(suffix: str) -> bool:
    """diffusers writes MP4 with imageio, or with OpenCV where there is no imageio."""
    if suffix not in (".mp4", ".webm"):
        return True
    if is_importable("imageio"):
        return is_importable("imageio_ffmpeg")
    return suffix == ".mp4" and is_importable("cv2")


def _check_folder(file: Path, is_frames: bool) -> None:
    if is_frames and file.exists() and (not file.is_dir() or any(file.iterdir())):
        raise RequestError(f"{file} holds something already", "name a folder that does not exist")
    if not is_frames and file.is_dir():
        raise RequestError(f"{file} is a folder", "give a file name with -o")


def _require_writable(folder: Path) -> None:
    """Find out before the work, not after it."""
    try:
        handle, probe = tempfile.mkstemp(dir=folder)
        os.close(handle)
        Path(probe).unlink()
    except OSError as error:
        raise RequestError(
            f"cannot write to {folder}: {error.strerror}", "choose another folder with -o"
        ) from error


# ---- writing ------------------------------------------------------------------------------------


def save(drawn: Sequence[Any], files: list[Path], fps: int) -> list[Path]:
    """Write images, or videos as lists of images.

    Returns:
        The files written: some pipelines draw fewer than they are asked for.

    Raises:
        RequestError: a file cannot be written.
    """
    for item, file in zip(drawn, files, strict=False):
        try:
            if file.suffix:
                _write_file(file, _writer(item, file.suffix.lower(), fps))
            else:
                _write_frames(item, file)
        except (OSError, RuntimeError) as error:  # encoders raise either
            reason = getattr(error, "strerror", None) or first_line(error)
            raise RequestError(
                f"cannot write {file}: {reason}",
                "make room, or choose another folder with -o; the same --seed draws it again",
            ) from error
    return files[: len(drawn)]


def _writer(item: Any, suffix: str, fps: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        if suffix == ".mp4":
            from diffusers.utils import export_to_video

            # Two: H.264 takes even sides, and frames are not scaled for less.
            export_to_video(item, str(path), fps=fps, macro_block_size=2)
        elif suffix == ".webm":
            import numpy

            imageio: Any = importlib.import_module("imageio")  # optional, and untyped
            frames = [numpy.asarray(frame) for frame in item]
            options = {"codec": "libvpx-vp9", "macro_block_size": 2, "ffmpeg_log_level": "error"}
            imageio.mimwrite(path, frames, fps=fps, **options)
        elif suffix == ".gif":
            from diffusers.utils import export_to_gif

            export_to_gif(item, str(path), fps=fps)
        else:
            item.save(path)

    return write


def _write_file(file: Path, write: Callable[[Path], None]) -> None:
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=file.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_frames(frames: list[Any], folder: Path) -> None:
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        for index, frame in enumerate(frames):
            frame.save(temporary / f"{index + 1:04}.png")
        temporary.chmod(0o755)
        if folder.exists():
            folder.rmdir()  # it is empty
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
