"""Sizes and durations as people write them: ``"64MiB"``, ``"1.5GB"``, ``"90s"``, and back."""

from __future__ import annotations

import re

from brainenc.errors import UsageError

_SIZES = {"": 1, "b": 1}
_SIZES |= {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)} | {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}
_SIZES |= {p: 1024**i for i, p in enumerate("kmgt", 1)}
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """``"64MiB"`` -> 67108864. ``MB`` is 10^6, ``MiB`` and a bare ``M`` are 2^20.

    Raises:
        UsageError: not a size.
    """
    if isinstance(text, int):
        return text
    number, unit = _split(text, "size", "64MiB")
    if unit.lower() not in _SIZES:
        raise UsageError(f"{text!r} is not a size: {unit!r} is no unit; write for example 64MiB or 1.5GB.")
    return int(number * _SIZES[unit.lower()])


def parse_seconds(text: str | float) -> float:
    """``"5min"`` -> 300.0.

    Raises:
        UsageError: not a duration.
    """
    if isinstance(text, int | float):
        return float(text)
    number, unit = _split(text, "duration", "90s")
    if unit.lower() not in _SECONDS:
        raise UsageError(f"{text!r} is not a duration: {unit!r} is no unit; write for example 90s or 5min.")
    return number * _SECONDS[unit.lower()]


def _split(text: str, kind: str, example: str) -> tuple[float, str]:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not a {kind}; write for example {example}.")
    return float(match.group(1)), match.group(2)


def format_bytes(n: float) -> str:
    """1478400 -> ``"1.5 MB"`` (powers of 1000, as disks are sold)."""
    sign, n = ("-", -n) if n < 0 else ("", n)
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.5:
            return f"{sign}{n:.0f} {unit}" if unit == "B" else f"{sign}{n:.3g} {unit}"
        n /= 1000
    return f"{sign}{n:.3g} TB" if n < 999.5 else f"{sign}{n:.0f} TB"


def format_seconds(s: float) -> str:
    """4000 -> ``"1 h 06 min"``."""
    if s < 60:
        return f"{s:.1f} s" if s < 10 else f"{s:.0f} s"
    minutes = round(s / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
