"""Traces against what really happens: the allocator's events and PyTorch's own flop counter."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from autotune.workload import trace as trace_module
from autotune.workload.architecture import describe_pipeline
from autotune.workload.phases import trace_workload
from autotune.workload.rehearsal import _WithoutData
from autotune.workload.trace import trace, trace_call
from autotune.workload.values import key_of
from autotune.workload.workload import AttentionShape, ComponentRun, Operator, Trace, Workload
from tests.workload.truth import peaks

SIZES = [(64, 1), (96, 3)]

RequestOf = Callable[..., Any]


def real_call(pipe: Any, run: ComponentRun, side: int, batch: int) -> Callable[[], Any]:
    """What the pipeline itself does with the component in a guided call, inputs made inside."""
    module = getattr(pipe, run.component)
    latent = side // 4
    if run.component == "vae":
        return lambda: module.decode(torch.randn(batch, 4, latent, latent), return_dict=False)
    if run.component.startswith("text_encoder"):
        return lambda: module(torch.zeros(1, 16, dtype=torch.long), output_hidden_states=True)

    def denoise() -> Any:
        x = torch.randn(2 * batch, 4, latent, latent)
        text = torch.randn(2 * batch, 16, module.config.cross_attention_dim)
        added = None
        if module.config.addition_embed_type:
            added = {
                "text_embeds": torch.randn(2 * batch, 32),
                "time_ids": torch.randn(2 * batch, 6),
            }
        step = torch.tensor(1.0)
        return module(x, step, text, added_cond_kwargs=added, return_dict=False)

    return denoise


def runs_of(workload: Workload) -> list[ComponentRun]:
    return [run for phase in workload.phases for run in phase.runs]


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "batch"), SIZES)
def test_the_peak_is_the_allocators_to_the_byte(
    pipe: Any,
    side: int,
    batch: int,
    request_of: RequestOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without CUDA's rounding of every tensor, which the CPU's allocator does not do."""
    monkeypatch.setattr(trace_module, "ALLOCATION_BYTES", 1)
    workload = trace_workload(describe_pipeline(pipe), request_of(side, batch))
    for run in runs_of(workload):
        tensors, with_scratch = peaks(real_call(pipe, run, side, batch))
        assert run.trace.activation_bytes == pytest.approx(tensors, abs=64), run.component
        assert with_scratch >= tensors


