# SPDX-License-Identifier: MIT
"""Which of a disk's readers read on, and what they will want next.

Python never hears of a hit. So the first block of what is fetched ahead is kept back: it is in the
file, but not said to be there. A reader that comes to it calls Python once, which says that it is
there, and has the blocks after this run fetched, while the reader still has the rest of it to read.
The kernel's own read-ahead marks a page for the same reason.
"""

from collections import OrderedDict
from dataclasses import dataclass

#: How many readers are told apart.
READERS = 32
#: Blocks that are fetched ahead when somebody is seen to read on; then twice as many, and so on.
FIRST_WINDOW = 4


@dataclass(slots=True)
class _Reader:
    edge: int  # the block after all that was asked for
    window: int


class ReadAhead:
    """Tells readers apart by the block that each wants next. Not for several threads at once.

    Args:
        most: blocks that are fetched ahead of a reader at most; 0 for none.
        blocks: of the disk.
    """

    def __init__(self, most: int, blocks: int) -> None:
        self._most = most
        self._blocks = blocks
        self._readers: OrderedDict[int, _Reader] = OrderedDict()  # by the block expected next

    def asked(self, first: int, count: int) -> range:
        """Somebody reads blocks that Python is asked for: the blocks to fetch ahead, if any.

        The first of them is to be kept back.
        """
        end = first + count
        if not self._most:
            return range(0)
        for block in range(first, end + 1):
            if (reader := self._readers.pop(block, None)) is not None:
                # A block at the very end belongs to who asks for it.
                if block < end or block == first:
                    return self._go_on(reader, end)
                self._readers[block] = reader
        self._expect(end, _Reader(end, 0))
        return range(0)

    def _go_on(self, reader: _Reader, end: int) -> range:
        window = min(self._most, max(FIRST_WINDOW, 2 * reader.window))
        start = max(reader.edge, end)
        ahead = range(start, min(start + window, self._blocks))
        if ahead:
            self._expect(ahead.start, _Reader(ahead.stop, window))
        return ahead

    def _expect(self, block: int, reader: _Reader) -> None:
        self._readers[block] = reader
        while len(self._readers) > READERS:
            self._readers.popitem(last=False)
