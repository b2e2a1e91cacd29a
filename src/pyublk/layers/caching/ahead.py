# SPDX-License-Identifier: MIT
"""Fetches for a cache what nobody has asked for yet: ahead of a reader, or in a recorded order."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Protocol

from pyublk.layers.caching.crew import Crew, Urgency
from pyublk.layers.caching.eviction import Run
from pyublk.layers.caching.readahead import ReadAhead
from pyublk.layers.caching.room import Room

#: Bytes of one read below.
FETCH = 1 << 20


class Fetching(Protocol):
    """What the blocks are fetched for, and from where."""

    def is_present(self, offset: int, length: int) -> bool: ...

    def fetch_now(self, offset: int, length: int) -> None: ...

    def read_below(self, offset: int, buffer: memoryview) -> None: ...


class Ahead:
    """Fetches ahead. Failures are counted only: who wants these bytes asks for them himself.

    Args:
        disk: what it fetches for.
        size, granularity, most: of the disk, of a block, of what is fetched ahead of one reader;
            bytes.
    """

    def __init__(
        self, disk: Fetching, crew: Crew, room: Room, *, size: int, granularity: int, most: int
    ) -> None:
        self._disk = disk
        self._crew = crew
        self._room = room
        self._size = size
        self._granularity = granularity
        self._lock = threading.Lock()
        self._readers = ReadAhead(most // granularity, -(-size // granularity))
        self._kept_back: dict[int, Future[bytes]] = {}  # by offset
        self._here = threading.local()
        self.ahead_bytes = 0
        self.failures = 0
        self.to_warm = 0
        self.warmed = 0

    @property
    def in_background(self) -> bool:
        """Whether the caller is a thread that fetches what nobody waits for."""
        return getattr(self._here, "fetches", False)

    # ---- ahead of a reader ----

    def wanted(self, offset: int, length: int) -> None:
        """Somebody misses these blocks. Does not wait."""
        if self.in_background:
            return
        first = offset // self._granularity
        count = -(-(offset + length) // self._granularity) - first
        with self._lock:
            blocks = self._readers.asked(first, count)
            if not blocks:
                return
            start = blocks.start * self._granularity
            end = min(blocks.stop * self._granularity, self._size)
            second = min(start + self._granularity, end)
            kept = None
            if not self._disk.is_present(start, second - start) and start not in self._kept_back:
                kept = self._kept_back[start] = Future()
        if kept is not None:
            self._submit(Urgency.AHEAD, partial(self._keep_back, kept, start, second - start))
        self._fetch(Urgency.AHEAD, [(second, end - second)])

    def _keep_back(self, kept: "Future[bytes]", offset: int, length: int) -> None:
        if not kept.set_running_or_notify_cancel():
            return
        data = bytearray(length)
        try:
            self._disk.read_below(offset, memoryview(data))
        except BaseException as error:
            kept.set_exception(error)
            raise
        kept.set_result(bytes(data))

    def take(self, offset: int, buffer: memoryview) -> int:
        """Fills the beginning of the buffer with what was kept back for it: how many bytes."""
        with self._lock:
            kept = self._kept_back.pop(offset, None)
        if kept is None or kept.cancel():
            return 0
        try:
            data = kept.result()
        except OSError:
            return 0
        length = min(len(data), len(buffer))
        buffer[:length] = data[:length]
        return length

    def forget(self, runs: Iterable[Run]) -> None:
        """These blocks are evicted: what was read of them before is not what is below now."""
        with self._lock:
            for offset in list(self._kept_back):
                if any(start <= offset < start + length for start, length in runs):
                    self._kept_back.pop(offset).cancel()

    # ---- in an order that was recorded ----

    def warm(self, runs: list[Run]) -> None:
        """Fetches these in this order, after all that is more urgent, while there is room."""
        parts = [part for run in runs for part in self._parts(*run)]
        self.to_warm = len(parts)
        for offset, length in parts:
            self._submit(Urgency.WARM, partial(self._warm, offset, length))

    def _warm(self, offset: int, length: int) -> None:
        self.warmed += 1
        if self._room.has(length):
            self._disk.fetch_now(offset, length)

    # ---- both ----

    def _fetch(self, urgency: Urgency, runs: list[Run]) -> None:
        for run in runs:
            for offset, length in self._parts(*run):
                self.ahead_bytes += length
                self._submit(urgency, partial(self._disk.fetch_now, offset, length))

    @staticmethod
    def _parts(offset: int, length: int) -> list[Run]:
        return [
            (at, min(FETCH, offset + length - at)) for at in range(offset, offset + length, FETCH)
        ]

    def _submit(self, urgency: Urgency, job: Callable[[], None]) -> None:
        def in_background() -> None:
            self._here.fetches = True
            try:
                job()
            except OSError:
                self.failures += 1
            finally:
                self._here.fetches = False

        self._crew.submit(urgency, in_background)
