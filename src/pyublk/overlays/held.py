# SPDX-License-Identifier: MIT
"""An overlay that nobody else can have meanwhile: its map, its record, its base."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pyublk.backing import Backing
from pyublk.files import punch_hole, read_into, write_all
from pyublk.layers.identity import Identity, settle
from pyublk.layers.mapfile import MapFile
from pyublk.layers.overlay_record import OverlayRecord
from pyublk.overlays.runs import Run, pieces, runs_of
from pyublk.targets.sources import from_text
from pyublk.testing import Disk

#: Bytes that are read or written at once.
PIECE = 1 << 20


def read_map(file: Path) -> tuple[MapFile, OverlayRecord]:
    """What an overlay's map has. Raises OSError or ValueError when it is none."""
    place = MapFile.path_of(file)
    if not place.exists():
        if not file.exists():
            raise FileNotFoundError(errno.ENOENT, f"{file} does not exist")
        raise FileNotFoundError(
            errno.ENOENT, f"{file} is not an overlay, or its map is lost: there is no {place}"
        )
    found = MapFile.read(file)
    return found, OverlayRecord.of(found.record, file)


@dataclass(slots=True)
class Held:
    """An overlay whose file is locked; `upper` is its open file."""

    file: Path
    upper: int
    map: MapFile
    record: OverlayRecord

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.map.size

    @property
    def granularity(self) -> int:
        """Bytes of a block."""
        return self.map.granularity

    def runs(self) -> Iterator[Run]:
        """What the overlay has itself."""
        return runs_of(self.map.bits, self.granularity, self.size)

    def read(self, offset: int, length: int) -> bytes:
        """What its file has there, which only counts where the map says so."""
        return _read_all(self.upper, offset, length, self.file)

    def extents(self) -> Iterator[tuple[int, int, bool]]:
        """The same as `runs`, in pieces that can be read at once; or long ones where the file has
        a hole, which reads as zeroes: then the last is False."""
        for offset, length in self.runs():
            end = offset + length
            while offset < end:
                data = min(_seek(self.upper, offset, os.SEEK_DATA, end), end)
                if offset < data:
                    yield offset, data - offset, False
                hole = min(_seek(self.upper, data, os.SEEK_HOLE, end), end)
                for at, size in pieces([(data, hole - data)], PIECE):
                    yield at, size, True
                offset = hole

    def write(self, offset: int, data: bytes) -> None:
        """Writes whole blocks into its file; sparse where they are zero, if the file system can."""
        if data.count(0) != len(data) or not punch_hole(self.upper, offset, len(data)):
            write_all(self.upper, data, offset)

    def replace_map(
        self, record: OverlayRecord, blocks: MapFile, *, below: int | None = None
    ) -> None:
        """The one moment at which an overlay changes: before it, it is the old one; after it, the
        new one, with these blocks. `below`: bytes of another base.

        What the map says to be in the file is durable there first, also what a server that was
        killed had written there and not synced.
        """
        os.fdatasync(self.upper)
        header = replace(self.map.header, record=record.metadata())
        if below is not None:
            header = replace(header, below_size=below)
        made = MapFile(header, blocks.bits)
        made.write(self.file)
        self.map, self.record = made, record

    def base(self) -> str:
        """The source of its base. Raises ValueError when none is on record."""
        if self.record.base is None:
            raise ValueError(
                f"{self.file} has no base on record, since it is used as a layer: give it one by "
                f"`pyublk overlay rebase --unsafe {self.file} BASE`"
            )
        return self.record.base


def beyond(below: int, granularity: int, size: int) -> list[Run]:
    """The blocks of a disk that a base of `below` bytes does not have to their ends. They are the
    overlay's own from the beginning."""
    first = below - below % granularity
    return [(first, size - first)] if below < size else []


def _seek(fd: int, offset: int, what: int, end: int) -> int:
    try:
        return os.lseek(fd, offset, what)
    except OSError as error:
        if error.errno != errno.ENXIO:  # there is no more data
            raise
        return end


@contextmanager
def held(file: Path, *, read_only: bool = False) -> Iterator[Held]:
    """An overlay that no disk, and no other command, has open for writing meanwhile.

    Raises OSError EBUSY naming who has it; ValueError when it is damaged, or is none.
    """
    read_map(file)  # tells better what is wrong than the lack of a file does
    if not file.exists():
        raise FileNotFoundError(
            errno.ENOENT, f"{file} is lost, and only its map, {MapFile.path_of(file)}, is there"
        )
    backing = Backing.open(file, read_only=read_only)
    try:
        backing.keep([(0, max(backing.size, 1))], read_only=read_only)
        found, record = read_map(file)  # by whoever had it before
        if backing.size < found.size:
            raise ValueError(
                f"{file} was cut: it has {backing.size} bytes, and the disk has {found.size}"
            )
        yield Held(file, backing.fd, found, record)
    finally:
        backing.close()


@dataclass(slots=True)
class Base:
    """A base that is open, as a disk without a kernel."""

    disk: Disk
    identity: Identity

    @property
    def size(self) -> int:
        """Bytes."""
        return self.disk.size

    def read(self, offset: int, length: int) -> bytes:
        """Beyond its end there are zeroes."""
        inside = max(0, min(length, self.size - offset))
        found = self.disk.pread(inside, offset) if inside else b""
        return found + bytes(length - inside)


@contextmanager
def base_of(text: str, *, read_only: bool = True, settled: bool = False) -> Iterator[Base]:
    """A source, open; for writing, nobody else may have it. `settled`: its identity is to be put
    on record."""
    target = from_text(text, read_only=read_only)
    with Disk(target, max_io_size=PIECE) as disk:
        if settled:
            settle(target)
        yield Base(disk, Identity.of(target))


@contextmanager
def own_base(overlay: Held) -> Iterator[Base]:
    """The overlay's base, to be read. Raises BaseChanged when it is not what it was."""
    with base_of(overlay.base()) as base:
        overlay.record.check(base.identity, overlay.file)
        yield base


def _read_all(fd: int, offset: int, length: int, path: Path) -> bytes:
    found = bytearray(length)
    if (there := read_into(fd, found, offset)) < length:
        raise OSError(errno.EIO, f"{path} ends at {offset + there}: it was cut meanwhile")
    return bytes(found)
