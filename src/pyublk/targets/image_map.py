# SPDX-License-Identifier: MIT
"""A read-only image as a mapped target: its data is served from where it lies in its files."""

import errno
import fcntl
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pyublk.backing import Backing
from pyublk.keeping import Ranges
from pyublk.mapped import Extent, MappedTarget
from pyublk.targets.image_files import (
    ImageFile,
    Part,
    Unmapped,
    empty,
    examine,
    parts,
    virtual_size,
)

#: An image in more parts than these is not worth a table.
MOST_PARTS = 1_000_000

# QEMU locks bytes of an image to say what it does with it, and what others may not do
# (block/file-posix.c): who has 100 + n does n, who has 200 + n lets nobody else do it.
_DOES, _FORBIDS = 100, 200
_READ, _WRITE, _RESIZE = 0, 1, 3
_READER = (_DOES + _READ, _FORBIDS + _WRITE, _FORBIDS + _RESIZE)
_AGAINST_READERS = (_DOES + _WRITE, _DOES + _RESIZE, _FORBIDS + _READ)


class MappedImage(MappedTarget):
    """Serves an image read-only, as `linear` serves files: without Python, and without QEMU.

    Args:
        path, format, block_size, direct: as for `Image`.
    """

    recoverable = True
    succeeds = True

    def __init__(
        self, path: Path, *, format: str | None = None, block_size: int = 512, direct: bool = False
    ) -> None:
        super().__init__([path], read_only=True, block_size=block_size, direct=direct)
        self.path = Path(path)
        self._format = format
        self._image: ImageFile | None = None
        self._parts: list[Part] = []
        self._zeroes = -1
        self._virtual_size = 0

    def open(self) -> None:
        self.check_closed()
        self._image = examine(self.path, self._format)
        try:
            self._virtual_size = virtual_size(self._image)
            self._parts = parts(self._image, MOST_PARTS)
        except Unmapped as error:
            raise ValueError(f"{self.path} cannot be served by its map: {error}") from None
        if not self._virtual_size:
            raise empty(self.path)
        used = {path for _, _, path, _ in self._parts}
        # Every file of the chain is kept, also one that has no data yet.
        self.files = [one.path for one in self._image.chain() if one.path in used or not used]
        self._zeroes = os.memfd_create("pyublk-zeroes", os.MFD_CLOEXEC)
        os.ftruncate(self._zeroes, self._virtual_size)
        self.files.append(Path(f"/proc/self/fd/{self._zeroes}"))
        super().open()
        try:
            self._refuse_writers()
        except BaseException:
            self.close()
            raise

    def open_file(self, path: Path, size: int | None = None, *, read_only: bool = True) -> Backing:
        direct = self._direct and path != self.files[-1]
        return Backing.open(path, size=size, direct=direct, read_only=True)

    def close(self) -> None:
        super().close()
        if self._zeroes >= 0:
            os.close(self._zeroes)
            self._zeroes = -1

    def extents(self) -> Iterable[Extent]:
        at = 0
        zeroes = len(self.files) - 1
        for start, length, path, offset in self._parts:
            if start > at:
                yield zeroes, 0, start - at
            yield self.files.index(path), offset, length
            at = start + length
        if at < self._virtual_size:
            yield zeroes, 0, self._virtual_size - at

    def ranges(self, file: int) -> Ranges:
        """Those of its data, and the bytes by which QEMU sees that the image is read."""
        found = super().ranges(file)
        if file == len(self.files) - 1:
            return found
        if found:
            found = [(min(first for first, _ in found), max(end for _, end in found))]
        return [*found, *((byte, byte + 1) for byte in _READER)]

    def _refuse_writers(self) -> None:
        """Raises OSError EBUSY when QEMU began to write one of them since it was asked."""
        for backing in self.backing[:-1]:
            for byte in _AGAINST_READERS:
                asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
                told = fcntl.fcntl(backing.fd, fcntl.F_OFD_GETLK, asked)
                if struct.unpack_from("h", told)[0] != fcntl.F_UNLCK:
                    raise OSError(errno.EBUSY, f"{backing.path} is in use by another program")

    def identity(self) -> str:
        """Changes when one of the files does."""
        told = (os.fstat(backing.fd) for backing in self.backing[:-1])
        return " ".join(f"{one.st_size}:{one.st_mtime_ns}" for one in told)

    def status(self) -> dict[str, Any]:
        chain = self._image.chain() if self._image else []
        return {
            "image": [{"file": str(one.path), "format": one.format} for one in chain],
            "served_by": "its map",
            "parts": len(self._parts),
        }
