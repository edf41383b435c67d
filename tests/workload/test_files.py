"""Which weights stay mapped, as their files say and as libraries really read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from autotune.workload.architecture import find_architecture
from autotune.workload.files import InFiles, file_dtype, in_files
from autotune.workload.workload import Workload
from tests.workloads import maps_files_here, workload_of

MAPS = pytest.mark.skipif(not maps_files_here(), reason="not known to map weights")


@pytest.fixture
def folder(sd_pipe: Any, tmp_path: Path) -> Path:
    sd_pipe.save_pretrained(tmp_path)
    return tmp_path


def asked(dtype: str) -> Workload:
    workload = workload_of("sd")
    size = {"float32": 1.0, "bfloat16": 0.5}[dtype]
    return msgspec.structs.replace(
        workload,
        request=msgspec.structs.replace(workload.request, dtype=dtype),
        components=tuple(
            msgspec.structs.replace(c, weight_bytes=int(c.weight_bytes * size))
            for c in workload.components
        ),
    )


def found(folder: Path, dtype: str, **change: Any) -> InFiles:
    architecture = msgspec.structs.replace(find_architecture(str(folder)), **change)
    return in_files(architecture, asked(dtype))


def mapped(folder: Path, dtype: str, **change: Any) -> set[str]:
    return set(found(folder, dtype, **change).mapped)


ALL = {"text_encoder", "unet", "vae"}


@MAPS
def test_files_in_the_dtype_that_is_asked_for_are_mapped(folder: Path) -> None:
    assert mapped(folder, "float32") == ALL
    assert mapped(folder, "bfloat16") == set()
    assert mapped(folder, "float32", weights=None) == set()
    assert mapped(folder, "float32", weights="no-one/nothing") == set()
    assert set(found(folder, "bfloat16").mappable) == ALL
    assert found(folder, "bfloat16", weights=None).mappable == ()


@MAPS
def test_a_variant_is_read_where_there_is_one(sd_pipe: Any, folder: Path) -> None:
    sd_pipe.unet.to(torch.bfloat16).save_pretrained(folder / "unet", variant="bf16")
    assert mapped(folder, "bfloat16", variant="bf16") == {"unet"}
    assert mapped(folder, "float32", variant="bf16") == ALL
    assert mapped(folder, "bfloat16") == set()


def test_of_files_that_are_not_here_the_architecture_may_know(tmp_path: Path) -> None:
    flux = find_architecture("flux-dev")
    assert file_dtype(flux, "transformer", "float16") == "bfloat16"
    assert file_dtype(flux, "no_such_part", "bfloat16") is None
    sdxl = find_architecture("sdxl")
    assert file_dtype(sdxl, "unet", "bfloat16") == "float16"
    assert file_dtype(sdxl, "unet", "float32") is None  # which is not of its variant
    here = msgspec.structs.replace(sdxl, weights=str(tmp_path))
    (tmp_path / "unet").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert file_dtype(here, "unet", "float16") == "float32"


@pytest.mark.parametrize("how", ["pickled", "lost", "cut short"])
def test_of_files_that_are_here_the_architecture_is_not_asked(tmp_path: Path, how: str) -> None:
    here = msgspec.structs.replace(find_architecture("sdxl"), weights=str(tmp_path))
    assert file_dtype(here, "unet", "float16") == "float16"
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").touch()
    assert file_dtype(here, "unet", "float16") == "float16"
    suffix = "bin" if how == "pickled" else "safetensors"
    file = tmp_path / "unet" / f"diffusion_pytorch_model.fp16.{suffix}"
    if how == "lost":
        file.symlink_to(tmp_path / "nowhere")
    else:
        file.touch()
    assert file_dtype(here, "unet", "float16") is None


@MAPS
def test_weights_kept_wider_and_files_cut_short_are_not_known(folder: Path) -> None:
    architecture, workload = find_architecture(str(folder)), asked("float32")
    wider = msgspec.structs.replace(workload.component("vae"), weight_bytes=1 << 30)
    others = tuple(c for c in workload.components if c.name != "vae")
    changed = msgspec.structs.replace(workload, components=(*others, wider))
    assert set(in_files(architecture, changed).mapped) == ALL - {"vae"}
    assert set(in_files(architecture, changed).mappable) == ALL
    (file,) = (folder / "unet").glob("*.safetensors")
    file.write_bytes(b"")
    assert "unet" not in mapped(folder, "float32")


@MAPS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_libraries_leave_what_is_mapped_in_its_file(folder: Path, dtype: str) -> None:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
    ranges = list(_mappings(folder))
    for name in ALL:
        lie = [
            any(a <= p.data_ptr() < b for a, b in ranges) for p in getattr(pipe, name).parameters()
        ]
        assert set(lie) == {name in mapped(folder, dtype)}, name


def _mappings(folder: Path) -> Iterator[tuple[int, int]]:
    """Addresses at which files of this folder are mapped."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line:
            low, high = line.split()[0].split("-")
            yield int(low, 16), int(high, 16)
