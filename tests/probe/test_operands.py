"""Operators come back from their signatures, with operands of the recorded kinds."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.probe.operands import Buffers, fitting, rebuild
from autotune.workload.workload import Operator
from tests.probe.signatures import operator, tensor

CPU = torch.device("cpu")
PLENTY = 1 << 30


def result(name: str, *arguments: Any, **keywords: Any) -> Any:
    """What the rebuilt operator computes."""
    (group,), none = fitting([operator(name, *arguments, **keywords)], PLENTY)
    assert not none
    return rebuild(group.operators[0].signature, Buffers(group, CPU))()


QUERY = tensor(1, 4, 6, 8)


@pytest.mark.parametrize(
    ("key_heads", "keywords"),
    [
        (4, {}),
        (4, {"attn_mask": tensor(1, 1, 6, 6, dtype="bool")}),
        (4, {"attn_mask": tensor(1, 4, 6, 6), "scale": 0.1}),
        (4, {"is_causal": True, "dropout_p": 0.0}),
        (2, {"enable_gqa": True}),
        (1, {"enable_gqa": True, "is_causal": True}),
        (2, {"enable_gqa": True, "attn_mask": tensor(6, 6, dtype="bool")}),
    ],
)
def test_attention_of_every_kind_computes_numbers(key_heads: int, keywords: dict[str, Any]) -> None:
    key = tensor(1, key_heads, 6, 8)
    out = result("attention", QUERY, key, key, **keywords)
    assert out.shape == (1, 4, 6, 8)
    assert bool(out.isfinite().all()), "a mask that hides everything gives NaN"


def test_masks_are_true_and_indices_valid() -> None:
    assert bool(result("aten.clone.default", tensor(5, dtype="bool")).all())
    rows = result("aten.embedding.default", tensor(3, 4), tensor(2, 7, dtype="int64"))
    assert rows.shape == (2, 7, 4)
    taken = result("aten.index.Tensor", tensor(3, 4), [None, tensor(5, dtype="int64")])
    assert taken.shape == (3, 5)
    filled = result("aten.masked_fill.Scalar", tensor(3), tensor(3, dtype="bool"), -math.inf)
    assert bool(filled.isinf().all())


def test_what_is_written_does_not_spoil_what_others_read() -> None:
    """Positions are counted up and masks turned round in place; both are read as indices later."""
    embedding = operator("aten.embedding.default", tensor(1, 4), tensor(6, dtype="int64"))
    masked = operator("attention", QUERY, QUERY, QUERY, attn_mask=tensor(6, 6, dtype="bool"))
    operators = [
        operator("aten.add_.Scalar", tensor(6, dtype="int64"), 1),
        operator("aten.logical_not_.default", tensor(6, 6, dtype="bool")),
        embedding,
        masked,
    ]
    groups, _ = fitting(operators, PLENTY)
    buffers = Buffers(groups[0], CPU)
    for _ in range(5):  # through the whole buffers, if they used them
        calls = [rebuild(one.signature, buffers) for one in operators]
        for call in calls[:2]:
            call()
    assert calls[2]().shape == (6, 4)
    assert bool(calls[3]().isfinite().all())
    assert not buffers._flat["int64"].any()
    assert bool(buffers._flat["bool"].all())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "complex64", "int8", "uint8"])
def test_every_dtype_has_values(dtype: str) -> None:
    out = result("aten.clone.default", tensor(2, 3, dtype=dtype))
    assert (out.shape, str(out.dtype)) == ((2, 3), f"torch.{dtype}")
    if out.is_complex() or out.is_floating_point():
        assert out.abs().sum() > 0


def test_other_arguments_come_back() -> None:
    """dtypes, layouts, memory formats, devices; a generator is the device's own."""
    cast = result(
        "aten._to_copy.default",
        tensor(1, 2, 3, 3),
        dtype={"o": "torch.float16"},
        layout={"o": "torch.strided"},
        device={"o": "meta"},
        memory_format={"o": "torch.channels_last"},
    )
    assert (cast.dtype, cast.device) == (torch.float16, CPU)
    assert cast.is_contiguous(memory_format=torch.channels_last)
    generator = {"o": "<torch._C.Generator object at 0x7f>"}
    drawn = result("aten.normal.Tensor_float", tensor(4), 1.0, generator=generator)
    assert drawn.shape == (4,)


