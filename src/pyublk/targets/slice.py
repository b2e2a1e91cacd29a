# SPDX-License-Identifier: MIT
"""A part of a file or block device as a disk: a range of it, or a partition."""

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from pyublk.backing import Backing
from pyublk.mapped import Extent, MappedTarget
from pyublk.resizing import Ends

#: Bytes of the largest partition table that is read; those of every tool have 16 KiB.
MAX_TABLE = 1 << 20


class Slice(MappedTarget):
    """Serves `size` bytes of `file` from `offset` on, or its partition number `partition`.

    Args:
        file: a regular file or block device.
        offset: where the disk begins in it, a multiple of the block size.
        size: bytes of the disk; by default, up to the end of the file.
        partition: the number of a partition, from 1, of the file's GPT or MBR (the four primary
            ones), instead of offset and size.
        direct, read_only, block_size: as for `File`. A partition table is read with the sector size
            of its device; in a file, with 512 bytes, or 4096 if that is the block_size.
    """

    recoverable = True
    succeeds = True

    def __init__(
        self,
        file: Path,
        *,
        offset: int = 0,
        size: int | None = None,
        partition: int | None = None,
        direct: bool = False,
        read_only: bool = False,
        block_size: int = 512,
    ) -> None:
        if partition is not None and (offset or size is not None):
            raise ValueError("give either a partition, or offset and size")
        super().__init__([file], direct=direct, read_only=read_only, block_size=block_size)
        self.offset = offset
        self.length = size
        self.partition = partition

    def ends(self, size: int) -> Ends:
        if self.partition is not None and size != self.layout.size:
            raise ValueError(
                f"a partition's size is in its partition table: change that of {self.files[0]}, "
                "and serve it again"
            )
        return super().ends(size)

    def size_changed(self, *, fresh: bool) -> None:
        self.length = self.size

    def extents(self) -> Iterable[Extent]:
        (backing,) = self.backing
        if self.partition is not None:
            sector = backing.block_size if backing.is_device else self._wanted_block_size
            offset, length = find_partition(backing, self.partition, sector)
        else:
            offset = self.offset
            length = backing.size - offset if self.length is None else self.length
        return [(0, offset, length)]


def find_partition(backing: Backing, number: int, sector: int = 512) -> tuple[int, int]:
    """Offset and length, in bytes, of a partition of a GPT (UEFI specification, 5.3) or MBR.

    Raises ValueError when there is no such partition, naming those that there are.
    """
    with open(backing.path, "rb") as file:
        partitions = _gpt(file, backing, sector)
        if partitions is None:
            file.seek(0)
            partitions = _mbr(file.read(512), sector)
    if number not in partitions:
        there = ", ".join(map(str, sorted(partitions))) or "none"
        raise ValueError(f"{backing.path} has no partition {number}; there is: {there}")
    return partitions[number]


def _gpt(file: BinaryIO, backing: Backing, sector: int) -> dict[int, tuple[int, int]] | None:
    file.seek(sector)
    header = file.read(92)
    if header[:8] != b"EFI PART":
        return None
    if len(header) < 92:
        raise ValueError(f"{backing.path} ends within the header of its GPT")
    table, count, entry = struct.unpack_from("<QII", header, 72)
    size = count * entry
    if entry < 128 or entry.bit_count() != 1 or size > MAX_TABLE:
        raise ValueError(
            f"the GPT of {backing.path} says that it has {count} entries of {entry} bytes: an "
            f"entry has 128 bytes, 256, 512 and so on, and the table at most {MAX_TABLE}"
        )
    if table * sector + size > backing.size:
        raise ValueError(f"{backing.path} ends within the table of its GPT")
    file.seek(table * sector)
    entries = file.read(size)
    found = {}
    for number in range(count):
        kind = entries[number * entry : number * entry + 16]
        first, last = struct.unpack_from("<QQ", entries, number * entry + 32)
        if any(kind):
            found[number + 1] = (first * sector, (last - first + 1) * sector)
    return found


def _mbr(start: bytes, sector: int) -> dict[int, tuple[int, int]]:
    found = {}
    if start[510:512] == b"\x55\xaa":
        for number in range(4):
            kind, first, count = struct.unpack_from("<4xB3xII", start, 446 + 16 * number)
            if kind and count:
                found[number + 1] = (first * sector, count * sector)
    return found
