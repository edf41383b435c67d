"""What a GPU would be needed for, near enough on a CPU."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch


@contextmanager
def xformers_on_cpu() -> Iterator[list[Any]]:
    """diffusers finds an xFormers whose kernel is PyTorch's; the list counts its calls.

    As strict as the real one about masks: of the full shape, and in the dtype of the query.
    """
    from diffusers.models import attention, attention_dispatch, attention_processor

    calls: list[Any] = []

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
    randn = torch.randn  # for the try-out, diffusers makes three tensors on the GPU
    with ExitStack() as patches:
        for patched in (
            patch.object(attention_processor, "xformers", package, create=True),
            patch.object(attention, "xops", package),
            patch.object(attention_dispatch, "xops", ops),
            patch.object(attention, "is_xformers_available", lambda: True),
            patch.object(attention_processor, "is_xformers_available", lambda: True),
            patch.object(torch, "randn", lambda *a, **k: randn(*a, **{**k, "device": "cpu"})),
            patch.object(torch.cuda, "is_available", lambda: True),
        ):
            patches.enter_context(patched)
        yield calls


@contextmanager
def sequential_on_cpu() -> Iterator[None]:
    """Sequential offload onto the CPU.

    diffusers numbers the device ("cpu:0"), and accelerate 1.15 then writes plain tensors where
    parameters belong, since tensors call it "cpu": it is given that name.
    """
    import accelerate

    original = accelerate.cpu_offload
    with patch.object(
        accelerate, "cpu_offload", lambda m, _, **k: original(m, torch.device("cpu"), **k)
    ):
        yield


@contextmanager
def kernels_on_cpu() -> Iterator[None]:
    """The kernels that PyTorch has for GPUs only are the one that it has for CPUs."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    name = AttentionBackendName
    known = _AttentionBackendRegistry._backends
    gpu = (name._NATIVE_CUDNN, name._NATIVE_EFFICIENT)
    with patch.dict(known, dict.fromkeys(gpu, known[name._NATIVE_FLASH])):
        yield


@contextmanager
def sage_on_cpu() -> Iterator[list[Any]]:
    """SageAttention's kernel is PyTorch's, of queries and keys rounded to 8 bits; its calls."""
    from diffusers.models import attention_dispatch

    calls: list[Any] = []

    def kernel(q: Any, k: Any, v: Any, tensor_layout: str, is_causal: bool, **_: Any) -> Any:
        calls.append(q.shape)
        assert tensor_layout == "NHD"
        query, key, value = (t.transpose(1, 2) for t in (_rounded(q), _rounded(k), v))
        attended = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal
        )
        return attended.transpose(1, 2)

    with (
        patch.object(attention_dispatch, "sageattn", kernel),
        patch.object(attention_dispatch, "_CAN_USE_SAGE_ATTN", True),
    ):
        yield calls


def _rounded(tensor: Any) -> Any:
    scale = tensor.abs().amax().clamp(min=1e-8) / 127
    return (tensor / scale).round() * scale


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Compiling takes a minute and a compiler: what is compiled is called as it is."""
    with patch.object(torch, "compile", lambda function, *_, **__: partial(function)):
        yield


StandIn = Callable[[], AbstractContextManager[object]]

_NEEDED_BY: dict[str, StandIn] = {
    "attention_backend": kernels_on_cpu,
    "compile": nothing_compiled,
    "sage_attention": sage_on_cpu,
    "xformers": xformers_on_cpu,
    "sequential_cpu_offload": sequential_on_cpu,
}


@contextmanager
def standing_in(names: Iterable[str]) -> Iterator[None]:
    """What these optimizations need of a GPU."""
    with ExitStack() as stack:
        for name in names:
            if name in _NEEDED_BY:
                stack.enter_context(_NEEDED_BY[name]())
        yield
