"""Operators as a trace records them, written by hand."""

from __future__ import annotations

import json
from typing import Any

from autotune.workload.workload import Operator


def operator(name: str, *arguments: Any, size: int = 0, **keywords: Any) -> Operator:
    signature = json.dumps([name, arguments, keywords], separators=(",", ":"))
    return Operator(name, "memory", signature, "float32", 1, 0, size, 0, 0, 0)


def tensor(*shape: int, dtype: str = "float32", **more: Any) -> dict[str, Any]:
    return {"t": dtype, "s": list(shape), **more}
