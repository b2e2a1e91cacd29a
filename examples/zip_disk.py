"""A disk image that stays in a zip file: a read-only disk of one of its members.

pyublk add examples/zip_disk.py:ZipDisk images.zip disk.img

A member that is stored is read where it is. One that is deflated can only be unpacked from its
beginning on, so the unpacker is copied every STEP bytes, as it stands there: a read goes on from
the last copy before it. Copies are made as the disk is read, 40 KiB each, so that reads of one end
of a large member for the first time unpack all that is before it.
"""

import errno
import zipfile
import zlib
from pathlib import Path

import pyublk

STEP = 4 << 20
PIECE = 64 << 10


class ZipDisk(pyublk.Target):
    recoverable = True

    def __init__(self, file: Path, member: str | None = None) -> None:
        super().__init__(size=0, read_only=True)
        self._path = Path(file)
        self._member = member

    def open(self) -> None:
        with zipfile.ZipFile(self._path) as archive:
            names = [one.filename for one in archive.infolist() if not one.is_dir()]
            member = self._member or (names[0] if len(names) == 1 else None)
            if member not in names:
                what = "needs the name of a member" if member is None else f"has no {member!r}"
                raise ValueError(f"{self._path} {what}; it has {', '.join(names) or 'none'}")
            self._info = archive.getinfo(member)
        if self._info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{member} is packed in a way that only whole members are read from")
        if self._info.flag_bits & 1:
            raise ValueError(f"{member} is encrypted: unpack it first")
        self.size = -(-self._info.file_size // 512) * 512
        self._file = self._path.open("rb")
        # The member's own header has a name and an extra field, whose lengths are only there.
        self._file.seek(self._info.header_offset + 26)
        lengths = self._file.read(4)
        self._begin = self._info.header_offset + 30
        self._begin += int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        self._copies = [(0, 0, zlib.decompressobj(-zlib.MAX_WBITS))]
        self._now = self._copies[0]  # the one that unpacked last, as it stands
        self._last = b""  # what it unpacked, and where that lies
        self._last_at = 0

    def close(self) -> None:
        self._file.close()

    def read(self, offset: int, buffer: memoryview) -> None:
        end = min(offset + len(buffer), self._info.file_size)
        buffer[max(0, end - offset) :] = bytes(len(buffer) - max(0, end - offset))
        while offset < end:
            data = self._stored(offset) if self._info.compress_type == 0 else self._unpacked(offset)
            if not data:
                raise OSError(errno.EIO, f"{self._path} ends within {self._info.filename}")
            data = data[: end - offset]
            buffer[: len(data)] = data
            buffer, offset = buffer[len(data) :], offset + len(data)

    def _stored(self, offset: int) -> bytes:
        self._file.seek(self._begin + offset)
        return self._file.read(min(PIECE, self._info.file_size - offset))

    def _unpacked(self, offset: int) -> bytes:
        """Some bytes from there on."""
        if not self._last_at <= offset < self._last_at + len(self._last):
            before = [one for one in (*self._copies, self._now) if one[0] <= offset]
            found = max(before, key=lambda one: one[0])
            place, used, unpacker = found
            if found is not self._now or found is self._copies[0]:
                unpacker = unpacker.copy()
            self._last = b""
            while place + len(self._last) <= offset:
                place += len(self._last)
                if place - self._copies[-1][0] >= STEP:
                    self._copies.append((place, used, unpacker.copy()))
                self._file.seek(self._begin + used)
                packed = self._file.read(min(PIECE, self._info.compress_size - used))
                self._last = unpacker.decompress(packed, STEP)
                used += len(packed) - len(unpacker.unconsumed_tail)
                if not packed and not self._last:
                    return b""
            self._last_at = place
            self._now = (place + len(self._last), used, unpacker)
        return self._last[offset - self._last_at :]
