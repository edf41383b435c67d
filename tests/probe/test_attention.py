"""Attention implementations: all compute the same, and a bad one is found out."""

from __future__ import annotations

import importlib
import logging
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from autotune.probe import attention
from autotune.probe.attention import (
    CPU_SHAPES,
    GPU_SHAPES,
    XFORMERS_ABSENT,
    Shape,
    brief,
    measure_attention,
    measure_shape,
    sdpa,
    sliced,
    vanilla,
)
from autotune.probe.deadline import Deadline
from autotune.probe.timing import Timer

CPU = torch.device("cpu")
BRIEF = Timer(CPU, 0.001)
SMALL = Shape(2, 4, 64, 48, 16)
PLAIN: dict[str, attention.Attention] = {"sdpa": sdpa, "vanilla": vanilla, "sliced": sliced}


def measure_one(name: str, call: attention.Attention, shape: Shape = SMALL) -> Any:
    with torch.no_grad():
        (rate,) = measure_shape(BRIEF, shape, torch.float32, {name: call})
    return rate


@settings(max_examples=15, deadline=None)
@given(
    st.builds(
        Shape,
        st.integers(1, 3),
        st.integers(1, 5),
        st.integers(1, 80),
        st.integers(1, 80),
        st.sampled_from((8, 40, 64)),
    )
)
def test_implementations_agree(shape: Shape) -> None:
    query, key, value = attention._inputs(shape, CPU, torch.float32)
    expected = sdpa(query, key, value)
    for call in (vanilla, sliced):
        torch.testing.assert_close(call(query, key, value), expected, rtol=1e-3, atol=1e-5)


def test_vanilla_is_what_diffusers_computes() -> None:
    from diffusers.models.attention_processor import Attention

    module = Attention(query_dim=64, heads=4, dim_head=16)
    query, key, value = attention._inputs(Shape(2, 4, 32, 32, 16), CPU, torch.float32)
    folded = [tensor.flatten(0, 1) for tensor in (query, key, value)]
    expected = torch.bmm(module.get_attention_scores(folded[0], folded[1]), folded[2])
    assert torch.equal(vanilla(query, key, value).flatten(0, 1), expected)


def test_rates_and_deviations() -> None:
    with torch.no_grad():
        rates = measure_shape(BRIEF, SMALL, torch.float32, PLAIN)
    assert [rate.implementation for rate in rates] == list(PLAIN)
    for rate in rates:
        assert rate.error is None
        assert rate.flops_per_s is not None
        assert rate.deviation is not None
        assert rate.deviation < 1e-5
        assert rate.extra_bytes is None, "a CPU has no allocator to ask"


def test_a_wrong_result_is_an_error() -> None:
    rate = measure_one("sdpa", lambda query, key, value: sdpa(query, key, value) * 1.1)
    assert "wrong result" in rate.error
    assert rate.flops_per_s is None


def test_not_a_number_is_an_error() -> None:
    rate = measure_one("sdpa", lambda query, key, value: query * float("nan"))
    assert "wrong result" in rate.error
    assert rate.deviation is None


def test_whatever_is_raised_is_recorded() -> None:
    def broken(*_: torch.Tensor) -> torch.Tensor:
        raise OSError("libcudart.so.12: cannot open shared object file\nmore lines")

    rate = measure_one("sdpa", broken)
    assert rate.error == "OSError: libcudart.so.12: cannot open shared object file"


def test_absent_xformers_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "is_importable", lambda name: False)
    assert measure_one("xformers", attention.xformers).error == XFORMERS_ABSENT


def test_present_xformers_is_really_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: torch.Tensor, scale: float) -> torch.Tensor:
        raise NotImplementedError(XFORMERS_REFUSAL)

    operators = types.SimpleNamespace(memory_efficient_attention=refuse)
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", operators)
    monkeypatch.setattr(attention, "is_importable", lambda name: True)
    level = logging.root.manager.disable
    error = measure_one("xformers", attention.xformers).error
    assert "device=cpu (supported: {'cuda'})" in error
    assert "\n" not in error
    assert logging.root.manager.disable == level


