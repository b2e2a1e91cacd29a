# SPDX-License-Identifier: MIT
"""Where a disk that only reads keeps what it has fetched."""

import errno
import mmap
import os
import tempfile

from pyublk._native import PresenceLayout
from pyublk.files import read_into
from pyublk.layers.fetching import Fetching


class Scratch:
    """A file without a name over an upper file that must not change, and what is below that.

    It is served instead of them, and gone with its disk; whatever is read goes through it, as
    fetched.
    """

    def __init__(self, policy: Fetching, layout: PresenceLayout, upper_fd: int) -> None:
        #: Says what is in the upper file.
        self.map = layout
        self._policy = policy
        self._upper_fd = upper_fd
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (it is closed with the disk)
        self.fd = self._file.fileno()
        os.ftruncate(self.fd, layout.size)
        bits = mmap.mmap(-1, PresenceLayout.map_bytes(layout.size, layout.block_bytes))
        self.layout = PresenceLayout(
            [(self.fd, False, False)], layout.size, bits, block_bytes=layout.block_bytes
        )

    def close(self) -> None:
        self._file.close()

    # ---- as of who says how blocks are fetched ----

    def fetch(self, offset: int, buffer: memoryview) -> None:
        at, end = offset, offset + len(buffer)
        while at < end:
            length, present = self.map.run(at, end)
            piece = buffer[at - offset : at - offset + length]
            if present:
                self._read_upper(at, piece)
            else:
                self._policy.fetch(at, piece)
            at += length

    def _read_upper(self, offset: int, buffer: memoryview) -> None:
        if read_into(self._upper_fd, buffer, offset) < len(buffer):
            raise OSError(errno.EIO, "the upper file was cut short")

    def widen(self, offset: int, length: int) -> tuple[int, int]:
        return self._policy.widen(offset, length)

    def fetched(self, offset: int, length: int) -> None:
        self._policy.fetched(offset, length)
