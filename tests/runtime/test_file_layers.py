"""Layers that are left in their files until they are quantized: bits, memory, ways back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from autotune.decide.limits import Limits
from autotune.decide.predict import Predictor
from autotune.decide.prediction import PROCESS_BYTES
from autotune.errors import RequestError
from autotune.optimizations import CATALOGUE, execution_of, parse_settings
from autotune.optimizations.file_layers import is_in_file, left_in_files, read_from_files
from autotune.probe.machine import Machine
from autotune.probe.reference import load_machine
from autotune.runtime.apply import apply_plan
from autotune.runtime.load import load_pipeline
from autotune.runtime.out_of_memory import Failure
from autotune.runtime.tuned import Tuned
from autotune.testing.pipelines import BUILDERS
from autotune.tuner import Ask, Measured
from autotune.tuner.configure import configure_pipeline
from autotune.tuner.planning import Planned, completed, decided
from autotune.tuner.replan import Replanner
from autotune.workload import files
from autotune.workload.architecture import describe_pipeline, find_architecture
from autotune.workload.cache import workload_of
from autotune.workload.components import like_on_meta, meta_module, tensor_bytes
from autotune.workload.phases import trace_workload
from autotune.workload.workload import Request
from tests.workloads import maps_files_here

pytestmark = pytest.mark.skipif(not maps_files_here(), reason="not known to map weights")

SCHEMES = ("gguf_q8_0", "gguf_q4_0")

PlanOf = Callable[..., Any]


@pytest.fixture
def plan(sd_pipe: Any, plan_of: PlanOf) -> Callable[..., Any]:
    """``plan("gguf_q8_0")``: to quantize so, in bfloat16; empty: not at all."""

    def make(scheme: str = "gguf_q8_0", dtype: str = "bfloat16") -> Any:
        text = f"quantization:scheme={scheme}" if scheme else ""
        made, workload = plan_of(sd_pipe, text)
        return msgspec.structs.replace(
            made,
            execution=execution_of(parse_settings(text)),
            workload=msgspec.structs.replace(made.workload, dtype=dtype),
        ), workload

    return make


def load(folder: Path, plan: Any, **change: Any) -> Any:
    architecture = msgspec.structs.replace(find_architecture(str(folder)), **change)
    pipe = load_pipeline(architecture, plan, maps_files=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tensors(module: Any) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def require_same(one: Any, other: Any) -> None:
    """To the bit, and in all that a loaded module is besides."""
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.requires_grad == theirs[name].requires_grad
        assert torch.equal(tensor, theirs[name]), name
    assert dict(one.config) == dict(other.config)
    assert vars(one).keys() == vars(other).keys()
    assert [type(m) for m in one.modules()] == [type(m) for m in other.modules()]
    assert not any(is_in_file(m) for m in one.modules())


def file_layers(module: Any) -> list[Any]:
    return [m for m in module.modules() if is_in_file(m)]


def mappings(folder: Path) -> list[tuple[int, int]]:
    """Addresses at which files of this folder are mapped."""

    def found() -> Iterator[tuple[int, int]]:
        for line in Path("/proc/self/maps").read_text().splitlines():
            if str(folder) in line:
                low, high = line.split()[0].split("-")
                yield int(low, 16), int(high, 16)

    return list(found())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed_from_the_file_it_draws_the_same_and_goes_back_to_the_bit(
    folder: Path, plan: Any, draw: Any, scheme: str
) -> None:
    quantized, _ = plan(scheme)
    pipe, usual = load(folder, quantized), load(folder, plan("")[0])
    drawn = draw(usual)
    undo, other = apply_plan(pipe, quantized, "cpu"), apply_plan(usual, quantized, "cpu")
    assert file_layers(pipe.unet) == []
    assert CATALOGUE["quantization"].found(pipe) == {"scheme": scheme}
    assert torch.equal(draw(pipe), draw(usual))
    undo()
    other()
    read_from_files(pipe)
    require_same(pipe.unet, usual.unet)
    assert torch.equal(draw(pipe), drawn)


def test_what_waits_is_in_the_file_before_and_after(folder: Path, plan: Any) -> None:
    quantized, _ = plan()
    pipe = load(folder, quantized)
    left = file_layers(pipe.unet)
    assert len(left) > 10
    undo = apply_plan(pipe, quantized, "cpu")
    assert left_in_files(pipe) == ("unet",)
    undo()
    assert file_layers(pipe.unet) == left
    ranges = mappings(folder)
    for parameter in (p for layer in left for p in layer.parameters()):
        assert any(low <= parameter.data_ptr() < high for low, high in ranges)
        assert parameter.dtype == torch.float32


def test_ram_is_taken_as_predicted(folder: Path, plan: Any) -> None:
    quantized, _ = plan()
    architecture = find_architecture(str(folder))
    machine = load_machine("rtx-4090-24gb")
    request = completed(architecture, machine, Ask(height=64, width=64, steps=2, dtype="bfloat16"))
    predictor = Predictor(machine, workload_of(architecture, request))
    predicted = predictor.predict(quantized.execution).load.host_bytes - PROCESS_BYTES
    pipe = load(folder, quantized)
    apply_plan(pipe, quantized, "cpu")
    ranges = mappings(folder)
    in_ram = sum(
        tensor_bytes(tensor)
        for name in ("unet", "vae", "text_encoder")
        for tensor in tensors(getattr(pipe, name)).values()
        if not any(low <= tensor.data_ptr() < high for low, high in ranges)
    )
    assert in_ram == pytest.approx(predicted, rel=0.05)


def test_left_in_its_file_it_is_described_and_traced_as_read(folder: Path, plan: Any) -> None:
    quantized, _ = plan()
    pipe, request = load(folder, quantized), Request(64, 64, 1, 2, 7.5, "bfloat16")
    apply_plan(pipe, quantized, "cpu")()
    architecture = describe_pipeline(pipe)
    traced = trace_workload(architecture, request, pipe)
    read_from_files(pipe)
    assert describe_pipeline(pipe) == architecture
    assert trace_workload(architecture, request, pipe) == traced
    assert not any(run.is_estimated for phase in traced.phases for run in phase.runs)


@pytest.mark.parametrize("kind", ["sd3", "flux", "wan", "sd-controlnet"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_kind_is_as_an_ordinary_load_has_it(
    kind: str, dtype: str, tmp_path: Path, plan: Any
) -> None:
    """Norms that stay in float32, and buffers that no file holds, among others."""
    built = BUILDERS[kind]()
    names = tuple(n for n in ("unet", "controlnet", "transformer") if hasattr(built, n))
    built.save_pretrained(tmp_path)
    made = [plan(scheme, dtype)[0] for scheme in ("gguf_q8_0", "")]
    pipe, usual = (
        load(
            tmp_path,
            msgspec.structs.replace(
                p, workload=msgspec.structs.replace(p.workload, denoisers=names)
            ),
        )
        for p in made
    )
    components = find_architecture(str(tmp_path)).components
    for name in names:
        left, real = getattr(pipe, name), getattr(usual, name)
        made = meta_module(name, components[name], getattr(torch, dtype), {name: left})
        for alike in (made, like_on_meta(left)):
            assert {n: t.dtype for n, t in tensors(alike).items()} == {
                n: t.dtype for n, t in tensors(real).items()
            }
    read_from_files(pipe)
    for name in names:
        require_same(getattr(pipe, name), getattr(usual, name))


def test_without_quantization_what_was_left_is_read(folder: Path, plan: Any, draw: Any) -> None:
    """Memory may have changed between planning and applying; casting copies what it finds."""
    usual = load(folder, plan("")[0])
    for text in ("", "layerwise_casting"):
        pipe = load(folder, plan()[0])
        other = msgspec.structs.replace(plan("")[0], optimizations=parse_settings(text))
        undo, undo_usual = apply_plan(pipe, other, "cpu"), apply_plan(usual, other, "cpu")
        assert torch.equal(draw(pipe), draw(usual))
        undo()
        undo_usual()
        require_same(pipe.unet, usual.unet)
        assert left_in_files(pipe) == ()


def test_one_scheme_after_another_and_the_end(folder: Path, plan: Any, draw: Any) -> None:
    (first, workload), usual = plan("gguf_q4_0"), load(folder, plan("")[0])
    pipe = load(folder, first)
    apply_plan(pipe, first, "cpu")()
    tuned = Tuned(pipe, plan("gguf_q8_0")[0], workload, "cpu")
    assert CATALOGUE["quantization"].found(pipe) == {"scheme": "gguf_q8_0"}
    tuned.undo()
    require_same(pipe.unet, usual.unet)
    assert torch.equal(draw(pipe), draw(usual))


def test_a_failure_leaves_it_in_its_file(
    folder: Path, plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized, _ = plan()
    pipe = load(folder, quantized)
    left = file_layers(pipe.unet)

    def fail(*_: Any) -> Any:
        raise MemoryError("no more")

    monkeypatch.setattr(type(pipe), "to", fail)
    with pytest.raises(Exception, match="no more"):
        apply_plan(pipe, quantized, "cpu")
    assert file_layers(pipe.unet) == left


def test_shards_and_variants_are_read_in_their_own_dtype(
    folder: Path, plan: Any, sd_pipe: Any
) -> None:
    half = sd_pipe.unet.to(torch.float16)
    half.save_pretrained(folder / "unet", variant="fp16", max_shard_size="300KB")
    assert len(list((folder / "unet").glob("*.fp16*.safetensors"))) > 1
    pipe, usual = (load(folder, plan(s)[0], variant="fp16") for s in ("gguf_q8_0", ""))
    assert {layer.weight.dtype for layer in file_layers(pipe.unet)} == {torch.float16}
    read_from_files(pipe)
    require_same(pipe.unet, usual.unet)


@pytest.mark.parametrize("how", ["pickled", "mixed"])
def test_what_cannot_be_mapped_is_read_as_usual(
    folder: Path, plan: Any, sd_pipe: Any, how: str
) -> None:
    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    if how == "mixed":
        sd_pipe.unet.conv_in.to(torch.float16)
    sd_pipe.unet.save_pretrained(folder / "unet", safe_serialization=how == "mixed")
    pipe, usual = (load(folder, plan(scheme)[0]) for scheme in ("gguf_q8_0", ""))
    assert left_in_files(pipe) == ()
    require_same(pipe.unet, usual.unet)
    assert files.file_dtype(find_architecture(str(folder)), "unet", "bfloat16") is None


def test_nothing_is_left_in_files_where_the_plan_was_made_for_copies(
    folder: Path, plan: Any
) -> None:
    """It is the machine that says whether files are mapped: the plan reckons with the same."""
    pipe = load_pipeline(find_architecture(str(folder)), plan()[0], maps_files=False)
    assert left_in_files(pipe) == ()
    assert pipe.unet.dtype == torch.bfloat16


def test_files_of_eight_bits_are_read_as_usual(folder: Path, plan: Any) -> None:
    (file,) = (folder / "unet").glob("*.safetensors")
    narrow = {name: t.to(torch.float8_e4m3fn) for name, t in load_file(file).items()}
    save_file(narrow, file, metadata={"format": "pt"})
    assert files.file_dtype(find_architecture(str(folder)), "unet", "bfloat16") is None
    pipe = load(folder, plan()[0])
    assert left_in_files(pipe) == ()
    assert pipe.unet.dtype == torch.bfloat16


def test_a_denoiser_that_cannot_be_left_in_its_files_is_read_as_usual(
    folder: Path, plan: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("size mismatch for to_q.weight")

    monkeypatch.setattr(torch.nn.Module, "load_state_dict", refuse)
    pipe, usual = (load(folder, plan(scheme)[0]) for scheme in ("gguf_q8_0", ""))
    require_same(pipe.unet, usual.unet)
    assert "unet cannot be left in its files" in caplog.text
    assert "size mismatch" in caplog.text


@pytest.fixture
def planned(folder: Path, plan: Any, cpu_machine: Machine) -> tuple[Any, Planned, Replanner]:
    """A pipeline left in its files, a plan that does not quantize, and what plans again."""
    pipe, (_, workload) = load(folder, plan()[0]), plan()
    left = msgspec.structs.replace(workload, is_loaded=True, mappable=("unet",))
    first = decided(find_architecture(str(folder)), cpu_machine, left, Limits())
    return pipe, first, Replanner(pipe, first, Measured("cpu", cpu_machine, ()), Ask())


def test_after_a_failure_what_was_read_meanwhile_counts_as_read(
    planned: tuple[Any, Planned, Replanner],
) -> None:
    pipe, first, planner = planned
    failure = Failure("no more", None, of_host=True)
    for left in (("unet",), ()):
        assert planner.step_down(first.plan, first.workload, failure).workload.mappable == left
        read_from_files(pipe)


def test_given_to_configure_nothing_is_left_in_files(
    folder: Path, plan: Any, draw: Any, measured_here: None
) -> None:
    pipe = load(folder, plan()[0])
    with pytest.raises(RequestError):
        configure_pipeline(pipe, Ask(height=63))
    assert torch.equal(draw(pipe), draw(load(folder, plan("")[0])))


@pytest.mark.parametrize("packs", [True, False])
def test_an_optimization_says_whether_it_takes_layers_from_their_files(
    folder: Path, plan: Any, monkeypatch: pytest.MonkeyPatch, packs: bool
) -> None:
    """One of another package may do as quantization does."""
    found: list[tuple[str, ...]] = []

    def apply(_: Any, pipe: Any, *__: Any) -> Callable[[], None]:
        found.append(left_in_files(pipe))
        return lambda: None

    other = type(CATALOGUE["layerwise_casting"])
    monkeypatch.setattr(other, "packs_from_files", packs)
    monkeypatch.setattr(other, "apply", apply)
    chosen = plan()[0]
    pipe = load(folder, chosen)
    settings = parse_settings("layerwise_casting")
    apply_plan(pipe, msgspec.structs.replace(chosen, optimizations=settings), "cpu")
    assert found == [("unet",) if packs else ()]