def test_an_xformers_whose_kernels_did_not_load_is_told_by_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It warns on import, goes on, and then says only that no operator was found."""

    def refuse(*_: torch.Tensor, scale: float) -> torch.Tensor:
        raise NotImplementedError(XFORMERS_REFUSAL)

    missing = OSError("libcudart.so.12: cannot open shared object file")
    failure = Exception("xFormers can't load C++/CUDA extensions.")
    library = types.SimpleNamespace(_cpp_library_load_exception=failure)
    operators = types.SimpleNamespace(memory_efficient_attention=refuse)
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", operators)
    monkeypatch.setitem(sys.modules, "xformers._cpp_lib", library)
    monkeypatch.setattr(attention, "is_importable", lambda name: True)
    assert measure_one("xformers", attention.xformers).error == f"Exception: {failure}"
    failure.__cause__ = missing
    assert measure_one("xformers", attention.xformers).error == f"OSError: {missing}"
    monkeypatch.setattr(library, "_cpp_library_load_exception", None)
    assert "device=cpu" in measure_one("xformers", attention.xformers).error


def test_every_backend_of_sdpa_runs_alone_and_leaves_no_flag() -> None:
    flags = torch.backends.cuda
    before = (flags.flash_sdp_enabled(), flags.math_sdp_enabled(), flags.cudnn_sdp_enabled())
    for name in ("sdpa_flash", "sdpa_math"):
        rate = measure_one(name, sdpa)
        assert (rate.implementation, rate.error) == (name, None)
    after = (flags.flash_sdp_enabled(), flags.math_sdp_enabled(), flags.cudnn_sdp_enabled())
    assert after == before


def test_a_backend_that_refuses_says_why() -> None:
    def dropped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(query, key, value, dropout_p=0.5)

    rate = measure_one("sdpa_flash", dropped)
    assert "dropout" in rate.error
    assert "No available kernel" not in rate.error
    assert rate.flops_per_s is None


def test_the_reason_is_that_of_the_backend_asked_for() -> None:
    texts = """Memory efficient kernel not used because: (Triggered internally at x.cpp:1.)
Memory Efficient attention has been runtime disabled. (Triggered internally at y.h:2.)
Flash attention kernel not used because: (Triggered internally at x.cpp:3.)
Flash attention only supports gpu architectures in the range [sm80, sm121]. (Triggered internally)
cuDNN attention kernel not used because: (Triggered internally at x.cpp:5.)
Torch was not compiled with cuDNN attention. (Triggered internally at w.cpp:6.)"""
    told = [
        warnings.WarningMessage(UserWarning(text), UserWarning, "", 0) for text in texts.split("\n")
    ]
    reasons = {name: attention._refusal(name, told) or "" for name in attention.BACKENDS}
    assert "range [sm80, sm121]." in reasons["sdpa_flash"]
    assert reasons["sdpa_cudnn"] == "RuntimeError: Torch was not compiled with cuDNN attention."
    assert "runtime disabled" in reasons["sdpa_efficient"]
    assert reasons["sdpa_math"] == ""


@pytest.mark.parametrize(
    ("device", "backends"),
    [
        ("cuda:0", {"sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "sdpa_math"}),
        ("cpu", {"sdpa_flash", "sdpa_math"}),
        ("mps", set()),
    ],
)
def test_backends_are_called_where_they_can_be_chosen(device: str, backends: set[str]) -> None:
    names = set(attention.implementations_on(torch.device(device)))
    assert names == backends | set(attention.IMPLEMENTATIONS)


def test_math_is_left_out_where_its_wide_scores_do_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[set[str]] = []
    monkeypatch.setattr(
        attention, "measure_shape", lambda timer, shape, dtype, calls: called.append(calls)
    )
    monkeypatch.setattr(attention, "GPU_SHAPES", GPU_SHAPES[:1])
    for memory in (2 * GPU_SHAPES[0].score_bytes(2), 2 * GPU_SHAPES[0].score_bytes(4)):
        with pytest.raises(TypeError):  # nothing was measured
            measure_attention(Timer(torch.device("cuda:0")), memory_bytes=memory)
    assert ["sdpa_math" in calls for calls in called] == [False, True]


def test_a_quick_look_compares_sdpa_with_xformers_once() -> None:
    with torch.no_grad():
        rates = measure_attention(BRIEF, memory_bytes=1 << 30, quick=True)
    assert [rate.implementation for rate in rates] == ["sdpa", "xformers"]


XFORMERS_REFUSAL = """No operator found for `memory_efficient_attention_forward` with inputs:
     query       : shape=(1, 64, 1, 32) (torch.float32)
