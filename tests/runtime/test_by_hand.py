"""What users set by public calls is recognised, kept, said, and still there after an undo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import diffusers
import msgspec
import pytest
import tomesd
import torch
from diffusers import hooks
from diffusers.models import attention_processor
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from autotune.decide.limits import Limits
from autotune.decide.plan import Plan
from autotune.optimizations import parse_settings
from autotune.optimizations.base import Setting
from autotune.runtime.apply import apply_plan
from autotune.runtime.by_hand import foreign_to, set_by_hand
from autotune.testing.pipelines import BUILDERS, call
from autotune.testing.standins import standing_in
from autotune.testing.state import differences, whole_state
from autotune.tuner import Ask, configure_pipeline
from tests.thorough import part

ByHand = Callable[[Any], Any]

CPU = torch.device("cpu")
LEAF = {"offload_type": "leaf_level"}
NARROW = torch.float8_e4m3fn


def timestep() -> int:
    return 500


FIRST_BLOCK = diffusers.FirstBlockCacheConfig(threshold=0.2)
TAYLOR = diffusers.TaylorSeerCacheConfig(cache_interval=4)
BROADCAST = diffusers.PyramidAttentionBroadcastConfig(
    spatial_attention_block_skip_range=3, current_timestep_callback=timestep
)
FASTER = diffusers.FasterCacheConfig(
    spatial_attention_block_skip_range=2, current_timestep_callback=timestep,
    tensor_format="BCHW", is_guidance_distilled=True,
)  # fmt: skip


MAG = diffusers.MagCacheConfig(num_inference_steps=2, mag_ratios=[1.0] * 2)


class Mine(attention_processor.AttnProcessor2_0):
    """An attention processor of the user's own."""


def compile_forward(pipe: Any) -> None:
    pipe.transformer.forward = torch.compile(pipe.transformer.forward)


KNOWN: list[tuple[str, str, ByHand]] = [
    ("xformers", "sd", lambda p: p.enable_xformers_memory_efficient_attention()),
    ("attention_slicing:slices=max", "sd", lambda p: p.enable_attention_slicing("max")),
    ("attention_slicing:slices=auto", "sd", lambda p: p.unet.set_attention_slice("auto")),
    (
        "attention_backend:kernel=flash",
        "flux",
        lambda p: p.transformer.set_attention_backend("_native_flash"),
    ),
    ("fuse_qkv", "sd", lambda p: p.fuse_qkv_projections()),
    ("fuse_qkv", "flux", lambda p: p.transformer.fuse_qkv_projections()),
    ("vae_tiling:tile=64", "sd", lambda p: p.vae.enable_tiling()),
    ("vae_tiling:tile=96", "wan", lambda p: p.vae.enable_tiling(tile_sample_min_height=96)),
    ("vae_slicing", "sd", lambda p: p.vae.enable_slicing()),
    (
        "tiny_autoencoder:weights=",
        "sd",
        lambda p: setattr(p, "vae", diffusers.AutoencoderTiny(latent_channels=4)),
    ),
    ("channels_last", "sd", lambda p: p.unet.to(memory_format=torch.channels_last)),
    ("channels_last", "sd", lambda p: p.vae.to(memory_format=torch.channels_last)),
    ("model_cpu_offload", "sd", lambda p: p.enable_model_cpu_offload(device="cpu")),
    ("sequential_cpu_offload", "sd", lambda p: p.enable_sequential_cpu_offload(device="cpu")),
    ("sequential_cpu_offload", "flux", lambda p: accelerate.cpu_offload(p.transformer, CPU)),
    (
        "text_encoder_offload",
        "sd",
        lambda p: accelerate.cpu_offload_with_hook(p.text_encoder, "cpu"),
    ),
    (
        "group_offload:level=leaf,stream=False,low_ram=False,disk=False",
        "flux",
        lambda p: p.enable_group_offload(CPU, **LEAF),
    ),
    (
        "group_offload:level=block,stream=False,low_ram=False,disk=False",
        "wan",
        lambda p: hooks.apply_group_offloading(p.transformer, CPU, num_blocks_per_group=1),
    ),
    (
        "layerwise_casting",
        "flux",
        lambda p: p.transformer.enable_layerwise_casting(storage_dtype=NARROW),
    ),
    (
        "layerwise_casting",
        "flux",
        lambda p: hooks.apply_layerwise_casting(p.transformer, NARROW, torch.float32),
    ),
    ("compile:scope=whole", "flux", lambda p: p.transformer.compile()),
    ("compile:scope=regional", "flux", lambda p: p.transformer.compile_repeated_blocks()),
    ("compile:scope=whole", "sd", lambda p: setattr(p, "unet", torch.compile(p.unet))),
    ("compile:scope=whole", "flux", compile_forward),
    ("tome:ratio=0.4,max_downsample=2", "sd", lambda p: tomesd.apply_patch(p, 0.4, 2)),
    ("tome:ratio=0.5,max_downsample=1", "sd", lambda p: tomesd.apply_patch(p.unet)),
    ("first_block_cache:threshold=0.2", "flux", lambda p: p.transformer.enable_cache(FIRST_BLOCK)),
    (
        "first_block_cache:threshold=0.2",
        "wan",
        lambda p: hooks.apply_first_block_cache(p.transformer, FIRST_BLOCK),
    ),
    ("faster_cache:range=2", "flux", lambda p: p.transformer.enable_cache(FASTER)),
    ("taylorseer_cache:interval=4", "flux", lambda p: p.transformer.enable_cache(TAYLOR)),
    (
        "pyramid_attention_broadcast:range=3",
        "flux",
        lambda p: p.transformer.enable_cache(BROADCAST),
    ),
]
"""What it is, on which pipeline, and the call."""

