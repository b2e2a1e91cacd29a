# SPDX-License-Identifier: MIT
"""The threads that work for a cache: what a request waits for goes before what may come late."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from enum import IntEnum

from pyublk._native import become_io_flusher
from pyublk.scheduling import NamedThread

log = logging.getLogger("pyublk.cache")

Job = Callable[[], None]


class Urgency(IntEnum):
    """What is done first."""

    DEMAND = 0
    AHEAD = 1
    DRAIN = 2
    WARM = 3


class Crew:
    """Threads that do jobs, the most urgent first.

    Jobs that nobody will soon wait for never have all threads, unless there is only one.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._jobs: dict[Urgency, deque[Job]] = {urgency: deque() for urgency in Urgency}
        self._changed = threading.Condition()
        self._ended = False
        self._busy = 0  # threads with a job
        self._patient = 0  # of these, with a job that nobody will soon wait for
        self._most_patient = max(1, threads - max(1, threads // 4))
        self._threads = [
            NamedThread(target=self._work, name=f"{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, urgency: Urgency, job: Job) -> None:
        """The job is done by one of the threads; after `close`, it is forgotten."""
        with self._changed:
            if not self._ended:
                self._jobs[urgency].append(job)
                self._changed.notify_all()

    def drained(self, timeout: float) -> bool:
        """Waits until there is no job, waiting or under way, for so many seconds: whether so."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._busy and not any(self._jobs.values()), timeout
            )

    def close(self, timeout: float) -> bool:
        """Forgets what has not begun; whether all that had begun ended within so many seconds."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout)
            timeout = min(timeout, 1.0) if thread.is_alive() else timeout
        return not any(thread.is_alive() for thread in self._threads)

    def _next(self) -> tuple[Urgency, Job] | None:
        for urgency, jobs in self._jobs.items():
            if urgency > Urgency.AHEAD and self._patient >= self._most_patient:
                return None
            if jobs:
                return urgency, jobs.popleft()
        return None

    def _work(self) -> None:
        become_io_flusher()
        while True:
            with self._changed:
                while not self._ended and (found := self._next()) is None:
                    self._changed.wait()
                if self._ended:
                    return
                assert found is not None
                urgency, job = found
                self._busy += 1
                self._patient += urgency > Urgency.AHEAD
            try:
                job()
            except BaseException:
                log.exception("a job of a cache failed")
            finally:
                with self._changed:
                    self._busy -= 1
                    self._patient -= urgency > Urgency.AHEAD
                    self._changed.notify_all()
            del found, job  # they may hold a request
