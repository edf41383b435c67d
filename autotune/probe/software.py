"""What is installed, read from package metadata and found on the path: nothing is imported."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.version import InvalidVersion, Version

DISTRIBUTIONS = (
    "diffusers-autotune",
    "torch",
    "diffusers",
    "accelerate",
    "transformers",
    "safetensors",
    "nvidia-ml-py",
)

OPTIONAL = ("xformers", "sageattention", "tomesd", "torchao", "bitsandbytes", "gguf", "triton")
"""What optimizations need. Their modules have the same names; ``triton`` comes in distributions of
other names, too, whose version is not looked up."""

COMPILERS = ("g++", "clang++", "cl")
"""For C++: torch.compile on a CPU needs one of them."""

_MAPPING = {"diffusers": Version("0.42"), "transformers": Version("5"), "torch": Version("2")}
"""Versions from which weights were seen to stay mapped (``tests/workload/test_files.py``); what
runs with PyTorch 1 is older."""


def maps_files(system: str, versions: Mapping[str, str]) -> bool:
    """Whether weights stay mapped from their files as they are read: known of Linux alone.

    Args:
        system: Its name, ``"Linux 6.1"``.
        versions: Distribution name → version. What is not among them is taken to be late: reference
            machines say only what is old. What is no version number is not known to map.
    """
    found = {name: versions[name] for name in _MAPPING if name in versions}
    return system.startswith("Linux") and all(_is_from(v, _MAPPING[n]) for n, v in found.items())


def _is_from(text: str, least: Version) -> bool:
    try:
        return Version(text) >= least
    except InvalidVersion:
        return False


def installed_versions() -> dict[str, str]:
    """Distribution name → version of what is installed, Python first; absent ones are left out.

    What optimizations need is never left out: where it is absent, its version is empty, so that
    this differs from what nobody looked for. ``cuda`` (or ``hip``, ``xpu``) is what the installed
    torch was built for, not what the driver offers. ``c++`` is the name of the first compiler for
    it on the path. A version that nobody tells is ``"?"``.
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= {name: version_of(name) for name in DISTRIBUTIONS}
    versions = {name: version for name, version in found.items() if version}
    versions |= {n: version_of(n) or ("?" if is_importable(n) else "") for n in OPTIONAL}
    versions["c++"] = _compiler(os.environ.get("PATH")) or ""
    return versions | torch_build()


@functools.cache  # asked several times at each start, and it looks into every folder of the path
def _compiler(path: str | None) -> str | None:
    """The name of the first compiler for C++ on that search path."""
    return next((name for name in COMPILERS if shutil.which(name, path=path)), None)


def is_importable(module: str) -> bool:
    """Whether importing it would find code, as far as that is known without doing it.

    A stub that somebody put in a module's place has none, nor has a bare folder of its name: where
    one starts in a directory with checkouts, Python takes each for a namespace package.
    """
    try:
        spec = find_spec(module)
    except ValueError:  # it is in sys.modules without a spec
        return False
    return spec is not None and spec.origin is not None


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
