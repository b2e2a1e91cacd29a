# SPDX-License-Identifier: MIT
"""The ways a queue's requests reach a target: one function for each dispatcher.

Each runs on the thread that opened the queue and returns when the kernel has taken every tag back.
"""

import errno
import logging
import os
import queue as queues
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

from pyublk._native import (
    IO,
    Handlers,
    MappedQueue,
    Mapper,
    Queue,
    become_io_flusher,
    process,
    this_thread,
)
from pyublk.errors import InternalError
from pyublk.mapped import MappedTarget
from pyublk.scheduling import NamedThread, keep_to, never_interrupt
from pyublk.target import FailureLog

log = logging.getLogger("pyublk.serving")

#: Seconds between two rounds of `refuse`.
ROUND = 0.01


def _stack(ident: int) -> traceback.StackSummary:
    """Where a thread is now; empty when it runs no Python."""
    return traceback.extract_stack(sys._current_frames().get(ident))


def _end_child(error: BaseException | None) -> None:
    """Ends a process that a handler forked, and that leaves the handler: what it came from is its
    parent's, and goes on there."""
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif error is not None:
        traceback.print_exception(error)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def serve_mapped(queue: Queue, target: MappedTarget, report: FailureLog) -> None:
    """The queue's ring does the I/O; Python is asked where the bytes are, if at all."""
    assert isinstance(queue, MappedQueue)
    mapper = None if target.map is None else Mapper(target, report)

    def leg_failed(leg: int, error: int, file_generation: int) -> None:
        try:
            target.leg_failed(leg, error, file_generation)
        except BaseException as raised:
            report.tell(raised, None, "leg_failed")

    queue.serve_mapped(mapper, leg_failed)


def refuse(queues: list[Queue]) -> list[Queue]:
    """Fails what these queues hold and what comes to them, without waiting. Returns those of which
    the kernel has not taken every tag back: again for these, after a ROUND.

    So a queue that nobody serves any more goes on for its clients, who get EIO at once, until the
    device is stopped. What cannot do even that is closed, which ends the I/O of the whole device.
    """
    left = []
    for queue in queues:
        queue.fail_held()
        with suppress(Exception):
            batch = queue.wait(0)
            if batch is not None:
                left.append(queue)
                for io in batch:
                    io.fail(errno.EIO)
    return left


def waker(servants: "list[QueueServer]") -> Callable[[], None]:
    """Wakes every queue of the servants that there will be."""

    def wake() -> None:
        for servant in servants:
            for queue in servant.queues:
                queue.wake()

    return wake


class WorkerPool:
    """Threads for handlers that block. They are daemons: one that hangs holds up no exit."""

    def __init__(self, handlers: Handlers, count: int, name: str) -> None:
        self._inbox: queues.SimpleQueue[IO | None] = queues.SimpleQueue()
        self._threads = [
            NamedThread(target=self._work, args=(handlers,), name=f"{name}-w{n}", daemon=True)
            for n in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self, handlers: Handlers) -> None:
        become_io_flusher()
        here = process()
        while True:
            try:
                if (io := self._inbox.get()) is None:
                    return
                handlers.answer_from_here(io)
            except BaseException as error:  # such as what another thread raises in this one
                if here != process():
                    _end_child(error)
                with suppress(BaseException):
                    log.exception("a worker lost its request, and goes on with the next")
            io = None  # kept, it would make the tag need a new one; dropped, it is answered

    def submit(self, io: IO) -> None:
        self._inbox.put(io)

    def close(self) -> None:
        """Lets the threads end when they are idle; does not wait for one that is not."""
        for _ in self._threads:
            self._inbox.put(None)

    def runs_here(self) -> bool:
        """Whether the caller is one of the threads."""
        return threading.current_thread() in self._threads

    def hanging(self) -> list[str]:
        """The stacks of the threads that are in a handler now."""
        stacks = [_stack(thread.ident) for thread in self._threads if thread.ident is not None]
        idle = self._work.__name__
        return ["".join(stack.format()) for stack in stacks if stack and stack[-1].name != idle]


def serve_with_workers(queue: Queue, pool: WorkerPool) -> None:
    """The queue's thread takes and commits, the pool's threads handle."""
    while (batch := queue.wait()) is not None:
        batch.reverse()
        while batch:  # what was submitted is only the pool's
            pool.submit(batch.pop())


class QueueServer:
    """Whoever serves some queues of a device: a thread, or an event loop that was there before.

    `primed` is set when every tag of these queues was fetched, or that failed, `ended` when they
    are closed. `failed` is called with what ended the serving by failure, `over` at the end.
    """

    def __init__(
        self,
        make_queues: Callable[[], list[Queue]],
        failed: Callable[[BaseException], None],
        over: Callable[[], None],
    ) -> None:
        self._make_queues = make_queues
        self._failed = failed
        self._over = over
        self.queues: list[Queue] = []
        self.primed = threading.Event()
        self.ended = threading.Event()
        self._process = process()
        self._thread = 0
        self._ident = 0

    def _open(self) -> None:
        self._thread = this_thread()
        self._ident = threading.get_ident()
        self.queues = self._make_queues()
        for queue in self.queues:
            queue.fetch()
        self.primed.set()

    def _close(self) -> None:
        for queue in self.queues:
            queue.close()
        self.primed.set()
        self.ended.set()
        self._over()

    def runs_here(self) -> bool:
        """Whether the caller is a handler: on the thread that serves."""
        return this_thread() == self._thread

    def holds(self) -> bool:
        """Whether requests are unanswered."""
        return any(queue.held for queue in self.queues)

    def holds_everything(self) -> bool:
        """Whether every request that some queue can carry is unanswered."""
        return any(queue.held == queue.depth for queue in self.queues)

    def stack(self) -> str:
        """Where the thread that serves is now."""
        return "".join(_stack(self._ident).format())


class ServingThread(QueueServer):
    """Queues served by `serve` on a thread of their own, kept to `cpus` if given.

    `preempt`: whether a request that comes may take the CPU from whoever runs on it.
    """

    def __init__(
        self,
        make_queues: Callable[[], list[Queue]],
        failed: Callable[[BaseException], None],
        over: Callable[[], None],
        serve: Callable[[list[Queue]], None],
        *,
        name: str,
        cpus: frozenset[int] | None,
        preempt: bool,
    ) -> None:
        super().__init__(make_queues, failed, over)
        # A daemon: a handler that hangs must not keep the process from ending.
        NamedThread(target=self._run, args=(serve, cpus, preempt), name=name, daemon=True).start()

    def _run(
        self, serve: Callable[[list[Queue]], None], cpus: frozenset[int] | None, preempt: bool
    ) -> None:
        failure: BaseException | None = None
        try:
            if cpus:
                keep_to(cpus)
            if not preempt:
                never_interrupt()
            self._open()
            serve(self.queues)
            if self._process == process() and refuse(self.queues):
                raise InternalError("a queue's thread returned before the kernel took its tags")
        except BaseException as error:
            failure = error
        if self._process != process():
            _end_child(failure)
        if failure is not None:
            self._failed(failure)
        try:
            left = self.queues if self.primed.is_set() else []
            while left := refuse(left):
                time.sleep(ROUND)
        finally:
            self._close()
            # The failure's traceback has this frame: both would wait for the collector.
            del failure, self, left
