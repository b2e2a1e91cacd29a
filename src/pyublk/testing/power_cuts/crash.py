# SPDX-License-Identifier: MIT
"""A disk as a power cut left it."""

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pyublk.target import Target
from pyublk.testing.disk import Disk
from pyublk.testing.power_cuts.filesystems import extracted, mounted
from pyublk.testing.power_cuts.record import CHUNK, Write
from pyublk.testing.power_cuts.states import Choices, Point, name_of

T = TypeVar("T")

#: The most requests that an explanation names.
NAMED = 20
#: Bytes that are copied at once into an image.
PIECE = 1 << 20


class Recorded(Protocol):
    """What a crash needs of the `PowerCut` that it is of."""

    @property
    def size(self) -> int: ...

    block_size: int
    unit: int

    def crashed(self, crash: "Crash") -> Target: ...
    def hold(self) -> None: ...
    def let_go(self) -> None: ...


class Crash:
    """A disk that a power cut could leave; from `PowerCut.crashes`.

    `id` names it: `cut.crash(id)` makes it again. `marks` are the names of the marks that had been
    reached before the cut, in their order. `time` is the event of the record after which it was.
    """

    def __init__(self, cut: Recorded, point: Point, choices: Choices, name: str = "") -> None:
        self._cut = cut
        self._point = point
        self._choices = choices
        self._name = name
        self.marks = point.marks
        self.time = point.time

    @property
    def id(self) -> str:
        """Its name."""
        if not self._name:
            self._name = name_of(self._point, self._choices)
        return self._name

    def __repr__(self) -> str:
        return f"<Crash {self.id}>"

    # ---- what it is ----

    def reached(self, mark: str) -> bool:
        """Whether the application had set this mark before the cut."""
        return mark in self.marks

    def allowed(self, after: Mapping[str, Collection[T]], before: Collection[T]) -> Collection[T]:
        """Which values may be found: those for the last mark of `after` that had been reached, or
        `before` when none had."""
        return next((after[mark] for mark in reversed(self.marks) if mark in after), before)

    def explain(self) -> str:
        """What was lost, in words: a line for each request."""
        point = self._point
        marks = ", ".join(map(repr, self.marks[-3:]))
        reached = f"after the mark {self.marks[-1]!r}" if marks else "before any mark"
        lines = [f"power cut {self.id}, {reached}"]
        lost: dict[int, list[int]] = {}
        for number, unit in point.lost(self._choices):
            lost.setdefault(number, []).append(unit)
        for write in point.writes:
            if (units := lost.get(write.number)) is None:
                continue
            if len(units) == len(point.places(write)):
                lines.append(f"lost: {write}")
            else:
                lines.append(f"torn: {write}: without {self._extents(units)}")
        if len(lines) > NAMED + 1:
            lines[NAMED + 1 :] = [f"lost: {len(lines) - NAMED - 1} more requests"]
        garbled = [u for u, one in zip(point.units, self._choices, strict=True) if one < 0]
        if garbled:
            lines.append(f"garbage: {self._extents(garbled)}")
        if not lost:
            lines.append("nothing is lost")
        elif kept := len(point.writes) - len(lost):
            lines.append(f"kept: {kept} other requests that were not flushed")
        return "\n".join(lines)

    def _extents(self, units: Iterable[int]) -> str:
        size = self._point.record.unit
        extents = [Write.extent(first * size, count * size) for first, count in runs(units)]
        more = f" and {len(extents) - NAMED} more" if len(extents) > NAMED else ""
        return ", ".join(extents[:NAMED]) + more

    # ---- using it ----

    def target(self) -> Target:
        """The disk, as a target to serve: each call makes another one, and what is written to it is
        written to that one only."""
        return self._cut.crashed(self)

    def disk(self, **options: Any) -> Disk:
        """The disk without a kernel; `options` are those of `Disk`."""
        return Disk(self.target(), **options)

    def mounted(
        self, file_system: str | None = None, *, options: str = ""
    ) -> AbstractContextManager[Path]:
        """The disk as a device of the kernel, its file system mounted and checked: ``with
        crash.mounted() as path``. Needs root.

        ext4, xfs and btrfs are mounted, which replays their journal; at the end of the block they
        are unmounted, and their own tool must find nothing, also when the block has failed. vfat
        has no journal: its tool repairs it first, and must be able to.

        Args:
            file_system: "ext4", "xfs", "btrfs" or "vfat"; by default, the one that is there.
            options: of mount(8), such as "noatime,data=journal".

        Raises CheckFailed when the tool finds a fault, or it cannot be mounted; ValueError for
        another file system.
        """
        return mounted(self.target(), file_system, options)

    def extracted(self) -> AbstractContextManager[Path]:
        """The files of an ext4 file system, copied out into a directory: ``with crash.extracted()
        as path``. Needs e2fsprogs, but no kernel, and root only for the owners of files.

        e2fsck replays the journal, and must be able to bring the file system in order by itself.
        Raises CheckFailed when it is not.
        """
        return extracted(self.write_image)

    def write_image(self, path: Path | str) -> None:
        """Writes the disk into a file, sparse where it is zero."""
        size, zeroes = self._cut.size, bytes(PIECE)
        with self.disk() as disk, open(path, "wb") as file:
            for offset in range(0, size, PIECE):
                data = disk.pread(min(PIECE, size - offset), offset)
                if data != zeroes[: len(data)]:
                    file.seek(offset)
                    file.write(data)
            file.truncate(size)

    # ---- for the target, and to shrink it ----

    def read(self, offset: int, buffer: memoryview) -> None:
        """What the cut left there."""
        record = self._point.record
        record.read_before(offset, buffer)
        size, end = record.unit, offset + len(buffer)
        for unit in range(offset // size, (end - 1) // size + 1):
            if unit in record.changes:
                content = self._point.content(unit, self._choices)
                start, stop = max(offset, unit * size), min(end, unit * size + len(content))
                inside = content[start - unit * size : stop - unit * size]
                buffer[start - offset : stop - offset] = inside

    @property
    def state(self) -> tuple[Point, Choices]:
        """The moment, and what each unit that was not stable then has."""
        return self._point, self._choices

    @property
    def cut(self) -> Recorded:
        """The disk that it is of."""
        return self._cut


def runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(first, how many) of whole numbers in a row; they must be sorted."""
    for _, run in itertools.groupby(enumerate(numbers), lambda one: one[1] - one[0]):
        members = [number for _, number in run]
        yield members[0], len(members)


class CrashedDisk(Target):
    """The disk after a crash. What is written is kept in memory, beside what the cut left."""

    def __init__(self, crash: Crash) -> None:
        cut = crash.cut
        super().__init__(
            size=cut.size, block_size=cut.block_size, physical_block_size=cut.unit, io_min=cut.unit
        )
        self._crash = crash
        self._written: dict[int, bytearray] = {}

    def open(self) -> None:
        self._crash.cut.hold()

    def close(self) -> None:
        self._crash.cut.let_go()

    def read(self, offset: int, buffer: memoryview) -> None:
        self._crash.read(offset, buffer)
        end = offset + len(buffer)
        for chunk in range(offset // CHUNK, (end - 1) // CHUNK + 1):
            if (written := self._written.get(chunk)) is not None:
                start, stop = max(offset, chunk * CHUNK), min(end, (chunk + 1) * CHUNK)
                inside = written[start - chunk * CHUNK : stop - chunk * CHUNK]
                buffer[start - offset : stop - offset] = inside

    def write(self, offset: int, data: memoryview | bytes) -> None:
        end = offset + len(data)
        for chunk in range(offset // CHUNK, (end - 1) // CHUNK + 1):
            start, stop = max(offset, chunk * CHUNK), min(end, (chunk + 1) * CHUNK)
            if (written := self._written.get(chunk)) is None:
                written = bytearray(min(CHUNK, self.size - chunk * CHUNK))
                if stop - start < len(written):
                    self._crash.read(chunk * CHUNK, memoryview(written))
                self._written[chunk] = written
            written[start - chunk * CHUNK : stop - chunk * CHUNK] = data[
                start - offset : stop - offset
            ]

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        for start in range(offset, offset + length, PIECE):
            piece = bytearray(min(PIECE, offset + length - start))
            self.read(start, memoryview(piece))
            if piece.count(0) < len(piece):  # else a new disk that is discarded would be in memory
                self.write(start, bytes(len(piece)))

    def discard(self, offset: int, length: int) -> None:
        self.write_zeroes(offset, length, True)
