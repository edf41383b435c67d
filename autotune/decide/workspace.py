"""What libraries take besides tensors: cuDNN and oneDNN for a convolution, cuBLAS for good.

What cuDNN takes does not decide whether something fits: where a workspace cannot be had, PyTorch
goes down its list of plans (``try_configs`` in ``aten/src/ATen/native/cudnn/Conv_v8.cpp``). It
belongs to the peak. oneDNN has to have it.
"""

from __future__ import annotations

import re

from autotune.probe.machine import Machine
from autotune.units import MIB
from autotune.workload.workload import Operator

HALF_DTYPES = ("float16", "bfloat16")

ADDRESSED_BYTES = 2**31
"""What a signed 32-bit offset reaches. cuDNN before 9.3 (PyTorch before 2.7) has no engine with
copies of both for larger 16-bit tensors: FLUX.1's decode of 4, 8 and 16 images on an H100 peaks at
2.0, 2.0 and 1.88 GiB per image above the weights, that of one at 2.4 (sayakpaul/diffusers-torchao).
Since then it has (PyTorch #134890), and Qwen-Image's decode of 2048² on an RTX 4090 uses it."""

ADDRESSES_MORE = (2, 7)
"""The first PyTorch whose wheels bring such a cuDNN for every CUDA version."""


def library_bytes(machine: Machine) -> int:
    """cuBLAS's workspace, which PyTorch allocates at the first product and keeps.

    ``parseChosenWorkspaceSize`` in ``aten/src/ATen/cuda/CublasHandlePool.cpp``: 32 MiB from Hopper
    on, 2 × 4096 + 8 × 16 KiB before.
    """
    if machine.device.kind != "cuda":
        return 0
    return 32 * MIB if _capability(machine) >= 9 else int(8.125 * MIB)


def convolution_bytes(machine: Machine, operator: Operator, channels_last: bool) -> int:
    """Workspace of one convolution, while memory is free.

    Replay knows it. Otherwise: cuDNN's tensor-core engines read NHWC, so that tensors laid out as
    NCHW are copied. 16-bit engines write NHWC too (``..._nhwckrsc_nhwc_...`` in profiles): input,
    filter and output are copied, as ten published decodes of Qwen-Image's VAE show to within
    0.1 % (InvokeAI #9305, RTX 4090). TF32 ones write NCHW themselves (``..._nhwckrsc_nchw_...``):
    only input and filter are, as SDXL's float32 decode does on an A100
    (Hugging Face's simple_sdxl_optimizations).
    """
    if operator.kind != "convolution":
        return 0
    if machine.device.kind == "cpu":
        return _onednn_bytes(operator, channels_last)
    if machine.device.kind != "cuda":
        return 0
    in_layout = channels_last and operator.is_over_images
    replayed = machine.operators.get((operator.in_channels_last() if in_layout else operator).key)
    if replayed is not None and replayed.workspace_bytes is not None:
        return replayed.workspace_bytes
    if in_layout or not _has_tensor_cores(machine, operator.dtype):
        return 0
    read = operator.in_bytes + operator.weight_bytes
    writes_nhwc = operator.dtype in HALF_DTYPES and _is_addressed(machine, operator)
    return read + operator.out_bytes if writes_nhwc else read


def _onednn_bytes(operator: Operator, channels_last: bool) -> int:
    """What oneDNN takes for a convolution on a CPU, beside its input and output.

    Filters are packed. Of an image that is not channels last a copy is made that is, and one of the
    result before it is laid out as the image was (the profiler's allocations, PyTorch 2.13).
    """
    filters = operator.weight_bytes
    if (channels_last and operator.is_over_images) or operator.is_channels_last_on_cpu:
        return filters
    return max(operator.in_bytes + filters, operator.out_bytes)


def _is_addressed(machine: Machine, operator: Operator) -> bool:
    version = re.match(r"(\d+)\.(\d+)", machine.software.get("torch", ""))
    if version is None or (int(version[1]), int(version[2])) >= ADDRESSES_MORE:
        return True
    return max(operator.in_bytes, operator.out_bytes) < ADDRESSED_BYTES


def _has_tensor_cores(machine: Machine, dtype: str) -> bool:
    """GTX 16xx shares its capability with cards that have them: the rates tell them apart."""
    rates = machine.kernels.matmul_flops_per_s
    half = rates.get("float16") or rates.get("bfloat16")
    if half is None or half.value < 2 * rates["float32"].value:
        return False
    return dtype != "float32" or _capability(machine) >= 8


def _capability(machine: Machine) -> float:
    return float(machine.device.compute_capability or 0)
