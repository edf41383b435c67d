"""All that a run or an optimization could leave behind, on a pipeline and beside it."""

from __future__ import annotations

from typing import Any

import torch


def whole_state(pipe: Any) -> dict[str, Any]:
    """``take_snapshot``, the pipeline's attributes, its attention kernels and PyTorch's flags."""
    return {
        **take_snapshot(pipe),
        **{f"pipe.{name}": _plain(value) for name, value in vars(pipe).items()},
        "kernels": _kernels(pipe),
        "flags": _flags(),
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What is not as it was: an assertion that fails prints little more."""
    return {
        k: _narrowed(before.get(k), after.get(k))
        for k in before | after
        if before.get(k) != after.get(k)
    }


def _narrowed(before: Any, after: Any) -> Any:
    """Of two mappings or lists, only where they differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        return differences(before, after)
    if isinstance(before, list) and isinstance(after, list):
        return [v for v in before if v not in after], [v for v in after if v not in before]
    return before, after


def _plain(value: Any) -> Any:
    """Data by value, since a call of the pipeline may make it anew; objects by identity."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    is_data = isinstance(value, (bool, int, float, str, tuple, list, dict)) or value is None
    return value if is_data else id(value)


def _kernels(pipe: Any) -> list[tuple[int, Any]]:
    """Every attention processor and the kernel that it is told to use."""
    modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    processors = [c.processor for m in modules for c in m.modules() if hasattr(c, "processor")]
    return [(id(p), sorted((k, _plain(v)) for k, v in vars(p).items())) for p in processors]


def _flags() -> dict[str, Any]:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    return {
        "attention backend": _AttentionBackendRegistry.get_active_backend()[0],
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


# ---- components ----------------------------------------------------------------------------------


def take_snapshot(pipe: Any) -> dict[str, Any]:
    """Layers, hooks, weights and where they are, of every component; and the random state."""
    components = {n: m for n, m in pipe.components.items() if hasattr(m, "named_modules")}
    state: dict[str, Any] = {
        "pipe": sorted(pipe.__dict__),
        "device": str(pipe._execution_device),
        "random state": _digest_of_random_state(),
    }
    for component, root in components.items():
        for path, module in root.named_modules():
            state[f"{component}.{path}"] = _describe_module(module)
        for path, tensor in (*root.named_parameters(), *root.named_buffers()):
            state[f"{component}.{path}"] = _describe_tensor(tensor)
    return state


def _digest_of_random_state() -> int:
    return hash(torch.get_rng_state().numpy().tobytes())


def _describe_module(module: Any) -> dict[str, Any]:
    plain = {k: v for k, v in module.__dict__.items() if isinstance(v, (bool, int, float, str))}
    return {
        "class": type(module),
        # diffusers keeps an empty one for its hooks.
        "attributes": sorted(set(module.__dict__) - {"_diffusers_hook"}),
        "hooks": list(getattr(getattr(module, "_diffusers_hook", None), "hooks", ())),
        "values": plain,
        "processor": id(getattr(module, "processor", None)),
        "forward hooks": list(module._forward_hooks),
        "forward pre-hooks": list(module._forward_pre_hooks),
        "children": list(module._modules),
    }


def _describe_tensor(tensor: Any) -> tuple[Any, ...]:
    data = None if tensor.is_meta else _bytes_of(tensor)
    return (
        str(tensor.dtype),
        str(tensor.device),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.requires_grad,
        hash(data),
    )


def _bytes_of(tensor: torch.Tensor) -> bytes:
    """Of any dtype: NumPy knows neither eight-bit nor brain floats."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy())
