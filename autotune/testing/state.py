"""All that a run or an optimization could leave behind, on a pipeline and beside it."""

from __future__ import annotations

import os
import random
from typing import Any

import torch


class Same:
    """An object that only itself equals; being held, its identity is not given to another."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.held is other.held

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self.held).__name__} at {id(self.held):x}"


def whole_state(pipe: Any) -> dict[str, Any]:
    """``take_snapshot``, the pipeline's attributes, its attention kernels and PyTorch's flags."""
    return {
        **take_snapshot(pipe),
        **{f"pipe.{name}": _plain(value) for name, value in vars(pipe).items()},
        **{f"pipe.{name}.config": _config(part) for name, part in pipe.components.items()},
        "pipe.class": type(pipe),
        "kernels": _kernels(pipe),
        "flags": flags(),
        "environment": dict(os.environ),
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
        return str(value.device), value.tolist()
    is_data = isinstance(value, (bool, int, float, str, tuple, list, dict)) or value is None
    return value if is_data else Same(value)


def _config(part: Any) -> Any:
    """A component's configuration by value: schedulers and tokenizers have one, too."""
    config = getattr(part, "config", None)
    if config is None:
        return None
    return dict(config.to_dict() if hasattr(config, "to_dict") else config)


def _kernels(pipe: Any) -> list[tuple[Any, ...]]:
    """Every attention processor and the kernel that it is told to use, by itself or its class."""
    modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    processors = [c.processor for m in modules for c in m.modules() if hasattr(c, "processor")]
    return [
        (
            Same(p),
            sorted((k, _plain(v)) for k, v in vars(p).items()),
            str(getattr(type(p), "_attention_backend", None)),
        )
        for p in processors
    ]


# ---- the process -----------------------------------------------------------------------------


def flags() -> dict[str, Any]:
    """PyTorch's and diffusers' switches for the whole process."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    cuda: Any = torch.backends.cuda
    cudnn: Any = torch.backends.cudnn
    deterministic: Any = torch.utils.deterministic
    return {
        "attention backend": _AttentionBackendRegistry.get_active_backend()[0],
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "matmul": torch.get_float32_matmul_precision(),
        "TF32": (cuda.matmul.allow_tf32, cudnn.allow_tf32),
        "reduced precision": (
            cuda.matmul.allow_fp16_reduced_precision_reduction,
            cuda.matmul.allow_bf16_reduced_precision_reduction,
        ),
        "cuDNN": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.benchmark_limit),
        "SDPA": (
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
            cuda.fp16_bf16_reduction_math_sdp_allowed(),
        ),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            deterministic.fill_uninitialized_memory,
        ),
        "threads": torch.get_num_threads(),
    }


def random_state() -> dict[str, int]:
    """Digests of the global generators: PyTorch's, Python's and NumPy's."""
    import numpy

    cuda: Any = torch.cuda
    states: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "python": random.getstate(),
        "numpy": numpy.random.get_state()[1].tobytes(),  # type: ignore[index]
    }
    if cuda.is_available() and cuda.is_initialized():
        states["cuda"] = b"".join(s.numpy().tobytes() for s in cuda.get_rng_state_all())
    return {name: hash(state) for name, state in states.items()}


# ---- components ----------------------------------------------------------------------------------


def take_snapshot(pipe: Any) -> dict[str, Any]:
    """Layers, hooks, weights and where they are, of every component; and the random state."""
    components = {n: m for n, m in pipe.components.items() if hasattr(m, "named_modules")}
    state: dict[str, Any] = {
        "pipe": sorted(pipe.__dict__),
        "device": str(pipe._execution_device),
        "random state": random_state(),
    }
    for component, root in components.items():
        for path, module in root.named_modules(remove_duplicate=False):
            state[f"{component}.{path}"] = _describe_module(module)
        for path, parameter in root.named_parameters(remove_duplicate=False):
            state[f"{component}.{path}"] = (Same(parameter), *_describe_tensor(parameter))
        for path, buffer in root.named_buffers(remove_duplicate=False):
            state[f"{component}.{path}"] = _describe_tensor(buffer)  # a move makes them anew
    return state


_BY_CONTENT = ("_parameters", "_buffers", "_modules", "_diffusers_hook")
"""Attributes of layers that are described on their own."""


def _describe_module(module: Any) -> dict[str, Any]:
    own = {k: v for k, v in module.__dict__.items() if k not in _BY_CONTENT}
    plain = {k: v for k, v in own.items() if isinstance(v, (bool, int, float, str))}
    return {
        "itself": Same(module),
        "class": type(module),
        # diffusers keeps an empty one for its hooks.
        "attributes": sorted(own),
        "values": plain,
        "methods": {k: v for k, v in own.items() if callable(v)},
        "hooks": _diffusers_hooks(module),
        "accelerate's hook": _accelerate_hook(module),
        "processor": Same(own.get("processor")),
        "torch's hooks": {k: dict(v) for k, v in own.items() if k.endswith("_hooks") and v},
        "children": list(module._modules),
        "persistent": sorted(module._non_persistent_buffers_set),
    }


def _diffusers_hooks(module: Any) -> list[tuple[str, Same]]:
    hooks = getattr(module.__dict__.get("_diffusers_hook"), "hooks", {})
    return [(name, Same(hook)) for name, hook in hooks.items()]


def _accelerate_hook(module: Any) -> Any:
    """The hook and what it was told: one may be put on again with other values."""
    hook = module.__dict__.get("_hf_hook")
    told = {k: _plain(v) for k, v in vars(hook).items()} if hook is not None else {}
    simple = {k: v for k, v in told.items() if not isinstance(v, (dict, list, tuple))}
    return Same(hook), simple


def _describe_tensor(tensor: Any) -> tuple[Any, ...]:
    data = None if tensor.is_meta else _bytes_of(tensor)
    return (
        str(tensor.dtype),
        str(tensor.device),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.requires_grad,
        tensor.is_pinned(),
        hash(data),
    )


def _bytes_of(tensor: torch.Tensor) -> bytes:
    """Of any dtype: NumPy knows neither eight-bit nor brain floats."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy())
