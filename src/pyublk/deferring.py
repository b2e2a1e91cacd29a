# SPDX-License-Identifier: MIT
"""Requests of a mapped target's queues that other threads finish, so that no queue waits for
them."""

import errno
import logging
import queue as queues
import threading
from collections.abc import Callable
from contextlib import suppress

from pyublk._native import MappedQueue, become_io_flusher
from pyublk.scheduling import NamedThread
from pyublk.uapi import Op

log = logging.getLogger("pyublk.target")

#: Seconds that the end of a disk waits for the threads here; one that hangs is left alone.
HANGS = 5.0
#: Seconds after which a thread ends that had nothing to do: there may be many disks.
IDLE = 10.0


class Deferred:
    """One request, whose queue's thread is done with it. It must be finished, once."""

    __slots__ = ("_generation", "_queue", "_tag", "length", "offset", "op")

    def __init__(
        self, queue: MappedQueue, tag: int, generation: int, op: Op, offset: int, length: int
    ) -> None:
        self._queue, self._tag, self._generation = queue, tag, generation
        self.op, self.offset, self.length = op, offset, length

    def finish(self, error: int) -> None:
        """With an errno, or 0. [any thread]"""
        self._queue.resolve(self._tag, self._generation, error)


def errno_of(step: Callable[[], object], what: str) -> int:
    """Calls it: 0, or the errno of what it raised, which is logged unless it is an OSError's."""
    try:
        step()
    except BaseException as error:
        number = error.errno if isinstance(error, OSError) else None
        if number is None or not 0 < number < 4096:
            log.exception("%s failed; the client gets EIO", what)
            return errno.EIO
        return number
    return 0


class Threads:
    """A few threads, started when there is work for them. They are daemons: one that hangs holds up
    no exit."""

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._inbox: queues.SimpleQueue[Callable[[], object] | None] = queues.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._undone = 0  # jobs that wait or run
        self._closed = False

    def submit(self, job: Callable[[], object]) -> bool:
        """Has it done soon. False: it is closed. Raises RuntimeError when no thread can be had, and
        there is none."""
        with self._lock:
            if self._closed:
                return False
            if self._undone >= len(self._threads) < self._count:
                thread = NamedThread(
                    target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:  # the others will do
                    if not self._threads:
                        raise
                else:
                    self._threads.append(thread)
            self._undone += 1
            self._inbox.put(job)
        return True

    def _next(self) -> Callable[[], object] | None:
        """None: the thread is to end, and is none of ours any more."""
        while True:
            try:
                return self._inbox.get(timeout=IDLE)
            except queues.Empty:
                with self._lock:
                    if self._inbox.empty():
                        self._threads.remove(threading.current_thread())
                        return None

    def _work(self) -> None:
        become_io_flusher()
        while (job := self._next()) is not None:
            try:
                job()
            except BaseException:
                with suppress(BaseException):
                    log.exception("a thread of %s lost its job, and goes on", self._name)
            job = None
            with self._lock:
                self._undone -= 1

    def close(self) -> bool:
        """What is waiting is done first; whether all is, in time."""
        with self._lock:
            self._closed = True
            threads = list(self._threads)
        for _ in threads:
            self._inbox.put(None)
        for thread in threads:
            thread.join(HANGS)
        return not any(thread.is_alive() for thread in threads)


class Flushes:
    """Calls `sync` for deferred flushes: once for all that came before it began."""

    def __init__(self, sync: Callable[[], object]) -> None:
        self._sync = sync
        self._thread = Threads(1, "flush")
        self._waiting: list[Deferred] = []
        self._lock = threading.Lock()

    def defer(self, flush: Deferred) -> None:
        """By the queue's thread: it raises nothing."""
        with self._lock:
            self._waiting.append(flush)
            first = len(self._waiting) == 1
        if first and errno_of(self._begin, "a thread for a flush"):
            self._finish(self._take(), errno.EIO)

    def _begin(self) -> None:
        if not self._thread.submit(self._run):
            raise OSError(errno.EIO, "the target is closed")

    def _run(self) -> None:
        flushes = self._take()
        self._finish(flushes, errno_of(self._sync, "sync_metadata()"))

    def _take(self) -> list[Deferred]:
        with self._lock:
            flushes, self._waiting = self._waiting, []
        return flushes

    @staticmethod
    def _finish(flushes: list[Deferred], error: int) -> None:
        for flush in flushes:
            flush.finish(error)

    def close(self) -> bool:
        """Whether none is under way any more."""
        return self._thread.close()
