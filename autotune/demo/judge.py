"""Decides which digit an image shows, so that harm done to generated images can be counted.

The judge is a support vector machine on 8 x 8 grey images. It learns from real digits that went
through the same enlargement as the demonstration model's training images and back, and it is
checked on real digits held out from its own training and from the demonstration model's.

Nothing here imports torch. scikit-learn, a development dependency, is imported on first use.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DIGIT_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
)
"""The word for each digit, by its value."""

IMAGE_SIZE = 128
"""Width and height of a rendered digit, in pixels."""

GRID_SIZE = 8
"""Width and height of an original digit, in cells."""

CELL_SIZE = 12
"""Width and height in a rendered digit of one original cell, in pixels."""

MARGIN = (IMAGE_SIZE - GRID_SIZE * CELL_SIZE) // 2
"""Width of the empty border round a rendered digit, in pixels."""

_HELD_OUT_EVERY = 5
_PADDING = 2
_BLACK_BELOW = 0.4
_WHITE_ABOVE = 0.8

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class DigitSplit:
    """Real handwritten digits, parted into a training set and a held-out set.

    Attributes:
        train_images: Ink from 0 (none) to 1 (full), shape (count, 8, 8).
        train_labels: Digit values, shape (count,).
        held_out_images: As `train_images`, never used for training.
        held_out_labels: As `train_labels`.
    """

    train_images: FloatArray
    train_labels: IntArray
    held_out_images: FloatArray
    held_out_labels: IntArray


@dataclass(frozen=True)
class Placement:
    """How a digit is laid on its image.

    Attributes:
        rotation: Clockwise turn, in radians.
        scale: Enlargement beyond the usual one.
        shear: Horizontal slant, in pixels per pixel of height.
        shift_x: Move to the right, in pixels.
        shift_y: Move downwards, in pixels.
    """

    rotation: float = 0.0
    scale: float = 1.0
    shear: float = 0.0
    shift_x: float = 0.0
    shift_y: float = 0.0


UPRIGHT = Placement()
"""The placement of a digit that is not varied at all."""


def load_digit_split() -> DigitSplit:
    """Load scikit-learn's digits; every fifth sample of each digit is held out.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    dataset = _import_sklearn("sklearn.datasets").load_digits()
    images = (dataset.images / 16.0).astype(np.float32)
    labels = dataset.target.astype(np.int64)
    held_out = np.zeros(len(labels), dtype=bool)
    for digit in range(len(DIGIT_WORDS)):
        members = np.flatnonzero(labels == digit)
        held_out[members[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]] = True
    return DigitSplit(images[~held_out], labels[~held_out], images[held_out], labels[held_out])


def render_digit(digit: FloatArray, placement: Placement = UPRIGHT) -> FloatArray:
    """Enlarge one 8 x 8 digit smoothly and sharpen its outline.

    Args:
        digit: Ink from 0 to 1, shape (8, 8).
        placement: How the digit is turned, slanted and moved.

    Returns:
        Brightness from 0 (black ground) to 1 (white stroke), shape (128, 128).
    """
    padded = Image.fromarray(np.pad(digit, _PADDING).astype(np.float32))
    smooth = np.asarray(
        padded.transform(
            (IMAGE_SIZE, IMAGE_SIZE),
            Image.Transform.AFFINE,
            _image_to_grid(placement),
            Image.Resampling.BICUBIC,
        ),
        dtype=np.float32,
    )
    contrast = np.clip((smooth - _BLACK_BELOW) / (_WHITE_ABOVE - _BLACK_BELOW), 0.0, 1.0)
    return np.asarray(contrast * contrast * (3.0 - 2.0 * contrast), dtype=np.float32)


def shrink_images(images: Sequence[Image.Image]) -> FloatArray:
    """Undo the enlargement: average the pixels of each cell of the original grid.

    Args:
        images: Pictures of 128 x 128 pixels, in any mode that converts to grey.

    Returns:
        Brightness from 0 to 1, shape (count, 8, 8).

    Raises:
        ValueError: An image is not 128 x 128 pixels.
    """
    return np.stack([_shrink(_as_brightness(image)) for image in images])


