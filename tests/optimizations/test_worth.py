"""What the members know about a workload: where they do nothing, and which parameters to try."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from autotune.optimizations import CATALOGUE, find
from autotune.optimizations.tome import downsample, merged_downsamples
from autotune.probe.machine import Machine
from autotune.probe.software import OPTIONAL
from autotune.workload.architecture import describe_pipeline
from autotune.workload.phases import trace_workload
from autotune.workload.workload import Request, Workload


def workload_of(pipe: Any, side: int = 64, batch: int = 1) -> Workload:
    request = Request(side, side, batch, 2, 7.5, "float32")
    return trace_workload(describe_pipeline(pipe), request)


def without_self_attention(workload: Workload) -> Workload:
    phases = []
    for phase in workload.phases:
        runs = []
        for run in phase.runs:
            kept = tuple(o for o in run.trace.operators if not o.block_tokens)
            trace = msgspec.structs.replace(run.trace, operators=kept)
            runs.append(msgspec.structs.replace(run, trace=trace))
        phases.append(msgspec.structs.replace(phase, runs=tuple(runs)))
    return msgspec.structs.replace(workload, phases=tuple(phases))


def test_token_merging_is_tried_where_it_reaches_blocks(
    sd_pipe: Any, sdxl_pipe: Any, cpu_machine: Machine
) -> None:
    for pipe, depths in ((sd_pipe, {1, 2}), (sdxl_pipe, {2})):
        workload = workload_of(pipe)
        assert find("tome").unavailable(cpu_machine, workload) is None
        tried = find("tome").worth_trying(cpu_machine, workload)
        assert {p["max_downsample"] for p in tried} == depths
        assert {p["ratio"] for p in tried} == {0.3, 0.5}
    assert merged_downsamples(workload_of(sdxl_pipe), 1) == set()


def test_token_merging_needs_self_attention(sd_pipe: Any, cpu_machine: Machine) -> None:
    bare = without_self_attention(workload_of(sd_pipe))
    assert "no self-attention" in (find("tome").unavailable(cpu_machine, bare) or "")


ABSENT = dict.fromkeys((*OPTIONAL, "c++"), "")
"""What a machine without any of them records."""


def test_packages_that_nobody_looked_for_are_taken_to_be_there(
    sd_pipe: Any, cpu_machine: Machine, rtx_3080: Machine
) -> None:
    """As of a machine recorded before all of them were."""
    cpu = replace(cpu_machine, source="measured", software={"torch": "2.13.0"})
    gpu = replace(rtx_3080, source="measured", software={"torch": "2.13.0"})
    workload = workload_of(sd_pipe)
    half = replace(workload, request=replace(workload.request, dtype="float16"))
    for name in ("tome", "compile"):
        assert find(name).unavailable(cpu, workload) is None
        assert find(name).unavailable(gpu, half) is None
    schemes = find("quantization").worth_trying(rtx_3080, half)
    assert find("quantization").worth_trying(gpu, half) == schemes


def test_packages_are_those_of_the_machine(sd_pipe: Any, cpu_machine: Machine) -> None:
    """Not those of the process that plans: tomesd and a compiler are here."""
    bare = replace(cpu_machine, source="measured", software=ABSENT)
    workload = workload_of(sd_pipe)
    reason = find("tome").unavailable(bare, workload)
    assert reason == "the package tomesd is not installed: pip install tomesd"
    assert "install g++" in (find("compile").unavailable(bare, workload) or "")
    both = replace(bare, software=ABSENT | {"tomesd": "0.1.3", "c++": "g++"})
    assert find("tome").unavailable(both, workload) is None
    assert find("compile").unavailable(both, workload) is None


def test_packages_of_another_machines_gpu(sd_pipe: Any, rtx_3080: Machine) -> None:
    workload = workload_of(sd_pipe)
    half = replace(workload, request=replace(workload.request, dtype="float16"))
    bare = replace(rtx_3080, source="measured", software=ABSENT)
    assert "pip install triton" in (find("compile").unavailable(bare, half) or "")
    assert "it needs the package" in (find("quantization").unavailable(bare, half) or "")
    some = replace(bare, software=ABSENT | {"triton": "3.6.0", "bitsandbytes": "0.49.0"})
    assert find("compile").unavailable(some, half) is None
    assert find("quantization").worth_trying(some, half) == ({"scheme": "nf4"},)
    assert len(find("quantization").worth_trying(rtx_3080, half)) > 1


@pytest.mark.parametrize("side", range(8, 72, 8))
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_the_downsampling_factor_is_tomesds(side: int, factor: int) -> None:
    """Its own formula, on a square latent and on blocks whose sides are rounded up."""
    import math

    block = math.ceil(side / factor) ** 2
    assert downsample(side * side, block) == math.ceil(math.sqrt(side * side // block))


def test_the_decode_switches_know_when_they_change_nothing(
    sd_pipe: Any, cpu_machine: Machine
) -> None:
    slicing, tiling = find("vae_slicing"), find("vae_tiling")
    small, large = workload_of(sd_pipe, 64, 1), workload_of(sd_pipe, 128, 2)
    assert slicing.unavailable(cpu_machine, small) == "a batch of one has nothing to slice"
    assert "64x64 is not cut into tiles" in (tiling.unavailable(cpu_machine, small) or "")
    assert slicing.unavailable(cpu_machine, large) is None
    assert tiling.unavailable(cpu_machine, large) is None
    assert tiling.worth_trying(cpu_machine, large) == ({"tile": 64},)


def test_a_cpu_has_no_use_for_what_moves_weights_or_needs_cuda(
    sd_pipe: Any, cpu_machine: Machine, rtx_3080: Machine
) -> None:
    workload = workload_of(sd_pipe)
    for name in ("xformers", "model_cpu_offload", "sequential_cpu_offload"):
        assert find(name).unavailable(cpu_machine, workload)
    for name in ("model_cpu_offload", "sequential_cpu_offload"):
        assert find(name).unavailable(rtx_3080, workload) is None
        unified = msgspec.structs.replace(rtx_3080, link=None)
        assert "share their memory" in (find(name).unavailable(unified, workload) or "")


def test_what_is_worth_trying_is_valid(pipe: Any, rtx_3080: Machine) -> None:
    workload = workload_of(pipe, 128, 2)
    for handler in CATALOGUE.values():
        for parameters in handler.worth_trying(rtx_3080, workload):
            assert handler.setting(parameters).parameters == parameters
