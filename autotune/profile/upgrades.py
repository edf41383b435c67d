"""From the profiles of older versions to today's, one step from each version to the next.

A new schema version takes three things: the number in ``profile.py``, a step here, and a file that
the version before has written in ``tests/profile/fixtures/``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from autotune.profile.profile import SCHEMA_VERSION

Fields = dict[str, Any]
"""A profile as JSON has it."""


def upgraded(fields: Fields, version: int) -> Fields:
    """A profile of an older version as today's version would have written it.

    Raises:
        KeyError: there never was such a version.
    """
    for step in range(version, SCHEMA_VERSION):
        fields = UPGRADES[step](fields)
    return {**fields, "schema_version": SCHEMA_VERSION}


def _from_1(fields: Fields) -> Fields:
    """Plans, misfits and more figures of a phase came in; all may be missing."""
    return fields


UPGRADES: Final[dict[int, Callable[[Fields], Fields]]] = {1: _from_1}
"""By the version that a step starts from."""
