# SPDX-License-Identifier: MIT
"""How absent blocks of a presence map are fetched from below."""

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Protocol

from pyublk._native import PresenceLayout
from pyublk.deferring import Threads, errno_of
from pyublk.files import write_all
from pyublk.target import Target

#: Bytes that are fetched at once, at most.
PIECE = 1 << 20
#: Threads that fetch, where what is below wants no more.
_THREADS = 8


def fetching_threads(below: Target) -> int:
    """How many fetch at the same time when nobody says: as many requests as it would be given as a
    disk, so that reading through is not slower than reading it."""
    return max(_THREADS, below.workers)


class Fetching(Protocol):
    """Who says how blocks are fetched; see `PresenceLayer`."""

    def fetch(self, offset: int, buffer: memoryview) -> None: ...
    def widen(self, offset: int, length: int) -> tuple[int, int]: ...
    def fetched(self, offset: int, length: int) -> None: ...


class _Wanted:
    """Runs of blocks that somebody waits for."""

    def __init__(self, count: int) -> None:
        self.error = 0
        self._left = count
        self._lock = threading.Lock()
        self._done = threading.Event()

    def ended(self, error: int) -> None:
        with self._lock:
            self.error = self.error or error
            self._left -= 1
            if not self._left:
                self._done.set()

    def wait(self) -> None:
        self._done.wait()


class _Buffers:
    """Memory for fetches. A fresh MiB from the kernel takes longer than the copy of one, so what a
    fetch had is kept for others, as long as some are under way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_use = 0
        self._spare: list[mmap.mmap] = []

    @contextmanager
    def lend(self, size: int) -> Iterator[memoryview]:
        """So many bytes, at a page's start, as direct I/O wants them."""
        with self._lock:
            self._in_use += 1
            kept = self._spare.pop() if self._spare and size <= PIECE else None
        try:
            memory = mmap.mmap(-1, max(size, PIECE)) if kept is None else kept
            yield memoryview(memory)[:size]
            if size <= PIECE:
                with self._lock:
                    self._spare.append(memory)
        finally:
            with self._lock:
                self._in_use -= 1
                if not self._in_use:
                    self._spare.clear()


