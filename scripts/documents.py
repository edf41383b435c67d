"""Tables that scripts write into documents."""

from __future__ import annotations


def between(text: str, begin: str, end: str, new: str) -> str:
    """A document with something new between its two marker lines.

    Raises:
        ValueError: it has none.
    """
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"there is no {begin} with {end} after it")
    return f"{before}{begin}\n\n{new}\n{end}{after}"
