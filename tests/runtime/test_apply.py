"""A plan is applied as a transaction, on real pipelines."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from autotune.errors import OptimizationError
from autotune.optimizations import CATALOGUE
from autotune.optimizations.base import Setting
from autotune.runtime.apply import apply_plan, set_by_hand

ALL = "attention_slicing,tome:ratio=0.5:max_downsample=2,vae_slicing,channels_last"
NAMES = ("attention_slicing", "tome", "vae_slicing", "channels_last", "model_cpu_offload")

PlanOf = Callable[..., Any]


def names_set_by_hand(pipe: Any) -> tuple[str, ...]:
    return tuple(s.name for s in set_by_hand(pipe))


def test_all_at_once_and_back(pipe: Any, plan_of: PlanOf, draw: Any, snapshot: Any) -> None:
    plan, _ = plan_of(pipe, ALL)
    plain = draw(pipe)
    before = snapshot(pipe)
    undo = apply_plan(pipe, plan, "cpu")
    assert set(names_set_by_hand(pipe)) == {s.name for s in plan.optimizations}
    assert not torch.equal(draw(pipe), plain)
    undo()
    assert set_by_hand(pipe) == ()
    assert snapshot(pipe) == before
    assert torch.equal(draw(pipe), plain)
    undo()
    assert snapshot(pipe) == before


def test_offload_is_put_on_last_wherever_it_is_named(
    sd_pipe: Any, plan_of: PlanOf, draw: Any, snapshot: Any
) -> None:
    plain = draw(sd_pipe)
    before = snapshot(sd_pipe)
    plan, _ = plan_of(sd_pipe, "model_cpu_offload,channels_last,tome:ratio=0.5")
    undo = apply_plan(sd_pipe, plan, "cpu")
    assert not torch.equal(draw(sd_pipe), plain)  # merging is at work under the hooks
    undo()
    assert snapshot(sd_pipe) == before
    assert torch.equal(draw(sd_pipe), plain)


@pytest.mark.parametrize(
    "error", [RuntimeError("first line\nsecond"), MemoryError(), KeyboardInterrupt()], ids=repr
)
@pytest.mark.parametrize("failing", [*NAMES, "pipe.to"])
def test_a_failing_step_leaves_the_pipeline_as_it_was(
    sd_pipe: Any,
    plan_of: PlanOf,
    snapshot: Any,
    failing: str,
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offload = "" if failing == "pipe.to" else ",model_cpu_offload"
    plan, _ = plan_of(sd_pipe, ALL + offload)
    before = snapshot(sd_pipe)

    def fail(*_: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        if failing == "pipe.to":
            patch.setattr(type(sd_pipe), "to", fail)
        else:
            patch.setattr(type(CATALOGUE[failing]), "apply", fail)
        if isinstance(error, Exception):
            with pytest.raises(OptimizationError) as caught:
                apply_plan(sd_pipe, plan, "cpu")
            assert "\n" not in str(caught.value)
            assert "the pipeline is as it was" in str(caught.value)
        else:
            with pytest.raises(type(error)):
                apply_plan(sd_pipe, plan, "cpu")
    assert snapshot(sd_pipe) == before


def test_what_really_cannot_run_undoes_the_rest(
    sd_pipe: Any, plan_of: PlanOf, snapshot: Any
) -> None:
    plan, _ = plan_of(sd_pipe, "vae_slicing,channels_last,xformers")
    before = snapshot(sd_pipe)
    with pytest.raises(OptimizationError, match="xformers cannot run here"):
        apply_plan(sd_pipe, plan, "cpu")
    assert snapshot(sd_pipe) == before


def test_an_undo_that_fails_does_not_stop_the_others(
    sd_pipe: Any,
    plan_of: PlanOf,
    snapshot: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan, _ = plan_of(sd_pipe, "vae_slicing,tome,channels_last")
    before = snapshot(sd_pipe)
    merge = CATALOGUE["tome"]
    original = merge.apply

    def apply(*arguments: Any) -> Any:
        undo = original(*arguments)

        def undo_and_fail() -> None:
            undo()
            raise RuntimeError("broken undo")

        return undo_and_fail

    monkeypatch.setattr(type(merge), "apply", lambda _, *arguments: apply(*arguments))
    undo = apply_plan(sd_pipe, plan, "cpu")
    with caplog.at_level(logging.ERROR, "autotune"), pytest.raises(RuntimeError, match="broken"):
        undo()
    assert "could not undo a step" in caplog.text
    assert snapshot(sd_pipe) == before


def test_weights_are_moved_to_the_device_and_back(
    sd_pipe: Any, plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = plan_of(sd_pipe)
    moves = []
    original = type(sd_pipe.unet).to

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        moves.append(str(args[0] if args else None))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(sd_pipe.unet), "to", recorded)
    undo = apply_plan(sd_pipe, plan, "cpu")
    there = len(moves)
    undo()
    assert 1 <= there < len(moves)
    assert moves[-1] == "cpu"


def test_kept_offload_decides_where_weights_are(
    sd_pipe: Any, plan_of: PlanOf, snapshot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sd_pipe.enable_model_cpu_offload(device="cpu")
    before = snapshot(sd_pipe)
    plan, _ = plan_of(sd_pipe, "vae_slicing")
    kept = msgspec.structs.replace(plan, kept=(Setting("model_cpu_offload"),))
    monkeypatch.setattr(type(sd_pipe), "to", lambda *_: pytest.fail("weights were moved"))
    undo = apply_plan(sd_pipe, kept, "cpu")
    assert names_set_by_hand(sd_pipe) == ("model_cpu_offload", "vae_slicing")
    undo()
    assert snapshot(sd_pipe) == before


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("attention_slicing", lambda p: p.enable_attention_slicing("max")),
        ("model_cpu_offload", lambda p: p.enable_model_cpu_offload(device="cpu")),
        ("sequential_cpu_offload", lambda p: p.enable_sequential_cpu_offload(device="cpu")),
        ("tome", lambda p: __import__("tomesd").apply_patch(p)),
        ("vae_slicing", lambda p: p.vae.enable_slicing()),
        ("vae_tiling", lambda p: p.vae.enable_tiling()),
        ("channels_last", lambda p: p.unet.to(memory_format=torch.channels_last)),
    ],
)
def test_what_the_user_set_is_recognised(pipe: Any, name: str, by_hand: Any) -> None:
    assert set_by_hand(pipe) == ()
    by_hand(pipe)
    assert names_set_by_hand(pipe) == (name,)


def test_what_the_user_set_is_found_with_its_parameters(sd_pipe: Any) -> None:
    sd_pipe.enable_attention_slicing("max")
    sd_pipe.vae.enable_tiling()
    sd_pipe.vae.tile_sample_min_size = 96
    __import__("tomesd").apply_patch(sd_pipe, ratio=0.4, max_downsample=2)
    assert {s.name: s.parameters for s in set_by_hand(sd_pipe)} == {
        "attention_slicing": {"slices": "max"},
        "tome": {"ratio": 0.4, "max_downsample": 2},
        "vae_tiling": {"tile": 96},
    }


def test_a_device_map_is_no_sequential_offload(sd_pipe: Any) -> None:
    """``device_map`` attaches accelerate's hook as well, but leaves the weights where they are."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(sd_pipe.text_encoder, AlignDevicesHook(execution_device="cpu"))
    assert set_by_hand(sd_pipe) == ()


def test_xformers_set_by_hand_is_recognised_by_its_processors(sd_pipe: Any) -> None:
    from diffusers.models.attention_processor import XFormersAttnProcessor

    sd_pipe.unet.set_attn_processor(XFormersAttnProcessor())
    assert names_set_by_hand(sd_pipe) == ("xformers",)
