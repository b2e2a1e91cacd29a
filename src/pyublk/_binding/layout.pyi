"""Where a disk's bytes are."""

from collections.abc import Callable, Iterable, Sequence
from typing import Self, TypeAlias

from typing_extensions import disjoint_base

from pyublk._binding.mapped import MappedQueue
from pyublk.uapi import Op

#: Descriptor, whether the file's bytes are in memory, whether it is a block device.
_File: TypeAlias = tuple[int, bool, bool]

@disjoint_base
class Layout:
    """Where a disk's bytes are, for a `MappedQueue`. `MappedTarget` makes it. Extents are (file's
    index, offset, length). All sizes are in bytes."""

    @classmethod
    def table(cls, files: Sequence[_File], extents: Iterable[tuple[int, int, int]]) -> Self:
        """Extents, one after the other."""
    @classmethod
    def stripe(cls, files: Sequence[_File], size: int, chunk: int) -> Self:
        """Chunks of `chunk` bytes, in turn from every file."""
    @classmethod
    def per_request(cls, files: Sequence[_File], size: int) -> Self:
        """A `Mapper` says for each request where its bytes are."""
    @property
    def size(self) -> int: ...
    def resize(self, size: int) -> None:
        """Gives it another size while queues use it: each request sees the old one or the new one.
        Of a table, the last extent grows. Raises ValueError when it cannot have that size."""
    @property
    def in_memory(self) -> bool:
        """Whether no file's I/O ever waits."""
    def protect(self, index: int) -> None:
        """Has requests fail for which a `Mapper` would have this file changed, and flushes leave it
        alone. Before queues use the layout."""
    def map_memory(self) -> None:
        """Maps the files in memory, for user copy straight between them and requests."""
    @property
    def in_use(self) -> bool:
        """Whether a queue may come to use the files: one that was cut off, and has not ended."""
    def give_up(self, fd: int) -> None:
        """Lets go of a file, and keeps its number from others as long as queues may use it."""
    def unmap_memory(self) -> None:
        """Lets go of them: a mapped file keeps its file system from being unmounted."""
    def defer(
        self, told: Callable[[MappedQueue, int, int, Op, int, int], object] | None, *, flushes: bool
    ) -> None:
        """`told` hears of each request that others finish: its queue, tag and generation, for
        `MappedQueue.resolve`, and its operation, offset and length. It is called by the queue's
        thread, and must not raise. `flushes`: of each flush, when the files are synced."""
    @property
    def defers_flushes(self) -> bool: ...