FOREIGN: list[tuple[str, str, ByHand]] = [
    ("attention (AttnProcessor)", "sd", lambda p: p.unet.set_default_attn_processor()),
    ("attention (Mine)", "sd", lambda p: p.unet.set_attn_processor(Mine())),
    (
        "attention (attention backend _native_math)",
        "flux",
        lambda p: p.transformer.set_attention_backend("_native_math"),
    ),
    (
        "attention (attention backend _native_math)",  # for all models of the process
        "flux",
        lambda p: _AttentionBackendRegistry.set_active_backend(AttentionBackendName._NATIVE_MATH),
    ),
    ("a step cache (MagCacheConfig)", "flux", lambda p: p.transformer.enable_cache(MAG)),
    (
        "a step cache (MagCacheConfig)",
        "flux",
        lambda p: hooks.apply_mag_cache(p.transformer, MAG),
    ),
    (
        "the device of components (vae)",
        "sd",
        lambda p: accelerate.cpu_offload_with_hook(p.vae, "cpu"),
    ),
    (
        "the device of components (text_encoder)",
        "sd",
        lambda p: accelerate.cpu_offload(p.text_encoder, CPU),
    ),
    (
        "the device of components (text_encoder_2)",
        "flux",
        lambda p: hooks.apply_group_offloading(p.text_encoder_2, CPU, **LEAF),
    ),
    (
        "the device of components (unet)",
        "sd",
        lambda p: accelerate.dispatch_model(p.unet, {"": "cpu"}, "cpu", force_hooks=True),
    ),
    (
        "the device of components (vae, text_encoder, unet)",  # as from_pretrained leaves it
        "sd",
        lambda p: setattr(p, "hf_device_map", {"unet": 0, "vae": 1, "text_encoder": 1}),
    ),
]
"""What no optimization stands for."""

EVERY = [*KNOWN, *FOREIGN]


@pytest.fixture(autouse=True)
def _backend_of_the_process() -> Iterator[None]:
    """A model's own switch sets it for all models."""
    active = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = active


@pytest.fixture(scope="module", autouse=True)
def _stand_ins() -> Iterator[None]:
    with standing_in(("xformers", "sequential_cpu_offload", "attention_backend")):
        yield


@pytest.fixture
def an_sd_plan(plan_of: Any) -> Plan:
    """Any: only its optimizations matter here."""
    plan, _ = plan_of(BUILDERS["sd"]())
    return plan


