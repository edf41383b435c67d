"""Rehearse a generation: the pipeline's own ``__call__``, with modules that have no data.

The pipeline's Python runs for real, on the CPU: prompts are encoded, the scheduler steps, latents
have values. Its modules are on the meta device. Each call of one is intercepted and traced there
(once for the same shapes), so that what runs when, how often, on which shapes and in which dtype is
read off the pipeline itself, whichever pipeline it is.
"""

from __future__ import annotations

import functools
import json
import random
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from autotune.errors import RequestError, first_line
from autotune.workload.arguments import call_arguments
from autotune.workload.live import modules_of
from autotune.workload.stage import RehearsalError, quiet
from autotune.workload.trace import Traced, trace_call
from autotune.workload.values import Values, key_of, on_cpu, run_by_shapes, tensors_in
from autotune.workload.workload import Request

ENTRIES = ("forward", "encode", "decode", "get_image_features", "get_text_features")
"""Methods by which pipelines call their modules."""


class Call(NamedTuple):
    """One call of a component on the meta device: enough to make it again.

    Attributes:
        component: Its name in the pipeline.
        entry: The method's name.
        module: The component.
        function: The method itself: what stands in its place meanwhile intercepts.
        args: What it is given by position, tensors on the meta device.
        kwargs: What it is given by name.
        known: Tensors among these whose values are known, with their values.
    """

    component: str
    entry: str
    module: nn.Module
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    known: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that the call is given."""
        return [t for t in tree_flatten((self.args, self.kwargs))[0] if isinstance(t, Tensor)]

    def trace(self) -> Traced:
        """What the call does, and what it returns."""
        return trace_call(
            self.module, lambda: self.function(*self.args, **self.kwargs), self.tensors, self.known
        )


Tracer = Callable[[Call], Any]
"""Told of every call with new shapes; returns what the call returns, on the meta device."""


def rehearse(pipe: Any, request: Request, tracer: Tracer) -> list[tuple[str, str, str]]:
    """Run the pipeline once for a request.

    Args:
        pipe: A pipeline whose modules are on the meta device; see ``meta_pipeline``.
        request: What to draw.
        tracer: Traces calls.

    Returns:
        Component, entry and signature of every call of a module, in order.

    Raises:
        RequestError: the pipeline refuses the request.
        RehearsalError: its ``__call__`` fails on meta modules.
    """
    script = _Script(tracer)
    with ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(_own_random_state())
        stack.enter_context(torch.no_grad())
        for name, module in modules_of(pipe).items():
            stack.enter_context(_intercepted(name, module, script))
        stack.enter_context(_optional_imports(type(pipe)))
        stack.enter_context(script.glue)
        arguments = call_arguments(pipe, request)
        try:
            pipe(**arguments)
        except Exception as error:  # the code of any pipeline
            raise _failure(error, pipe, request) from error
    return script.calls


def _failure(error: Exception, pipe: Any, request: Request) -> Exception:
    """Whether the pipeline refuses what was asked, or cannot be rehearsed whatever is asked."""
    raised = traceback.extract_tb(error.__traceback__)[-1]
    is_meant = isinstance(error, ValueError) and (raised.line or "").startswith("raise ")
    if is_meant and any(name in str(error) for name in (*_ASKED, *request.options)):
        return RequestError(
            f"{type(pipe).__name__} refuses: {first_line(error)}",
            "ask for a size, length or number that it takes",
        )
    return RehearsalError(first_line(error))


_ASKED = ("height", "width", "frames", "num_inference_steps", "guidance")
"""What errors call the things that everybody may ask for."""


class _Script:
    """The calls made so far, and the outputs of those with the same shapes."""

    def __init__(self, tracer: Tracer) -> None:
        self.calls: list[tuple[str, str, str]] = []
        self.glue = _Glue()
        self._tracer = tracer
        self._outputs: dict[tuple[str, str, str], Any] = {}

    def call(self, component: str, entry: str, module: nn.Module, function: Any) -> Any:
        @functools.wraps(function)
        def intercepted(*args: Any, **kwargs: Any) -> Any:
            if self.glue.is_paused:  # a module calls itself, while it is traced
                return function(*args, **kwargs)
            with self.glue.paused():
                without_data = _WithoutData()
                args, kwargs = tree_map_only(Tensor, without_data, (args, kwargs))
                key = (component, entry, _signature(module, args, kwargs))
                if key not in self._outputs:
                    known = tuple(without_data.known)
                    call = Call(component, entry, module, function, args, kwargs, known)
                    self._outputs[key] = self._tracer(call)
            self.calls.append(key)
            return self._outputs[key]

        return intercepted


class _WithoutData:
    """Moves tensors to the meta device; those of one storage share one again."""

    def __init__(self) -> None:
        self.known: list[tuple[Tensor, Tensor]] = []
        self._storages: dict[int, torch.UntypedStorage] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return tensor
        storage = self._storages.setdefault(key_of(tensor), _storage_like(tensor))
        made = torch.empty(0, dtype=tensor.dtype, device="meta").set_(
            storage, tensor.storage_offset(), tensor.shape, tensor.stride()
        )
        if not tensor.is_floating_point() or tensor.dim() < 2:
            self.known.append((made, tensor))  # else it may be zeros in place of an activation
        return made


def _storage_like(tensor: Tensor) -> torch.UntypedStorage:
    size = tensor.untyped_storage().nbytes()
    return torch.empty(size, dtype=torch.uint8, device="meta").untyped_storage()


def _signature(module: nn.Module, args: Any, kwargs: Any) -> str:
    """Shapes, dtypes and switches; numbers (a timestep, a scale) do not change what runs."""
    leaves, structure = tree_flatten((args, kwargs))
    plain = [
        [str(v.dtype), *v.shape] if isinstance(v, Tensor) else v
        for v in leaves
        if isinstance(v, (Tensor, bool, str)) or v is None
    ]
    return json.dumps([str(structure), plain, str(_dtype(module))])


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in module.parameters()), None)


@contextmanager
def _intercepted(name: str, module: nn.Module, script: _Script) -> Iterator[None]:
    entries = [e for e in ENTRIES if callable(getattr(module, e, None))]
    for entry in entries:
        own = getattr(module, entry)
        module.__dict__[entry] = script.call(name, entry, module, own)
    try:
        yield
    finally:
        for entry in entries:
            module.__dict__.pop(entry, None)


class _Glue(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Between the modules, what they returned has shapes only: where that is not enough, zeros."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_paused = False
        self._nothing = Values()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While a module is traced."""
        self.is_paused = True
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            self.__enter__()  # type: ignore[no-untyped-call]
            self.is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(t.is_meta for t in tensors_in((args, kwargs))):
            if str(kwargs.get("device")) == "meta":  # what a module says when asked where it is
                kwargs = on_cpu(kwargs)
            return func(*args, **kwargs)
        try:
            return run_by_shapes(func, args, kwargs)
        except (NotImplementedError, RuntimeError):
            return self._nothing.run(func, args, kwargs)


@contextmanager
def _own_random_state() -> Iterator[None]:
    """The user's random numbers go on as if nothing had been rehearsed."""
    import numpy

    python, arrays = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)


@contextmanager
def _optional_imports(cls: type) -> Iterator[None]:
    """Some pipelines clean prompts with ftfy, and fail without it: here nothing is dirty."""
    module = sys.modules.get(cls.__module__)
    missing = module is not None and "prompt_clean" in vars(module) and not hasattr(module, "ftfy")
    if missing:
        module.ftfy = types.SimpleNamespace(fix_text=lambda text: text)  # type: ignore[union-attr]
    try:
        yield
    finally:
        if missing:
            del module.ftfy  # type: ignore[union-attr]
