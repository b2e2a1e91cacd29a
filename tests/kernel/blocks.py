"""Direct I/O on a block device, as a client sees it."""

import fcntl
import mmap
import os
import struct
from types import TracebackType
from typing import Self

BLKDISCARD = 0x1277
BLKZEROOUT = 0x127F
BLKGETSIZE64 = 0x80081272
BLKSSZGET = 0x1268
BLKPBSZGET = 0x127B
BLKIOOPT = 0x1279
BLKROGET = 0x125E


class Blocks:
    """A block device opened with O_DIRECT: every call reaches the server."""

    def __init__(self, path: str, flags: int = os.O_RDWR, *, direct: bool = True) -> None:
        self.fd = os.open(path, flags | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self.fd)

    def read(self, length: int, offset: int) -> bytes:
        with mmap.mmap(-1, length) as aligned:
            count = os.preadv(self.fd, [aligned], offset)
            return aligned[:count]

    def write(self, data: bytes, offset: int, flags: int = 0) -> int:
        with mmap.mmap(-1, len(data)) as aligned:
            aligned[:] = data
            return os.pwritev(self.fd, [aligned], offset, flags)

    def sync(self) -> None:
        os.fsync(self.fd)

    def discard(self, offset: int, length: int) -> None:
        fcntl.ioctl(self.fd, BLKDISCARD, struct.pack("QQ", offset, length))

    def zero_out(self, offset: int, length: int) -> None:
        fcntl.ioctl(self.fd, BLKZEROOUT, struct.pack("QQ", offset, length))

    def number(self, request: int, size: int = 4) -> int:
        return int.from_bytes(fcntl.ioctl(self.fd, request, bytes(size)), "little")

    @property
    def size(self) -> int:
        return self.number(BLKGETSIZE64, 8)
