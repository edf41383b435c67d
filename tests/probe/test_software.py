"""Versions, read without importing what they belong to."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from autotune.probe import software
from autotune.probe.software import installed_versions, is_importable, maps_files, torch_build


def test_versions_are_those_of_the_metadata() -> None:
    versions = installed_versions()
    assert versions["torch"] == metadata.version("torch")
    assert versions["python"].count(".") == 2
    assert all(versions[name] for name in versions.keys() - {*software.OPTIONAL, "c++"})


def test_absent_ones_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "DISTRIBUTIONS", ("torch", "no-such-distribution"))
    assert "no-such-distribution" not in installed_versions()


def test_what_has_no_version_is_there_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A checkout on the path, or a distribution of another name."""
    (tmp_path / "a_checkout").mkdir()
    (tmp_path / "a_checkout" / "__init__.py").touch()
    (tmp_path / "clang++").touch(mode=0o755)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(software, "OPTIONAL", ("a_checkout", "not_there"))
    versions = installed_versions()
    assert versions["a_checkout"] == "?"
    assert versions["not_there"] == "", "it was looked for"
    assert versions["c++"] == "clang++"
    monkeypatch.setenv("PATH", "")
    assert installed_versions()["c++"] == ""


def test_a_compiler_is_looked_for_once_on_a_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cl").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    asked: list[str] = []
    which = software.shutil.which
    monkeypatch.setattr(
        software.shutil, "which", lambda name, **at: asked.append(name) or which(name, **at)
    )
    assert {installed_versions()["c++"] for _ in range(3)} == {"cl"}
    assert asked == list(software.COMPILERS)


def test_what_only_has_the_name_of_a_package_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stub in its place, or a folder where one starts."""
    (tmp_path / "a_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "a_stub", ModuleType("a_stub"))
    monkeypatch.setitem(sys.modules, "not_to_be_imported", None)
    names = ("a_folder", "a_stub", "not_to_be_imported", "not_there")
    monkeypatch.setattr(software, "OPTIONAL", names)
    versions = installed_versions()
    assert not any(versions[name] for name in names)
    assert is_importable("pytest")


@pytest.mark.parametrize(
    ("versions", "maps"),
    [
        ({}, True),
        ({"diffusers": "0.42.1", "transformers": "5.23.0", "torch": "2.13.0+cpu"}, True),
        ({"diffusers": "0.41.0"}, False),
        ({"torch": "nightly"}, False),
        ({"transformers": "?"}, False),
    ],
)
def test_what_is_known_to_map(versions: dict[str, str], maps: bool) -> None:
    assert maps_files("Linux 6.1", versions) == maps
    assert not maps_files("Windows 11", versions)


@pytest.mark.parametrize(
    ("text", "build"),
    [
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", {"cuda": "13.0"}),
        ("cuda = '11.7'\nhip = None\n", {"cuda": "11.7"}),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.4.1'\n", {"hip": "6.4.1"}),
        ("cuda: Optional[str] = None\n", {}),
        ("", {}),
    ],
)
def test_torch_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, build: dict[str, str]
) -> None:
    file = tmp_path / "version.py"
    file.write_text(text)

    class Distribution:
        def locate_file(self, path: str) -> Path:
            return file

    monkeypatch.setattr(software.metadata, "distribution", lambda name: Distribution())
    assert torch_build() == build


def test_light_modules_import_no_torch() -> None:
    modules = ["nvml", "host", "live", "software", "reference", "machine", "pcie"]
    imports = "; ".join(f"import autotune.probe.{name}" for name in modules)
    code = f"{imports}; import sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
