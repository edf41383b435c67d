"""Settings as people write them: read, checked, and written back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.errors import OptimizationError
from autotune.optimizations import CATALOGUE, find, parse_setting, parse_settings
from autotune.optimizations.attention import KERNELS
from autotune.optimizations.base import Optimization, Setting
from autotune.optimizations.compilation import SCOPES
from autotune.optimizations.quantization import PACKAGES

PARAMETERS: dict[str, st.SearchStrategy[dict[str, bool | int | float | str]]] = {
    "tome": st.fixed_dictionaries(
        {
            "ratio": st.floats(0, 0.75, exclude_min=True),
            "max_downsample": st.sampled_from((1, 2, 4, 8)),
        }
    ),
    "attention_slicing": st.fixed_dictionaries({"slices": st.sampled_from(("auto", "max"))}),
    "attention_backend": st.fixed_dictionaries({"kernel": st.sampled_from(sorted(KERNELS))}),
    "compile": st.fixed_dictionaries({"scope": st.sampled_from(SCOPES)}),
    "quantization": st.fixed_dictionaries({"scheme": st.sampled_from(sorted(PACKAGES))}),
    "first_block_cache": st.fixed_dictionaries({"threshold": st.floats(0.01, 0.5)}),
    "taylorseer_cache": st.fixed_dictionaries({"interval": st.integers(2, 10)}),
    "pyramid_attention_broadcast": st.fixed_dictionaries({"range": st.integers(2, 8)}),
    "faster_cache": st.fixed_dictionaries({"range": st.integers(2, 8)}),
    "device_map": st.fixed_dictionaries(
        {"encoders": st.integers(0, 7), "autoencoder": st.integers(0, 7)}
    ),
    "tiny_autoencoder": st.fixed_dictionaries({"weights": st.sampled_from(("", "folder", "a/b"))}),
    "vae_tiling": st.fixed_dictionaries({"tile": st.integers(1, 64).map(lambda n: 64 * n)}),
    "group_offload": st.fixed_dictionaries(
        {
            "level": st.sampled_from(("block", "leaf")),
            "stream": st.booleans(),
            "low_ram": st.booleans(),
            "disk": st.booleans(),
        }
    ).filter(lambda p: not (p["low_ram"] and p["disk"])),
}


def any_setting() -> st.SearchStrategy[Setting]:
    def of(name: str) -> st.SearchStrategy[Setting]:
        return PARAMETERS.get(name, st.just({})).map(lambda p: find(name).setting(p))

    return st.sampled_from(sorted(CATALOGUE)).flatmap(of)


def test_every_parameter_is_covered_above() -> None:
    assert {name for name, handler in CATALOGUE.items() if handler.defaults} == set(PARAMETERS)


@given(any_setting())
def test_a_setting_reads_back_as_it_was_written(setting: Setting) -> None:
    assert parse_setting(str(setting)) == setting
    assert parse_setting(str(setting).replace(",", ":")) == setting


@given(st.lists(any_setting(), unique_by=lambda s: s.name))
def test_a_list_of_settings_reads_back(settings: list[Setting]) -> None:
    assert parse_settings(",".join(map(str, settings))) == tuple(settings)
    assert parse_settings(" , ".join(map(str, settings)) + ",") == tuple(settings)


@given(st.text())
def test_any_text_is_a_setting_or_one_error(text: str) -> None:
    for read in (parse_setting, parse_settings):
        try:
            read(text)
        except OptimizationError as error:
            assert error.hint


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tom", "did you mean tome"),
        ("", "unknown optimization ''"),
        ("tome:ratio", "cannot read 'ratio'"),
        ("tome:rate=0.3", "tome has no parameter 'rate'"),
        ("xformers:fast=1", "it has: none"),
        ("tome:ratio=much", "tome:ratio=much is not a valid value"),
        ("tome:ratio=nan", "out of range"),
        ("tome:ratio=0", "out of range"),
        ("tome:ratio=0.76", "out of range"),
        ("tome:max_downsample=3", "use 1, 2, 4 or 8"),
        ("tome:max_downsample=1.5", "not a valid value"),
        ("tome:max_downsample=inf", "not a valid value"),
        ("attention_slicing:slices=all", "use auto or max"),
        ("vae_tiling:tile=100", "multiple of 64"),
        ("vae_tiling:tile=0", "multiple of 64"),
        ("vae_tiling:tile=8192", "multiple of 64"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(text: str, says: str) -> None:
    with pytest.raises(OptimizationError, match=says):
        parse_setting(text)


def test_an_optimization_is_named_once() -> None:
    with pytest.raises(OptimizationError, match="tome is named twice"):
        parse_settings("tome:ratio=0.3,vae_slicing,tome")


def test_missing_parameters_get_their_defaults() -> None:
    assert parse_setting("tome:ratio=0.5").parameters == {"ratio": 0.5, "max_downsample": 1}
    assert parse_setting("tome") == find("tome").setting()


@pytest.mark.parametrize(
    ("text", "value"), [("yes", True), ("Off", False), (1, True), (False, False)]
)
def test_switches_are_read_as_people_write_them(text: str | int | bool, value: bool) -> None:
    assert _Switched().setting({"on": text}).parameters == {"on": value}


def test_a_switch_that_is_neither_is_refused() -> None:
    with pytest.raises(OptimizationError, match="maybe is not a valid value"):
        _Switched().setting({"on": "maybe"})


class _Switched(type(find("vae_slicing"))):  # type: ignore[misc]
    """A member with a switch for a parameter, as a plug-in may have."""

    defaults = {"on": True}


def test_the_quality_that_a_setting_needs() -> None:
    def needed(name: str, **parameters: float) -> str:
        handler: Optimization = find(name)
        return handler.quality(handler.setting(dict(parameters)).parameters)

    assert needed("xformers") == "exact"
    assert needed("vae_tiling") == "high"
    assert needed("tome", ratio=0.3) == "balanced"
    assert needed("tome", ratio=0.31) == "fast"
