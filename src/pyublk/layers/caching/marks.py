# SPDX-License-Identifier: MIT
"""The regions of a disk in which a cache's file and the target below may differ: on disk before
they do.

A cache has the same bytes in two places, and a power cut may leave a write in only one of them.
So a region (1 MiB) is marked, and the mark is durable, before the first write to it. What a mark
costs is one fdatasync for each region that is written to; regions stay marked for a while, so that
writes to the same place pay it once, and writes that come together share one.

A mark too many is harmless: the region is drained, or dropped, once more. So marks are taken off in
memory at once, and on disk at some later time. A page that is torn holds some old marks and some
new ones; none of those that were durable is missing from either.
"""

import os
import struct
import threading
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path

from pyublk.files import sync_directory, write_all

#: Bytes of a disk that one mark is for, unless its blocks are larger.
REGION = 1 << 20

_MAGIC = b"pyublk marks 1\n\0"
_HEADER = struct.Struct("<16sQQ16s")  # magic, size, region, for what
_ROOM = 4096  # of the header, and bytes that are written at once


class Marks:
    """The marks of one disk, in a file of their own.

    Args:
        path: the file; made when it is not there.
        size: of the disk, in bytes.
        region: bytes that one mark is for.
        purpose: a word that says what is done with marks that are left; that of a file which has
            marks stays as it is until they are taken off.
    """

    def __init__(self, path: Path, *, size: int, region: int, purpose: str) -> None:
        self.path = path
        self.region = region
        #: What the marks in the file are for.
        self.purpose = purpose
        self._size = size
        self._count = -(-size // region)
        self._changed = threading.Condition()
        self._wanted = bytearray(-(-self._count // 8))
        self._stale: set[int] = set()  # pages that are not on disk as they are wanted
        self._writing = False
        self._held: Counter[int] = Counter()
        self._recent: set[int] = set()
        self._fd = self._open()
        self._durable = bytearray(self._wanted)
        if not len(self):
            self.use_for(purpose)

    def _open(self) -> int:
        if not self.path.exists():
            self._make()
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            whole = os.pread(fd, _ROOM + len(self._wanted), 0)
            self._check(whole[: _HEADER.size], whole[_HEADER.size : _HEADER.size + 4])
            if len(whole) != _ROOM + len(self._wanted):
                raise ValueError(f"{self.path} is damaged: it is too short")
            self._wanted[:] = whole[_ROOM:]
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _check(self, header: bytes, checksum: bytes) -> None:
        if len(checksum) < 4 or struct.pack("<I", zlib.crc32(header)) != checksum:
            raise ValueError(f"{self.path} is damaged: it does not begin as such a file does")
        magic, size, region, word = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise ValueError(f"{self.path} is damaged: it does not begin as such a file does")
        if (size, region) != (self._size, self.region):
            raise ValueError(
                f"{self.path} is of another disk: of {size} bytes in regions of {region}"
            )
        self.purpose = word.rstrip(b"\0").decode()

    def _header(self) -> bytes:
        header = _HEADER.pack(_MAGIC, self._size, self.region, self.purpose.encode())
        return header + struct.pack("<I", zlib.crc32(header))

    def _make(self) -> None:
        draft = self.path.with_name(f".{self.path.name}.draft")
        with open(draft, "wb") as file:
            file.write(self._header().ljust(_ROOM, b"\0"))
            file.truncate(_ROOM + len(self._wanted))
            file.flush()
            os.fsync(file.fileno())
        os.rename(draft, self.path)
        sync_directory(self.path.parent)

    def use_for(self, purpose: str) -> None:
        """The marks that are made from now on are for that. There are none now."""
        assert not len(self)
        self.write()
        if self.purpose != purpose:
            self.purpose = purpose
            write_all(self._fd, self._header(), 0)  # durable with the next mark

    # ---- looking ----

    def marked(self) -> list[int]:
        """The regions that have a mark, in order."""
        with self._changed:
            return [region for region in range(self._count) if _has(self._wanted, region)]

    def __len__(self) -> int:
        with self._changed:
            return int.from_bytes(self._wanted, "little").bit_count()

    # ---- marking ----

    def enter(self, offset: int, length: int) -> None:
        """Somebody writes to these bytes from now on: their regions are marked, durably, and stay
        so until `leave`. Raises OSError when they cannot be; then nothing may be written."""
        regions = self._regions(offset, length)
        with self._changed:
            self._held.update(regions)
            self._recent.update(regions)
        try:
            self._mark(regions)
        except BaseException:
            self.leave(offset, length)
            raise

    def leave(self, offset: int, length: int) -> None:
        """Ends what `enter` began."""
        with self._changed:
            for region in self._regions(offset, length):
                self._held[region] -= 1
                if not self._held[region]:
                    del self._held[region]

    def _regions(self, offset: int, length: int) -> range:
        return range(offset // self.region, -(-(offset + length) // self.region))

    def _mark(self, regions: range) -> None:
        with self._changed:
            for region in regions:
                if not _has(self._wanted, region):
                    self._set(region, on=True)
            while not all(_has(self._durable, region) for region in regions):
                if self._writing:
                    self._changed.wait()
                else:
                    self._write()

    def _set(self, region: int, *, on: bool) -> None:
        bit = 1 << region % 8
        if on:
            self._wanted[region // 8] |= bit
        else:
            self._wanted[region // 8] &= ~bit
            self._durable[region // 8] &= ~bit
        self._stale.add(region // 8 // _ROOM)

    def _write(self) -> None:
        """Writes the pages that changed. Called with the lock, which is open meanwhile."""
        pages = {
            page: bytes(self._wanted[page * _ROOM : (page + 1) * _ROOM]) for page in self._stale
        }
        self._stale.clear()
        self._writing = True
        self._changed.release()
        try:
            for page, bits in pages.items():
                write_all(self._fd, bits, _ROOM + page * _ROOM)
            os.fdatasync(self._fd)
        except BaseException:
            self._changed.acquire()
            self._stale.update(pages)
            raise
        else:
            self._changed.acquire()
            for page, bits in pages.items():
                for at, byte in enumerate(bits, page * _ROOM):
                    self._durable[at] = byte & self._wanted[at]
        finally:
            self._writing = False
            self._changed.notify_all()

    # ---- taking marks off ----

    def quiet(self) -> set[int]:
        """The marked regions that nobody has written to since the last call. `clear` takes those
        among them that nobody writes to until then."""
        with self._changed:
            recent, self._recent = self._recent, set()
            busy = recent | self._held.keys()
        return set(self.marked()) - busy

    def clear(self, regions: set[int]) -> int:
        """Takes the marks off that are still `quiet`, and returns how many; on disk they go with
        the next one that is made, or by `write`."""
        with self._changed:
            gone = regions - self._recent - self._held.keys()
            for region in gone:
                self._set(region, on=False)
            return len(gone)

    def write(self) -> None:
        """Makes the file say what is marked. Raises OSError."""
        with self._changed:
            while self._writing:
                self._changed.wait()
            if self._stale:
                self._write()

    def close(self) -> None:
        """Leaves the file as it should be, if it can be written."""
        with suppress(OSError):
            self.write()
        os.close(self._fd)


def _has(bits: bytearray, number: int) -> bool:
    return bool(bits[number // 8] >> number % 8 & 1)
