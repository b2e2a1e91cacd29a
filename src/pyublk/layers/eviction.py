# SPDX-License-Identifier: MIT
"""Blocks of a presence map that become absent again, and ranges that somebody has alone."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from pyublk._native import PresenceLayout
from pyublk.files import punch_hole
from pyublk.layers.durable import DurableMap

#: Seconds between two looks at requests that are under way.
_LOOK = 0.0005


class Eviction:
    """That of one disk, while it is served."""

    def __init__(
        self,
        layout: PresenceLayout,
        durable: DurableMap,
        upper_fd: int,
        wake: Callable[[], None],
    ) -> None:
        self._layout = layout
        self._durable = durable
        self._upper_fd = upper_fd
        self._wake = wake
        self._lock = threading.Lock()  # one region is blocked at a time

    @contextmanager
    def hold(self, offset: int, length: int) -> Iterator[None]:
        layout = self._layout
        region = offset // layout.region_bytes
        if length < 1 or (offset + length - 1) // layout.region_bytes != region:
            raise ValueError(
                f"{length} bytes at {offset} are not in one region of {layout.region_bytes} bytes"
            )
        with self._lock:
            layout.block_region(region)
            try:
                while not layout.is_drained(region):
                    time.sleep(_LOOK)
                yield
            finally:
                layout.block_region(None)
                self._wake()

    def evict(self, ranges: Iterable[tuple[int, int]]) -> int:
        layout = self._layout
        runs: list[tuple[int, int]] = []
        try:
            for offset, length in ranges:
                for at, size in self._by_region(offset, length):
                    with self.hold(at, size):
                        runs += layout.evict(at, size)
            if runs:
                self._durable.forget(runs)
        except BaseException:
            for at, size in runs:  # they are in the upper file still
                layout.let_go(at, size, True)
            self._wake()
            raise
        for at, size in runs:
            punch_hole(self._upper_fd, at, size)  # if it cannot, the bytes take room, no more
            layout.let_go(at, size, False)
        self._wake()
        return sum(size for _, size in runs)

    def _by_region(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The whole blocks in a range, by region."""
        layout = self._layout
        block, end = layout.block_bytes, offset + length
        offset = -(-offset // block) * block
        if end < layout.size:
            end = end // block * block
        while offset < end:
            size = min(layout.region_bytes - offset % layout.region_bytes, end - offset)
            if size:
                yield offset, size
            offset += size
