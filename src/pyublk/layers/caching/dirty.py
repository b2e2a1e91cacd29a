# SPDX-License-Identifier: MIT
"""Which blocks of a write-back cache are not below yet."""

import threading
from collections.abc import Iterator


class DirtyBlocks:
    """Dirty blocks, and those that are on their way below: written there, but not flushed.

    Bytes in whole blocks, `offset` and `length`; kept as one number of bits for each region, so
    that a terabyte's worth of dirty regions is a million small numbers at most.
    """

    def __init__(self, granularity: int, region: int) -> None:
        self._granularity = granularity
        self._a_region = region // granularity
        self._lock = threading.Lock()
        self._dirty: dict[int, int] = {}
        self._settling: dict[int, int] = {}
        self._count = 0

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Region and bits of each region that these bytes are in."""
        first = offset // self._granularity
        end = -(-(offset + length) // self._granularity)
        while first < end:
            region, bit = divmod(first, self._a_region)
            count = min(end - first, self._a_region - bit)
            yield region, ((1 << count) - 1) << bit
            first += count

    def add(self, offset: int, length: int) -> None:
        """These are dirty now."""
        with self._lock:
            for region, bits in self._pieces(offset, length):
                before = self._dirty.get(region, 0)
                self._dirty[region] = before | bits
                self._count += (bits & ~before).bit_count()

    def begin(self, offset: int, length: int) -> None:
        """What is dirty of these is on its way."""
        with self._lock:
            for region, bits in self._pieces(offset, length):
                gone = self._dirty.get(region, 0) & bits
                if not gone:
                    continue
                self._count -= gone.bit_count()
                self._settling[region] = self._settling.get(region, 0) | gone
                if left := self._dirty[region] & ~gone:
                    self._dirty[region] = left
                else:
                    del self._dirty[region]

    def end(self, *, below: bool) -> None:
        """What was on its way is there, durably; or it is dirty as before."""
        with self._lock:
            if not below:
                for region, bits in self._settling.items():
                    before = self._dirty.get(region, 0)
                    self._dirty[region] = before | bits
                    self._count += (bits & ~before).bit_count()
            self._settling.clear()

    def bytes(self) -> int:
        """How much is dirty, without what is on its way."""
        return self._count * self._granularity

    def regions(self) -> set[int]:
        """The regions that have any block that is not below, durably."""
        with self._lock:
            return self._dirty.keys() | self._settling.keys()

    def runs(self, most: int) -> list[tuple[int, int]]:
        """The dirty bytes in runs of at most so many, in order."""
        with self._lock:
            dirty = sorted(self._dirty.items())
        found: list[tuple[int, int]] = []
        for region, bits in dirty:
            for bit, count in _ones(bits):
                offset = (region * self._a_region + bit) * self._granularity
                length = count * self._granularity
                if found and sum(found[-1]) == offset and found[-1][1] + length <= most:
                    found[-1] = (found[-1][0], found[-1][1] + length)
                else:
                    found.append((offset, length))
        return found

    def clean(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The parts of these bytes, which are whole blocks, that are below."""
        with self._lock:
            kept = [
                (region, bits & ~(self._dirty.get(region, 0) | self._settling.get(region, 0)))
                for region, bits in self._pieces(offset, length)
            ]
        return [
            ((region * self._a_region + bit) * self._granularity, count * self._granularity)
            for region, bits in kept
            for bit, count in _ones(bits)
        ]


def _ones(bits: int) -> Iterator[tuple[int, int]]:
    """First bit and length of each run of ones."""
    at = 0
    while bits:
        zeroes = (bits & -bits).bit_length() - 1
        bits >>= zeroes
        ones = (~bits & (bits + 1)).bit_length() - 1
        bits >>= ones
        yield at + zeroes, ones
        at += zeroes + ones