def test_rounding_costs_less_than_one_block_per_tensor_alive(
    sd_pipe: Any, request_of: RequestOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = describe_pipeline(sd_pipe)
    rounded = runs_of(trace_workload(architecture, request_of()))
    monkeypatch.setattr(trace_module, "ALLOCATION_BYTES", 1)
    exact = runs_of(trace_workload(architecture, request_of()))
    for a, b in zip(rounded, exact, strict=True):
        extra = a.trace.activation_bytes - b.trace.activation_bytes
        assert 0 <= extra < 64 * 512
        assert a.trace.activation_bytes % 512 == 0


def test_16_bit_halves_the_activations(sd_pipe: Any, request_of: RequestOf) -> None:
    architecture = describe_pipeline(sd_pipe)
    full = trace_workload(architecture, request_of(128)).phases[1].runs[0].trace
    half = trace_workload(architecture, request_of(128, dtype="bfloat16")).phases[1].runs[0].trace
    assert half.activation_bytes == pytest.approx(full.activation_bytes / 2, rel=0.01)
    assert half.flops == full.flops


# ---- arithmetic ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "batch"), [(64, 1), (96, 2)])
def test_flops_are_those_of_the_real_run(
    pipe: Any, side: int, batch: int, request_of: RequestOf
) -> None:
    workload = trace_workload(describe_pipeline(pipe), request_of(side, batch))
    for run in runs_of(workload):
        counter = FlopCounterMode(display=False)
        # The plain kernel, because PyTorch has no formula for the CPU's flash kernel.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            real_call(pipe, run, side, batch)()
        assert run.trace.flops == counter.get_total_flops() > 0, run.component


def test_tracing_leaves_the_random_state_alone(sd_pipe: Any, request_of: RequestOf) -> None:
    class Random(type(sd_pipe)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            random.random(), numpy.random.rand(), torch.rand(1)
            return super().__call__(*args, **kwargs)

    sd_pipe.__class__ = Random
    random.seed(3), numpy.random.seed(3), torch.manual_seed(3)
    trace_workload(describe_pipeline(sd_pipe), request_of(), sd_pipe)
    drawn = random.random(), numpy.random.rand(), torch.rand(1).item()
    random.seed(3), numpy.random.seed(3), torch.manual_seed(3)
    assert drawn == (random.random(), numpy.random.rand(), torch.rand(1).item())


# ---- attention ----------------------------------------------------------------------------------


def attentions(trace: Trace) -> list[Operator]:
    return [o for o in trace.operators if o.kind == "attention"]


def test_attention_is_one_symbolic_operator_each(sd_pipe: Any, request_of: RequestOf) -> None:
    denoise = trace_workload(describe_pipeline(sd_pipe), request_of(64)).phases[1].runs[0].trace
    counts = {(o.attention, o.block_tokens): o.count for o in attentions(denoise)}
    # Per level: one block going down, two coming up; the middle has one at the lower level.
    assert counts == {
        (AttentionShape(2, 4, 256, 256, 8), 256): 3,
        (AttentionShape(2, 4, 256, 16, 8), 0): 3,
        (AttentionShape(2, 4, 64, 64, 16), 64): 4,
        (AttentionShape(2, 4, 64, 16, 16), 0): 4,
    }
    assert all(o.flops == o.attention.flops for o in attentions(denoise) if o.attention)
    assert not any("softmax" in o.name for o in denoise.operators)


def test_the_vaes_attention_is_not_token_mergings(pipe: Any, request_of: RequestOf) -> None:
    decode = trace_workload(describe_pipeline(pipe), request_of(64)).phases[-1].runs[0].trace
    assert [(o.attention, o.count) for o in attentions(decode)] == [
        (AttentionShape(1, 1, 256, 256, 32), 1)
    ]
    assert all(o.block_tokens == 0 for o in decode.operators)


def test_only_self_attention_of_blocks_is_marked(pipe: Any, request_of: RequestOf) -> None:
    denoise = trace_workload(describe_pipeline(pipe), request_of(64)).phases[1].runs[0].trace
    marked = [o for o in denoise.operators if o.block_tokens]
    blocks = [m for m in pipe.unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    assert sum(o.count for o in marked if o.kind == "attention") == len(blocks)
    # Query, key, value and output projection of each, and nothing of norms or feed-forwards.
    assert sum(o.count for o in marked if o.kind == "matmul") == 4 * len(blocks)
    assert not any("layer_norm" in o.name or "gelu" in o.name for o in marked)


def test_sdxl_has_no_self_attention_at_the_latents_resolution(
    sdxl_pipe: Any, request_of: RequestOf
) -> None:
    workload = trace_workload(describe_pipeline(sdxl_pipe), request_of(64))
    assert workload.latent_tokens == 256
    tokens = {o.block_tokens for o in workload.phases[1].runs[0].trace.operators}
    assert tokens == {0, 64}


# ---- single modules -----------------------------------------------------------------------------


class Calls(nn.Module):
    """A module that is one function, with one weight of 256 x 256 elements (256 KiB)."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(256, 256, device="meta"))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.weight)


def trace_function(function: Callable[[Tensor, Tensor], Any]) -> Trace:
    """The trace on an input of 256 x 256 elements (256 KiB)."""
    module = Calls(function)
    x = torch.empty(256, 256, device="meta")
    return trace(module, lambda: module(x), [x])


KIB256 = 256 * 1024


@pytest.mark.parametrize(
    ("function", "tensors", "operators"),
    [
        pytest.param(lambda x, w: x, 1, 0, id="nothing"),
        pytest.param(lambda x, w: x.view(-1).view(512, 128)[3:].transpose(0, 1), 1, 0, id="views"),
        pytest.param(lambda x, w: w.t()[1:].view_as(w.t()[1:]), 1, 0, id="views of weights"),
        pytest.param(lambda x, w: x.add_(1).mul_(2), 1, 2, id="in place"),
        pytest.param(lambda x, w: x + w, 2, 1, id="a new tensor"),
        pytest.param(lambda x, w: x + w + w, 3, 2, id="old and new at once"),
        pytest.param(lambda x, w: x + w + w + w, 3, 3, id="the oldest is freed"),
        pytest.param(lambda x, w: [x + 1, x + 2, x + 3], 4, 3, id="all outputs live"),
        pytest.param(lambda x, w: torch.cat([x, x]), 3, 1, id="cat"),
        pytest.param(lambda x, w: (x + 1).chunk(2)[0], 2, 1, id="a view keeps its base"),
        pytest.param(lambda x, w: torch.empty_like(x), 2, 0, id="only reserved"),
        pytest.param(lambda x, w: torch.mm(x, w), 2, 1, id="matmul"),
    ],
)
def test_what_is_alive_and_what_is_launched(
    function: Callable[[Tensor, Tensor], Any], tensors: int, operators: int
) -> None:
    found = trace_function(function)
    assert found.activation_bytes == tensors * KIB256
    assert found.dispatches == operators


def test_equal_calls_are_counted_and_weights_kept_apart() -> None:
    found = trace_function(lambda x, w: torch.mm(torch.mm(x, w), w))
    (operator,) = found.operators
    assert (operator.name, operator.kind, operator.count) == ("aten.mm.default", "matmul", 2)
    assert operator.flops == 2 * 256**3
    assert operator.bytes == 3 * KIB256
    assert operator.in_bytes == operator.out_bytes == KIB256
    assert operator.live_bytes == 3 * KIB256


def test_layers_that_follow_each_other_are_weighed_together() -> None:
    with torch.device("meta"):
        sizes = [(8, 64), (64, 8), (8, 128), (128, 16)]
        module = nn.Sequential(*(nn.Linear(i, o, bias=False) for i, o in sizes))
        module.register_buffer("table", torch.empty(3, 8, 4096))
        x = torch.empty(3, 8)
        whole = trace(module, lambda: module(x + module.table[..., 0]), [x])
        assert whole.adjacent_layers == (8 * 128 + 128 * 16) / (128 * 16), "no buffer is a layer"
        equal = nn.Sequential(module[0], nn.ReLU(), module[1])
        assert trace(equal, lambda: equal(x), [x]).adjacent_layers == 2
        assert trace(module[0], lambda: module[0](x), [x]).adjacent_layers == 1
        assert trace(module, lambda: x + 1, [x]).adjacent_layers == 0


def test_layouts_tell_signatures_apart() -> None:
    found = trace_function(lambda x, w: (torch.mm(x, w), torch.mm(x.t(), w)))
    assert [o.count for o in found.operators] == [1, 1]


@pytest.mark.parametrize("named", [False, True], ids=["positional", "by name"])
def test_attention_is_recognised_however_it_is_called(named: bool) -> None:
    def attend(x: Tensor, w: Tensor) -> Tensor:
        q = x.view(1, 4, 256, 64)
        if named:
            return functional.scaled_dot_product_attention(query=q, key=q, value=q)
        return functional.scaled_dot_product_attention(q, q, q)

    found = trace_function(attend)
    (operator,) = found.operators
    assert operator.attention == AttentionShape(1, 4, 256, 256, 64)
    assert operator.attention.scores == 4 * 256 * 256
    assert operator.flops == 4 * 4 * 256 * 256 * 64
    assert found.activation_bytes == 2 * KIB256


def test_numbers_that_are_multiplied_with_do_not_tell_signatures_apart() -> None:
    """Tiles are blended with a hundred weights."""
    found = trace_function(lambda x, w: [x * (i / 10) + i / 7 for i in range(1, 10)])
    assert [(o.name, o.count) for o in found.operators] == [
        ("aten.mul.Tensor", 9),
        ("aten.add.Tensor", 9),
    ]
    kinds = trace_function(lambda x, w: (x.int() * 2, x.int() * 2.0, x.int() ** 2, x.int() ** 3))
    assert len({o.signature for o in kinds.operators}) == 5  # int() once; powers are not linear


# ---- values -------------------------------------------------------------------------------------


def trace_values(function: Callable[[Tensor, Tensor, Tensor], Any]) -> Any:
    """The trace on unknown activations and on a mask and a time that are known."""
    module = nn.Module()
    x = torch.empty(3, 4, device="meta")
    real = [torch.tensor([[True, True, False, False]]).expand(3, 4), torch.tensor([7])]
    known = [torch.empty_strided(r.shape, r.stride(), dtype=r.dtype, device="meta") for r in real]
    return trace_call(
        module, lambda: function(x, *known), [x, *known], zip(known, real, strict=True)
    )


@pytest.mark.parametrize(
    ("function", "answer"),
    [
        pytest.param(lambda x, m, t: m.sum().item(), 6, id="how many"),
        pytest.param(lambda x, m, t: bool(m.all()), False, id="whether all"),
        pytest.param(lambda x, m, t: m.long().sum(1).tolist(), [2, 2, 2], id="each"),
        pytest.param(lambda x, m, t: (t * 2 + 1).cpu().numpy().tolist(), [15], id="on the host"),
        pytest.param(lambda x, m, t: x[m].shape, (6,), id="selected"),
        pytest.param(lambda x, m, t: m.nonzero().shape, (6, 2), id="places"),
        pytest.param(lambda x, m, t: x.new_ones(3, 4)[m].sum().item(), 6, id="ones like those"),
        pytest.param(
            lambda x, m, t: torch.arange(5, device="meta")[2:].tolist(), [2, 3, 4], id="v"
        ),
        pytest.param(
            lambda x, m, t: torch.zeros(4, device="meta").fill_(3).add_(t).tolist(),
            [10.0] * 4,
            id="in place",
        ),
        pytest.param(lambda x, m, t: written_view(m), [0, 9, 9, 0], id="through a view"),
    ],
)
def test_what_is_computed_of_known_values_is_known(function: Any, answer: Any) -> None:
    found = trace_values(function)
    assert found.guesses == ()
    assert found.out == answer


def written_view(mask: Tensor) -> list[int]:
    made = torch.zeros(4, dtype=torch.long, device=mask.device)
    made[1:3] = 9
    return made.tolist()


def overwritten(x: Tensor) -> list[float]:
    made = torch.zeros(4, device=x.device)
    made.copy_(x[0])
    return made.tolist()


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x, m, t: x.sum().item(), id="an activation"),
        pytest.param(lambda x, m, t: (x * t).max().item(), id="half of it known"),
        pytest.param(lambda x, m, t: overwritten(x), id="written over"),
        pytest.param(lambda x, m, t: torch.empty(1, device="meta").item(), id="never written"),
        pytest.param(lambda x, m, t: torch.rand(1, device="meta").item(), id="drawn"),
        pytest.param(lambda x, m, t: x[x > 0], id="selected by an activation"),
        pytest.param(lambda x, m, t: x.cpu(), id="brought to the host"),
        pytest.param(lambda x, m, t: torch.zeros(300, 300, device="meta").sum().item(), id="large"),
    ],
)
def test_what_is_not_known_is_a_guess_and_said(function: Any) -> None:
    found = trace_values(function)
    assert found.guesses


def test_a_result_whose_shape_is_a_matter_of_values_is_not_used_again() -> None:
    def select(x: Tensor, mask: Tensor, time: Tensor) -> Any:
        return x[mask].shape, x[mask.logical_not() | mask].shape

    assert trace_values(select).out == ((6,), (12,))


def test_zeros_are_not_run_on_at_any_size() -> None:
    """They would be real memory."""
    module = nn.Module()
    x = torch.empty(1 << 20, 1 << 10, device="meta")
    with pytest.raises(RuntimeError, match="bytes of zeros"):
        trace_call(module, lambda: x.nonzero(), [x])


def test_inputs_that_share_a_storage_count_once() -> None:
    base = torch.zeros(4, 256, 256)
    without_data = _WithoutData()
    first, second = without_data(base[0]), without_data(base[1:])
    assert key_of(first) == key_of(second)
    assert second.storage_offset() == 256 * 256
    found = trace(nn.Module(), lambda: first + second[0], [first, second])
    assert found.activation_bytes == 5 * KIB256


def test_a_trace_takes_its_hooks_with_it(sd_pipe: Any, request_of: RequestOf) -> None:
    unet = sd_pipe.unet
    inputs = real_call(
        sd_pipe, ComponentRun("unet", "denoiser", 1, Trace((), 0, 0)), side=64, batch=1
    )
    trace(unet, inputs, [])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
