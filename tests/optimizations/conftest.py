"""What a GPU would be needed for, near enough on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from autotune.testing import standins
from autotune.testing.state import whole_state

Calls = list[Any]


@pytest.fixture
def state() -> Any:
    """``state(pipe)``: all that could be left behind."""
    return whole_state


@pytest.fixture
def xformers_on_cpu() -> Iterator[Calls]:
    """The list counts the calls of the kernel."""
    with standins.xformers_on_cpu() as calls:
        yield calls


@pytest.fixture
def sequential_on_cpu() -> Iterator[None]:
    with standins.sequential_on_cpu():
        yield
