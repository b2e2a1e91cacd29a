# SPDX-License-Identifier: MIT
"""How much of a disk a cache may keep, and who has to wait for room."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: The smallest limit: less than this is in flight on a busy disk.
LEAST = 8 << 20


class Room:
    """A limit of bytes.

    What is kept stays below the limit by an eighth as long as evicting keeps up; who brings in more
    than there is room for waits. A request is counted while its bytes are fetched, so what goes
    beyond the limit is at most what the requests in flight bring in.

    Args:
        limit: bytes; None for no limit.
        kept: how many bytes there are now.
        hopeless: whether there is no sense in waiting, since nothing can be evicted.
    """

    def __init__(
        self, limit: int | None, kept: Callable[[], int], hopeless: Callable[[], bool]
    ) -> None:
        self.limit = limit
        self._kept = kept
        self._hopeless = hopeless
        self._changed = threading.Condition()
        self._coming = 0
        self._wanted = 0  # by those who wait
        self._closed = False
        #: Set when something is to be evicted.
        self.short = threading.Event()

    @contextmanager
    def coming(self, length: int, patience: float) -> Iterator[bool]:
        """Inside, there is room for so many bytes more. False if there was none for so long
        (seconds), and none is to be hoped for; with no patience, at once."""
        if self.limit is None or not length:
            yield True
            return
        fits = self._wait(length, patience)
        try:
            yield fits
        finally:
            if fits:
                with self._changed:
                    self._coming -= length
            if self.excess(0):
                self.short.set()

    def _wait(self, length: int, patience: float) -> bool:
        until = time.monotonic() + patience
        with self._changed:
            self._wanted += length
            try:
                while not (fits := self._fits(length)):
                    self.short.set()
                    left = until - time.monotonic()
                    if self._closed or not patience or (left <= 0 and self._hopeless()):
                        break
                    self._changed.wait(left if left > 0 else 1.0)
            finally:
                self._wanted -= length
            if fits:
                self._coming += length
            return fits

    def open(self) -> None:
        """It may be waited for room."""
        self._closed = False

    def close(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _fits(self, length: int) -> bool:
        assert self.limit is not None
        return self._kept() + self._coming + length <= self.limit

    def has(self, length: int) -> bool:
        """Whether there is room without evicting anything."""
        return self.limit is None or self._kept() + self._coming + length <= self.limit * 7 // 8

    def excess(self, margin: int) -> int:
        """How many bytes are to be evicted now, if any; then `margin` more, so that it is not
        needed again at once."""
        if self.limit is None:
            return 0
        over = self._kept() + self._coming + self._wanted - self.limit * 7 // 8
        return over + margin if over > 0 else 0

    @contextmanager
    def leaving(self, length: int) -> Iterator[None]:
        """Inside, so many bytes are being evicted: they take room until the end of it."""
        with self._changed:
            self._coming += length
        try:
            yield
        finally:
            with self._changed:
                self._coming -= length
                self._changed.notify_all()
