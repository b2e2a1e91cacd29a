# SPDX-License-Identifier: MIT
"""The blocks of a map, as runs of bytes."""

import re
from collections.abc import Iterable, Iterator

#: Offset and length in bytes.
Run = tuple[int, int]

_NOT_EMPTY = re.compile(rb"[^\0]+")


def runs_of(bits: bytes | bytearray, granularity: int, size: int) -> Iterator[Run]:
    """What a map has: bit b of byte n is block 8n + b. In order, and as long as they can be."""
    for first, end in _blocks(bits):
        offset = first * granularity
        if offset < size:
            yield offset, min(end * granularity, size) - offset


def _blocks(bits: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """First block and end of each run."""
    begun: int | None = None
    end = 0
    for found in _NOT_EMPTY.finditer(bits):
        for place, byte in enumerate(found[0], start=found.start()):
            for bit in range(8) if byte != 0xFF else (0,):
                block = 8 * place + bit
                if not byte >> bit & 1:
                    continue
                if begun is not None and block != end:
                    yield begun, end
                    begun = None
                if begun is None:
                    begun = block
                end = block + (8 if byte == 0xFF else 1)
    if begun is not None:
        yield begun, end


def rest_of(runs: Iterable[Run], size: int) -> Iterator[Run]:
    """What lies between runs, up to `size`."""
    at = 0
    for offset, length in runs:
        if offset > at:
            yield at, offset - at
        at = offset + length
    if at < size:
        yield at, size - at


def common(ones: Iterable[Run], others: Iterable[Run]) -> Iterator[Run]:
    """What is in runs of both."""
    left, right = iter(ones), iter(others)
    one, other = next(left, None), next(right, None)
    while one is not None and other is not None:
        start, end = max(one[0], other[0]), min(sum(one), sum(other))
        if start < end:
            yield start, end - start
        if sum(one) < sum(other):
            one = next(left, None)
        else:
            other = next(right, None)


def whole_blocks(runs: Iterable[Run], granularity: int, size: int) -> Iterator[Run]:
    """The runs, extended to whole blocks; those that touch then are one."""
    before: Run | None = None
    for offset, length in runs:
        start = offset - offset % granularity
        end = min(-(-(offset + length) // granularity) * granularity, size)
        if before is not None and start <= sum(before):
            before = before[0], max(sum(before), end) - before[0]
            continue
        if before is not None:
            yield before
        before = start, end - start
    if before is not None:
        yield before


def pieces(runs: Iterable[Run], most: int) -> Iterator[Run]:
    """The runs in pieces of at most so many bytes."""
    for offset, length in runs:
        for at in range(offset, offset + length, most):
            yield at, min(most, offset + length - at)
