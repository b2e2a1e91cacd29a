# SPDX-License-Identifier: MIT
"""A zoned disk in memory."""

import mmap

from pyublk._native import IO
from pyublk.zoned import ZonedTarget

#: Missing in Python 3.11; this is its value on every architecture that has Linux's generic numbers.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class Zoned(ZonedTarget):
    """A host-managed zoned disk in memory, sparse until written; a reset gives memory back.

    The data and the states of its zones live as long as the object.

    Args:
        size: bytes, a multiple of the zone size.
        zone_size: bytes, a power of two.
        zone_capacity: bytes of each sequential zone that can be written; by default, all.
        conventional: how many zones, from the first on, can be written anywhere.
        max_open: how many zones are open at once; 0: no limit.
        max_active: how many are open or closed at once; 0: no limit.
        block_size: the disk's logical block size in bytes.
    """

    def __init__(
        self,
        *,
        size: int,
        zone_size: int = 64 << 20,
        zone_capacity: int | None = None,
        conventional: int = 0,
        max_open: int = 0,
        max_active: int = 0,
        block_size: int = 512,
    ) -> None:
        super().__init__(
            size=size,
            zone_size=zone_size,
            zone_capacity=zone_capacity,
            conventional=conventional,
            max_open=max_open,
            max_active=max_active,
            block_size=block_size,
        )
        self._memory: mmap.mmap | None = None
        self._bytes = memoryview(b"")

    def open(self) -> None:
        if self._memory is None:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
            self._memory = mmap.mmap(-1, self.size, flags=flags)
            self._bytes = memoryview(self._memory)

    def load(self, io: IO) -> None:
        io.write_from(self._bytes[io.offset : io.offset + io.length])

    def store(self, io: IO, offset: int) -> None:
        io.read_into(self._bytes[offset : offset + io.length])

    def erase(self, offset: int, length: int) -> None:
        assert self._memory is not None
        self._memory.madvise(mmap.MADV_DONTNEED, offset, length)
