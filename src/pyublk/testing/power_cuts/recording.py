# SPDX-License-Identifier: MIT
"""What every disk with a volatile write cache has that records what is done to it: the states, and
the checks of them."""

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pyublk.arguments import whole
from pyublk.errors import InvalidTarget
from pyublk.layers import Layer
from pyublk.target import Target
from pyublk.testing.power_cuts.checks import Check, PowerCutFailed, checker, failure_of, shrink
from pyublk.testing.power_cuts.crash import Crash, CrashedDisk, runs
from pyublk.testing.power_cuts.record import Record, Write
from pyublk.testing.power_cuts.saved import save
from pyublk.testing.power_cuts.states import Point, read_name, unique_states

#: How often a check is called at most, to find the smallest loss at which it fails.
TRIES = 200


@dataclass(frozen=True, slots=True)
class Volatile:
    """What is not durable: `ranges` of the disk as (offset, length) in bytes, and the `writes` (of
    which there may be more than one for a range)."""

    ranges: tuple[tuple[int, int], ...]
    writes: tuple[Write, ...]

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def __str__(self) -> str:
        if not self.writes:
            return "everything is durable"
        return "not durable: " + "; ".join(map(str, self.writes))


class Recording(Layer):
    """The base of `PowerCut` and `ZonedPowerCut`, which know how requests reach the disk below."""

    recoverable = False
    #: Bytes that a power cut leaves whole.
    unit: int

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._made: Record | None = None
        self._windows: list[tuple[int, int | None]] = []
        self._failing: list[tuple[int, bool]] = []
        self._users = 0
        self._lock = threading.Lock()

    # ---- as a target ----

    def hold(self) -> None:
        """Opens the target below, if it is not open for somebody already."""
        with self._lock:
            if self._users == 0:
                self._open_below()
            self._users += 1

    def let_go(self) -> None:
        """Closes it when it was the last one."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._close_below()

    def _open_below(self) -> None:
        self.below.open()

    def _close_below(self) -> None:
        self.below.close()

    def open(self) -> None:
        self.hold()
        if self._made is not None:
            return
        try:
            if self.below.target.profile().read_only:
                raise InvalidTarget("a PowerCut of a read-only target would have nothing to record")
            self._made = self._new_record()
        except BaseException:
            self.let_go()
            raise

    def close(self) -> None:
        self.let_go()

    def resize(self, size: int, update: Callable[[int], None]) -> None:
        raise ValueError("the size of a PowerCut cannot be changed: make another one")

    @contextmanager
    def _flushing(self) -> Iterator[None]:
        """Around a flush of the disk below, which fails if the test has asked for it."""
        with self._lock:
            error, forget = self._failing.pop(0) if self._failing else (0, False)
        with self._record.flushing(forget=forget):
            if error:
                raise OSError(error, f"{os.strerror(error)} (fail_flush_once)")
            yield

    # ---- what is recorded, and what may be left of it ----

    def _new_record(self) -> Record:
        raise NotImplementedError

    def _new_point(self, time: int) -> Point:
        return Point(self._record, time)

    def crashed(self, crash: Crash) -> Target:
        """The disk after this crash, as a target."""
        return CrashedDisk(crash)

    def _about(self) -> dict[str, Any]:
        """What a saved record says of the disk."""
        return {"block_size": self.block_size, "unit": self.unit}

    # ---- while it is used ----

    @property
    def _record(self) -> Record:
        if self._made is None:
            raise ValueError("nothing is recorded yet: serve the PowerCut first")
        return self._made

    def mark(self, name: str) -> None:
        """The application has got so far: `Crash.marks` has this name when the cut was later."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be a text, not {name!r}")
        self._record.mark(name)

    @contextmanager
    def record(self) -> Iterator[Self]:
        """``with cut.record():``: cuts happen only in here, as when what came before is not the
        test's. What was not flushed then may be lost even so."""
        start = self._made.now if self._made is not None else 0
        self._windows.append((start, None))
        try:
            yield self
        finally:
            self._windows[self._windows.index((start, None))] = (start, self._record.now)

    def _fail_next_flush(self, error: int, *, forget: bool) -> None:
        if error not in errno.errorcode:
            raise ValueError(f"error must be an errno value such as errno.EIO, not {error!r}")
        self._failing.append((error, forget))

    def volatile(self) -> Volatile:
        """What would not certainly survive a power cut now."""
        record = self._record
        with record.lock:
            point = self._new_point(record.now)
        ranges = tuple((first * self.unit, many * self.unit) for first, many in runs(point.units))
        return Volatile(ranges, tuple(point.writes))

    def cut(self, keep: Iterable[int] = ()) -> Crash:
        """The disk after a cut now; of what is not durable it has only the requests with these
        numbers, as `volatile` has them. Raises ValueError for one that is not there."""
        point = self._point(self._record.now)
        kept = set(keep)
        if unknown := kept - {write.number for write in point.writes}:
            raise ValueError(f"request {min(unknown)} is durable, or was never made")
        lost = [piece for piece in point.lost(point.all_lost) if piece[0] not in kept]
        return Crash(self, point, point.without(lost))

    # ---- after it ----

    def _point(self, time: int) -> Point:
        record = self._record
        if time > record.now:
            raise ValueError(f"the record has {record.now} events, so no cut was after {time}")
        with record.lock:
            return self._new_point(time)

    def _points(self) -> list[Point]:
        """Around each end of a flush or a FUA write, at each mark, and at the end."""
        record = self._record
        with record.lock:
            ends = [one.completed for one in record.flushes if one.completed is not None]
            ends += [one.stable for one in record.writes if one.fua and one.stable is not None]
            times = {time for end in ends for time in (end - 1, end, end + 1)}
            times |= {mark.time for mark in record.marks}
            wanted: set[int] = set()
            for start, stop in self._windows or [(0, None)]:
                last = record.now if stop is None else stop
                wanted |= {time for time in times if start <= time <= last} | {last}
            return [self._point(time) for time in sorted(wanted)]

    def crashes(self, limit: int = 500, seed: int = 0) -> Iterator[Crash]:
        """The disks that may be left, at most `limit` of them, no two alike.

        Those that tell most come first: everything lost that could be, everything kept, each prefix
        in the order of arrival, each request lost or kept by itself, each torn; then random ones,
        which follow from `seed`. When there are at most `limit`, they are all there.
        """
        whole("limit", limit, least=1)
        record = self._record
        for point, choices, name in unique_states(record, self._points(), limit, seed):
            yield Crash(self, point, choices, name)

    def crash(self, id: str) -> Crash:
        """The state with that `Crash.id`, of this record, or of one with the same requests. Raises
        ValueError for an id that names none."""
        return Crash(self, *read_name(id, self._point))

    def check(self, check: Check = None, *, limit: int = 500, seed: int = 0) -> int:
        """Tries every state of `crashes`; returns how many there were.

        `check` is a function of a `Crash`, which raises or returns False when the disk is not as it
        must be; a command in which {path} (where the file system is mounted), {device} or {image}
        (a file with the content) is filled in, and that must exit with 0; or None: the file system
        can be mounted, and its own tool finds no fault.

        Raises PowerCutFailed for the first state that fails, with the smallest loss that does
        (`shrink`); ValueError when nothing was written, so that nothing would be tried.
        """
        __tracebackhide__ = True  # pytest shows the check that failed, not this
        if not self._record.writes:
            raise ValueError("nothing was written, so there is nothing to check")
        call = checker(check)
        number = 0
        for number, crash in enumerate(self.crashes(limit, seed), start=1):
            if (reason := failure_of(call, crash)) is not None:
                small, why = shrink(crash, check, TRIES)
                raise PowerCutFailed(small, crash, number, why or reason) from (why or reason)
        return number

    def shrink(self, crash: Crash, check: Check, *, tries: int = TRIES) -> Crash:
        """The same cut with a smaller loss, at which `check` fails still: none of what is lost can
        be kept without its passing. `tries`: how often it calls the check at most."""
        return shrink(crash, check, tries)[0]

    def save(self, path: Path | str) -> None:
        """Saves the record into a file, so that `load` has the same crashes, by the same ids, also
        on a machine that has no kernel with ublk."""
        windows = [[start, stop] for start, stop in self._windows]
        self.hold()
        try:
            save(path, self._record, self._about() | {"windows": windows})
        finally:
            self.let_go()
