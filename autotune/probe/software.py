"""Which versions are installed, read from package metadata: nothing is imported."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from pathlib import Path

DISTRIBUTIONS = (
    "diffusers-autotune",
    "torch",
    "diffusers",
    "accelerate",
    "transformers",
    "xformers",
    "sageattention",
    "tomesd",
    "torchao",
    "safetensors",
    "nvidia-ml-py",
)


def installed_versions() -> dict[str, str]:
    """Distribution name → version of what is installed, Python first; absent ones are left out.

    ``cuda`` (or ``hip``, ``xpu``) is what the installed torch was built for, not what the driver
    offers.
    """
    versions = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        version = version_of(name)
        if version is not None:
            versions[name] = version
    return versions | torch_build()


def torch_build() -> dict[str, str]:
    """What the installed torch was built for: ``{"cuda": "13.0"}``, ``{"hip": …}``; empty for CPUs.

    Read from the text of ``torch/version.py``: importing torch costs a second, and the wheels on
    PyPI carry no local version tag.
    """
    try:
        text = Path(str(metadata.distribution("torch").locate_file("torch/version.py"))).read_text()
    except (metadata.PackageNotFoundError, OSError, UnicodeDecodeError):
        return {}
    found = re.findall(r"^(cuda|hip|xpu)\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, flags=re.MULTILINE)
    return dict(found)


def version_of(name: str) -> str | None:
    """The version of an installed distribution; ``None`` where it is absent."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    # Parsing all of the metadata, as importlib does, takes most of what a start spends here.
    line = re.search(r"^Version:[ \t]*(\S+)", found.read_text("METADATA") or "", re.MULTILINE)
    return line[1] if line else found.version
