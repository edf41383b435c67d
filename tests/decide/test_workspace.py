"""cuDNN's and cuBLAS's workspaces, by engine."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from autotune.decide.workspace import ADDRESSED_BYTES, convolution_bytes, library_bytes
from autotune.probe.machine import Machine, OperatorTime
from autotune.probe.reference import load_machine
from autotune.units import MIB
from autotune.workload.workload import Operator

IN, OUT, FILTER = 256 * MIB, 128 * MIB, 4 * MIB


def convolution(dtype: str = "float16", in_bytes: int = IN, kind: str = "convolution") -> Operator:
    return Operator(
        name="aten.convolution.default",
        kind=kind,
        signature='["aten.convolution.default",[{"t":"float16","s":[1,128,1024,1024]}],{}]',
        dtype=dtype,
        count=1,
        flops=1e12,
        bytes=in_bytes + OUT + FILTER,
        live_bytes=0,
        in_bytes=in_bytes,
        out_bytes=OUT,
    )


@pytest.mark.parametrize(
    ("machine", "dtype", "expected"),
    [
        ("rtx-4090-24gb", "float16", IN + FILTER + OUT),  # NHWC in, NHWC out
        ("h100-80gb", "bfloat16", IN + FILTER + OUT),
        ("t4-16gb", "float16", IN + FILTER + OUT),
        ("a100-40gb", "float32", IN + FILTER),  # TF32 engines write NCHW
        ("t4-16gb", "float32", 0),  # no tensor cores for float32 before Ampere
        ("gtx-1660-6gb", "float32", 0),
        ("cpu-16-cores", "float32", IN + FILTER),  # oneDNN: a copy, and packed filters
    ],
)
def test_copies_by_engine(machine: str, dtype: str, expected: int) -> None:
    assert convolution_bytes(load_machine(machine), convolution(dtype), False) == expected


@pytest.mark.parametrize(
    ("image", "taken"),
    [
        ('{"t":"float32","s":[1,8,64,64]}', IN + FILTER),
        ('{"t":"float32","s":[1,8,64,64],"l":"nhwc"}', FILTER),  # as CPU kernels leave it
        ('{"t":"float32","s":[1,8,64,64],"st":[32768,1,512,8]}', FILTER),
        (
            '{"t":"float32","s":[1,8,64,64],"st":[8,1,512,8]}',
            IN + FILTER,
        ),  # PyTorch does not say so
    ],
)
def test_onednn_copies_what_is_not_channels_last(
    cpu_machine: Machine, image: str, taken: int
) -> None:
    signature = f'["aten.convolution.default",[{image}],{{}}]'
    operator = replace(convolution("float32"), signature=signature)
    assert convolution_bytes(cpu_machine, operator, False) == taken
    assert convolution_bytes(cpu_machine, operator, True) == FILTER


@pytest.mark.parametrize(("torch", "copied"), [("2.5.1", False), ("2.7.0+cu128", True), ("", True)])
def test_large_tensors_before_cudnn_9_3(rtx_3080: Machine, torch: str, copied: bool) -> None:
    machine = replace(rtx_3080, software={"torch": torch} if torch else {})
    below, from_there = (
        convolution_bytes(machine, convolution(in_bytes=n), channels_last=False)
        for n in (ADDRESSED_BYTES - 2, ADDRESSED_BYTES)
    )
    assert below == ADDRESSED_BYTES - 2 + FILTER + OUT
    assert from_there == ADDRESSED_BYTES + FILTER + OUT * copied


def test_channels_last_needs_none(rtx_3080: Machine) -> None:
    assert convolution_bytes(rtx_3080, convolution(), channels_last=True) == 0
    assert convolution_bytes(rtx_3080, convolution(kind="matmul"), channels_last=False) == 0


def test_replay_knows_better(rtx_3080: Machine) -> None:
    operator = convolution()
    replayed = {operator.key: OperatorTime(seconds=1e-3, workspace_bytes=7)}
    machine = replace(rtx_3080, operators=replayed)
    assert convolution_bytes(machine, operator, channels_last=False) == 7


def test_cublas(rtx_3080: Machine, cpu_machine: Machine) -> None:
    assert library_bytes(rtx_3080) == (2 * 4096 + 8 * 16) * 1024
    assert library_bytes(load_machine("h100-80gb")) == 32 * MIB
    assert library_bytes(cpu_machine) == 0
