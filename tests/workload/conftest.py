"""Requests for the small pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from autotune.workload.workload import Request


@pytest.fixture
def request_of() -> Callable[..., Request]:
    def make(side: int = 64, batch: int = 1, **fields: Any) -> Request:
        values: dict[str, Any] = {"steps": 3, "guidance_scale": 7.5, "dtype": "float32"} | fields
        return Request(height=side, width=side, batch=batch, **values)

    return make
