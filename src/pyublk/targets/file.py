# SPDX-License-Identifier: MIT
"""A regular file, or another block device, as a disk."""

import errno
from pathlib import Path

from pyublk.mapped import MappedTarget


class File(MappedTarget):
    """Serves `path`: reads and writes at the same offset, by the kernel, without Python.

    Args:
        path: a regular file, or a block device, which is opened exclusively.
        size: creates the file with this size, or extends it; by default, the size of the file.
        direct: bypass the page cache (O_DIRECT), if the file allows it; the block size is then
            at least what its device requires.
        read_only: open it for reading, and make the disk read-only.
        block_size: the disk's logical block size in bytes; at least that of a block device.
    """

    cuts_files = True
    recoverable = True
    succeeds = True

    def __init__(
        self,
        path: Path,
        *,
        size: int | None = None,
        direct: bool = False,
        read_only: bool = False,
        block_size: int = 512,
    ) -> None:
        super().__init__(
            [path], size=size, direct=direct, read_only=read_only, block_size=block_size
        )
        self.path = Path(path)

    def open(self) -> None:
        try:
            super().open()
        except FileNotFoundError as error:
            if self.read_only or self._wanted_size is not None:
                raise
            raise FileNotFoundError(
                errno.ENOENT, f"{error.strerror}: give a size to make it"
            ) from None
