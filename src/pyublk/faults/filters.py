# SPDX-License-Identifier: MIT
"""Which requests a rule is for: operations, bytes, counts and chance, checked when it is made."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any, TypedDict

from pyublk.arguments import whole
from pyublk.target import Target
from pyublk.uapi import Feature, Op

#: Operations by the names that rules know them by.
OPERATIONS = {op.name.lower(): op for op in Op if op is not Op.WRITE_SAME}
#: What stands for every operation of a target.
ALL = "all"

#: An operation by name, several of them, or "all".
Operations = str | Iterable[str]


class FaultFilter(TypedDict, total=False):
    """Which of the requests of its operations a rule fires for; all that is given must hold.

    - `range`: (first byte, byte after the last): requests that touch any of these (no flush).
    - `jumps`: only requests that do not begin where the last one ended (a disk's head must move).
    - `when`: called with the operation (a `pyublk.uapi.Op`), offset and length in bytes; the rule
      fires only if it returns true. It holds up the queue that has the request.
    - `nth`: of the requests that are left, only the nth since the rule was made; with `every`, each
      nth.
    - `probability`: 0 to 1; with the same `seed` (0 by default) chance is the same.
    - `times`: so often at most.
    """

    range: tuple[int, int] | None
    jumps: bool
    when: Callable[[Op, int, int], object] | None
    nth: int | None
    every: bool
    probability: float
    seed: int
    times: int | None


def operations_named(names: Operations) -> tuple[str, ...]:
    """The names, each once. Raises ValueError for one that is no operation."""
    given = (names,) if isinstance(names, str) else tuple(names)
    for name in given:
        if name != ALL and name not in OPERATIONS:
            raise ValueError(
                f"{name!r} is not an operation{near(name, [*OPERATIONS, ALL])}: operations are "
                f"{', '.join(OPERATIONS)}, and {ALL}"
            )
    if not given:
        raise ValueError("a rule needs an operation")
    return tuple(OPERATIONS) if ALL in given else tuple(dict.fromkeys(given))


def near(name: object, choices: Iterable[str]) -> str:
    """A question that suggests what was meant, if anything is near it."""
    close = difflib.get_close_matches(str(name), list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def of_target(target: Target) -> tuple[str, ...]:
    """The operations that requests to this target can have."""
    zoned = Feature.ZONED in target.needs
    return tuple(
        name
        for name in OPERATIONS
        if (zoned if "zone" in name else target.announces(name))
        and not (target.read_only and name not in ("read", "flush", "report_zones"))
    )


def check_happens(names: Iterable[str], target: Target) -> None:
    """Raises ValueError when no request of the target has one of these operations."""
    taken = of_target(target)
    for name in names:
        if name not in taken:
            kind = "a read-only " if target.read_only else ""
            raise ValueError(
                f"no request of {kind}{type(target).__name__} is a {name!r}{near(name, taken)}: "
                f"its operations are {', '.join(taken)}"
            )


def checked_filter(given: FaultFilter) -> dict[str, Any]:
    """The filter as `GateRule` takes it. Raises ValueError, or TypeError for an unknown name."""
    known = FaultFilter.__annotations__
    for name in given:
        if name not in known:
            raise TypeError(f"a rule takes no {name!r}{near(name, known)}")
    found: dict[str, Any] = {"seed": whole("seed", given.get("seed", 0), least=0)}
    if (span := given.get("range")) is not None:
        found["begin"], found["end"] = _checked_range(span)
    if (nth := given.get("nth")) is not None:
        found["nth"] = whole("nth", nth, least=1)
    elif given.get("every"):
        raise ValueError("every needs nth: each nth request")
    if (times := given.get("times")) is not None:
        found["times"] = whole("times", times, least=1)
    if (when := given.get("when")) is not None and not callable(when):
        raise TypeError(f"when must be callable, not {when!r}")
    probability = given.get("probability", 1.0)
    if isinstance(probability, bool) or not isinstance(probability, (int, float)):
        raise ValueError(f"probability must be a number above 0, up to 1, not {probability!r}")
    if not 0 < probability <= 1:
        raise ValueError(f"probability must be above 0, up to 1, not {probability!r}")
    found |= {
        "when": when,
        "probability": probability,
        "every": bool(given.get("every")),
        "jumps": bool(given.get("jumps")),
    }
    return found


def _checked_range(span: object) -> tuple[int, int]:
    if not isinstance(span, tuple) or len(span) != 2:
        raise ValueError(
            f"range must be a tuple of the first byte and the byte after the last, not {span!r}"
        )
    begin = whole("range", span[0], least=0)
    end = whole("range", span[1], least=1)
    if begin >= end:
        raise ValueError(f"range must not be empty: {begin} is not before {end}")
    return begin, end


def is_all(operations: Operations) -> bool:
    """Whether they are whatever the target takes."""
    return ALL in ((operations,) if isinstance(operations, str) else tuple(operations))
