# SPDX-License-Identifier: MIT
"""Numbers that callers pass, told at once when they are none, and what they are by default."""

import operator

#: Requests in flight for each queue.
DEFAULT_DEPTH = 128
#: Bytes of the largest request, and of each tag's buffer.
DEFAULT_MAX_IO_SIZE = 512 * 1024


def whole(name: str, value: object, *, least: int | None = None) -> int:
    """`value` as an int. Raises ValueError for what is no whole number, or below `least`."""
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        hint = ""
        if isinstance(value, str):
            hint = f"; pyublk.targets.parse_size({value!r}) reads a text"
        raise ValueError(f"{name} must be a whole number, not {value!r}{hint}")
    number = operator.index(value)  # type: ignore[arg-type]  # it has __index__
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, not {number}")
    return number


def seconds(name: str, value: object, *, zero: bool = False) -> float:
    """`value` as a number of seconds. Raises ValueError for what is none that a clock can have."""
    number = float(value) if isinstance(value, (int, float)) else -1.0
    if isinstance(value, bool) or not 0 <= number <= 1e9 or not (number or zero):
        raise ValueError(f"{name} must be a number of seconds above 0, not {value!r}")
    return number