`fa3F@0.0.0` is not supported because:
    device=cpu (supported: {'cuda'})
    dtype=torch.float32 (supported: {torch.bfloat16, torch.float16})
`cutlassF-pt` is not supported because:
    device=cpu (supported: {'cuda'})
"""


def test_refusals_become_one_line_with_each_reason_once() -> None:
    text = brief(NotImplementedError(XFORMERS_REFUSAL))
    assert text.startswith("NotImplementedError: No operator found for")
    assert text.count("device=cpu") == 1
    assert brief(ValueError()) == "ValueError"


@given(st.text(max_size=2000))
def test_messages_stay_one_short_line(message: str) -> None:
    text = brief(RuntimeError(message))
    assert len(text) <= 240
    assert len(text.splitlines()) == 1


def test_a_spent_budget_still_measures_the_first_shape() -> None:
    spent = Timer(CPU, deadline=Deadline(0.0))
    with torch.no_grad():
        rates = measure_attention(spent, memory_bytes=1 << 30)
    first = CPU_SHAPES[0]
    assert {rate.implementation for rate in rates} == {"sdpa", "vanilla", "xformers"}
    assert {(rate.q_tokens, rate.head_dim) for rate in rates} == {(first.q_tokens, first.head_dim)}
    assert spent.deadline.left_out == (
        "some kinds of attention over 256 tokens",
        "attention over 256 tokens and more",
    )


def test_memory_that_a_probe_may_not_take_is_no_fault_of_the_implementation() -> None:
    def greedy(*_: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    timer = Timer(CPU, 0.001)
    with torch.no_grad():
        rates = measure_shape(timer, SMALL, torch.float32, PLAIN | {"vanilla": greedy})
    assert [rate.implementation for rate in rates] == ["sdpa", "sliced"]
    assert all(rate.error is None for rate in rates)
    assert "more memory than a probe may take" in timer.deadline.left_out[0]


def test_an_xformers_that_takes_too_long_to_import_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slow = tmp_path / "xformers"
    slow.mkdir()
    (slow / "__init__.py").write_text("import time\ntime.sleep(0.5)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    timer = Timer(CPU, deadline=Deadline(0.01))
    with torch.no_grad():
        rates = measure_shape(timer, SMALL, torch.float32, {"xformers": attention.xformers})
    assert rates == []
    assert "too long to import" in timer.deadline.left_out[0]
    importlib.import_module("xformers")  # it goes on in the background: wait for it
    del sys.modules["xformers"]


@given(
    st.sampled_from((*GPU_SHAPES, *CPU_SHAPES)),
    st.integers(0, 1 << 32),
    st.sampled_from((2, 4)),
    st.floats(1e6, 1e13),
)
def test_shapes_shrink_into_the_allowance(
    shape: Shape, memory: int, itemsize: int, most_flops: float
) -> None:
    fitted = shape.fitted(memory, itemsize, most_flops)
    if fitted is None:
        assert 2 * shape.q_tokens * shape.kv_tokens * itemsize > memory
    else:
        assert 2 * fitted.score_bytes(itemsize) <= memory
        assert fitted.flops <= most_flops or (fitted.batch, fitted.heads) == (1, 1)
        assert (fitted.q_tokens, fitted.head_dim) == (shape.q_tokens, shape.head_dim)


def test_flops_of_self_attention() -> None:
    assert Shape(2, 10, 4096, 4096, 64).flops == 4 * 2 * 10 * 4096 * 4096 * 64
