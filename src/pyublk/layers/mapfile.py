# SPDX-License-Identifier: MIT
"""The map beside an upper file: which of its blocks are there, and a record of whoever made it.

``FILE.map`` is a header of 8 KiB, then a bit for each block, the lowest bit of each byte first: bit
b of byte n is block 8n + b. It says what is durable.

``FILE.live`` is there while the disk is served: the same bits, as they are in memory. What a client
has written, and not flushed, is in no map yet; it outlives the server that is killed, so the bits
must as well. It does not outlive the machine, since the kernel may write these bits before the data
that they speak of. So they are believed only in the boot in which they were written.
"""

import json
import os
import secrets
import stat
import struct
import zlib
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from pyublk._native import FileMemory
from pyublk.files import draft_of, read_into, sync_directory, write_all

HEADER_BYTES = 8192
PAGE = 4096
SMALLEST_GRANULARITY = 4096
LARGEST_GRANULARITY = 1 << 30

_MAGIC = b"pyublkPM"
_LIVE_MAGIC = b"pyublkLV"
_VERSION = 1
#: Magic, version, header's bytes, disk's size, size of what is below, bytes of a block, bytes of
#: the record, serial number, checksum of the header with zeroes in its own place.
_HEADER = struct.Struct("<8sIIQQII16sI")
_LIVE = struct.Struct("<8sI16s16sQI")
#: Bytes of the longest record.
LONGEST_RECORD = HEADER_BYTES - _HEADER.size


