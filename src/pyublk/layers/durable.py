# SPDX-License-Identifier: MIT
"""The upper file of a served disk and its map, and the order in which they become durable.

A flush takes copies of the map's pages that changed, then syncs the upper file, then writes the
copies, then syncs the map: no bit is in the map before its block is in the upper file. Between two
flushes bits only come, so after a power cut some may be missing, of writes that no flush has ended
after.

An eviction is the other way round: the bits go first, from memory and durably from the map, and
only then the bytes from the upper file. In between the file has bytes of a block that is absent,
which nobody looks at.
"""

import errno
import os
import stat
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyublk._native import PresenceLayout
from pyublk.files import write_all
from pyublk.layers.mapfile import HEADER_BYTES, PAGE, Header, MapFile, open_map, put_map


class DurableMap:
    """The map's file, while the disk is served."""

    def __init__(self, file: Path, upper_fd: int, header: Header, *, read_only: bool) -> None:
        self.header = header
        self._file = file
        self._upper_fd = upper_fd
        self._fd = open_map(MapFile.path_of(file), os.O_RDONLY if read_only else os.O_RDWR)
        self._lock = threading.Lock()
        self._failed = False

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def sync(self, layout: PresenceLayout) -> None:
        """A flush. Raises OSError."""
        with self._lock:
            layout.begin_sync()
            try:
                self._sync(layout)
            finally:
                layout.end_sync()

    def _sync(self, layout: PresenceLayout) -> None:
        if self._failed:  # the kernel forgets what it could not write: another try would succeed
            raise OSError(errno.EIO, f"{self._file} could not be synced before: open it again")
        pages = layout.take_dirty()
        try:
            try:
                os.fdatasync(self._upper_fd)
            except OSError:
                self._failed = True
                raise
            for place, page in pages:
                write_all(self._fd, page, HEADER_BYTES + place)
            if pages:
                os.fdatasync(self._fd)
        except BaseException:
            for place, _ in pages:
                layout.mark_dirty(place)
            raise

    def forget(self, runs: Iterable[tuple[int, int]]) -> None:
        """Says, durably, that these blocks are absent. Raises OSError."""
        pages: dict[int, bytearray] = {}
        block_bytes = self.header.granularity
        with self._lock:
            for offset, length in runs:
                for block in range(offset // block_bytes, -(-(offset + length) // block_bytes)):
                    place = block // (8 * PAGE) * PAGE
                    if place not in pages:
                        page = os.pread(self._fd, PAGE, HEADER_BYTES + place)
                        pages[place] = bytearray(page.ljust(PAGE, b"\0"))
                    pages[place][block // 8 % PAGE] &= ~(1 << block % 8)
            for place, changed in pages.items():
                write_all(self._fd, changed, HEADER_BYTES + place)
            os.fdatasync(self._fd)

    def set_record(self, record: dict[str, Any]) -> None:
        """Durably, and as a whole. Raises OSError, and ValueError for one that is too long."""
        header = replace(self.header, record=record)
        header.packed()
        with self._lock:
            bits = MapFile.read_durable(self._file).bits
            mode = stat.S_IMODE(os.fstat(self._fd).st_mode)
            fd = put_map(MapFile.path_of(self._file), header, bits, mode=mode)
            self._fd, before = fd, self._fd
            self.header = header
        os.close(before)
