"""Numbers as people write and read them."""

from __future__ import annotations

import re

from autotune.errors import RequestError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_FACTORS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1 << 40,
}


def format_bytes(count: float) -> str:
    """``5368709120`` → ``"5.00 GiB"``; below a GiB in MiB, below a MiB in KiB."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(count) >= unit:
            value = count / unit
            return f"{value:.2f} {name}" if abs(value) < 10 else f"{value:.1f} {name}"
    return f"{count:.0f} B"


def format_seconds(seconds: float, beside: float | None = None) -> str:
    """``0.0123`` → ``"12.3 ms"``; ``83`` → ``"83.0 s"``; ``735`` → ``"12.2 min"``; ``"1.83 h"``.

    Beside another time, a long one is in the unit of the smaller: ``735`` beside ``546`` is
    ``"735 s"``.
    """
    least = abs(seconds) if beside is None else min(abs(seconds), abs(beside))
    if abs(seconds) < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    if abs(seconds) < 1:
        return f"{seconds * 1e3:.1f} ms"
    unit, name = (1, "s") if least < 600 else (60, "min") if least < 6000 else (3600, "h")
    value = seconds / unit
    decimals = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{decimals}f} {name}"


def format_rate(per_second: float, unit: str) -> str:
    """``2.5e13, "FLOP/s"`` → ``"25.0 TFLOP/s"`` (decimal prefixes, as vendors print rates)."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if per_second >= factor:
            return f"{per_second / factor:.1f} {prefix}{unit}"
    return f"{per_second:.0f} {unit}"


def parse_bytes(text: str) -> int:
    """``"5GiB"``, ``"5.5 gb"`` or ``"1048576"`` → bytes.

    Raises:
        RequestError: the text is not a size, or is not positive.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None or float(match[1]) * factor < 1:
        raise RequestError(f"{text!r} is not a memory size", "write it like 5GiB, 5.5GB or 512MiB")
    return int(float(match[1]) * factor)


def printable(text: str) -> str:
    """Text from a file as a terminal may show it: what would steer the terminal is spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