class NotAMap(ValueError):
    """What lies in a map's place is none of ours, or is damaged; the message says what it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a map says of its disk: `size` and `granularity` (of a block) in bytes; `below_size` is
    how many bytes were below when it was made. `record` is what whoever made it wants to be kept,
    as JSON."""

    size: int
    granularity: int
    below_size: int
    record: dict[str, Any] = field(default_factory=dict)
    #: Of this map: what lies beside it is for it only.
    serial: bytes = field(default_factory=lambda: secrets.token_bytes(16))

    @property
    def blocks(self) -> int:
        return -(-self.size // self.granularity)

    @property
    def map_bytes(self) -> int:
        """Bytes of all bits, which are whole pages."""
        return -(-self.blocks // (8 * PAGE)) * PAGE

    def packed(self) -> bytes:
        """Raises ValueError for a record that is too long."""
        record = json.dumps(self.record).encode()
        if len(record) > LONGEST_RECORD:
            raise ValueError(
                f"a map's record has at most {LONGEST_RECORD} bytes, and this one {len(record)}"
            )

        def fields(checksum: int) -> bytes:
            return (
                _HEADER.pack(
                    _MAGIC,
                    _VERSION,
                    HEADER_BYTES,
                    self.size,
                    self.below_size,
                    self.granularity,
                    len(record),
                    self.serial,
                    checksum,
                )
                + record
            ).ljust(HEADER_BYTES, b"\0")

        return fields(zlib.crc32(fields(0)))

    @classmethod
    def unpacked(cls, path: Path, packed: bytes) -> Self:
        """Raises NotAMap."""
        if len(packed) < HEADER_BYTES or not packed.startswith(_MAGIC):
            raise NotAMap(f"{path} is not the map of an overlay or a cache")
        _, version, _, size, below, granularity, length, serial, checksum = _HEADER.unpack_from(
            packed
        )
        if version != _VERSION:
            raise NotAMap(
                f"{path} is a map of version {version}, and this pyublk knows version {_VERSION}: "
                "use the pyublk that made it, or a newer one"
            )
        end = _HEADER.size
        plain = packed[: end - 4] + bytes(4) + packed[end:]
        if checksum != zlib.crc32(plain) or length > LONGEST_RECORD:
            raise NotAMap(f"{path} is damaged: its header has another checksum than it says")
        try:
            record = json.loads(packed[end : end + length])
            if not isinstance(record, dict):
                raise ValueError
        except ValueError:
            raise NotAMap(f"{path} is damaged: its record is not JSON") from None
        return cls(
            size=size, granularity=granularity, below_size=below, record=record, serial=serial
        )


def check_granularity(granularity: int) -> None:
    """Raises ValueError."""
    sizes = SMALLEST_GRANULARITY <= granularity <= LARGEST_GRANULARITY
    if not sizes or granularity & (granularity - 1):
        raise ValueError(
            f"granularity {granularity} is not a block's size: it is a power of two from "
            f"{SMALLEST_GRANULARITY} to {LARGEST_GRANULARITY} bytes"
        )


@dataclass(slots=True)
class MapFile:
    """A map that is read, or to be written, as a whole: its header and its `bits`."""

    header: Header
    bits: bytearray

    @staticmethod
    def path_of(file: Path) -> Path:
        """Where the map of an upper file is."""
        return file.with_name(file.name + ".map")

    @staticmethod
    def live_path_of(file: Path) -> Path:
        """Where the bits of a served disk are."""
        return file.with_name(file.name + ".live")

    @property
    def size(self) -> int:
        return self.header.size

    @property
    def granularity(self) -> int:
        return self.header.granularity

    @property
    def record(self) -> dict[str, Any]:
        return self.header.record

    @classmethod
    def new(
        cls,
        *,
        size: int,
        granularity: int = SMALLEST_GRANULARITY,
        below_size: int | None = None,
        record: dict[str, Any] | None = None,
    ) -> Self:
        """Of a disk of which only what is beyond the end of what is below is present: it is zero.
        A block in which that ends must be filled. Raises ValueError."""
        check_granularity(granularity)
        below_size = size if below_size is None else below_size
        header = Header(
            size=size, granularity=granularity, below_size=below_size, record=record or {}
        )
        header.packed()
        made = cls(header, bytearray(header.map_bytes))
        if below_size < size:
            made.set_present(below_size // granularity, header.blocks)
        return made

    def set_present(self, first: int, end: int) -> None:
        """The blocks from `first` up to `end`."""
        whole, last = min(-(-first // 8), end // 8), end // 8
        for block in [*range(first, min(whole * 8, end)), *range(max(last * 8, first), end)]:
            self.bits[block // 8] |= 1 << block % 8
        self.bits[whole:last] = b"\xff" * (last - whole)

    @classmethod
    def read_header(cls, file: Path) -> Header:
        """Of the map of an upper file. Raises OSError and NotAMap."""
        fd = open_map(cls.path_of(file), os.O_RDONLY)
        try:
            return Header.unpacked(cls.path_of(file), os.pread(fd, HEADER_BYTES, 0))
        finally:
            os.close(fd)

    @classmethod
    def read(cls, file: Path) -> Self:
        """The map of an upper file, which nobody serves now, with what a server that was killed
        left of it. Raises OSError and NotAMap."""
        found = cls.read_durable(file)
        live = read_live(file, found.header)
        return found if live is None else replace(found, bits=live)

    @classmethod
    def read_durable(cls, file: Path) -> Self:
        """As `read`, but only what outlives the machine."""
        path = cls.path_of(file)
        fd = open_map(path, os.O_RDONLY)
        try:
            header = Header.unpacked(path, os.pread(fd, HEADER_BYTES, 0))
            bits = bytearray(header.map_bytes)
            there = read_into(fd, bits, HEADER_BYTES)
        finally:
            os.close(fd)
        if there < len(bits):
            raise NotAMap(
                f"{path} is cut short: it has {HEADER_BYTES + there} bytes, and needs "
                f"{HEADER_BYTES + len(bits)}"
            )
        return cls(header, bits)

    def write(self, file: Path) -> None:
        """Puts the map in its place, durably, as a whole or not at all; `file` is not served. What
        a killed server left is in `bits` already, or is not wanted, and goes."""
        path = self.path_of(file)
        # Another serial number: the bits of a server that was killed are not for this map.
        self.header = replace(self.header, serial=secrets.token_bytes(16))
        os.close(put_map(path, self.header, self.bits, mode=stat.S_IMODE(os.stat(file).st_mode)))
        with suppress(FileNotFoundError):
            self.live_path_of(file).unlink()


def open_map(path: Path, flags: int) -> int:
    """Opens a map. Raises OSError, and NotAMap for what is no regular file."""
    # Without O_NONBLOCK, a FIFO would wait for somebody who writes.
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotAMap(f"{path} is not the map of an overlay or a cache, but no regular file at all")
    return fd


def put_map(path: Path, header: Header, bits: bytearray, *, mode: int) -> int:
    """Puts a map in its place, durably, as a whole or not at all; a descriptor of it."""
    draft = draft_of(path)
    fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, mode & 0o666)
        write_all(fd, header.packed(), 0)
        os.ftruncate(fd, HEADER_BYTES + header.map_bytes)
        _write_sparse(fd, bits, HEADER_BYTES)
        os.fsync(fd)
        draft.replace(path)
        sync_directory(path.parent)
    except BaseException:
        os.close(fd)
        with suppress(OSError):
            draft.unlink()
        raise
    return fd


def _write_sparse(fd: int, bits: bytearray, offset: int) -> None:
    """Whole pages; those that are all zero stay holes."""
    nothing = bytes(PAGE)
    for at in range(0, len(bits), PAGE):
        if (page := bytes(bits[at : at + PAGE])) != nothing:
            write_all(fd, page, offset + at)


# ---- bits that outlive the server, but not the machine ----


def _boot() -> bytes:
    text = Path("/proc/sys/kernel/random/boot_id").read_text()
    return bytes.fromhex(text.strip().replace("-", ""))


def _live_header(header: Header) -> bytes:
    plain = _LIVE.pack(_LIVE_MAGIC, _VERSION, _boot(), header.serial, header.map_bytes, 0)
    return plain[:-4] + struct.pack("<I", zlib.crc32(plain))


def read_live(file: Path, header: Header) -> bytearray | None:
    """The bits that a server left that was killed in this boot; None: there are none."""
    try:
        fd = open_map(MapFile.live_path_of(file), os.O_RDONLY)
    except (FileNotFoundError, NotAMap):
        return None
    try:
        if os.pread(fd, _LIVE.size, 0) != _live_header(header):
            return None
        bits = bytearray(header.map_bytes)
        return bits if read_into(fd, bits, PAGE) == len(bits) else None
    finally:
        os.close(fd)


def make_live(file: Path, header: Header, bits: bytearray) -> FileMemory:
    """Memory with these bits that outlives this process; see `read_live`. Raises OSError."""
    path = MapFile.live_path_of(file)
    draft = draft_of(path)
    fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # All of it: who writes to a hole of it in memory, when the disk is full, is killed.
        os.posix_fallocate(fd, 0, PAGE + header.map_bytes)
        _write_sparse(fd, bits, PAGE)
        write_all(fd, _live_header(header), 0)
        draft.replace(path)
        return FileMemory(fd, header.map_bytes, offset=PAGE)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
    finally:
        os.close(fd)


def drop_live(file: Path) -> None:
    """The map says all that there is."""
    with suppress(FileNotFoundError):
        MapFile.live_path_of(file).unlink()
