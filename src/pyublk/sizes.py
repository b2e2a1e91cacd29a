# SPDX-License-Identifier: MIT
"""Sizes as people write them: 512, 64K, 512MiB, 1G. Every unit is a power of 1024. Times, too."""

import re

UNITS = "KMGTPE"
_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def parse_size(text: str) -> int:
    """The bytes that `text` means. Raises ValueError, saying what is allowed."""
    match = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*(?:([{UNITS}])(?:iB|B)?|B)?\s*", text, re.I)
    if not match:
        raise ValueError(
            f"{text!r} is not a size: write bytes, or a number with a unit as in 1G or 512MiB"
        )
    number, unit = match[1], match[2]
    scale = 1024 ** (UNITS.index(unit.upper()) + 1) if unit else 1
    size = float(number) * scale if "." in number else int(number) * scale
    if size != int(size):
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return int(size)


def format_size(size: int) -> str:
    """The shortest exact way to write a number of bytes; parse_size reads it back."""
    exponent = 0
    while size and size % 1024 == 0 and exponent < len(UNITS):
        size //= 1024
        exponent += 1
    return f"{size}{UNITS[exponent - 1]}iB" if exponent else str(size)


def short_size(size: float) -> str:
    """A number of bytes in three digits, for people: 1.25MiB."""
    exponent = 0
    while size >= 999.5 and exponent < len(UNITS):
        size /= 1024
        exponent += 1
    return f"{_digits(size)}{UNITS[exponent - 1]}iB" if exponent else f"{size:.0f}B"


def short_count(count: float) -> str:
    """A number in at most five characters, for people: 12.5k."""
    if count < 9999.5:
        return f"{count:.0f}"
    thousands = count / 1000
    return f"{_digits(thousands)}k" if thousands < 999.5 else f"{_digits(thousands / 1000)}M"


def short_seconds(seconds: float) -> str:
    """A time in three digits, for people: 1.25ms."""
    if not seconds:
        return "0s"
    scale, unit = next((one for one in _TIMES if seconds >= 0.9995 * one[0]), _TIMES[-1])
    return f"{_digits(seconds / scale)}{unit}"


def _digits(number: float) -> str:
    """Three of them, or all that are before the point."""
    return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f}"
