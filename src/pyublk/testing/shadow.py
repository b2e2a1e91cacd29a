# SPDX-License-Identifier: MIT
"""What a disk must hold, kept beside it."""

from pyublk.testing.disk import Disk


class Shadow:
    """Does every operation on a `Disk` and on a bytearray, and compares.

    For small disks and random operations, as hypothesis makes them. Discarded bytes are unknown
    until they are written again; an AssertionError names the first byte that differs.
    """

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self._bytes = bytearray(disk.size)
        self._known = bytearray(b"\1" * disk.size)

    def read(self, offset: int, length: int) -> None:
        """Reads, and compares the bytes that are known."""
        found = self.disk.pread(length, offset)
        for at in range(length):
            if self._known[offset + at]:
                assert found[at] == self._bytes[offset + at], (
                    f"byte {offset + at} is {found[at]:#x}, not {self._bytes[offset + at]:#x}"
                )

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        """Writes, and remembers."""
        assert self.disk.pwrite(data, offset, fua=fua) == len(data)
        self._set(offset, data)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        """Makes zero, and remembers."""
        self.disk.write_zeroes(offset, length, unmap=unmap)
        self._set(offset, bytes(length))

    def discard(self, offset: int, length: int) -> None:
        """Discards; the bytes are then unknown."""
        self.disk.discard(offset, length)
        self._known[offset : offset + length] = bytes(length)

    def _set(self, offset: int, data: bytes) -> None:
        self._bytes[offset : offset + len(data)] = data
        self._known[offset : offset + len(data)] = b"\1" * len(data)

    def check(self) -> None:
        """Compares the whole disk."""
        self.read(0, self.disk.size)
