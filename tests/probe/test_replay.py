"""Operators come back from their signatures, are timed once, and stay within budget and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from autotune.probe.machine import OperatorTime
from autotune.probe.operands import fitting
from autotune.probe.replay import replay
from autotune.workload.trace import trace
from autotune.workload.workload import Operator, Trace
from tests.probe.pretend import SlowDevice, pretend
from tests.probe.signatures import operator, tensor

CPU = torch.device("cpu")
PLENTY = 1 << 30


def traced(make: Any, call: Any) -> Trace:
    with torch.device("meta"):
        shadow = make().eval()
        return trace(shadow, lambda: call(shadow), [])


@pytest.fixture(scope="module")
def small() -> Trace:
    """Convolution, normalization, attention, an in-place operator, an embedding and a cast."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.conv = nn.Conv2d(8, 8, 3, padding=1, stride=2)
            self.norm = nn.GroupNorm(2, 8)
            self.act = nn.SiLU(inplace=True)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            tokens = self.embed(ids).transpose(1, 2).reshape(1, 8, 4, 4)
            hidden = self.act(self.norm(self.conv(tokens)))
            rows = hidden.flatten(2).transpose(1, 2).unsqueeze(1)
            attended = nn.functional.scaled_dot_product_attention(rows, rows, rows)
            return attended.to(torch.float64)

    return traced(Small, lambda m: m(torch.zeros(1, 16, dtype=torch.long)))


def run(trace: Trace, **options: Any) -> dict[str, OperatorTime]:
    given = {"known": {}, "budget_s": 60.0, "memory_bytes": PLENTY, "weight": lambda o: o.bytes}
    return replay(trace.operators, CPU, **(given | options))


def replayed(*operators: Operator, **options: Any) -> list[OperatorTime | None]:
    given = {"known": {}, "budget_s": 60.0, "memory_bytes": PLENTY, "weight": lambda o: 1.0}
    times = replay(operators, CPU, **(given | options))
    return [times.get(one.key) for one in operators]


def test_every_operator_is_timed(small: Trace) -> None:
    times = run(small)
    assert {o.key for o in small.operators} == set(times)
    for timed in times.values():
        assert timed.seconds is not None
        assert timed.seconds > 0
        assert timed.workspace_bytes is None, "a CPU has no allocator to ask"
        assert timed.first_extra_s is not None
        assert timed.first_extra_s >= 0
        assert len(timed.samples) > 1, "raw, as they came"
        assert min(timed.samples) <= timed.seconds * 1.001 <= 1.002 * max(timed.samples)


def test_known_operators_are_not_run_again(small: Trace) -> None:
    times = run(small)
    first = small.operators[0]
    again = run(small, known={k: v for k, v in times.items() if k != first.key})
    assert set(again) == {first.key}


# ---- whatever a trace can hold -------------------------------------------------------------------


