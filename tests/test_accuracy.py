"""The bars of accuracy, on the published rows that can be traced in a minute.

``scripts/accuracy.py`` compares all of them; docs/accuracy.md says what is off, and why.
"""

from __future__ import annotations

import importlib.util
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from _pytest.tmpdir import TempPathFactory

SCRIPT = Path(__file__).parent.parent / "scripts" / "accuracy.py"

TORCHAO = "github sayakpaul/diffusers-torchao README.md"
SDXL = "hf.co/blog/simple_sdxl_optimizations"


@pytest.fixture(scope="module")
def accuracy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("accuracy", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(accuracy: ModuleType, tmp_path_factory: TempPathFactory) -> dict[str, Any]:
    """The report without FLUX.1's largest batch, and what is known of ratios alone."""
    rows = [r for r in accuracy.read_rows() if r.model != "flux-dev" or r.batch < 16]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOTUNE_CACHE", str(tmp_path_factory.mktemp("traces")))
        report: dict[str, Any] = accuracy.report(rows)
        return report | {"ratios": list(accuracy.ratios(["flux", "sdxl"]))}


def row(found: dict[str, Any], source: str, name: str) -> dict[str, Any]:
    (only,) = (r for r in found["rows"] if r["source"] == source and r["row"].endswith(name))
    return only


def test_allocated_memory(found: dict[str, Any]) -> None:
    assert found["mape"]["by_metric"]["allocated"] <= 0.04
    assert found["mape"]["by_source"][TORCHAO] <= 0.03


def test_all_memory(found: dict[str, Any]) -> None:
    assert found["mape"]["all"] <= 0.10
    assert found["mape"]["by_metric"]["reserved"] <= 0.02
    # The context of the PyTorch of the time is not known, nor what cuDNN's search chose.
    assert found["mape"]["by_metric"]["device"] <= 0.15


def test_all_but_one_allocated_row_is_met(found: dict[str, Any]) -> None:
    """SDXL with slicing and sequential offload at once was measured 2.8 GiB above all the others.

    Its notebook leaves the UNet behind, as in the three rows before; what else it left is unknown.
    """
    allocated = [r for r in found["rows"] if r["metric"] == "allocated"]
    off = [r for r in allocated if abs(r["memory_error"]) > 0.03]
    assert [r["row"].rpartition(" ")[2] for r in off] == ["SDPA+vae_slicing+sequential_cpu_offload"]
    assert abs(off[0]["memory_error"]) < 0.25


def test_better_than_naive_rules_by_far(found: dict[str, Any]) -> None:
    for rule in found["naive"].values():
        assert rule["all"] > 3 * found["mape"]["all"]
        assert rule["by_metric"]["allocated"] > 7 * found["mape"]["by_metric"]["allocated"]


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("default attn processor", 21.72),
        (" SDPA", 21.72),
        ("SDPA+model_cpu_offload", 20.21),
        ("SDPA+sequential_cpu_offload", 19.91),
        ("SDPA+vae_slicing", 15.40),
    ],
)
def test_sdxl_to_two_digits(found: dict[str, Any], name: str, gib: float) -> None:
    predicted = row(found, SDXL, name if name.startswith(" ") else f"float16 {name}")
    total = predicted["predicted_gib"] + predicted["left_over_gib"]
    assert total == pytest.approx(gib, abs=0.03)


def test_one_change_has_the_right_direction_and_size(found: dict[str, Any]) -> None:
    assert len(found["changes"]) == 25
    for change in found["changes"]:
        predicted, published = change["predicted_gib"], change["published_gib"]
        if abs(published) < 0.05:
            assert abs(predicted) < 0.05, change["what"]
        else:
            assert 0.7 < predicted / published < 1.8, change["what"]
        if change["predicted_factor"] is not None:
            ratio = change["predicted_factor"] / change["published_factor"]
            assert 0.85 < ratio < 1.2, change["what"]


def test_quantization_weighs_what_was_published(found: dict[str, Any]) -> None:
    """11.05 to 11.08 GiB less; fused projections are kept beside their parts, in eight bits too."""
    changes = [c for c in found["changes"] if c["source"] == TORCHAO and "float8" in c["what"]]
    assert len(changes) == 8
    for change in changes:
        assert change["predicted_gib"] == pytest.approx(change["published_gib"], rel=0.01)


def test_ratios_where_the_gpu_is_not_known(found: dict[str, Any]) -> None:
    by_evidence: dict[str, list[float]] = {}
    for ratio in found["ratios"]:
        if (ratio["model"], ratio["what"]) != ("sdxl", "layerwise casting"):
            off = ratio["factor"] / ratio["published_factor"]
            by_evidence.setdefault(ratio["evidence"], []).append(off)
    assert all(0.9 < off < 1.15 for off in by_evidence["independent"])
    assert all(0.97 < off < 1.02 for off in by_evidence["by construction"])


def test_a_denoiser_alone_to_two_digits(found: dict[str, Any]) -> None:
    """Nothing was adjusted to these."""
    alone = [r for r in found["ratios"] if r["before_gib"] is not None]
    assert {r["model"] for r in alone} == {"flux-dev", "sdxl"}
    for ratio in alone:
        assert ratio["before_gib"] == pytest.approx(ratio["published_before_gib"], abs=0.03)


def test_casting_makes_small_unets_wait_for_the_host(found: dict[str, Any]) -> None:
    """SDXL takes twice as long; how much exactly is a matter of the host, which is assumed."""
    (ratio,) = (
        r for r in found["ratios"] if (r["model"], r["what"]) == ("sdxl", "layerwise casting")
    )
    assert ratio["published_factor"] == pytest.approx(2.0, abs=0.02)
    assert 1.7 < ratio["factor"] < 2.4


def test_times(found: dict[str, Any]) -> None:
    assert found["time"]["median"] <= 0.20
    assert all(tau >= 0.85 for tau in found["time"]["kendall_tau_by_source"].values())
    assert max(abs(r["time_error"] or 0.0) for r in found["rows"]) <= 0.30


def test_what_is_not_predicted_is_said(found: dict[str, Any]) -> None:
    assert set(found["inexpressible"]) >= {"GGUF", "Quanto", "tiny autoencoder"}
    assert not any("compil" in what for what in found["inexpressible"])
    assert {r["metric"] for r in found["rows"] if not r["counted"]} == {"searched"}


def test_decodes_of_another_vae(accuracy: ModuleType) -> None:
    """Nothing was adjusted to these: ten sizes were measured on an RTX 4090, three are traced."""
    errors = [
        d["allocated_gib"] / d["published_allocated_gib"] - 1 for d in accuracy.decodes(sizes=3)
    ]
    assert max(map(abs, errors)) < 0.002
    reserved = [
        d["reserved_gib"] / d["published_reserved_gib"] - 1 for d in accuracy.decodes(sizes=3)
    ]
    assert statistics.fmean(map(abs, reserved)) < 0.03


def test_kendall_tau(accuracy: ModuleType) -> None:
    def outcome(published: float, predicted: float) -> Any:
        known = accuracy.read_rows()[0]
        timed = accuracy.replace(known, seconds=published)
        return accuracy.Outcome(timed, 1.0, 0.0, predicted, 1.0)

    assert accuracy.kendall_tau([outcome(1, 10), outcome(2, 20), outcome(3, 30)]) == 1
    assert accuracy.kendall_tau([outcome(1, 30), outcome(2, 20), outcome(3, 10)]) == -1
    assert accuracy.kendall_tau([outcome(1, 2), outcome(1.01, 1)]) == 1  # as good as equal
