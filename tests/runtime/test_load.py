"""Loading saved pipelines, whole and broken."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from autotune.errors import ModelError
from autotune.runtime.load import load_pipeline
from autotune.workload.architecture import Architecture, find_architecture

PlanOf = Callable[..., Any]


@pytest.fixture
def plan(sd_pipe: Any, plan_of: PlanOf) -> Any:
    return plan_of(sd_pipe)[0]


def as_dtype(plan: Any, dtype: str) -> Any:
    workload = msgspec.structs.replace(plan.workload, dtype=dtype)
    return msgspec.structs.replace(plan, workload=workload)


def test_a_saved_pipeline_draws_as_before(sd_pipe: Any, folder: Path, plan: Any, draw: Any) -> None:
    loaded = load_pipeline(find_architecture(str(folder)), plan)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded), draw(sd_pipe))


def test_it_is_read_in_the_plans_dtype(folder: Path, plan: Any) -> None:
    loaded = load_pipeline(find_architecture(str(folder)), as_dtype(plan, "bfloat16"))
    assert {p.dtype for p in loaded.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in loaded.text_encoder.parameters()} == {torch.bfloat16}
    assert loaded.device.type == "cpu"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_variant_that_the_folder_does_not_have_is_no_obstacle(
    folder: Path, plan: Any, dtype: str
) -> None:
    architecture = msgspec.structs.replace(find_architecture(str(folder)), variant="fp16")
    loaded = load_pipeline(architecture, as_dtype(plan, dtype))
    assert loaded.unet.dtype == getattr(torch, dtype)


def refused(architecture: Architecture, plan: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load_pipeline(architecture, plan)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_missing_weights_are_one_line(folder: Path, plan: Any, component: str) -> None:
    architecture = find_architecture(str(folder))
    (weights,) = (folder / component).glob("*.safetensors")
    weights.unlink()
    assert f"cannot load the weights of {folder}" in str(refused(architecture, plan))


def test_weights_cut_short_are_one_line(folder: Path, plan: Any) -> None:
    architecture = find_architecture(str(folder))
    (weights,) = (folder / "unet").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot load the weights" in str(refused(architecture, plan))


@pytest.mark.parametrize(
    ("component", "named"),
    [
        ("unet", "UNet2DConditionModel"),
        ("vae", "AutoencoderKL"),
        ("text_encoder", "CLIPTextModel"),
    ],
)
def test_weights_that_would_be_random_are_refused(
    folder: Path, plan: Any, component: str, named: str, quiet_libraries: None
) -> None:
    """To diffusers and transformers, a file without some of them is worth a warning."""
    (file,) = (folder / component).glob("*.safetensors")
    weights = load_file(file)
    del weights[sorted(weights)[3]]
    save_file(weights, file, metadata={"format": "pt"})
    error = refused(find_architecture(str(folder)), plan)
    assert error.message == f"{folder} lacks weights of its {named}, which would be random"


@pytest.fixture(params=["warning", "error"])
def quiet_libraries(request: pytest.FixtureRequest) -> Iterator[None]:
    """A user may have silenced the warnings."""
    from diffusers.utils import logging as theirs
    from transformers.utils import logging as others

    levels = theirs.get_verbosity(), others.get_verbosity()
    for library in (theirs, others):
        getattr(library, f"set_verbosity_{request.param}")()
    yield
    theirs.set_verbosity(levels[0])
    others.set_verbosity(levels[1])


def test_weights_that_nobody_asks_for_are_no_obstacle(
    folder: Path, plan: Any, quiet_libraries: None, caplog: pytest.LogCaptureFixture
) -> None:
    (file,) = (folder / "unet").glob("*.safetensors")
    weights = {**load_file(file), "no_such_layer.weight": torch.zeros(3)}
    save_file(weights, file, metadata={"format": "pt"})
    loggers = [logging.getLogger(name) for name in ("diffusers", "diffusers.models.modeling_utils")]
    before = [(logger.level, list(logger.filters)) for logger in loggers]
    assert load_pipeline(find_architecture(str(folder)), plan).unet is not None
    assert [(logger.level, list(logger.filters)) for logger in loggers] == before


def test_a_missing_shard_is_one_line(folder: Path, plan: Any, sd_pipe: Any) -> None:
    shutil.rmtree(folder / "unet")
    sd_pipe.unet.save_pretrained(folder / "unet", max_shard_size="500KB")
    assert load_pipeline(find_architecture(str(folder)), plan).unet is not None
    max((folder / "unet").glob("*.safetensors")).unlink()
    assert f"cannot load the weights of {folder}" in str(
        refused(find_architecture(str(folder)), plan)
    )


def test_a_missing_component_is_one_line(folder: Path, plan: Any) -> None:
    architecture = find_architecture(str(folder))
    shutil.rmtree(folder / "vae")
    assert f"cannot load the weights of {folder}" in str(refused(architecture, plan))


def test_a_missing_tokenizer_is_one_line(folder: Path, plan: Any) -> None:
    architecture = find_architecture(str(folder))
    shutil.rmtree(folder / "tokenizer")
    assert "has no vocabulary for its tokenizer" in str(refused(architecture, plan))


def test_an_architecture_alone_cannot_be_loaded(folder: Path, plan: Any) -> None:
    architecture = msgspec.structs.replace(find_architecture(str(folder)), weights=None)
    assert "has no weights to load" in str(refused(architecture, plan))


def test_a_hub_id_without_a_connection_is_one_line(folder: Path, plan: Any) -> None:
    architecture = msgspec.structs.replace(find_architecture(str(folder)), weights="nobody/nothing")
    assert "nobody/nothing" in str(refused(architecture, plan))