def test_3d_convolutions_grouped_queries_and_masks_are_timed_as_traced() -> None:
    class Video(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(4, 8, 3, padding=(0, 1, 1))
            self.norm = nn.RMSNorm(8)

        def forward(self, video: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            hidden = self.conv(functional.pad(video, (0, 0, 0, 0, 2, 0)))
            rows = self.norm(hidden.flatten(2).transpose(1, 2))
            query = rows.unflatten(-1, (4, 2)).transpose(1, 2)
            key = query[:, :2]
            attend = functional.scaled_dot_product_attention
            grouped = attend(query, key, key, enable_gqa=True, is_causal=True)
            return attend(query, query, query, attn_mask=mask) + grouped

    video = traced(
        Video,
        lambda m: m(torch.zeros(1, 4, 3, 4, 4), torch.ones(1, 1, 48, 48, dtype=torch.bool)),
    )
    assert {"attention", "aten.convolution.default"} <= {o.name for o in video.operators}
    times = run(video)
    assert all(times[o.key].seconds for o in video.operators)


UNUSABLE = [
    operator("aten.no_such.default"),
    operator("nowhere.no_such.default"),
    operator("aten"),
    operator("", tensor(2)),
    operator("aten.add.Tensor", tensor(2), tensor(3)),
    operator("aten.add.Tensor", tensor(2, dtype="float7"), 1),
    operator("aten.add.Tensor", tensor(2, dtype="quint4x2"), 1),
    operator("aten.add.Tensor", {"t": "float32"}, 1),
    operator("aten.add.Tensor", {"unheard": "of"}, 1),
    operator("aten.add.Tensor", tensor(2, st=[1, 1]), 1),
    operator("aten.relu.default", "text", no_such_argument=1),
    operator("aten.remainder.Tensor", tensor(2, dtype="int64"), tensor(2, dtype="int64")),
    operator("aten.linalg_cholesky.default", tensor(2, 3)),
    operator("aten.multinomial.default", tensor(3), 2),
    operator("aten._assert_async.default", tensor(1, dtype="int64")),
    operator("aten._local_scalar_dense.default", tensor(1)),
    operator("aten.nonzero.default", tensor(4)),
    Operator("x", "memory", "no json at all", "float32", 1, 0, 0, 0, 0, 0),
    Operator("x", "memory", "[]", "float32", 1, 0, 0, 0, 0, 0),
    Operator("x", "memory", "[" * 5000, "float32", 1, 0, 0, 0, 0, 0),
    Operator("x", "memory", '["aten.add.Tensor",3,null]', "float32", 1, 0, 0, 0, 0, 0),
]


def test_what_cannot_be_run_alone_is_left_to_rates_and_the_rest_is_timed() -> None:
    good = operator("aten.relu.default", tensor(8))
    *bad, timed = replayed(*UNUSABLE, good)
    assert bad == [OperatorTime(None)] * len(UNUSABLE)
    assert timed is not None
    assert timed.seconds


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=6,
)
TENSORS = st.builds(
    lambda shape, dtype: tensor(*shape, dtype=dtype),
    st.lists(st.integers(0, 4), max_size=4),
    st.sampled_from(["float32", "float16", "bool", "int64", "float8_e4m3fn", "complex64", "x"]),
)
NAMES = ["relu.default", "add.Tensor", "cat.default", "index.Tensor", "mm.default", "copy_.default"]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), st.lists(TENSORS | st.lists(TENSORS, max_size=2) | JSON, max_size=3))
def test_no_signature_ends_the_replay(name: str, arguments: list[Any]) -> None:
    one, good = operator(f"aten.{name}", *arguments), operator("aten.relu.default", tensor(8))
    assert replayed(one, good, budget_s=1.0)[1] is not None


@pytest.fixture
def own_operators() -> Iterator[Callable[[str, Callable[..., torch.Tensor]], str]]:
    """Defines operators of this test's own, ``name(Tensor x) -> Tensor``."""
    libraries: list[Any] = []

    def define(name: str, function: Callable[..., torch.Tensor]) -> str:
        library = torch.library.Library("autotune_test", "FRAGMENT")
        library.define(f"{name}(Tensor x) -> Tensor")
        library.impl(name, function, "CPU")
        libraries.append(library)
        return f"autotune_test.{name}.default"

    yield define
    for library in libraries:
        library._destroy()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")]
)  # fmt: skip
def test_what_ran_out_of_memory_may_be_tried_another_time(
    own_operators: Any, error: Exception
) -> None:
    def greedy(x: torch.Tensor) -> torch.Tensor:
        raise error

    name = own_operators("greedy", greedy)
    good = operator("aten.relu.default", tensor(8))
    left_out, timed = replayed(operator(name, tensor(8)), good)
    assert left_out is None, "nothing is remembered of it"
    assert timed is not None


@pytest.mark.parametrize(
    "error", [NotImplementedError("no"), KeyError("float8"), ValueError(), AssertionError()]
)
def test_whatever_is_raised_leaves_the_operator_to_rates(
    own_operators: Any, error: Exception
) -> None:
    def failing(x: torch.Tensor) -> torch.Tensor:
        raise error

    name = own_operators("failing", failing)
    assert replayed(operator(name, tensor(8))) == [OperatorTime(None)]


