# SPDX-License-Identifier: MIT
"""Which of a disk's readers read on, and what they will want next.

Python never hears of a hit. So the first block of what is fetched ahead is kept back: it is in the
file, but not said to be there. A reader that comes to it calls Python once, which says that it is
there, and has the blocks after this run fetched, while the reader still has the rest of it to read.
The kernel's own read-ahead marks a page for the same reason.
"""

from dataclasses import dataclass

#: How many readers are told apart.
READERS = 32
#: Blocks that are fetched ahead when somebody is seen to read on; then twice as many, and so on.
FIRST_WINDOW = 4
#: Blocks by which a request may come before or after those that it follows: a reader sends several
#: at once, and they are seen in any order.
NEAR = 16


@dataclass(slots=True)
class _Reader:
    end: int  # of what was asked for
    start: int  # of what was fetched ahead last
    edge: int  # the block after that
    window: int = 0
    follows: int = 0  # requests that followed others, before anything was fetched ahead


class ReadAhead:
    """Tells readers apart by where each is. Not for several threads at once.

    Args:
        most: blocks that are fetched ahead of a reader at most; 0 for none.
        blocks: of the disk.
    """

    def __init__(self, most: int, blocks: int) -> None:
        self._most = most
        self._blocks = blocks
        self._readers: list[_Reader] = []  # the one that was seen last first

    def asked(self, first: int, count: int) -> range:
        """Somebody reads blocks that Python is asked for: the blocks to fetch ahead, if any.

        The first of them is to be kept back.
        """
        end = first + count
        if not self._most:
            return range(0)
        reader = self._find(first)
        if reader is None:
            self._readers.insert(0, _Reader(end, end, end))
            del self._readers[READERS:]
            return range(0)
        if end <= reader.end:
            return range(0)
        reader.follows += 1 if first != reader.end else NEAR
        reader.end = end
        if end <= reader.start or reader.follows < 2:
            return range(0)
        return self._go_on(reader)

    def _find(self, first: int) -> _Reader | None:
        for place, reader in enumerate(self._readers):
            if reader.end - NEAR <= first <= reader.edge + NEAR:
                self._readers.insert(0, self._readers.pop(place))
                return reader
        return None

    def _go_on(self, reader: _Reader) -> range:
        reader.window = min(self._most, max(FIRST_WINDOW, 2 * reader.window))
        start = max(reader.edge, reader.end)
        ahead = range(start, min(start + reader.window, self._blocks))
        if ahead:
            reader.start, reader.edge = ahead.start, ahead.stop
        return ahead
