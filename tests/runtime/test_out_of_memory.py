"""Out-of-memory in all its forms, and the memory that it holds."""

from __future__ import annotations

import errno
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from autotune.errors import OptimizationError
from autotune.runtime.apply import apply_plan
from autotune.runtime.out_of_memory import (
    failure_of,
    free_memory,
    is_of_host,
    is_out_of_memory,
)
from autotune.testing.pipelines import BUILDERS, call
from autotune.testing.state import differences, whole_state
from tests.workloads import workload_of

ON_DEVICE = (
    torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 9.77 GiB of "
        "which 1.12 GiB is free."
    ),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate`"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB (GPU 0; 15.98 GiB total)"),
    RuntimeError("HIP error: out of memory"),
    RuntimeError("miopenStatusAllocFailed"),
    RuntimeError("XPU out of memory. Tried to allocate 512.00 MiB."),
    RuntimeError("Native API failed. Native API returns: UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"),
    RuntimeError("MPS backend out of memory (MPS allocated: 18.11 GB, other allocations: 1 GB)"),
    RuntimeError("Invalid buffer size: 16.00 GB"),
    RuntimeError("[Rank 0] FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size::1"),
)
IN_HOST = (
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("unable to mmap 4096 bytes from file <weights>: Cannot allocate memory (12)"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4503599627370496 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1024 bytes."),
    RuntimeError("std::bad_alloc"),
)
MAYBE = (
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
)
OTHER = (
    ValueError("`height` and `width` have to be divisible by 8 but are 1001 and 1024."),
    RuntimeError("The size of tensor a (64) must match the size of tensor b (32)"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    Exception("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
    OSError(errno.ENOSPC, "No space left on device"),
    KeyError("out of memory"),
)


@pytest.mark.parametrize("error", (*ON_DEVICE, *IN_HOST), ids=lambda e: str(e)[:40])
def test_every_form_is_told(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert is_of_host(error) == (error in IN_HOST)


@pytest.mark.parametrize("error", MAYBE, ids=lambda e: str(e)[:40])
def test_some_mean_it_only_where_memory_is_scarce(error: Exception) -> None:
    assert is_out_of_memory(error, is_scarce=True)
    assert not is_out_of_memory(error, is_scarce=False)


@pytest.mark.parametrize("error", OTHER, ids=lambda e: str(e)[:40])
def test_other_errors_are_others(error: Exception) -> None:
    assert not is_out_of_memory(error, is_scarce=True)


def test_what_the_real_allocator_says_is_told() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 52, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_of_host(caught.value)


def raised(make: Any) -> Exception:
    try:
        make()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_it_is_told_by_what_it_came_of() -> None:
    def caused() -> None:
        try:
            raise ON_DEVICE[0]
        except RuntimeError as error:
            raise OptimizationError("cannot apply the plan") from error

    def meanwhile() -> None:
        try:
            raise ON_DEVICE[0]
        except RuntimeError:
            raise KeyError("latents")  # noqa: B904

    def dealt_with() -> None:
        try:
            raise ON_DEVICE[0]
        except RuntimeError:
            raise ValueError("a batch of 4 is too much") from None

    assert is_out_of_memory(raised(caused))
    assert is_out_of_memory(raised(meanwhile))
    assert not is_out_of_memory(raised(dealt_with))


def test_a_loop_of_errors_ends() -> None:
    one, two = ValueError("one"), ValueError("two")
    one.__context__, two.__context__ = two, one
    assert not is_out_of_memory(one)


# ---- in a pipeline -------------------------------------------------------------------------------


def fail(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")


@pytest.mark.parametrize(
    ("part", "phase"),
    [("text_encoder", "encode"), ("unet.mid_block", "denoise"), ("vae.decoder", "decode")],
)
def test_it_says_in_which_phase(sd_pipe: Any, part: str, phase: str) -> None:
    module: Any = sd_pipe
    for name in part.split("."):
        module = getattr(module, name)
    handle = module.register_forward_pre_hook(fail)
    error = raised(lambda: sd_pipe("a cat", height=64, width=64, num_inference_steps=1))
    handle.remove()
    failure = failure_of(error, sd_pipe, workload_of("sd"))
    assert failure.phase == phase
    assert failure.text == "CUDA out of memory. Tried to allocate 2.00 GiB."
    assert not failure.of_host


def test_the_tensors_that_an_error_holds_are_let_go(sd_pipe: Any) -> None:
    held: list[weakref.ref[Any]] = []

    def remember_and_fail(module: nn.Module, args: Any) -> None:
        held.extend(weakref.ref(a) for a in args if isinstance(a, torch.Tensor))
        fail()

    handle = sd_pipe.unet.mid_block.register_forward_pre_hook(remember_and_fail)
    error = raised(lambda: sd_pipe("a cat", height=64, width=64, num_inference_steps=1))
    handle.remove()
    assert held and all(ref() is not None for ref in held)
    failure_of(error, sd_pipe, workload_of("sd"))
    free_memory(sd_pipe)
    assert all(ref() is None for ref in held)


def test_an_autoencoder_runs_in_two_phases() -> None:
    """Its first frame is that of a decorator, whatever is called."""
    pipe = BUILDERS["sd-img2img"]()
    phases = {}
    for part in ("encoder", "decoder"):
        handle = getattr(pipe.vae, part).register_forward_pre_hook(fail)
        error = raised(lambda: call(pipe))
        handle.remove()
        phases[part] = failure_of(error, pipe, workload_of("sd-img2img")).phase
    assert phases == {"encoder": "encode", "decoder": "decode"}


def test_what_an_error_was_raised_over_is_let_go_too() -> None:
    held: list[weakref.ref[Any]] = []

    def inner() -> None:
        tensor = torch.ones(3)
        held.append(weakref.ref(tensor))
        fail()

    def outer() -> None:
        try:
            inner()
        except RuntimeError:
            raise torch.OutOfMemoryError("CUDA out of memory") from None

    error = raised(outer)
    assert held[0]() is not None
    failure_of(error, BUILDERS["sd"](), workload_of("sd"))
    assert held[0]() is None


def test_what_a_videos_decode_keeps_from_frame_to_frame_is_let_go() -> None:
    pipe = BUILDERS["wan"]()
    pipe.vae.clear_cache()
    pipe.vae._feat_map[0] = torch.ones(3)
    held = weakref.ref(pipe.vae._feat_map[0])
    free_memory(pipe)
    assert held() is None


def test_a_model_that_offload_has_left_on_the_device_is_hooked_anew(sd_pipe: Any) -> None:
    """Its hook would not send it home before another is called."""
    sd_pipe.enable_model_cpu_offload(device="cpu")
    before = list(sd_pipe._all_hooks)
    free_memory(sd_pipe)
    assert len(sd_pipe._all_hooks) == len(before)
    assert not set(map(id, before)) & set(map(id, sd_pipe._all_hooks))


@pytest.mark.parametrize(
    "optimizations",
    [
        "model_cpu_offload",
        "group_offload",
        "text_encoder_offload",
        "tome:ratio=0.5:max_downsample=2",
        "fuse_qkv,vae_slicing",
    ],
)
@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_after_a_call_that_failed_half_way_everything_can_be_undone(
    optimizations: str, part: str, plan_of: Any
) -> None:
    pipe = BUILDERS["sd"]()
    plain = draw_one(pipe)
    before = whole_state(pipe)
    undo = apply_plan(pipe, plan_of(pipe, optimizations)[0], "cpu")
    inside = {"vae": "decoder.conv_norm_out", "unet": "mid_block", "text_encoder": "encoder"}
    module = getattr(pipe, part).get_submodule(inside[part])
    handle = module.register_forward_pre_hook(fail)
    error = raised(lambda: draw_one(pipe))
    handle.remove()
    assert is_out_of_memory(error)
    failure_of(error, pipe, workload_of("sd"))
    free_memory(pipe)
    undo()
    assert differences(before, whole_state(pipe)) == {}
    assert torch.equal(draw_one(pipe), plain)


def draw_one(pipe: Any) -> torch.Tensor:
    return pipe(
        "a cat",
        height=64,
        width=64,
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images
