"""How images lie in memory on a CPU, where that is not as on the meta device.

What an attention layer hands on is a transposed view, channels last (NHWC). On a CPU group norms
and convolutions keep that layout, and so does all that follows; on CUDA a group norm lays its
result out anew, and so does one on the meta device. A single image's view has a first stride by
which PyTorch does not know it for channels last, and meta kernels correct that. It matters: oneDNN
copies what it convolves unless it is channels last.
(``at::native::group_norm`` and ``mkldnn_conv_use_channels_last``, PyTorch 2.13.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from autotune.workload.values import key_of
from autotune.workload.workload import NCHW, NHWC

_KEEP = frozenset(
    {
        *("convolution", "native_group_norm", "upsample_nearest2d", "cat", "_to_copy"),
        *("silu", "gelu", "relu", "sigmoid", "tanh", "add", "sub", "mul", "div"),
    }
)
"""Operators whose result lies as their first operand does."""


class Layouts:
    """Storages of images that lie otherwise on a CPU than they seem to here."""

    def __init__(self) -> None:
        self._otherwise: dict[int, str] = {}
        self._keep = _KEEP

    @contextmanager
    def kept_by_copies(self) -> Iterator[None]:
        """While a copy is one that a CPU does not make."""
        self._keep = _KEEP | {"clone"}
        try:
            yield
        finally:
            self._keep = _KEEP

    def of(self, tensor: Tensor) -> str:
        """``"nhwc"`` or ``"nchw"`` for such an image, empty for others."""
        return self._otherwise.get(key_of(tensor), "") if tensor.dim() == 4 else ""

    def of_all(self, args: Any) -> tuple[str, ...]:
        """The same of every tensor among an operator's arguments; empty where there are none."""
        if not self._otherwise:
            return ()
        return tuple(self.of(a) for a in args if isinstance(a, Tensor))

    def follow(self, func: Any, args: Any, outputs: Iterable[Tensor]) -> None:
        """Note what an operator makes of the layout of its first operand."""
        if func.overloadpacket.__name__ not in self._keep or not args:
            return
        first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        if not isinstance(first, Tensor) or first.dim() != 4:
            return
        is_nhwc = (self.of(first) or (NHWC if _is_channels_last(first) else NCHW)) == NHWC
        for image in outputs:
            if image.dim() == 4 and _is_channels_last(image) != is_nhwc:
                self._otherwise[key_of(image)] = NHWC if is_nhwc else NCHW

    def forget(self, key: int) -> None:
        """The storage is freed."""
        self._otherwise.pop(key, None)


NO_LAYOUTS = Layouts()


def _is_channels_last(tensor: Tensor) -> bool:
    """As PyTorch judges it: a single image's first stride counts, too."""
    if tensor.dim() != 4:
        return False
    _, channels, height, width = tensor.shape
    wanted = (height * width * channels, 1, width * channels, channels)
    return channels > 1 and height * width > 1 and tensor.stride() == wanted
