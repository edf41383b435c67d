"""What is known of tensors without data: the values of small ones, and zeros for the rest.

Some models ask for values: how many tokens a mask lets through, whether it lets all through. Masks,
positions and timesteps are known, and stay known through what is computed of them alone. What
depends on weights or activations is not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

MOST_ELEMENTS = 1 << 16
"""Of a tensor whose values are followed: masks and positions are small."""

MOST_ZEROS_BYTES = 1 << 30
"""Zeros are real memory once they are written to, and operators really compute on them: more than
this is not worth an answer."""


class Values:
    """Data of those tensors on the meta device whose values are known, by their storage."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}

    def given(self, tensor: Tensor, real: Tensor) -> None:
        """``tensor`` looks at its storage as ``real`` does at its own, and has its values."""
        storage = real.untyped_storage()
        if storage.nbytes() <= MOST_ELEMENTS * real.element_size():
            self._storages[key_of(tensor)] = storage.clone()  # type: ignore[no-untyped-call]

    def learn(self, tensor: Tensor, real: Tensor) -> None:
        """``tensor`` is new and has the values of ``real``."""
        if tensor.is_meta and tensor.numel() <= MOST_ELEMENTS:
            same = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            self._storages[key_of(tensor)] = same.copy_(real).untyped_storage()

    def forget(self, key: int) -> None:
        """The storage is freed, or has been written to."""
        self._storages.pop(key, None)

    def knows(self, value: Any) -> bool:
        """Whether every tensor in ``value`` has data, or known values."""
        if isinstance(value, Tensor):
            return not value.is_meta or key_of(value) in self._storages
        return all(self.knows(t) for t in tensors_in(value))

    def decides(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether all is known that the shape of an operator's result depends on."""
        position = facts_of(func).decided_by
        return self.knows((args, kwargs) if position is None else args[position])

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator on the CPU: on what is known, and on zeros for the rest.

        Raises:
            RuntimeError: it refuses zeros, or they would fill the host's memory.
        """
        unknown = [t for t in tensors_in((args, kwargs)) if not self.knows(t)]
        size = sum(t.numel() * t.element_size() for t in unknown)
        if size > MOST_ZEROS_BYTES:
            raise RuntimeError(f"{func} would need {size} bytes of zeros to be run")
        args, kwargs = tree_map_only(Tensor, self._real, (args, kwargs))
        return func(*args, **on_cpu(kwargs))

    def _real(self, tensor: Tensor) -> Tensor:
        """With data; views of one known storage are views of one again."""
        if not tensor.is_meta:
            return tensor
        storage = self._storages.get(key_of(tensor))
        if storage is None:
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
        return torch.empty(0, dtype=tensor.dtype).set_(
            storage, tensor.storage_offset(), tensor.shape, tensor.stride()
        )

    def follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """An operator has run: its results are known if all that they depend on is."""
        facts = facts_of(func)
        first = args[0] if args else None
        # Most operators take activations first: found out without looking at the rest.
        if isinstance(first, Tensor) and not (facts.ignores_values or self.knows(first)):
            return
        real = self._computed(facts, func, args, kwargs, out)
        if facts.written:
            if real is None:
                for i in facts.written:
                    self.forget(key_of(args[i]))
        elif real is not None:
            for made, known in zip(tensors_in(out), tensors_in(real), strict=True):
                self.learn(made, known)

    def _computed(self, facts: Facts, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        """What the operator returns on known values; ``None`` where they are not, or not small."""
        if facts.only_allocates or facts.is_random:
            return None
        if not facts.ignores_values and not self.knows((args, kwargs)):
            return None
        if not all(t.is_meta and t.numel() <= MOST_ELEMENTS for t in tensors_in(out)):
            return None
        try:
            return self.run(func, args, kwargs)
        except Exception:  # values that are no more than zeros may be out of some range
            return None


def key_of(tensor: Tensor) -> int:
    """Names the tensor's storage while it lives."""
    key: int = tensor.untyped_storage()._cdata
    return key


def on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, with the CPU for any device asked for."""
    return kwargs | {"device": torch.device("cpu")} if kwargs.get("device") is not None else kwargs


def run_by_shapes(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator; where tensors with and without data meet, without."""
    try:
        return func(*args, **kwargs)
    except (NotImplementedError, RuntimeError):
        if len({t.is_meta for t in tensors_in((args, kwargs))}) < 2:
            raise
    args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
    return func(*args, **kwargs)


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors among an operator's arguments or results."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [t for item in value for t in tensors_in(item)]


# ---- operators ----------------------------------------------------------------------------------

_ALLOCATES_ONLY = {"empty", "new_empty", "empty_like", "empty_strided", "empty_permuted"}
_IGNORES_VALUES = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
_DECIDED_BY = {"index": 1, "_unsafe_index": 1, "masked_select": 1}
_LINEAR = {"add", "sub", "rsub", "mul", "div", "lerp", "add_", "sub_", "mul_", "div_", "lerp_"}


class Facts(NamedTuple):
    """What an operator's schema says.

    Attributes:
        is_view: Returns another look at its argument's storage.
        written: Positions of the arguments that it writes to.
        is_random: Draws numbers.
        only_allocates: Leaves memory as it is.
        ignores_values: Takes only shape and dtype of its argument.
        decided_by: Position of the argument whose values decide the result's shape, where it is
            not all of them.
        is_linear: Takes numbers whose value does not change its work.
    """

    is_view: bool
    written: tuple[int, ...]
    is_random: bool
    only_allocates: bool
    ignores_values: bool
    decided_by: int | None
    is_linear: bool


_FACTS: dict[int, tuple[Facts, Any]] = {}  # by identity: an operator's own hash is slow


def facts_of(func: Any) -> Facts:
    """The operator's facts, looked up once."""
    found = _FACTS.get(id(func))
    if found is None:
        found = _FACTS[id(func)] = _read_facts(func), func
    return found[0]


def _read_facts(func: Any) -> Facts:
    taken = func._schema.arguments
    aliases = [r.alias_info for r in func._schema.returns]
    name = func.overloadpacket.__name__
    return Facts(
        is_view=any(a is not None and not a.is_write for a in aliases),
        written=tuple(i for i, a in enumerate(taken) if a.alias_info and a.alias_info.is_write),
        is_random=torch.Tag.nondeterministic_seeded in func.tags,
        only_allocates=name in _ALLOCATES_ONLY,
        ignores_values=name in _IGNORES_VALUES,
        decided_by=_DECIDED_BY.get(name),
        is_linear=name in _LINEAR,
    )