def test_one_that_fails_only_later_is_left_out(own_operators: Any) -> None:
    calls: list[None] = []

    def tiring(x: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        if len(calls) > 3:
            raise RuntimeError("enough")
        return x.clone()

    name = own_operators("tiring", tiring)
    good = operator("aten.relu.default", tensor(8))
    left_out, timed = replayed(operator(name, tensor(8)), good)
    assert left_out is None
    assert timed is not None


def test_the_first_call_is_known_apart(own_operators: Any, slow_clock: Any) -> None:
    """Kernels are loaded and algorithms searched then, which later calls do not pay."""
    calls: list[None] = []

    def lazy(x: torch.Tensor) -> torch.Tensor:
        slow_clock.advance(0.01 if calls else 0.25)
        calls.append(None)
        return x.clone()

    name = own_operators("lazy", lazy)
    (timed,) = replayed(operator(name, tensor(8)))
    assert timed is not None
    assert timed.seconds == pytest.approx(0.01, rel=0.01)
    assert timed.first_extra_s == pytest.approx(0.24, rel=0.01)


def test_on_a_gpu_workspaces_are_told_and_short_operators_called_in_blocks(
    small: Trace, own_operators: Any, slow_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"short": 0, "long": 0}

    def lasting(name: str, seconds: float) -> Operator:
        def run(x: torch.Tensor) -> torch.Tensor:
            calls[name] += 1
            slow_clock.advance(seconds)
            return x.clone()

        return operator(own_operators(name, run), tensor(8))

    operators = [lasting("short", 1e-4), lasting("long", 0.02), *small.operators]
    gpu = torch.device("cuda:0")
    with pretend(monkeypatch, "cuda") as limits:
        times = replay(
            operators,
            gpu,
            known={},
            budget_s=60.0,
            memory_bytes=PLENTY,
            weight=lambda o: o.bytes,
        )
    assert all(times[o.key].seconds for o in operators)
    assert {time.workspace_bytes for time in times.values()} == {1 << 20}
    assert calls == {"short": 2 + 9 * 10, "long": 2 + 9}
    assert limits == [pytest.approx(PLENTY / (8 << 30)), 1.0]


def test_a_first_call_that_was_quicker_took_nothing_extra(
    own_operators: Any, slow_clock: Any
) -> None:
    calls: list[None] = []

    def warming(x: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        slow_clock.advance(0.01 * len(calls))
        return x.clone()

    (timed,) = replayed(operator(own_operators("warming", warming), tensor(8)))
    assert timed is not None
    assert timed.first_extra_s == 0.0


# ---- time and memory -----------------------------------------------------------------------------


def test_what_is_too_large_for_the_memory_given_is_left_out(small: Trace) -> None:
    limit = sorted(o.bytes for o in small.operators)[len(small.operators) // 2]
    times = run(small, memory_bytes=limit)
    assert set(times) == {o.key for o in small.operators if o.bytes <= limit}
    run_alone = {key for key, time in times.items() if time.seconds is not None}
    assert 0 < len(run_alone) < len(times), "what all but fills the memory is left to rates"


def test_operators_that_do_not_fit_together_are_run_one_after_the_other() -> None:
    one = operator("aten.relu.default", tensor(1000))
    other = operator("aten.relu.default", tensor(500, dtype="float64"))
    groups, none = fitting([one, other], 5000)
    assert [len(group.operators) for group in groups] == [1, 1]
    assert not none
    assert all(
        time is not None and time.seconds for time in replayed(one, other, memory_bytes=7000)
    )


def test_without_a_budget_nothing_is_run(small: Trace) -> None:
    assert run(small, budget_s=0.0) == {}


@pytest.mark.parametrize("budget_s", [0.3, 1.0, 3.0])
def test_a_slow_device_is_asked_for_the_heaviest_in_time(
    small: Trace, slow_clock: Any, budget_s: float
) -> None:
    start = slow_clock.now
    with SlowDevice(slow_clock.advance, 0.05):
        times = run(small, budget_s=budget_s)
    assert slow_clock.now - start <= budget_s + 10 * 0.05, "a call may be of several operators"
    heaviest = sorted(small.operators, key=lambda o: o.bytes, reverse=True)
    assert len(times) > 0
    assert set(times) == {o.key for o in heaviest[: len(times)]}
    assert len(times) < len(small.operators) or budget_s == 3.0


def test_one_call_longer_than_the_budget_is_still_known(
    own_operators: Any, slow_clock: Any
) -> None:
    def endless(x: torch.Tensor) -> torch.Tensor:
        slow_clock.advance(20.0)
        return x.clone()

    heavy = operator(own_operators("endless", endless), tensor(8))
    light = operator("aten.relu.default", tensor(8))
    found = replayed(heavy, light, budget_s=3.0, weight=lambda o: o.name.startswith("autotune"))
    assert found[0] is not None
    assert found[0].seconds == pytest.approx(20.0)
    assert found[1] is None
    assert slow_clock.now <= 3 * 20.1


def test_random_state_is_left_alone(small: Trace) -> None:
    before = torch.get_rng_state()
    run(small)
    drawing = operator("aten.rand_like.default", tensor(8))
    (timed,) = replayed(drawing)
    assert timed is not None
    assert timed.seconds
    assert torch.equal(before, torch.get_rng_state())
