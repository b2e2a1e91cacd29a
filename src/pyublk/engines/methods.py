# SPDX-License-Identifier: MIT
"""Targets with plain methods: called by the queues' threads, or by workers."""

import logging
import queue as queues
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from pyublk._native import IO, Handlers, Queue, become_io_flusher, process
from pyublk.engines.base import Engine, Setup
from pyublk.queue_servers import end_child, stack_of
from pyublk.scheduling import NamedThread

log = logging.getLogger("pyublk.workers")


class MethodsEngine(Engine):
    """Serves by `read`, `write` and the others, or by `handle`."""

    kind = "sync"
    _pool: "WorkerPool | None" = None

    def _can_have_workers(self) -> bool:
        return self.target.concurrency == "parallel"

    def begin(self, setup: Setup) -> None:
        self._handlers = Handlers(self.target, self.report)
        self._locks = self._make_locks(setup)
        count = self.target.workers if setup.workers is None else setup.workers
        if count and self._can_have_workers():
            self._pool = WorkerPool(self._handlers, count, setup.name)

    def _make_locks(self, setup: Setup) -> "list[threading.Lock | None]":
        """What a handler holds, for each queue, so that the target's promise is kept."""
        concurrency = self.target.concurrency
        if concurrency == "serial" and setup.queues * setup.threads > 1:
            return [threading.Lock()] * setup.queues
        if concurrency == "per_queue" and setup.threads > 1:
            return [threading.Lock() for _ in range(setup.queues)]
        return [None] * setup.queues

    def serve(self, queues: list[Queue]) -> None:
        queue = queues[0]
        if self._pool is None:
            queue.serve(self._handlers, self._locks[queue.id])
        else:
            serve_with_workers(queue, self._pool)

    def turns(self, queue: Queue) -> Callable[[], bool]:
        if self._pool is None:
            return partial(queue.turn, self._handlers, self._locks[queue.id])
        return partial(submit_to_workers, queue, self._pool, 0)

    async def answer(self, queue: Queue) -> None:
        if self._pool is None:
            self.serve([queue])
        else:
            for io in queue.wait() or ():
                self._pool.submit(io)

    def hanging(self) -> list[str]:
        return [] if self._pool is None else self._pool.hanging()

    def leave(self) -> None:
        if self._pool is not None:
            self._pool.close()

    def has_left(self) -> bool:
        return self._pool is None or self._pool.has_ended()

    def runs_here(self) -> bool:
        return self._pool is not None and self._pool.runs_here()

    def end(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def serve_with_workers(queue: Queue, pool: "WorkerPool") -> None:
    """The queue's thread takes and commits, the pool's threads handle."""
    while submit_to_workers(queue, pool):
        pass


def submit_to_workers(queue: Queue, pool: "WorkerPool", timeout: float | None = None) -> bool:
    """False: the kernel has taken every tag back."""
    if (batch := queue.wait(timeout)) is None:
        return False
    batch.reverse()
    while batch:  # what was submitted is only the pool's
        pool.submit(batch.pop())
    return True


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
                    end_child(error)
                with suppress(BaseException):
                    log.exception("a worker lost its request, and goes on with the next")
            io = None  # kept, it would make the tag need a new one; dropped, it is answered

    def submit(self, io: IO) -> None:
        self._inbox.put(io)

    def close(self) -> None:
        """Lets the threads end when they are idle; does not wait for one that is not."""
        for _ in self._threads:
            self._inbox.put(None)

    def has_ended(self) -> bool:
        """Whether every thread has."""
        return not any(thread.is_alive() for thread in self._threads)

    def runs_here(self) -> bool:
        """Whether the caller is one of the threads."""
        return threading.current_thread() in self._threads

    def hanging(self) -> list[str]:
        """The stacks of the threads that are in a handler now."""
        stacks = [stack_of(thread.ident) for thread in self._threads if thread.ident is not None]
        idle = self._work.__name__
        return ["".join(stack.format()) for stack in stacks if stack and stack[-1].name != idle]
