"""How images are compared, and that the document tells of everything that changes them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy
import pytest

from autotune.optimizations import CATALOGUE, find
from tests.thorough import thoroughly

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "scripts" / "measure_quality.py"
    spec = importlib.util.spec_from_file_location("measure_quality", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def waves() -> tuple[numpy.ndarray, numpy.ndarray]:
    y, x = numpy.mgrid[0:32, 0:48]
    one = numpy.repeat((0.5 + 0.5 * numpy.sin(x / 5 + y / 9))[..., None], 3, axis=-1)
    return one, numpy.clip(one + 0.1 * numpy.cos(x * y / 20)[..., None], 0, 1)


def test_ssim_is_that_of_scikit_image(script, waves):
    """0.26's structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=1)."""
    one, other = waves
    assert script.ssim(one, other) == pytest.approx(0.8059176406935405, abs=1e-9)
    assert script.ssim(one, 1 - one) == pytest.approx(-0.4428695727323882, abs=1e-9)
    assert script.ssim(one, one) == 1


def test_psnr(script, waves):
    one, _ = waves
    assert script.psnr(one, one + 0.1) == pytest.approx(20)
    assert script.psnr(one, one) is None


def test_the_document_tells_of_everything_that_changes_the_image(script):
    text = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    table = text.split(script.BEGIN)[1].split(script.END)[0]
    missing = [name for name in script.inexact_names() if f"`{name}" not in table]
    assert not missing, "run scripts/measure_quality.py --markdown"
    assert set(script.inexact_names()) <= set(CATALOGUE)


def test_a_few_digits(script, tmp_path, monkeypatch):
    """The whole way, for one optimization and few digits; and the pipeline is as it was."""
    monkeypatch.setattr(script, "DOCUMENT", tmp_path / "quality.md")
    script.DOCUMENT.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    report = script.measure(["layerwise_casting", "taylorseer_cache", "xformers"], 2, 2)
    (row,) = report.rows
    assert (row.setting.name, row.quality) == ("layerwise_casting", "balanced")
    assert row.worst_ssim <= row.ssim < 1
    assert list(report.left_out) == ["taylorseer_cache"]  # and nothing else is not exact
    script.write(script.table(report))
    written = script.DOCUMENT.read_text()
    assert "old" not in written
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert "| `layerwise_casting` | balanced |" in written


@thoroughly
def test_what_only_changes_the_decode(script, monkeypatch):
    """Tiles larger than a digit cut sheets of them; an autoencoder is made one to be widened."""
    monkeypatch.setattr(script, "SHEET", 2)
    studio = script.Studio(3, 1, "cpu")
    exact = studio.draw()
    settings = (find("vae_tiling").setting({"tile": 128}), find("vae_bfloat16").setting())
    (tiled, narrow), failed = studio.compare(exact, settings, None)
    assert not failed and (tiled.is_on_sheets, narrow.is_on_sheets) == (True, False)
    assert tiled.worst_ssim <= tiled.ssim < 1
    assert 30 < narrow.psnr_db < 90
    nearest = [int(numpy.abs(exact - digit).mean((1, 2, 3)).argmin()) for digit in studio.on_sheets]
    assert nearest == [0, 1, 2]
    assert numpy.array_equal(studio.draw(), exact)
