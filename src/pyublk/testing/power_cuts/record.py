# SPDX-License-Identifier: MIT
"""What was done to a disk with a volatile write cache, and what of it is stable since when."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from pyublk.sizes import format_size

#: The last two are of zones.
Kind = Literal["write", "discard", "write_zeroes", "reset", "finish"]

#: Bytes of the pieces in which the content from before the record is kept.
CHUNK = 4096
#: Bytes that are read at once of what is about to be discarded.
PIECE = 1 << 20


@dataclass(eq=False, slots=True, kw_only=True)
class Write:
    """A write, discard or write-zeroes request, or the reset or the finish of a zone.

    `number` counts the requests of the record from 1; flushes count too. `offset` and `length` are
    bytes; `data` is None where zeroes are written. `arrived`, `completed` and `stable` are times of
    the record: its events, counted; None: not yet, or never. `forgotten`: a flush failed and lost
    it, so that no later flush makes it stable. `refused`: the disk did not do it.
    """

    number: int
    kind: Kind
    offset: int
    length: int
    data: bytes | None
    fua: bool
    arrived: int
    completed: int | None = None
    stable: int | None = None
    forgotten: bool = False
    refused: bool = False
    units: Sequence[int] = ()
    places: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.kind} {self.number}, {self.extent(self.offset, self.length)}"

    @staticmethod
    def extent(offset: int, length: int) -> str:
        """Some bytes of the disk, in words."""
        size = format_size(length).replace("KiB", " KiB").replace("MiB", " MiB")
        return f"{size if ' ' in size else size + ' bytes'} at {offset:#x}"


@dataclass(eq=False, slots=True, kw_only=True)
class Flush:
    """A flush request. `failed`: it was answered by an error, and made nothing stable."""

    number: int
    arrived: int
    completed: int | None = None
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """What the application said at a time of the record."""

    name: str
    time: int


class Record:
    """Every request in the order of arrival, and the versions that each unit has had.

    A unit is what a power cut leaves whole: `unit` bytes, one block or several. Version 0 is its
    content before the record, version k that after the first k requests that changed it.

    A request that overlaps one that is not completed waits for that one: the order of arrival is
    the order in which a unit was changed.
    """

    def __init__(self, size: int, unit: int, read: Callable[[int, memoryview], object]) -> None:
        self.size = size
        self.unit = unit
        self.now = 0
        self.writes: list[Write] = []
        self.flushes: list[Flush] = []
        self.marks: list[Mark] = []
        #: The requests that changed each unit.
        self.changes: dict[int, list[Write]] = {}
        self._read = read
        self._before: dict[int, bytes] = {}
        self._pending: dict[int, Write] = {}  # by number: not stable yet
        self._in_flight: list[Write] = []
        self._hashes: dict[tuple[int, int], int] = {}
        self._requests = 0
        self.lock = threading.Condition(threading.RLock())

    # ---- recording ----

    def _tick(self) -> int:
        self.now += 1
        return self.now

    def _number(self) -> int:
        self._requests += 1
        return self._requests

    @contextmanager
    def writing(
        self, kind: Kind, offset: int, length: int, data: bytes | None, *, fua: bool = False
    ) -> Iterator[Write]:
        """Around what does it to the disk itself. One that raises may have been done or not, unless
        it is marked as `refused`."""
        with self.lock:
            self.lock.wait_for(lambda: not self._busy(offset, offset + length))
            write = Write(
                number=self._number(),
                kind=kind,
                offset=offset,
                length=length,
                data=data,
                fua=fua,
                arrived=self._tick(),
            )
            self._add(write)
            self._in_flight.append(write)
        done = False
        try:
            yield write
            done = True
        finally:
            with self.lock:
                self._in_flight.remove(write)
                if done:
                    write.completed = self._tick()
                if done and fua:
                    self._settle_fua(write, self.now)
                if write.refused:
                    self._drop(write)
                self.lock.notify_all()

    def _add(self, write: Write) -> None:
        write.units = self._keep_before(write.offset, write.length, zeroes=write.data is None)
        for unit in write.units:
            changes = self.changes.setdefault(unit, [])
            changes.append(write)
            write.places.append(len(changes))
        self.writes.append(write)
        if write.stable is None:
            self._pending[write.number] = write

    def _drop(self, write: Write) -> None:
        """It is as if it had never come; no later one has changed the same."""
        self.writes.remove(write)
        self._pending.pop(write.number, None)
        for unit, version in zip(write.units, write.places, strict=True):
            self._hashes.pop((unit, version), None)
            self.changes[unit].pop()
            if not self.changes[unit]:
                del self.changes[unit]

    def restore(self, write: Write) -> None:
        """One of another record, whose times are those of this one; before it is done again."""
        with self.lock:
            self._requests = write.number
            self._add(write)

    def _busy(self, start: int, end: int) -> bool:
        """Whether a request is in flight that changes some of it."""
        return any(one.offset < end and start < one.offset + one.length for one in self._in_flight)

    @contextmanager
    def flushing(self, *, forget: bool = False) -> Iterator[None]:
        """Around a flush of the disk itself; it makes nothing stable when that raises. `forget`: it
        then loses what it should have made stable."""
        with self.lock:
            flush = Flush(number=self._number(), arrived=self._tick())
            self.flushes.append(flush)
            covered = [one for one in self._pending.values() if one.completed and not one.forgotten]
        try:
            yield
        except BaseException:
            flush.failed = True
            raise
        finally:
            with self.lock:
                flush.completed = self._tick()
                for write in covered:
                    if not flush.failed:
                        self._settle(write, flush.completed)
                    elif forget:
                        write.forgotten = True

    def _settle(self, write: Write, time: int) -> None:
        if write.stable is None and not write.forgotten:
            write.stable = time
            del self._pending[write.number]

    def _settle_fua(self, write: Write, time: int) -> None:
        """What a FUA write makes stable: itself."""
        self._settle(write, time)

    def mark(self, name: str) -> None:
        with self.lock:
            self.marks.append(Mark(name, self._tick()))

    def _keep_before(self, offset: int, length: int, *, zeroes: bool) -> Sequence[int]:
        """Keeps what is about to be changed for the first time; returns the units that change.

        Zeroes change nothing where there were none but zeroes before, as on a new disk that is
        discarded as a whole.
        """
        first, last = offset // self.unit, (offset + length - 1) // self.unit
        if not zeroes:
            self._keep(offset, length)
            return range(first, last + 1)
        units: list[int] = []
        for start in range(offset, offset + length, PIECE):
            size = min(PIECE, offset + length - start)
            known = self._before_of(start, size)
            blank = known.count(0) == size  # any(known) would make an object of each byte
            if not blank:
                self._keep(start, size)
            for unit in range(start // self.unit, (start + size - 1) // self.unit + 1):
                at = max(unit * self.unit - start, 0)
                end = min((unit + 1) * self.unit - start, size)
                if unit in self.changes or (not blank and known.count(0, at, end) < end - at):
                    units.append(unit)
        return list(dict.fromkeys(units))

    def _keep(self, offset: int, length: int) -> None:
        """In whole chunks, those of whole units."""
        step = max(CHUNK, self.unit)
        chunks = range(offset // step, (offset + length - 1) // step + 1)
        if all(chunk in self._before for chunk in chunks):
            return
        start = chunks[0] * step
        content = self._before_of(start, min(len(chunks) * step, self.size - start))
        for index, chunk in enumerate(chunks):
            self._before.setdefault(chunk, bytes(content[index * step : (index + 1) * step]))

    # ---- what was there ----

    def _before_of(self, offset: int, length: int) -> bytearray:
        content = bytearray(length)
        self.read_before(offset, memoryview(content))
        return content

    def read_before(self, offset: int, buffer: memoryview) -> None:
        """What was there before the record; any time of the record is a good one to ask."""
        step, end = max(CHUNK, self.unit), offset + len(buffer)
        chunks = range(offset // step, (end - 1) // step + 1)
        with self.lock:  # else a write could come between
            if any(chunk not in self._before for chunk in chunks):
                self._read(offset, buffer)
            for chunk in chunks:
                if (kept := self._before.get(chunk)) is not None:
                    start, stop = max(offset, chunk * step), min(end, chunk * step + len(kept))
                    buffer[start - offset : stop - offset] = kept[
                        start - chunk * step : stop - chunk * step
                    ]

    def content(self, unit: int, version: int) -> bytes:
        """A unit's bytes in one of its versions."""
        start = unit * self.unit
        length = min(self.unit, self.size - start)
        changes = self.changes[unit][:version]
        content = bytearray()
        for index in reversed(range(version)):  # the newest that covers all of it
            if changes[index].offset <= start and (
                start + length <= changes[index].offset + changes[index].length
            ):
                changes, content = changes[index:], bytearray(length)
                break
        else:
            content = self._before_of(start, length)
        for write in changes:
            first = max(start, write.offset)
            last = min(start + length, write.offset + write.length)
            piece = bytes(last - first)
            if write.data is not None:
                piece = write.data[first - write.offset : last - write.offset]
            content[first - start : last - start] = piece
        return bytes(content)

    def hash(self, unit: int, version: int) -> int:
        """Equal for equal contents of a unit; 0 for what was there before the record."""
        key = unit, version
        if (found := self._hashes.get(key)) is None:
            content = self.content(unit, version)
            if version == 0 or content == self.content(unit, 0):
                found = 0
            else:
                found = content_hash(unit, content)
            self._hashes[key] = found
        return found

    # ---- what is stable ----

    def stable_version(self, unit: int, time: int) -> int:
        """The newest version of a unit that is stable at that time."""
        changes = self.changes[unit]
        for version in range(len(changes), 0, -1):
            stable = changes[version - 1].stable
            if stable is not None and stable <= time:
                return version
        return 0

    def volatile(self, time: int) -> dict[int, list[Write]]:
        """The units that are not stable at that time, and the requests newer than the stable
        version of each."""
        found: dict[int, list[Write]] = {}
        for write in self.writes:
            if write.arrived > time:
                break
            if write.stable is not None and write.stable <= time:
                continue
            for unit in write.units:
                if unit not in found:
                    stable = self.stable_version(unit, time)
                    newer = self.changes[unit][stable:]
                    found[unit] = [one for one in newer if one.arrived <= time]
        return {unit: found[unit] for unit in sorted(found) if found[unit]}


def content_hash(unit: int, content: bytes) -> int:
    """A number to add up over units: the sums of two images differ when the images do."""
    digest = hashlib.blake2b(content, digest_size=16, salt=unit.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")
