"""What a GPU would be needed for, near enough on a CPU."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from tests.runtime.state import whole_state

Calls = list[Any]


@pytest.fixture
def state() -> Any:
    """``state(pipe)``: all that could be left behind."""
    return whole_state


@pytest.fixture
def xformers_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """diffusers finds an xFormers whose kernel is PyTorch's; the list counts its calls.

    As strict as the real one about masks: of the full shape, and in the dtype of the query.
    """
    from diffusers.models import attention, attention_dispatch, attention_processor

    calls: Calls = []

    def kernel(
        query: Any, key: Any, value: Any, attn_bias: Any = None, p: float = 0.0,
        scale: float | None = None, op: Any = None,
    ) -> Any:  # fmt: skip
        calls.append(query.shape)
        has_heads = query.dim() == 4
        q, k, v = (
            (t if has_heads else t.unsqueeze(2)).transpose(1, 2) for t in (query, key, value)
        )
        if attn_bias is not None:
            attn_bias = attn_bias if has_heads else attn_bias.unsqueeze(1)
            assert attn_bias.shape == (*q.shape[:3], k.shape[2])
            assert attn_bias.dtype == q.dtype
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_bias, p, scale=scale)
        return out.transpose(1, 2) if has_heads else out.squeeze(1)

    ops = types.SimpleNamespace(memory_efficient_attention=kernel)
    package = types.SimpleNamespace(ops=ops)
    monkeypatch.setattr(attention_processor, "xformers", package, raising=False)
    monkeypatch.setattr(attention, "xops", package)
    monkeypatch.setattr(attention_dispatch, "xops", ops)
    for module in (attention, attention_processor):
        monkeypatch.setattr(module, "is_xformers_available", lambda: True)
    randn = torch.randn  # for the try-out, diffusers makes three tensors on the GPU
    monkeypatch.setattr(torch, "randn", lambda *a, **k: randn(*a, **{**k, "device": "cpu"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return calls


@pytest.fixture
def sequential_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequential offload onto the CPU.

    diffusers numbers the device ("cpu:0"), and accelerate 1.15 then writes plain tensors where
    parameters belong, since tensors call it "cpu": it is given that name.
    """
    import accelerate

    original = accelerate.cpu_offload
    monkeypatch.setattr(
        accelerate, "cpu_offload", lambda m, _, **k: original(m, torch.device("cpu"), **k)
    )