def test_shapes_strides_and_dtypes_come_back() -> None:
    add = operator("aten.add.Tensor", tensor(2, 3, st=[1, 2]), tensor(3))
    (group,), _ = fitting([add], PLENTY)
    buffers = Buffers(group, CPU)
    view = buffers.view({"t": "float32", "s": [2, 3], "st": [1, 2]})
    assert (view.shape, view.stride()) == ((2, 3), (1, 2))
    other = buffers.view({"t": "float32", "s": [3]})
    assert view.data_ptr() != other.data_ptr()
    assert rebuild(add.signature, buffers)().shape == (2, 3)


def size_of(one: Operator) -> int:
    """Bytes of its one tensor."""
    described = json.loads(one.signature)[1][0]
    dtype = getattr(torch, described["t"])
    return int(math.prod(described["s"]) * dtype.itemsize)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["float32", "float16", "int64", "bool"]), st.integers(1, 4000)),
        max_size=12,
    ),
    st.integers(0, 40_000),
)
def test_buffers_and_outputs_fit_into_the_memory_given(
    shapes: list[tuple[str, int]], memory: int
) -> None:
    operators = [
        operator("aten.clone.default", tensor(count, dtype=dtype)) for dtype, count in shapes
    ]
    groups, none = fitting(operators, memory)
    for group in groups:
        buffers = Buffers(group, CPU)
        for one in group.operators:
            out = rebuild(one.signature, buffers)()
            assert out.numel() > 0
        taken = sum(flat.nbytes for flat in buffers._flat.values())
        room = sum(Buffers._ROOM * flat.itemsize for flat in buffers._flat.values())
        assert taken <= memory + room
    in_groups = [one.key for group in groups for one in group.operators]
    assert set(in_groups) == {one.key for one in operators if size_of(one) <= memory}
    assert {one.key for one in none} == {one.key for one in operators} - set(in_groups)


@pytest.mark.parametrize("layout", [{}, {"l": "nchw"}, {"st": [48, 1, 12, 3]}])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_convolution_in_the_other_layout(layout: dict[str, Any], is_transposed: bool) -> None:
    image, filters = tensor(2, 3, 4, 4) | layout, tensor(3, 3, 2, 2)
    options = (None, [1, 1], [0, 0], [1, 1], is_transposed, [0, 0], 1)
    made = operator("aten.convolution.default", image, filters, *options)
    other = msgspec.structs.replace(made, kind="convolution").in_channels_last()
    assert other.is_channels_last_on_cpu
    assert other.in_channels_last() == other
    (group,), none = fitting([other], PLENTY)
    assert not none
    out = rebuild(other.signature, Buffers(group, CPU))()
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert not out.is_contiguous()


def test_a_norm_in_the_other_layout() -> None:
    image, weight = tensor(2, 4, 3, 3), tensor(4)
    one = operator("aten.native_group_norm.default", image, weight, weight, 2, 4, 9, 2, 1e-5)
    assert one.depends_on_layout
    (group,), none = fitting([one.in_channels_last()], PLENTY)
    assert not none
    out, *_ = rebuild(group.operators[0].signature, Buffers(group, CPU))()
    assert out.is_contiguous(memory_format=torch.channels_last)
    flat = operator(
        "aten.native_group_norm.default", tensor(2, 4, 9), weight, weight, 2, 4, 9, 2, 1e-5
    )
    assert not flat.depends_on_layout
