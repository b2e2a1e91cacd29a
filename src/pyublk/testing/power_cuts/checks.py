# SPDX-License-Identifier: MIT
"""Checks of disks after a power cut, and the smallest loss at which one fails."""

import shlex
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TypeVar

from pyublk.device import Device
from pyublk.testing.file_systems import CheckFailed, run
from pyublk.testing.power_cuts.crash import Crash
from pyublk.testing.power_cuts.states import GARBAGE

T = TypeVar("T")

#: A function that raises, or returns False, when the disk is not as it must be; a command; or None:
#: the file system can be mounted, and its own tool finds no fault.
Check = Callable[[Crash], object] | str | Sequence[str] | None


class PowerCutFailed(CheckFailed):
    """What `PowerCut.check` raises. `crash` is the state with the smallest loss at which the check
    fails, `first` the one at which it was seen first."""

    def __init__(self, crash: Crash, first: Crash, number: int, reason: Exception) -> None:
        point, choices = crash.state
        also = ""
        if choices == point.all_kept:
            also = "it fails also when the disk loses nothing: was it written at all?\n"
        told = ": ".join(filter(None, [type(reason).__name__, str(reason)]))
        super().__init__(
            f"the check fails after a power cut (state {number}: {first.id}): {told}\n"
            f"{also}{crash.explain()}\n"
            f"the same state again: cut.crash({crash.id!r})"
        )
        self.crash = crash
        self.first = first


def checker(check: Check) -> Callable[[Crash], object]:
    """The check as a function. Raises ValueError for a command that never sees the disk."""
    if check is None:
        return _mount
    if callable(check):
        return check
    words = shlex.split(check) if isinstance(check, str) else list(check)
    if not any(place in word for word in words for place in ("{path}", "{device}", "{image}")):
        raise ValueError(
            f"the command {shlex.join(words)!r} must have {{path}} (of the mounted file system), "
            "{device} or {image} (a file) in it"
        )
    return lambda crash: _run_command(words, crash)


def _mount(crash: Crash) -> None:
    with crash.mounted():
        pass


def _run_command(words: Sequence[str], crash: Crash) -> None:
    def filled(name: str, value: object) -> list[str]:
        return [word.replace(name, str(value)) for word in words]

    if any("{path}" in word for word in words):
        with crash.mounted() as path:
            run(filled("{path}", path))
    elif any("{device}" in word for word in words):
        with Device(crash.target()) as device:
            run(filled("{device}", device.path))
    else:
        with tempfile.TemporaryDirectory(prefix="pyublk-") as directory:
            image = Path(directory, "disk.img")
            crash.write_image(image)
            run(filled("{image}", image))


def failure_of(check: Callable[[Crash], object], crash: Crash) -> Exception | None:
    """Why the check fails; None: it does not."""
    try:
        if check(crash) is False:
            return CheckFailed("the check returned False")
    except Exception as error:
        return error
    return None


def smallest(items: list[T], fails: Callable[[list[T]], bool]) -> list[T]:
    """A list at which it fails still, and no longer without any one of its items.

    Delta debugging (Zeller, Hildebrandt, 2002): drops ever smaller parts, as long as it fails.
    """
    parts = 2
    while items:
        size = -(-len(items) // parts)
        for start in range(0, len(items), size):
            fewer = items[:start] + items[start + size :]
            if fails(fewer):
                items, parts = fewer, max(parts - 1, 2)
                break
        else:
            if size == 1:
                break
            parts = min(2 * parts, len(items))
    return items


def shrink(crash: Crash, check: Check, tries: int) -> tuple[Crash, Exception | None]:
    """See `PowerCut.shrink`; also why the check fails there, or None where it was not smaller."""
    point, choices = crash.state
    call = checker(check)
    left = tries
    found, reason = crash, None

    def fails(lost: list[tuple[int, int]], garbled: Collection[int]) -> bool:
        """Whether the check fails when this is lost, which is then the smallest loss so far."""
        nonlocal left, found, reason
        left -= 1
        chosen = point.without(lost)
        for index in garbled:
            chosen[index] = GARBAGE
        tried = Crash(crash.cut, point, chosen)
        if left < 0 or (failure := failure_of(call, tried)) is None:
            return False
        found, reason = tried, failure
        return True

    # One try for the commonest mistake: what the program has never written fails without any loss.
    if choices == point.all_kept or fails([], []):
        return found, reason
    garbled = [index for index, one in enumerate(choices) if one == GARBAGE]
    lost = [piece for piece in point.lost(choices) if point.index[piece[1]] not in set(garbled)]
    garbled = smallest(garbled, lambda some: fails(lost, some))
    numbers = smallest(
        sorted({number for number, _ in lost}),
        lambda some: fails([piece for piece in lost if piece[0] in some], garbled),
    )
    lost = [piece for piece in lost if piece[0] in numbers]
    smallest(lost, lambda some: fails(some, garbled))
    return found, reason
