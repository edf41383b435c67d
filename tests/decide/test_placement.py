"""Where model offload has the weights, as predicted and as accelerate's hooks really move them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from autotune.decide.choose import choose, execution_of
from autotune.decide.placement import PROCESS_BYTES, Weights
from autotune.decide.predict import Predictor
from autotune.decide.quantized import saved_bytes
from autotune.optimizations import find, parse_settings
from autotune.optimizations.execution import Execution
from autotune.probe.reference import load_machine
from autotune.testing.pipelines import BUILDERS, call
from autotune.workload.workload import ComponentRun, Workload
from tests.thorough import part
from tests.workloads import few_frames, workload_of

HOME, DEVICE = torch.device("cpu"), torch.device("cpu:0")
"""To tensors they are one; accelerate and diffusers tell them apart, and so do modules below."""

Run = tuple[str, str]
"""Component and entry."""


class _Located(nn.Parameter):
    """A parameter that says where its module was last sent to."""

    where: torch.device

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.where


class Watched:
    """A pipeline whose modules note where they are, and who is on the device while each runs.

    Nothing is moved: diffusers' offload and accelerate's hooks run as they are, and ask the first
    parameter of a module where it is.
    """

    def __init__(self, pipe: Any) -> None:
        self.here: set[str] = set()
        self.during: list[tuple[Run, frozenset[str]]] = []
        self.moved_in: list[str] = []
        self.moved_out: list[str] = []
        modules = {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}
        for name, module in modules.items():
            first = next(module.parameters())
            first.__class__ = _Located
            first.where = HOME  # type: ignore[attr-defined]
            # On the class: accelerate takes a module's own ``to`` off with its hooks.
            cls = type(module)
            names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
            module.__class__ = type(
                cls.__name__, (cls,), {**names, "to": self._sender(name, cls, first)}
            )
            for entry in ("forward", "encode", "decode"):
                if hasattr(module, entry):
                    setattr(module, entry, self._caller((name, entry), getattr(module, entry)))

    def _sender(self, name: str, cls: Any, first: Any) -> Callable[..., Any]:
        def to(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            given = [v for v in (*args, *kwargs.values()) if isinstance(v, (str, torch.device))]
            if not given:
                return cls.to(module, *args, **kwargs)  # another dtype
            first.where = torch.device(given[0])
            if first.where == DEVICE and name not in self.here:
                self.here.add(name)
                self.moved_in.append(name)
            elif first.where == HOME and name in self.here:
                self.here.discard(name)
                self.moved_out.append(name)
            return module

        return to

    def _caller(self, run: Run, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # SVD asks what a decode takes
        def noted(*args: Any, **kwargs: Any) -> Any:
            if run[1] == "forward":  # the hooks are around it
                self.during.append((run, frozenset(self.here)))
                return function(*args, **kwargs)
            with self._once_inside(run, function):  # the hooks are in it
                return function(*args, **kwargs)

        return noted

    @contextmanager
    def _once_inside(self, run: Run, function: Any) -> Iterator[None]:
        """Note who is here when the first layer runs."""
        count = len(self.during)

        def note(*_: Any) -> None:
            if len(self.during) == count:
                self.during.append((run, frozenset(self.here)))

        layers = [m for m in function.__self__.modules() if not list(m.children())]
        handles = [layer.register_forward_pre_hook(note) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@functools.cache
def observed(kind: str) -> tuple[Watched, Workload]:
    """One generation under model offload, and the workload that it was predicted from."""
    pipe = BUILDERS[kind]()
    watched = Watched(pipe)
    handler = find("model_cpu_offload")
    handler.apply(pipe, handler.setting().parameters, "cpu")
    call(pipe, 2, **few_frames(pipe))
    return watched, workload_of(kind)


def resident_bytes(watched: Watched, workload: Workload) -> dict[Run, int]:
    """The most weights on the device during each run, its own included."""
    sizes = {c.name: c.weight_bytes for c in workload.components}
    most: dict[Run, int] = {}
    for run, here in watched.during:
        most[run] = max(most.get(run, 0), sum(sizes[n] for n in here))
    return most


OFFLOAD = Execution(placement="model_offload")
UNASKED: Any = None
"""What a forward costs: model offload moves the same, however long it takes."""


def predicted_bytes(weights: Weights, workload: Workload) -> dict[Run, int]:
    most: dict[Run, int] = {}
    for run in runs_of(workload):
        key = (run.component, run.entry)
        most[key] = max(most.get(key, 0), weights.resident_bytes(run, OFFLOAD))
    return most


def runs_of(workload: Workload) -> list[ComponentRun]:
    return [run for phase in workload.phases for run in phase.runs]


@pytest.mark.parametrize("kind", part(tuple(BUILDERS), 3, start=1))
def test_what_is_on_the_device_while_each_component_runs(kind: str) -> None:
    watched, workload = observed(kind)
    machine = load_machine("rtx-3080-10gb")
    weights = Weights(machine, workload)
    assert resident_bytes(watched, workload) == predicted_bytes(weights, workload)

    link = machine.link
    assert link is not None
    sizes = {c.name: c.weight_bytes for c in workload.components}
    seconds = sum(sizes[n] for n in watched.moved_in) / link.module_h2d_bytes_per_s.value
    seconds += sum(sizes[n] for n in watched.moved_out) / link.module_d2h_bytes_per_s.value
    predicted = sum(weights.transfer_s(r, OFFLOAD, UNASKED) for r in runs_of(workload))
    assert predicted == pytest.approx(seconds)


@pytest.mark.parametrize("kind", BUILDERS)
def test_every_component_is_on_the_device_while_it_runs(kind: str) -> None:
    """Else it would meet inputs that are elsewhere, and fail."""
    watched, _ = observed(kind)
    assert len(watched.during) >= 3
    for (component, _), here in watched.during:
        assert component in here
    assert watched.here == set()  # and all are home after the image


# ---- host RAM -----------------------------------------------------------------------------------


def test_what_is_loaded_takes_no_ram_for_loading() -> None:
    """A pipeline that is on the GPU has no copy in RAM, and gets one only if it is offloaded."""
    workload, machine = workload_of("sd"), load_machine("rtx-3080-10gb")
    loaded = msgspec.structs.replace(workload, is_loaded=True)
    for placement, in_ram in (("device", 0), ("model_offload", workload.weight_bytes)):
        execution = Execution(placement=placement)  # type: ignore[arg-type]
        before, after = (Weights(machine, w).load(execution) for w in (workload, loaded))
        assert before.host_bytes == PROCESS_BYTES + workload.weight_bytes
        assert after.host_bytes == PROCESS_BYTES + in_ram
        assert after.peak_bytes == before.peak_bytes
        assert after.seconds is None


def host_of(workload: Workload, text: str) -> tuple[int, int]:
    """RAM beside the process: while it is loaded, and at any time."""
    prediction = Predictor(load_machine("rtx-4090-24gb"), workload).predict(
        execution_of(parse_settings(text))
    )
    return prediction.load.host_bytes - PROCESS_BYTES, prediction.host_bytes - PROCESS_BYTES


def test_what_is_mapped_takes_no_ram_before_it_is_moved_or_changed() -> None:
    workload = workload_of("sd")
    (unet,) = workload.components_as("denoiser")
    rest = workload.weight_bytes - unet.weight_bytes
    mapped = msgspec.structs.replace(workload, mapped=("unet",))
    whole = msgspec.structs.replace(mapped, mapped=tuple(c.name for c in workload.components))
    assert host_of(mapped, "") == (rest, rest)
    assert host_of(whole, "") == (0, 0)
    assert host_of(whole, "model_cpu_offload") == (0, workload.weight_bytes)
    (vae,) = workload.components_as("autoencoder")
    assert host_of(whole, "group_offload:disk=True,stream=False") == (0, vae.weight_bytes)


def test_weights_are_narrowed_beside_all_that_was_read() -> None:
    """Quantizing keeps the layers, which are read already; casting copies them."""
    workload = workload_of("sd")
    (unet,) = workload.components_as("denoiser")
    everything = tuple(c.name for c in workload.components)
    mapped = msgspec.structs.replace(workload, mapped=everything, mappable=everything)
    packed = unet.linear_bytes - saved_bytes("nf4", unet.linear_bytes, 4)
    quantized, cast = "quantization:scheme=nf4", "layerwise_casting"
    assert host_of(workload, quantized) == (workload.weight_bytes + packed,) * 2
    assert host_of(mapped, quantized) == (packed, packed)
    assert host_of(workload, cast) == (workload.weight_bytes + unet.weight_bytes,) * 2
    narrow = unet.weight_bytes - unet.casting_saves_bytes
    assert host_of(mapped, cast) == (unet.weight_bytes + narrow,) * 2
    loaded = msgspec.structs.replace(workload, is_loaded=True)
    assert host_of(loaded, quantized) == (0, unet.linear_bytes)


def test_a_machine_that_does_not_map_files_reads_all() -> None:
    workload, machine = workload_of("sd"), load_machine("rtx-4090-24gb")
    everything = tuple(c.name for c in workload.components)
    mapped = msgspec.structs.replace(workload, mapped=everything, mappable=everything)
    host = msgspec.structs.replace(machine.host, os="Windows 11")
    old = {"diffusers": "0.36.0", "transformers": "5.2.0"}
    for other, in_ram in (
        (machine, 0),
        (msgspec.structs.replace(machine, host=host), workload.weight_bytes),
        (msgspec.structs.replace(machine, software=old), workload.weight_bytes),
        (load_machine("rtx-3080-10gb-torch1"), workload.weight_bytes),
    ):
        load = Predictor(other, mapped).predict(Execution()).load
        assert load.host_bytes - PROCESS_BYTES == in_ram


@pytest.mark.parametrize(("os", "fits"), [("Linux", True), ("Windows 11", False)])
def test_flux_is_quantized_in_16_gib_of_ram_where_its_files_are_mapped(
    traced: Any, os: str, fits: bool
) -> None:
    machine = load_machine("rtx-4090-24gb")
    other = msgspec.structs.replace(machine, host=msgspec.structs.replace(machine.host, os=os))
    predictor = Predictor(other, traced("flux-dev", dtype="bfloat16"))
    execution = execution_of(parse_settings("quantization:scheme=int8"))
    assert (predictor.predict(execution).load.host_bytes < 16 << 30) == fits


def test_what_is_left_in_its_file_is_packed_without_a_copy() -> None:
    workload = workload_of("sd")
    (unet,) = workload.components_as("denoiser")
    packed = unet.linear_bytes - saved_bytes("nf4", unet.linear_bytes, 4)
    left = msgspec.structs.replace(workload, mappable=("unet",))
    quantized = "quantization:scheme=nf4"
    assert host_of(left, quantized) == (workload.weight_bytes - unet.linear_bytes + packed,) * 2
    assert host_of(left, "") == (workload.weight_bytes,) * 2
    loaded = msgspec.structs.replace(left, is_loaded=True)
    assert host_of(loaded, quantized) == (0, 0)
    assert host_of(loaded, "") == (unet.linear_bytes,) * 2  # it is read before it is moved
    assert host_of(loaded, "model_cpu_offload") == (workload.weight_bytes,) * 2


def test_a_loaded_pipeline_fits_where_it_could_not_be_loaded() -> None:
    machine = load_machine("rtx-3080-10gb")
    host = msgspec.structs.replace(machine.host, ram_available_bytes=PROCESS_BYTES + (1 << 20))
    small = msgspec.structs.replace(machine, host=host)
    workload = workload_of("sd")
    assert workload.weight_bytes > 1 << 20
    assert not choose(small, workload).fits
    plan = choose(small, msgspec.structs.replace(workload, is_loaded=True))
    assert plan.fits
    assert plan.execution.placement == "device"
