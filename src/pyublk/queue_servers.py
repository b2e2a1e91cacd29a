# SPDX-License-Identifier: MIT
"""Whoever serves some queues of a disk: a thread, or an event loop that was there before."""

import errno
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from pyublk._native import Buffers, Queue, process, this_thread
from pyublk.errors import InternalError
from pyublk.scheduling import NamedThread, keep_to, never_interrupt

#: Seconds between two rounds of `refuse`.
ROUND = 0.01


@dataclass(frozen=True, slots=True)
class TagSet:
    """What one thread serves: every `step`th tag of a queue, from `first` on.

    With batch I/O any of the tags may come to it, so the threads of a queue share its buffers.
    """

    queue: int
    first: int
    step: int
    buffers: Buffers | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingTask:
    """Queues to be served, one by one or together, by whoever takes the task.

    `make_queues` and then `serve`, which returns when the kernel has taken every tag back, are
    called on one thread, kept to `cpus` if given. `failed` is told what ended the serving by
    failure, `ended` is called at the end. Who serves other tasks beside takes turns instead (see
    `Engine.turns`).
    """

    name: str
    make_queues: Callable[[], list[Queue]]
    serve: Callable[[list[Queue]], None]
    turns: Callable[[Queue], Callable[[], bool]]
    cpus: frozenset[int] | None
    failed: Callable[[BaseException], None]
    ended: Callable[[], None]


class QueueServer:
    """Has taken a task, and serves its queues.

    `primed` is set when every tag of these queues was fetched, or that failed, `ended` when they
    are closed.
    """

    def __init__(self, task: ServingTask) -> None:
        self._task = task
        self.queues: list[Queue] = []
        self.primed = threading.Event()
        self.ended = threading.Event()
        self._process = process()
        self._thread = 0
        self._ident = 0

    def _open(self) -> None:
        self._thread = this_thread()
        self._ident = threading.get_ident()
        self.queues = self._task.make_queues()
        for queue in self.queues:
            queue.fetch()
        self.primed.set()

    def _close(self) -> None:
        for queue in self.queues:
            queue.close()
        self.primed.set()
        self.ended.set()
        self._task.ended()

    def runs_here(self) -> bool:
        """Whether the caller is a handler: on the thread that serves."""
        return this_thread() == self._thread

    def holds(self) -> bool:
        """Whether requests are unanswered."""
        return any(queue.held for queue in self.queues)

    def holds_everything(self) -> bool:
        """Whether every request that some queue can carry is unanswered."""
        return any(queue.held == queue.depth for queue in self.queues)

    def sever(self) -> None:
        """Cuts the thread that serves, which hangs, off from these queues."""
        for queue in self.queues:
            queue.sever()

    def leave(self) -> None:
        """Has the queues closed whatever the kernel has of them, which gives it to the next
        server. A handler that runs ends first, but its answer may come too late. [any thread]"""
        self.sever()

    def stack(self) -> str:
        """Where the thread that serves is now."""
        return "".join(stack_of(self._ident).format())


class ThreadProvider(Protocol):
    """Who provides the threads that serve queues."""

    def begin(self, task: ServingTask) -> QueueServer:
        """Has the task's queues made and served from now on."""


class OwnThreads:
    """A thread of its own for each task.

    `preempt`: whether a request that comes may take the CPU from whoever runs on it.
    """

    def __init__(self, *, preempt: bool) -> None:
        self._preempt = preempt

    def begin(self, task: ServingTask) -> QueueServer:
        return ServingThread(task, preempt=self._preempt)


class ServingThread(QueueServer):
    """A thread that serves its task's queues, and nothing else."""

    def __init__(self, task: ServingTask, *, preempt: bool) -> None:
        super().__init__(task)
        # A daemon: a handler that hangs must not keep the process from ending.
        NamedThread(target=self._run, args=(preempt,), name=task.name, daemon=True).start()

    def _run(self, preempt: bool) -> None:
        task = self._task
        failure: BaseException | None = None
        try:
            if task.cpus:
                keep_to(task.cpus)
            if not preempt:
                never_interrupt()
            self._open()
            task.serve(self.queues)
            if self._process == process() and refuse(self.queues):
                raise InternalError("a queue's thread returned before the kernel took its tags")
        except BaseException as error:
            failure = error
        if self._process != process():
            end_child(failure)
        if failure is not None:
            task.failed(failure)
        try:
            left = self.queues if self.primed.is_set() else []
            while left := refuse(left):
                time.sleep(ROUND)
        finally:
            self._close()
            # The failure's traceback has this frame: both would wait for the collector.
            del failure, self, left, task


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


def stack_of(ident: int) -> traceback.StackSummary:
    """Where a thread is now; empty when it runs no Python."""
    return traceback.extract_stack(sys._current_frames().get(ident))


def end_child(error: BaseException | None) -> None:
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
