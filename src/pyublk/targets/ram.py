# SPDX-License-Identifier: MIT
"""A disk in memory, served in C."""

from collections.abc import Callable

from pyublk import _native
from pyublk.target import NativeTarget


class Ram(NativeTarget):
    """Memory that is sparse until written; discard and write-zeroes give it back.

    The data lives as long as the object: another Device that serves it has the same content. A
    sharded reader-writer lock makes overlapping requests of different queues atomic.
    """

    discards = True
    writes_zeroes = True

    def __init__(self, *, size: int, block_size: int = 512) -> None:
        super().__init__(
            size=size, block_size=block_size, discard_granularity=max(4096, block_size)
        )
        self._memory: _native.Ram | None = None
        self._room = size

    def open(self) -> None:
        if self._memory is None:
            self._memory = _native.Ram(self.size)
            self._room = self.size
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
