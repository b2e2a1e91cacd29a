# SPDX-License-Identifier: MIT
"""What a cache lets go of when it is full: second chance, in the order of the disk."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from pyublk.layers.caching.room import Room
from pyublk.scheduling import NamedThread

log = logging.getLogger("pyublk.cache")

#: Bytes that are looked at, and evicted, together.
PIECE = 1 << 20
#: Seconds until it is tried again when nothing could be evicted.
RETRY = 0.2

Run = tuple[int, int]


class Kept(Protocol):
    """What a cache has, as the clock's hand sees it."""

    def present(self, offset: int, length: int) -> Iterator[Run]:
        """The runs that are there, of these bytes."""

    def was_used(self, offset: int, length: int) -> bool:
        """Whether any of it was used since it was last asked."""

    def clean(self, offset: int, length: int) -> list[Run]:
        """The parts of it that are below as well."""


class Clock:
    """A hand that goes round the disk. What was used since it came by last is spared once.

    Args:
        size: of the disk, in bytes.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._hand = 0
        self._lock = threading.Lock()
        self._fresh: set[int] = set()

    def fetched(self, offset: int, length: int) -> None:
        """It was brought in, which counts as a use: nobody may have come to it yet."""
        with self._lock:
            self._fresh.update(range(offset // PIECE, -(-(offset + length) // PIECE)))

    def choose(self, wanted: int, kept: Kept) -> list[Run]:
        """Runs of so many bytes, if there are so many clean ones. For one thread at a time."""
        found: list[Run] = []
        have = 0
        start = self._hand
        # From the hand to the end, round to it, and once more: the second time finds what the first
        # one spared.
        for first, end in [(start, self._size), (0, self._size), (0, start)]:
            for offset, length in pieces(kept.present(first, end - first)):
                if have >= wanted:
                    return found
                self._hand = offset + length
                for run in self._not_used(offset, length, kept):
                    found.append(run)
                    have += run[1]
        return found

    def _not_used(self, offset: int, length: int, kept: Kept) -> list[Run]:
        with self._lock:
            fresh = offset // PIECE in self._fresh
            self._fresh.discard(offset // PIECE)
        used = kept.was_used(offset, length)
        return [] if fresh or used else kept.clean(offset, length)


def pieces(runs: Iterable[Run], size: int = PIECE) -> Iterator[Run]:
    """The runs, cut where one piece of the disk ends and the next one begins."""
    for offset, length in runs:
        end = offset + length
        while offset < end:
            cut = min(end, (offset // size + 1) * size)
            yield offset, cut - offset
            offset = cut


def every(size: int, kept: Kept) -> list[Run]:
    """All that is clean."""
    return [part for run in kept.present(0, size) for part in kept.clean(*run)]


class Evictor:
    """Keeps what is kept below the limit, on a thread of its own.

    `evict` lets go of runs and returns how many bytes that were; `stuck` is called when there is
    nothing to let go of, since all is dirty.
    """

    def __init__(
        self,
        room: Room,
        choose: Callable[[int], list[Run]],
        evict: Callable[[list[Run]], int],
        stuck: Callable[[], None],
    ) -> None:
        assert room.limit is not None
        self._room = room
        self._choose = choose
        self._evict = evict
        self._stuck = stuck
        # Each eviction waits for a disk twice: it is worth some of them together.
        self._margin = room.limit // 16
        self._ended = False
        self._thread = NamedThread(target=self._work, name="cache-evict", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ended = True
        self._room.short.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._ended:
            # What is in use all the time is not evicted at the first try.
            self._room.short.wait(RETRY if self._room.excess(0) else None)
            self._room.short.clear()
            try:
                while not self._ended and self._some():
                    pass
            except OSError as error:
                log.warning("a cache cannot evict: %s", error)

    def _some(self) -> bool:
        """Evicts some: whether more may be needed, and can be had."""
        if not (wanted := self._room.excess(self._margin)):
            return False
        runs = self._choose(wanted)
        freed = self._evict(runs) if runs else 0
        if not freed:
            self._stuck()
        return freed > 0
