# SPDX-License-Identifier: MIT
"""What was written to a chunk and is not in the store yet."""

import mmap
from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class Ranges:
    """A set of bytes, as ranges that neither touch nor overlap."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> None:
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def covers(self, start: int, end: int) -> bool:
        at = bisect_right(self._starts, start) - 1
        return at >= 0 and self._ends[at] >= end

    def within(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of it from `start` to `end`, in order."""
        at = bisect_right(self._ends, start)
        while at < len(self._starts) and self._starts[at] < end:
            yield max(start, self._starts[at]), min(end, self._ends[at])
            at += 1


class DirtyChunk:
    """A chunk's new bytes. Its memory is taken page by page as they come, and not for zeroes.

    `held` is about how many bytes of memory that is.
    """

    __slots__ = ("_memory", "_ranges", "_size", "held")

    def __init__(self, size: int) -> None:
        self._size = size
        self._ranges = Ranges()
        self._memory: mmap.mmap | None = None
        self.held = 0

    def write(self, start: int, data: memoryview | bytes) -> None:
        if self._memory is None:
            self._memory = mmap.mmap(-1, self._size)
        self._memory[start : start + len(data)] = data
        self._ranges.add(start, start + len(data))
        self.held = min(self._size, self.held + len(data))

    def zero(self, start: int, end: int) -> None:
        if end - start == self._size:
            self._memory, self.held = None, 0
        elif self._memory is not None:  # else there is nothing but zeroes
            self._memory[start:end] = bytes(end - start)
            self.held = min(self._size, self.held + end - start)
        self._ranges.add(start, end)

    def covers(self, start: int, end: int) -> bool:
        """Whether all these bytes are new."""
        return self._ranges.covers(start, end)

    def overlay(self, start: int, buffer: memoryview | bytearray) -> None:
        """Puts the new bytes into a buffer that has the chunk's bytes from `start` on."""
        for first, last in self._ranges.within(start, start + len(buffer)):
            new = bytes(last - first) if self._memory is None else self._memory[first:last]
            buffer[first - start : last - start] = new

    def put_under(self, newer: "DirtyChunk | None") -> "DirtyChunk":
        """This chunk with what was written to it since."""
        if newer is None:
            return self
        for first, last in newer._ranges.within(0, self._size):
            if newer._memory is None:
                self.zero(first, last)
            else:
                self.write(first, newer._memory[first:last])
        return self
