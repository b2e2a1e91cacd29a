# SPDX-License-Identifier: MIT
"""Several files or block devices, a chunk of each in turn, as one disk."""

from pathlib import Path

from pyublk._native import Layout
from pyublk.keeping import Ranges
from pyublk.mapped import MappedTarget
from pyublk.resizing import Ends


class Stripe(MappedTarget):
    """Stripes over `files`, as RAID 0 does: if one is lost, so is the disk.

    Of each file, as many whole chunks are used as the smallest has. The first chunk of the disk is
    the first of the first file, the second is the first of the second file, and so on.

    Args:
        files: regular files or block devices, in order.
        chunk: bytes in one file before the next file follows; a multiple of the block size.
        size: bytes of the disk; by default, all whole chunks.
        direct, read_only, block_size: as for `File`.
    """

    cuts_files = True
    recoverable = True
    succeeds = True

    def __init__(
        self,
        *files: Path,
        chunk: int = 64 * 1024,
        size: int | None = None,
        direct: bool = False,
        read_only: bool = False,
        block_size: int = 512,
    ) -> None:
        super().__init__(
            files, size=size, direct=direct, read_only=read_only, block_size=block_size
        )
        self.chunk = chunk

    def make_layout(self, files: list[tuple[int, bool, bool]]) -> Layout:
        if self.chunk < self.block_size or self.chunk % self.block_size:
            raise ValueError(
                f"chunk is {self.chunk} bytes: it must be a positive multiple of the block size, "
                f"{self.block_size}"
            )
        smallest = min(self.backing, key=lambda backing: backing.size)
        whole = smallest.size // self.chunk * self.chunk * len(files)
        if not whole:
            raise ValueError(
                f"{smallest.path} has {smallest.size} bytes, less than one chunk of {self.chunk}"
            )
        size = whole if self._wanted_size is None else self._wanted_size
        if size > whole:
            raise ValueError(f"size {size} is more than the files give, {whole} bytes")
        return Layout.stripe(files, size, self.chunk)

    def ranges(self, file: int) -> Ranges:
        return [(0, self.ends(self.layout.size)[file])]

    def ends(self, size: int) -> Ends:
        row = self.chunk * len(self.backing)
        if size % row and size != self.layout.size:
            raise ValueError(
                f"a stripe of {len(self.backing)} files can only be resized by whole rows of {row} "
                f"bytes: to {size // row * row or row} or {(size // row + 1) * row}, not {size}"
            )
        return dict.fromkeys(range(len(self.backing)), -(-size // row) * self.chunk)
