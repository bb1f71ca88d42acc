"""Bytes and counts as people write them. Inside fitune both are plain `int`; units exist only in text."""

from __future__ import annotations

import re
from fractions import Fraction

KiB = 2**10
MiB = 2**20
GiB = 2**30

_BYTES = {
    "B": 1,
    **{unit: 1000**power for power, unit in enumerate(["KB", "MB", "GB", "TB", "PB"], start=1)},
    **{unit: 1024**power for power, unit in enumerate(["KiB", "MiB", "GiB", "TiB", "PiB"], start=1)},
}
_BINARY = {unit: _BYTES[unit] for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB")}
_COUNTS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

# 15 digits hold every size and count there is, and keep int() far from Python's limit on digits.
_NUMBER_AND_UNIT = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([A-Za-z]*)")
_WHOLE_NUMBER = re.compile(r"[0-9]{1,3}(?:[,_][0-9]{3}){1,5}|[0-9]{1,18}")


def parse_bytes(text: str) -> int:
    """Bytes of a size such as `24GiB` (24 x 2**30) or `80 GB` (80 x 10**9); part of a byte is dropped.

    The unit is required, its case does not matter. Raises ValueError that says what is allowed.
    """
    match = _NUMBER_AND_UNIT.fullmatch(text.strip())
    if match is None:
        raise ValueError(f'"{text}" is not a size such as "24GiB" or "80GB"')
    number, unit = match.groups()
    if not unit:
        raise ValueError(f'"{text}" has no unit: write "{number}GiB" or "{number}GB"')
    factors = {name.upper(): factor for name, factor in _BYTES.items()}
    if unit.upper() not in factors:
        raise ValueError(f'"{text}": the unit "{unit}" is not one of {", ".join(_BYTES)}')
    return int(Fraction(number) * factors[unit.upper()])


def format_bytes(n: int) -> str:
    """`22.8 GiB`, `512.0 MiB`, `17 B`: the largest binary unit of which there is at least 1.0."""
    sign, size = ("-", -n) if n < 0 else ("", n)
    if size < KiB:
        return f"{sign}{size} B"
    for unit, factor in list(_BINARY.items())[1:]:
        tenths = round(Fraction(10 * size, factor))
        if tenths < 10 * KiB or unit == "PiB":
            break
    return f"{sign}{tenths // 10}.{tenths % 10} {unit}"


def parse_count(text: str) -> int:
    """A number of parameters such as `10B`, `354.92M`, `7b` or `8,030,261,248`.

    Raises ValueError that says what is allowed, also where the number is not whole or is zero.
    """
    stripped = text.strip()
    if _WHOLE_NUMBER.fullmatch(stripped):
        count = Fraction(re.sub("[,_]", "", stripped))
    else:
        match = _NUMBER_AND_UNIT.fullmatch(stripped)
        if match is None or match[2].upper() not in _COUNTS:
            raise ValueError(f'"{text}" is not a count such as "10B", "354.92M" or "8030261248"; units: K, M, B, T')
        count = Fraction(match[1]) * _COUNTS[match[2].upper()]
    if count < 1 or count.denominator != 1:
        raise ValueError(f'"{text}" is not a whole number of at least 1')
    return int(count)


def format_count(n: int) -> str:
    """`6.7B`, `354.8M`; below a million every digit: `393,216`."""
    sign, count = ("-", -n) if n < 0 else ("", n)
    if count < 10**6:
        return f"{sign}{count:,}"
    for unit, factor in list(_COUNTS.items())[1:]:
        tenths = round(Fraction(10 * count, factor))
        if tenths < 10_000 or unit == "T":
            break
    return f"{sign}{tenths // 10}.{tenths % 10}{unit}"


def format_seconds(seconds: float) -> str:
    """`0 s`, `0.42 s`, `42 s`, `3:07 min` or `2:15 h`."""
    if seconds == 0:
        return "0 s"
    if seconds < 9.95:
        return f"{seconds:.1f} s" if seconds >= 0.95 else f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600:,}:{whole % 3600 // 60:02d} h"
