# SPDX-License-Identifier: MIT
"""A disk in memory, served in C."""

import fcntl
import io
import os
from collections.abc import Callable

from pyublk import _native
from pyublk.target import NativeTarget


class Ram(NativeTarget):
    """Memory that is sparse until written; discard and write-zeroes give it back.

    The data lives as long as the object: another Device that serves it has the same content. A
    sharded reader-writer lock makes overlapping requests of different queues atomic.

    With `keep` the data is in a file in memory, and lives as long as somebody has that open.
    """

    discards = True
    writes_zeroes = True

    def __init__(self, *, size: int, block_size: int = 512) -> None:
        super().__init__(
            size=size, block_size=block_size, discard_granularity=max(4096, block_size)
        )
        self._memory: _native.Ram | None = None
        self._kept: io.FileIO | None = None
        self._room = size

    def keep(self, file: str | None = None) -> None:
        """Before it is opened: has the data in a file in memory (memfd_create(2)), so that it is
        `recoverable` by who has that open. `file` is the path of one that has data already, such as
        ``/proc/PID/fd/N``. Raises OSError, and ValueError for one that is too small."""
        if file is not None:
            self._kept = io.FileIO(file, "r+")
            self._room = os.fstat(self._kept.fileno()).st_size
            if self._room < self.size:
                self._kept.close()
                raise ValueError(f"the memory has {self._room} bytes, and the disk {self.size}")
        else:
            flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
            self._kept = io.FileIO(os.memfd_create("pyublk-ram", flags), "r+")
            self._kept.truncate(self.size)
            # Who maps it could be killed by a file that ends sooner.
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self._kept, fcntl.F_ADD_SEALS, seals)
        self.recoverable = True

    @property
    def file(self) -> int | None:
        """The descriptor of the file that has the data, if it is in one."""
        if self._memory is None:
            return None if self._kept is None else self._kept.fileno()
        return None if self._memory.file < 0 else self._memory.file

    def open(self) -> None:
        if self._memory is None and self._kept is None:
            self._memory = _native.Ram(self.size)
            self._room = self.size
        elif self._memory is None and self._kept is not None:
            self._memory = _native.Ram(self._room, self._kept.fileno())  # has one of its own
            self._kept.close()
        assert self._memory is not None
        self.handler = self._memory.handler
        self.context = self._memory.context

    def resize(self, size: int, update: Callable[[int], None]) -> None:
        if size > self._room:
            raise ValueError(
                f"a disk in memory grows to at most the {self._room} bytes that it began "
                "with: stop it, and make another"
            )
        super().resize(size, update)

    def resident(self) -> int:
        """Bytes of memory that the disk's content occupies now."""
        return self._memory.resident() if self._memory else 0
