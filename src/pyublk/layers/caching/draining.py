# SPDX-License-Identifier: MIT
"""How a write-back cache brings what was written to the target below."""

import errno
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from pyublk.layers.caching.crew import Crew, Urgency
from pyublk.layers.caching.dirty import DirtyBlocks
from pyublk.pauses import longer
from pyublk.scheduling import NamedThread

log = logging.getLogger("pyublk.cache")

#: Bytes of one write below.
PIECE = 1 << 20
#: Bytes that are written below before they are flushed there: nothing of them is clean before.
BATCH = 64 << 20
#: Seconds between two attempts when draining fails: the first, and the longest.
FIRST_DELAY = 1.0
LONGEST_DELAY = 60.0


class Drained(Protocol):
    """What is drained, and to where."""

    def take(self, offset: int, length: int) -> bool:
        """These blocks are on their way: from here on, a write to one of them says so first. False
        when they cannot be drained just now."""

    def pass_on(self, offset: int, length: int) -> None:
        """Writes them below. Raises OSError."""

    def flush_below(self) -> None:
        """What was passed on is durable. Raises OSError."""

    def settled(self) -> None:
        """A batch is below."""

    def tidy(self) -> None:
        """Called now and then. Raises OSError."""


class Drainer:
    """Drains in the background: after `period` seconds, or at once when `hurry` is set.

    While it fails it tries again, ever more slowly; `trouble` says why.
    """

    def __init__(self, disk: Drained, dirty: DirtyBlocks, crew: Crew, period: float) -> None:
        self._disk = disk
        self._dirty = dirty
        self._crew = crew
        self._period = period
        self._one_at_a_time = threading.Lock()
        self._ended = False
        self.hurry = threading.Event()
        #: The last failure, until all that failed has been drained.
        self.trouble: OSError | None = None
        self.failures = 0
        self.drained_bytes = 0
        self._delay = 0.0
        self._thread = NamedThread(target=self._work, name="cache-drain", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self, within: float) -> bool:
        """No more in the background, though `drain` may still be called; whether what was under way
        ended within so many seconds."""
        self._ended = True
        self.hurry.set()
        self._thread.join(within)
        return not self._thread.is_alive()

    def drain_until(self, then: float) -> bool:
        """As `drain`, until then (time.monotonic) at most, on another thread: whether it ended.
        `trouble` tells of a failure."""

        def drain() -> None:
            with suppress(OSError):
                self.drain(lambda: time.monotonic() > then)

        thread = NamedThread(target=drain, name="cache-drain", daemon=True)
        thread.start()
        thread.join(max(0.0, then - time.monotonic()))
        return not thread.is_alive()

    def _work(self) -> None:
        while not self._ended:
            if self._delay:  # hurrying does not help, and would only ask more often
                self._wait_out(self._delay)
            else:
                self.hurry.wait(self._period)
            self.hurry.clear()
            if self._ended:
                return
            try:
                if self._dirty.regions():
                    self.drain(lambda: self._ended)
                self._disk.tidy()
            except OSError as error:
                log.warning("a cache cannot be drained, and tries again: %s", error)

    def _wait_out(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._ended and (left := until - time.monotonic()) > 0:
            self.hurry.wait(min(left, 0.5))
            self.hurry.clear()

    def drain(self, enough: Callable[[], bool] = lambda: False) -> None:
        """Brings below, durably, what is dirty now, unless `enough` says so before. Raises OSError
        when that fails; what failed is as dirty as before."""
        with self._one_at_a_time:
            runs = self._dirty.runs(PIECE)
            while runs and not enough():
                batch, runs = runs[: BATCH // PIECE], runs[BATCH // PIECE :]
                try:
                    self._drain(batch, enough)
                except OSError as error:
                    self.trouble = error
                    self.failures += 1
                    self._delay = longer(self._delay, FIRST_DELAY, LONGEST_DELAY)
                    raise
            self.trouble, self._delay = None, 0.0

    def _drain(self, batch: list[tuple[int, int]], enough: Callable[[], bool]) -> None:
        passing = _Passing(batch, self._disk, enough)
        for _ in batch:
            self._crew.submit(Urgency.DRAIN, passing.one)
        try:
            passing.wait()
            self._disk.flush_below()
        except BaseException:
            self._dirty.end(below=False)
            raise
        self._dirty.end(below=True)
        self.drained_bytes += passing.bytes
        self._disk.settled()


class _Passing:
    """Runs that are passed on by several threads; after a failure, or `enough`, no further one."""

    def __init__(
        self, batch: list[tuple[int, int]], disk: Drained, enough: Callable[[], bool]
    ) -> None:
        self._left = batch[::-1]
        self._open = len(batch)
        self._disk = disk
        self._changed = threading.Condition()
        self._failure: OSError | None = None
        self._enough = enough
        self.bytes = 0

    def one(self) -> None:
        """Passes the next one on."""
        with self._changed:
            run = self._left.pop()
            over = self._failure is not None or self._enough()
        failure: OSError | None = None
        passed = 0
        try:
            if not over and self._disk.take(*run):
                self._disk.pass_on(*run)
                passed = run[1]
        except OSError as error:
            failure = error
        except BaseException as error:
            failure = OSError(errno.EIO, f"{type(error).__name__}: {error}")
            raise
        finally:
            with self._changed:
                self._failure = self._failure or failure
                self.bytes += passed
                self._open -= 1
                self._changed.notify_all()

    def wait(self) -> None:
        """Until each was passed on, or failed. Raises the first failure."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open)
            if self._failure is not None:
                raise self._failure
