"""Native targets, and the lock for ranges."""

from contextlib import AbstractContextManager
from typing import final

NULL_HANDLER: int

@final
class Ram:
    def __init__(self, size: int, file: int = -1) -> None: ...
    @property
    def handler(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def file(self) -> int:
        """Its own descriptor of the file that has the bytes; -1: there is none."""

    def resident(self) -> int: ...

@final
class ShardedLock:
    """Reader-writer locks over byte ranges, for `parallel` targets.

    The disk is divided into granules of `granule` bytes, each of which belongs to one of `shards`
    locks. A range takes the locks of all its granules, always in the same order. So overlapping
    ranges exclude each other as readers and writers do; distant ranges rarely share a lock.
    The GIL is released while waiting. Not reentrant.
    """

    def __init__(self, shards: int = 64, granule: int = 1048576) -> None: ...
    def reading(self, offset: int, length: int) -> AbstractContextManager[None]:
        """``with lock.reading(offset, length):`` shares the range with other readers."""
    def writing(self, offset: int, length: int) -> AbstractContextManager[None]:
        """``with lock.writing(offset, length):`` has the range exclusively."""
