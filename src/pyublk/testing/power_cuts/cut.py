# SPDX-License-Identifier: MIT
"""A disk with a volatile write cache that records what is done to it."""

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from pyublk.arguments import whole
from pyublk.engines import dispatch_of
from pyublk.errors import InvalidTarget
from pyublk.layers import Layer
from pyublk.methods import call_plain
from pyublk.profile import Profile
from pyublk.target import Target
from pyublk.targets.ram import Ram
from pyublk.testing.power_cuts.checks import Check, PowerCutFailed, checker, failure_of, shrink
from pyublk.testing.power_cuts.crash import Crash, runs
from pyublk.testing.power_cuts.log_writes import write_log
from pyublk.testing.power_cuts.record import Record, Write
from pyublk.testing.power_cuts.saved import Saved, save
from pyublk.testing.power_cuts.states import Point, read_name, unique_states

#: Bytes of the largest unit that a power cut leaves whole.
MAX_ATOMIC = 1 << 20


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


class PowerCut(Layer):
    """A disk with a volatile write cache, from which `crashes` makes the disks that may be left
    when the power is cut.

    Serve it as any target, on a `Device` or on a `Disk`. From the moment when it is opened, it
    records every request, when it arrived and when it was completed. A flush makes durable what was
    completed when it arrived, a FUA write itself; of all other writes, any block may be as it was
    before, or as it was written, whatever became of the others.

    ::

        cut = PowerCut(1 << 20)
        with Disk(cut) as disk:
            disk.pwrite(b"record".ljust(512), 4096)
            disk.flush()
            cut.mark("committed")
        for crash in cut.crashes():
            with crash.disk() as disk:
                if crash.reached("committed"):
                    assert disk.pread(6, 4096) == b"record"

    Args:
        target: bytes of a disk in memory, or a target of any kind that has plain methods, is
            native, or is mapped. Its content is the disk's; it is opened and closed with it, and
            must not be written otherwise.
        block_size: bytes; by default the target's, or 512.
        atomic: bytes that a power cut leaves whole, when they are aligned; by default a block. A
            unit of several blocks then has what was written to it in the order of arrival.
        garbage: a block that was being written may also have neither old nor new content.
    """

    recoverable = False

    def __init__(
        self,
        target: Target | int,
        *,
        block_size: int | None = None,
        atomic: int | None = None,
        garbage: bool = False,
    ) -> None:
        if isinstance(target, int):
            target = Ram(size=whole("size", target, least=512), block_size=block_size or 512)
        super().__init__(_recordable(target))
        block = whole("block_size", block_size or target.block_size, least=target.block_size)
        unit = whole("atomic", atomic or block, least=block)
        if unit & (unit - 1) or unit > MAX_ATOMIC:
            raise ValueError(f"atomic must be a power of two up to {MAX_ATOMIC} bytes, not {unit}")
        self.block_size = block
        #: Bytes that a power cut leaves whole.
        self.unit = unit
        self._garbage = garbage
        calls = self.below.methods
        if target.concurrency != "parallel":  # crashes are read while the disk is used
            lock = threading.Lock()
            calls = {name: _locked(call, lock) for name, call in calls.items()}
        self._calls = calls
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
                call_plain(self.below.target.open)
            self._users += 1

    def let_go(self) -> None:
        """Closes it when it was the last one."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                call_plain(super().close)

    def open(self) -> None:
        self.hold()
        if self._made is None:
            profile = self.below.target.profile()
            if profile.read_only:
                self.let_go()
                raise InvalidTarget("a PowerCut of a read-only target would have nothing to record")
            self._made = Record(profile.size, self.unit, self.read)

    def close(self) -> None:
        self.let_go()

    def resize(self, size: int, update: Any) -> None:
        raise ValueError("the size of a PowerCut cannot be changed: make another one")

    def announces(self, method: str) -> bool:
        if method in ("discard", "write_zeroes"):
            return self.below.target.announces(method)
        return super().announces(method)

    def profile(self) -> Profile:
        below = super().profile()
        return replace(
            below,
            block_size=self.block_size,
            physical_block_size=max(below.physical_block_size, self.block_size),
            io_min=max(below.io_min, self.block_size),
            discard_granularity=max(below.discard_granularity, self.block_size),
        )

    def read(self, offset: int, buffer: memoryview) -> None:
        self._calls["read"](offset, buffer)

    def write(self, offset: int, data: memoryview) -> None:
        with self._record.writing("write", offset, len(data), bytes(data)):
            self._calls["write"](offset, data)

    def write_fua(self, offset: int, data: memoryview) -> None:
        with self._record.writing("write", offset, len(data), bytes(data), fua=True):
            if "write_fua" in self._calls:
                self._calls["write_fua"](offset, data)
            else:
                self._calls["write"](offset, data)
                self._flush_below()

    def discard(self, offset: int, length: int) -> None:
        with self._record.writing("discard", offset, length, None):
            self._calls["discard"](offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        with self._record.writing("write_zeroes", offset, length, None):
            self._calls["write_zeroes"](offset, length, unmap)

    def flush(self) -> None:
        with self._lock:
            error, forget = self._failing.pop(0) if self._failing else (0, False)
        with self._record.flushing(forget=forget):
            if error:
                raise OSError(error, f"{os.strerror(error)} (fail_flush_once)")
            self._flush_below()

    def _flush_below(self) -> None:
        if "flush" in self._calls:
            self._calls["flush"]()

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

    def fail_flush_once(self, error: int = errno.EIO, *, forget: bool = True) -> None:
        """The next flush fails with that errno, those after it do not.

        With `forget`, what that flush should have made durable may be lost even after later flushes
        have succeeded, as when the kernel has marked pages clean that could not be written: an
        application that calls fsync again after an error loses data. Without, the next flush makes
        it durable.
        """
        if error not in errno.errorcode:
            raise ValueError(f"error must be an errno value such as errno.EIO, not {error!r}")
        self._failing.append((error, forget))

    def volatile(self) -> Volatile:
        """What would not certainly survive a power cut now."""
        record = self._record
        with record.lock:
            point = Point(record, record.now)
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
            return Point(record, time, garbage=self._garbage)

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
        if not self._record.writes:
            raise ValueError("nothing was written, so there is nothing to check")
        call = checker(check)
        number = 0
        for number, crash in enumerate(self.crashes(limit, seed), start=1):
            if (reason := failure_of(call, crash)) is not None:
                small = self.shrink(crash, check)
                reason = failure_of(call, small) or reason
                raise PowerCutFailed(small, crash, number, reason) from reason
        return number

    def shrink(self, crash: Crash, check: Check, *, tries: int = 200) -> Crash:
        """The same cut with a smaller loss, at which `check` fails still: none of what is lost can
        be kept without its passing. `tries`: how often it calls the check at most."""
        return shrink(crash, check, tries)

    def save(self, path: Path | str) -> None:
        """Saves the record into a file, so that `load` has the same crashes, by the same ids, also
        on a machine that has no kernel with ublk."""
        windows = [[start, stop] for start, stop in self._windows]
        about = {
            "block_size": self.block_size,
            "unit": self.unit,
            "garbage": self._garbage,
            "windows": windows,
        }
        self.hold()
        try:
            save(path, self._record, about)
        finally:
            self.let_go()

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """The PowerCut that was saved, in memory. Raises ValueError for another file."""
        with closing(Saved(path)) as saved:
            about = saved.about
            block, unit, garbage = about["block_size"], about["unit"], about["garbage"]
            cut = cls(about["size"], block_size=block, atomic=unit, garbage=garbage)
            cut.open()
            for offset, piece in saved.pieces():
                cut._calls["write"](offset, memoryview(piece))
            for write in saved.writes():
                cut._record.restore(write)
                data = bytes(write.length) if write.data is None else write.data
                cut._calls["write"](write.offset, memoryview(data))
            saved.restore_rest(cut._record)
            cut._windows = [(start, stop) for start, stop in about["windows"]]
            cut.close()
        return cut

    def write_log(self, path: Path | str) -> None:
        """Writes the record in the format of dm-log-writes, for the replay-log of xfstests.

        As in that, a write stands where the flush was completed that made it durable; those that
        never were stand at the end.
        """
        write_log(self._record, self.block_size, path)


def _locked(call: Callable[..., Any], lock: threading.Lock) -> Callable[..., Any]:
    def locked(*arguments: object) -> None:
        with lock:
            call(*arguments)

    return locked


def _recordable(target: Target) -> Target:
    kind = dispatch_of(target)
    if kind == "async" or callable(getattr(target, "handle", None)):
        what = "coroutines" if kind == "async" else "handle"
        raise InvalidTarget(
            f"{type(target).__name__} is served by {what}, and a PowerCut is a layer over targets "
            "with plain methods, native ones and mapped ones"
        )
    return target
