# SPDX-License-Identifier: MIT
"""Ranges of bytes that one thread has at a time."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Order:
    """Those who have a byte in common come one after the other."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: list[tuple[int, int]] = []

    @contextmanager
    def alone(self, offset: int, length: int) -> Iterator[None]:
        """Nobody else has any of these bytes inside."""
        mine = offset, offset + length
        with self._changed:
            while any(first < mine[1] and mine[0] < end for first, end in self._held):
                self._changed.wait()
            self._held.append(mine)
        try:
            yield
        finally:
            with self._changed:
                self._held.remove(mine)
                self._changed.notify_all()
