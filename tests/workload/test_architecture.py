"""Architectures from a folder, from a pipeline, built in; and everything that is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from autotune.demo import model_path
from autotune.errors import ModelError
from autotune.workload.architecture import builtin_names, describe_pipeline, find_architecture
from autotune.workload.components import build_on_meta, describe
from autotune.workload.phases import trace_workload


@pytest.fixture
def folder(sd_pipe: Any, tmp_path: Path) -> Path:
    """The SD-like pipeline, saved."""
    sd_pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def shapes(name: str, component: Any) -> dict[str, Any]:
    module = build_on_meta(name, component, torch.float32)
    return {n: (p.shape, p.dtype) for n, p in module.named_parameters()}


def test_a_folder_and_its_loaded_pipeline_build_the_same_modules(
    pipe: Any, tmp_path: Path, request_of: Callable[..., Any]
) -> None:
    pipe.save_pretrained(tmp_path / "model")
    loaded = type(pipe).from_pretrained(tmp_path / "model")
    saved = find_architecture(str(tmp_path / "model"))
    assert saved.weights == saved.name == str(tmp_path / "model")
    traced = msgspec.structs.replace(trace_workload(saved, request_of()), model="")
    for architecture in (describe_pipeline(pipe), describe_pipeline(loaded)):
        assert architecture.pipeline == saved.pipeline
        assert architecture.components.keys() == saved.components.keys()
        for name, component in architecture.components.items():
            assert component.library == saved.components[name].library
            assert shapes(name, component) == shapes(name, saved.components[name])
        workload = msgspec.structs.replace(trace_workload(architecture, request_of()), model="")
        assert set(workload.components) == set(traced.components)
        assert workload.phases == traced.phases


def test_a_module_of_the_pipelines_own_folder_is_found_again(
    sd_pipe: Any, request_of: Callable[..., Any]
) -> None:
    """The safety checker is no public class of diffusers; SD 1.5's repository has one."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = CLIPConfig(
        text_config=small | {"num_attention_heads": 2},
        vision_config=small | {"num_attention_heads": 2, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    sd_pipe.register_modules(safety_checker=StableDiffusionSafetyChecker(config))
    architecture = describe_pipeline(sd_pipe)
    component = architecture.components["safety_checker"]
    assert (component.library, component.class_name) == (
        "stable_diffusion",
        "StableDiffusionSafetyChecker",
    )
    weight = trace_workload(architecture, request_of()).component("safety_checker").weight_bytes
    checker = sd_pipe.safety_checker
    assert weight == sum(t.nbytes for t in (*checker.parameters(), *checker.buffers()))


def test_a_replaced_component_is_described_as_it_is_now(sd_pipe: Any, sdxl_pipe: Any) -> None:
    sd_pipe.vae = sdxl_pipe.unet
    assert describe_pipeline(sd_pipe).components["vae"].class_name == "UNet2DConditionModel"


def test_token_merging_does_not_hide_what_a_pipeline_is(sd_pipe: Any) -> None:
    import tomesd

    before = describe_pipeline(sd_pipe)
    tomesd.apply_patch(sd_pipe)
    assert describe_pipeline(sd_pipe) == before


@pytest.mark.parametrize("thing", ["sd15", 3, None, torch.nn.Linear(1, 1)], ids=repr)
def test_what_is_no_pipeline_is_said_so(thing: Any) -> None:
    with pytest.raises(ModelError, match="holds no modules"):
        describe_pipeline(thing)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_built_in_models_need_no_file(name: str) -> None:
    architecture = find_architecture(name)
    assert architecture.name == name
    assert name in builtin_names()
    for component, config in architecture.components.items():
        assert describe(component, build_on_meta(component, config, torch.float16)).parameters


# ---- what is none -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("sdlx", "did you mean sdxl"),
        ("", "unknown model"),
        ("./missing", "there is no folder"),
        ("/missing/model", "there is no folder"),
        ("~nobody-of-this-name/model", "there is no folder"),
        ("a/b/c", "there is no folder"),
        ("x" * 5000, "unknown model"),
        ("odd\0name", "unknown model"),
        ("nobody/nothing", "cannot read nobody/nothing from the Hugging Face hub"),
        ("not an/id!", "cannot read not an/id!"),
    ],
)
def test_names_that_lead_nowhere(model: str, says: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=says) as caught:
        find_architecture(model)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["flux-dev", "sdxl"])
def test_of_a_known_repository_the_dtypes_are_known_before_its_weights_are_here(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of SDXL's: it is the files of a variant that are known, and nobody has asked for one."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(model_path()))
    known = find_architecture(name)
    found = find_architecture(str(known.weights))
    assert (found.name, found.variant) == (known.weights, None)
    assert known.stored
    assert found.stored == ({} if known.variant else known.stored)


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file, not a pipeline folder"):
        find_architecture(str(folder / "model_index.json"))


def test_a_folder_without_an_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    with pytest.raises(ModelError, match=r"is no diffusers pipeline: it has no model_index\.json"):
        find_architecture(str(folder))


@pytest.mark.parametrize(
    "text", [b"{", b"\xff\xfe\x00", b"[]", b"null", b"{}", b'{"_class_name": 3}', b"[" * 100_000]
)
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json"])
def test_a_broken_file_is_named(
    folder: Path, file: str, text: bytes, request_of: Callable[..., Any]
) -> None:
    (folder / file).write_bytes(text)
    if file == "unet/config.json" and text.startswith(b"{") and text != b"{":
        return  # an object is a configuration, if a strange one: the tests of tracing see to it
    with pytest.raises(ModelError, match=Path(file).name) as caught:
        find_architecture(str(folder))
    assert "\n" not in str(caught.value)


def test_a_class_that_is_not_installed(folder: Path, request_of: Callable[..., Any]) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["diffusers", "UNet3000"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="unet needs UNet3000 of diffusers"):
        trace_workload(find_architecture(str(folder)), request_of())


@pytest.mark.parametrize("entry", [None, [None, None], ["diffusers"], "unet", True])
def test_entries_without_a_class_are_no_components(folder: Path, entry: Any) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": entry}))
    assert set(find_architecture(str(folder)).components) == {"text_encoder", "vae"}
