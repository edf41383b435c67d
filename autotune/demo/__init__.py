"""The demonstration model that ships with the package: a tiny text-to-image diffusion pipeline.

It draws handwritten digits of 128 x 128 pixels from prompts such as "a handwritten seven", so
that the product can be tried with no download. ``scripts/train_demo_model.py`` trained it on the
digits that scikit-learn ships (UCI "Optical Recognition of Handwritten Digits", CC BY 4.0).
"""

from pathlib import Path


def model_path() -> Path:
    """Return the folder that ``StableDiffusionPipeline.from_pretrained`` loads."""
    return Path(__file__).resolve().parent / "model"
