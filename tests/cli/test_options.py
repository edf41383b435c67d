"""Options that several verbs share."""

from __future__ import annotations

import inspect

import pytest

from autotune.cli.options import ChoiceOptions, MemoryOptions, make_limits, parse_call, spread
from autotune.cli.output import JsonFlag
from autotune.decide.limits import Limits
from autotune.errors import OptimizationError, RequestError
from autotune.optimizations import parse_settings
from autotune.tuner import Ask, check_ask


def test_call_arguments_become_plain_values():
    values = parse_call(
        ["strength=0.5", "max_sequence_length=256", "clean_caption=False", "prompt_2=a=b", "e=1e3"]
    )
    assert values == {
        "strength": 0.5,
        "max_sequence_length": 256,
        "clean_caption": False,
        "prompt_2": "a=b",
        "e": 1000.0,
    }
    assert [type(v) for v in values.values()] == [float, int, bool, str, float]
    assert parse_call(None) == {}
    assert parse_call(["x=nan", "y=inf", "z="]) == {"x": "nan", "y": "inf", "z": ""}


@pytest.mark.parametrize("items", [["strength"], ["=1"], ["a b=1"], ["a=1", "a=2"]])
def test_what_is_no_call_argument(items):
    with pytest.raises(RequestError) as caught:
        parse_call(items)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"height": 512}, "--height, in Python height="),
        ({"num_inference_steps": 3}, "--steps"),
        ({"num_videos_per_prompt": 3}, "--batch"),
        ({"sigmas": [1.0]}, "plain value"),
    ],
)
def test_arguments_that_are_said_otherwise(options, said):
    with pytest.raises(RequestError, match=said):
        check_ask(Ask(options=options))


def test_limits():
    choice = ChoiceOptions(quality="high", only="tome, xformers", priority="memory", images=9)
    limits = make_limits(choice, MemoryOptions("5GiB", "16GiB", "512MiB"))
    assert (limits.only, limits.vram_limit) == (("tome", "xformers"), 5 << 30)
    assert limits.images == 9
    assert (limits.ram_limit, limits.reserve, limits.priority) == (16 << 30, 512 << 20, "memory")
    assert make_limits(ChoiceOptions(), MemoryOptions()) == Limits()


def test_what_is_kept_is_read_like_a_set():
    limits = make_limits(ChoiceOptions(), MemoryOptions(), "xformers, tome:ratio=0.5")
    assert limits.keep == parse_settings("xformers,tome:ratio=0.5")


@pytest.mark.parametrize("keep", ["xformer", "tome,tome", "tome:ratio=2", "vae_slicing"])
def test_what_cannot_be_kept(keep):
    with pytest.raises(OptimizationError) as caught:
        make_limits(ChoiceOptions(without="vae_slicing"), MemoryOptions(), keep)
    assert caught.value.hint


def test_groups_of_options_are_spread():
    """In the place of the group, each option with its default and its help."""

    def command(model: str, *, memory: MemoryOptions, json: JsonFlag = False) -> None:
        seen.append((model, memory, json))

    seen: list[object] = []
    spread_out = spread(command)
    parameters = inspect.signature(spread_out).parameters
    assert list(parameters) == ["model", "vram_limit", "ram_limit", "reserve", "json"]
    assert parameters["reserve"].default is None
    spread_out(model="a", vram_limit="1GiB", ram_limit=None, reserve=None, json=True)
    assert seen == [("a", MemoryOptions("1GiB"), True)]
