# SPDX-License-Identifier: MIT
"""Rules as texts: `fail:op=write,range=4K-8K,errno=EIO,times=1`."""

import errno
import re
from collections.abc import Callable, Mapping
from typing import Any

from pyublk.faults.filters import FaultFilter, near, operations_named
from pyublk.faults.profiles import load
from pyublk.sizes import format_size, parse_size

#: Seconds of a unit of time.
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0}


def rule_text(action: str, operations: str, said: Mapping[str, object], only: FaultFilter) -> str:
    """What `parse` reads back, but for a `when`, which only Python can say."""
    parts = [f"op={operations}"]
    for name, value in {**said, **only}.items():
        if value is None or value is False:
            continue
        parts.append(f"{name}={_shown(name, value)}")
    return f"{action}:{','.join(parts)}"


def _shown(name: str, value: Any) -> str:
    if name == "range":
        return f"{format_size(value[0])}-{format_size(value[1])}"
    if name in ("offset", "bandwidth") and value == int(value):
        return format_size(int(value))
    if name == "when":
        return getattr(value, "__qualname__", repr(value))
    if isinstance(value, bool):
        return "yes"
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """The method of `Faults` that a rule's text calls, and its arguments. Raises ValueError."""
    action, _, rest = (word.strip() for word in text.partition(":"))
    if action not in _TAKEN:
        raise ValueError(
            f"{text!r} is not a rule{near(action, _TAKEN)}: it begins with one of "
            f"{', '.join(_TAKEN)}, and a colon"
        )
    taken = _TAKEN[action] | _FILTER
    if action in ("full", "read_only"):  # which say so themselves
        del taken["op"]
    found: dict[str, Any] = {}
    for part in rest.split(",") if rest else []:
        name, equals, value = (word.strip() for word in part.partition("="))
        if name not in taken:
            raise ValueError(
                f"{action} takes no {name!r}{near(name, taken)}: it takes {', '.join(taken)}"
            )
        if name in found:
            raise ValueError(f"{name} is given twice in {text!r}")
        if not equals and taken[name] is not _yes:
            raise ValueError(f"{name} of {action} needs a value, as in {name}=...")
        try:
            found[name] = taken[name](value)
        except ValueError as error:
            raise ValueError(f"{name} of {action}: {error}") from None
    return action, _arguments(action, found)


def split(texts: str) -> list[str]:
    """Several rules, with semicolons between them; `profile:NAME` stands for those of a profile.
    Raises ValueError when there is no such profile."""
    found: list[str] = []
    for text in filter(None, (one.strip() for one in texts.split(";"))):
        action, colon, name = text.partition(":")
        found += load(name.strip()).rules if colon and action.strip() == "profile" else [text]
    return found


def parse_limit(text: str) -> dict[str, Any]:
    """The arguments of a disk's `limit`. Raises ValueError."""
    arguments = parse(f"limit:{text}")[1]
    for name in arguments:
        if name not in ("iops", "bandwidth", "burst"):
            raise ValueError(f"the limit of a disk takes iops, bandwidth and burst, not {name!r}")
    return arguments


def _arguments(action: str, found: dict[str, Any]) -> dict[str, Any]:
    """By the names that Python has for them."""
    for text, python in (("op", "operations"), ("errno", "error")):
        if text in found:
            found[python] = found.pop(text)
    for name in _NEEDED.get(action, ()):
        if name not in found:
            said = "op" if name == "operations" else name
            raise ValueError(f"{action} needs {said}=..., as in {_EXAMPLES[action]}")
    return found


def _operations(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split("+"))
    operations_named(names)
    return names


def _range(text: str) -> tuple[int, int]:
    begin, dash, end = text.partition("-")
    if not dash:
        raise ValueError(f"{text!r} is not a range of bytes such as 4K-8K")
    return parse_size(begin), parse_size(end)


def _errno(text: str) -> int:
    if not hasattr(errno, text.upper()):
        names = errno.errorcode.values()
        raise ValueError(f"{text!r} is not an errno such as EIO{near(text.upper(), names)}")
    number: int = getattr(errno, text.upper())
    return number


def _seconds(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e-?\d+)?)\s*(us|ms|s|)\s*", text)
    if not match:
        raise ValueError(f"{text!r} is not a time: write seconds, or as in 10ms or 50us")
    return float(match[1]) * _TIMES[match[2]]


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None


def _yes(text: str) -> bool:
    if text not in ("", "yes", "no"):
        raise ValueError(f"{text!r} must be yes or no")
    return text != "no"


_Reader = Callable[[str], Any]
_FILTER: dict[str, _Reader] = {
    "op": _operations,
    "range": _range,
    "jumps": _yes,
    "nth": _whole,
    "every": _yes,
    "probability": _number,
    "seed": _whole,
    "times": _whole,
}
#: By action, what it takes beside a filter.
_TAKEN: dict[str, dict[str, _Reader]] = {
    "fail": {"errno": _errno},
    "delay": {"seconds": _seconds, "jitter": _seconds, "distribution": str},
    "hang": {},
    "limit": {"iops": _number, "bandwidth": parse_size, "burst": _seconds},
    "drop": {},
    "tear": {"sectors": _whole},
    "misdirect": {"offset": parse_size},
    "rot": {"bits": _whole},
    "stale": {},
    "full": {},
    "read_only": {},
}
_NEEDED = {
    "fail": ("operations",),
    "delay": ("operations", "seconds"),
    "hang": ("operations",),
    "drop": ("operations",),
    "misdirect": ("offset",),
}
_EXAMPLES = {
    "fail": "fail:op=write,errno=EIO",
    "delay": "delay:op=read,seconds=10ms",
    "hang": "hang:op=flush",
    "drop": "drop:op=write,nth=3",
    "misdirect": "misdirect:op=write,offset=1M",
}