@pytest.mark.parametrize(
    ("what", "kind", "by_hand"),
    [pytest.param(*one, id=f"{one[1]}-{one[0]}") for one in part(EVERY, 3)],
)
def test_it_is_recognised_and_still_there_after_an_undo(
    what: str, kind: str, by_hand: ByHand, an_sd_plan: Plan
) -> None:
    pipe = BUILDERS[kind]()
    by_hand(pipe)
    found = [str(s) for s in set_by_hand(pipe)]
    if (what, kind, by_hand) in KNOWN:
        assert found == [what]
    else:
        assert found == []
        assert [f.text for f in foreign_to(pipe)] == [as_said(what)]
    before = whole_state(pipe)
    free = "vae_tiling" if what in ("vae_slicing", "tiny_autoencoder:weights=") else "vae_slicing"
    if hasattr(pipe.vae, "tile_sample_min_size") or free == "vae_slicing":
        plan = msgspec.structs.replace(an_sd_plan, optimizations=parse_settings(free))
        apply_plan(pipe, plan, "cpu")()
    assert differences(before, whole_state(pipe)) == {}
    assert [str(s) for s in set_by_hand(pipe)] == found


def as_said(what: str) -> str:
    """``"attention (Mine)"`` → ``"attention set by hand (Mine) is kept"``."""
    kept, _, names = what.partition(" (")
    return f"{kept} set by hand ({names} is kept"


def several_on_sd(pipe: Any) -> None:
    """One of each kind that goes together."""
    pipe.enable_attention_slicing("max")
    tomesd.apply_patch(pipe, 0.4, 2)
    pipe.vae.enable_tiling()
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.enable_slicing()


def several_on_flux(pipe: Any) -> None:
    """Two that no optimization stands for among them."""
    pipe.transformer.set_attention_backend("_native_flash")
    pipe.transformer.enable_cache(MAG)
    pipe.transformer.enable_layerwise_casting(storage_dtype=NARROW)
    hooks.apply_group_offloading(pipe.text_encoder_2, CPU, **LEAF)


@pytest.mark.parametrize(
    ("kind", "by_hand", "known", "foreign"),
    [
        (
            "sd",
            several_on_sd,
            "attention_slicing:slices=max tome:ratio=0.4,max_downsample=2 vae_slicing "
            "vae_tiling:tile=64 channels_last",
            [],
        ),
        (
            "flux",
            several_on_flux,
            "attention_backend:kernel=flash layerwise_casting",
            ["a step cache (MagCacheConfig)", "the device of components (text_encoder_2)"],
        ),
    ],
    ids=["sd", "flux"],
)
def test_configuring_keeps_it_and_says_so(
    kind: str, by_hand: ByHand, known: str, foreign: list[str], measured_here: None
) -> None:
    pipe = BUILDERS[kind]()
    by_hand(pipe)
    call(pipe)
    before = whole_state(pipe)
    ask = Ask(height=64, width=64, steps=2, limits=Limits("fast"))
    tuned = configure_pipeline(pipe, ask, "cpu")
    kept = [str(s) for s in tuned.plan.kept]
    assert kept == known.split()
    for what in kept:
        assert any(n.startswith(f"{what} was set by hand and is kept") for n in tuned.plan.notes)
    assert {as_said(what) for what in foreign} <= set(tuned.plan.notes)
    assert not {s.name for s in tuned.plan.optimizations} & {s.name for s in tuned.plan.kept}
    assert tuned("a small cat", seed=0, output_type="pt")[0].isfinite().all()
    tuned.undo()
    call(pipe)
    assert differences(before, whole_state(pipe)) == {}


def test_components_beside_one_that_is_offloaded_by_hand_come_to_the_device(
    an_sd_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left where they were, they would compute on another device than the pipeline does."""
    pipe = BUILDERS["sd"]()
    pipe.unet.enable_group_offload(CPU, **LEAF)
    moved: list[Any] = []
    for name in ("unet", "vae", "text_encoder"):
        module = getattr(pipe, name)
        monkeypatch.setattr(module, "to", lambda *_, name=name: moved.append(name))
    kept = (Setting("group_offload", {"level": "leaf"}),)
    plan = msgspec.structs.replace(an_sd_plan, kept=kept, optimizations=())
    apply_plan(pipe, plan, "cpu")
    assert moved == ["vae", "text_encoder"]