class Fetcher:
    """Fills absent blocks of a served disk: what is fetched, and what others bring.

    Each run of blocks that it is given is held (presence.h), and let go of once, whatever happens:
    requests that wait for it find it present, or fail.
    """

    def __init__(
        self,
        policy: Fetching,
        layout: PresenceLayout,
        upper_fd: int,
        workers: int,
        wake: Callable[[], None],
    ) -> None:
        self._policy = policy
        self._layout = layout
        self._upper_fd = upper_fd
        self._wake = wake
        self._threads = Threads(workers, "fetch")
        self._buffers = _Buffers()
        self._lock = threading.Lock()  # the file is open; what is counted
        self._closed = False
        self.fetches = self.fetch_errors = self.fetched_bytes = 0

    def close(self) -> bool:
        """Nothing is written to the file any more. Whether nothing is under way."""
        done = self._threads.close()
        with self._lock:
            self._closed = True
        return done

    def want(self, layout: PresenceLayout, offset: int, length: int) -> None:
        """By a queue's thread, which holds the blocks for this; it raises nothing."""
        self._start(offset, length, None)

    def prefetch(self, offset: int, length: int) -> None:
        layout = self._layout
        while not layout.is_present(offset, length):
            runs = layout.claim(offset, length, PIECE)
            wanted = _Wanted(len(runs))
            for run in runs:
                self._start(*run, wanted)
            if runs:
                wanted.wait()
            else:  # somebody else is at it
                threading.Event().wait(0.001)
            if wanted.error:
                raise OSError(wanted.error, os.strerror(wanted.error))
            if self._closed:
                raise OSError(errno.EIO, "the target is closed")

    def fill(self, offset: int, data: memoryview) -> int:
        taken = 0
        for at, length in self._layout.claim(offset, len(data), PIECE):
            self._put(at, data[at - offset : at - offset + length])
            taken += length
        return taken

    def fetch_held(self, runs: list[tuple[int, int]]) -> int:
        """Fetches runs of blocks that the caller holds and nobody has asked for, on his thread: 0,
        or the errno of the first that failed. Those after it are let go of without a try. Requests
        that have come to wait for them are not failed by it: they ask for them now."""
        error = 0
        for run in runs:
            if error:
                self._give_back(*run)
            else:
                error = self._fetch_here(*run, None, asked=False)
        return error

    # ---- one run ----

    def _start(self, offset: int, length: int, wanted: _Wanted | None) -> None:
        """It raises nothing."""
        error = errno_of(partial(self._hand_over, offset, length, wanted), "a thread for a fetch")
        if error:
            self._fail(offset, length, error)
            if wanted is not None:
                wanted.ended(error)

    def _hand_over(self, offset: int, length: int, wanted: _Wanted | None) -> None:
        if not self._threads.submit(partial(self._fetch_here, offset, length, wanted)):
            raise OSError(errno.EIO, "the target is closed")

    def _fetch_here(
        self, offset: int, length: int, wanted: _Wanted | None, *, asked: bool = True
    ) -> int:
        error = 0
        for at, size in self._widened(offset, length):
            with self._buffers.lend(size) as buffer:
                failure = errno_of(partial(self._policy.fetch, at, buffer), "a fetch from below")
                error = self._ended(at, buffer, failure, asked=asked) or error
        if wanted is not None:
            wanted.ended(error)
        return error

    def _widened(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The held blocks of the range, and those around it that are read with them, held as well;
        in runs, the lowest first."""
        layout = self._layout
        runs = [(offset, length)]
        with suppress(Exception):  # what was wanted comes anyway
            first, wide = self._policy.widen(offset, length)
            if (first, wide) == (offset, length):
                return runs
            block = layout.block_bytes
            start = min(max(first, 0) // block * block, offset)
            end = max(min(first + wide, layout.size), offset + length)
            runs += layout.claim(start, offset - start, PIECE)
            runs += layout.claim(offset + length, end - offset - length, PIECE)
        runs.sort()
        merged = runs[:1]
        for at, size in runs[1:]:
            before, had = merged[-1]
            if before + had == at and had + size <= PIECE:
                merged[-1] = (before, had + size)
            else:
                merged.append((at, size))
        return merged

    def _ended(self, offset: int, buffer: memoryview, error: int, *, asked: bool) -> int:
        if not error:
            put = partial(self._put, offset, buffer, asked=asked)
            error = errno_of(put, "writing what was fetched")
        elif asked:
            self._fail(offset, len(buffer), error)
        else:
            self._give_back(offset, len(buffer))
        with self._lock:
            self.fetches += 1
            self.fetch_errors += error != 0
            self.fetched_bytes += 0 if error else len(buffer)
        if not error:
            errno_of(partial(self._policy.fetched, offset, len(buffer)), "fetched()")
        return error

    def _put(self, offset: int, data: memoryview, *, asked: bool = True) -> None:
        """Raises OSError; then the blocks are absent still."""
        try:
            with self._lock:
                if self._closed:
                    raise OSError(errno.EIO, "the target is closed")
                fd = os.dup(self._upper_fd)  # which may be closed meanwhile
            try:
                write_all(fd, data, offset)
            finally:
                os.close(fd)
        except BaseException as raised:
            number = raised.errno if isinstance(raised, OSError) else None
            if asked:
                self._fail(offset, len(data), number or errno.EIO)
            else:
                self._give_back(offset, len(data))
            raise
        self._layout.let_go(offset, len(data), True)
        self._wake()

    def _fail(self, offset: int, length: int, error: int) -> None:
        self._layout.fail(offset, length, error)
        self._give_back(offset, length)

    def _give_back(self, offset: int, length: int) -> None:
        """Absent still, and nobody's: who waits for it asks for it."""
        self._layout.let_go(offset, length, False)
        self._wake()