class DigitJudge:
    """Recognises digits in pictures of 128 x 128 pixels.

    Attributes:
        held_out_accuracy: Share of the held-out real digits that the judge recognises, 0 to 1.
    """

    held_out_accuracy: float

    def __init__(self) -> None:
        """Train on the real digits; takes a few seconds.

        Raises:
            ImportError: scikit-learn is not installed.
        """
        split = load_digit_split()
        self._classifier: Any = _import_sklearn("sklearn.svm").SVC(C=10.0)
        self._classifier.fit(_features(split.train_images), split.train_labels)
        recognised = self._classifier.predict(_features(split.held_out_images))
        self.held_out_accuracy = float(np.mean(recognised == split.held_out_labels))

    def recognise(self, images: Sequence[Image.Image]) -> IntArray:
        """Return the digit seen in each picture.

        Args:
            images: Pictures of 128 x 128 pixels.

        Returns:
            Digit values, shape (count,).

        Raises:
            ValueError: An image is not 128 x 128 pixels.
        """
        if not images:
            return np.zeros(0, dtype=np.int64)
        flat = shrink_images(images).reshape(len(images), -1)
        return np.asarray(self._classifier.predict(flat), dtype=np.int64)

    def accuracy(self, images: Sequence[Image.Image], digits: Sequence[int]) -> float:
        """Return the share of pictures, 0 to 1, that show the digit they should.

        Args:
            images: Pictures of 128 x 128 pixels, at least one.
            digits: The digit asked for, for each picture.

        Raises:
            ValueError: There are no images, or not one digit for each, or one has another size.
        """
        if not images or len(images) != len(digits):
            raise ValueError(f"{len(images)} images and {len(digits)} digits: need one for each")
        return float(np.mean(self.recognise(images) == np.asarray(digits)))


def _features(digits: FloatArray) -> FloatArray:
    """Enlarge and shrink real digits; shape (count, 8, 8) to (count, 64)."""
    return np.stack([_shrink(render_digit(digit)).reshape(-1) for digit in digits])


def _image_to_grid(placement: Placement) -> tuple[float, float, float, float, float, float]:
    """Return the affine map from image pixels to cells of the padded grid, in PIL's order."""
    turn = np.array(
        [
            [np.cos(placement.rotation), np.sin(placement.rotation)],
            [-np.sin(placement.rotation), np.cos(placement.rotation)],
        ]
    )
    slant = np.array([[1.0, placement.shear], [0.0, 1.0]])
    matrix = slant @ turn / (CELL_SIZE * placement.scale)
    image_centre = np.array([placement.shift_x, placement.shift_y]) + IMAGE_SIZE / 2
    offset = (GRID_SIZE / 2 + _PADDING) - matrix @ image_centre
    a, b, d, e = (float(value) for value in matrix.reshape(-1))
    return a, b, float(offset[0]), d, e, float(offset[1])


def _as_brightness(image: Image.Image) -> FloatArray:
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"expected {IMAGE_SIZE} x {IMAGE_SIZE} pixels, got {image.size}")
    return np.asarray(image.convert("L"), dtype=np.float32) / 255.0


def _shrink(brightness: FloatArray) -> FloatArray:
    """Average each cell; shape (128, 128) to (8, 8)."""
    inner = brightness[MARGIN : IMAGE_SIZE - MARGIN, MARGIN : IMAGE_SIZE - MARGIN]
    cells = inner.reshape(GRID_SIZE, CELL_SIZE, GRID_SIZE, CELL_SIZE)
    return np.asarray(cells.mean(axis=(1, 3)), dtype=np.float32)


def _import_sklearn(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            "the digit judge needs scikit-learn; install it with: pip install scikit-learn"
        ) from error
