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


def format_seconds(seconds: float) -> str:
    """``0.0123`` → ``"12.3 ms"``; ``83`` → ``"83.0 s"``; ``4674`` → ``"1 h 18 min"``."""
    if abs(seconds) >= 600:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
    if abs(seconds) >= 1:
        return f"{seconds:.1f} s" if abs(seconds) >= 10 else f"{seconds:.2f} s"
    if abs(seconds) >= 1e-3:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e6:.1f} µs"


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
