# SPDX-License-Identifier: MIT
"""The ways a queue's requests reach a target: one function for each dispatcher.

Each runs on the thread that opened the queue and returns when the kernel has taken every tag back.
"""

import asyncio
import os
import queue as queues
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine
from typing import Any

from pyublk._native import IO, Handlers, MappedQueue, Planner, Queue
from pyublk.mapped import MappedTarget


def _stack(ident: int) -> traceback.StackSummary:
    """Where a thread is now; empty when it runs no Python."""
    return traceback.extract_stack(sys._current_frames().get(ident))


def serve_mapped(queue: Queue, target: MappedTarget, report: Callable[[object, IO], int]) -> None:
    """The queue's ring does the I/O; Python is asked where the bytes are, if at all."""
    assert isinstance(queue, MappedQueue)
    planner = None if target.map is None else Planner(target, report)
    queue.serve_mapped(planner, target.leg_failed)


def waker(servants: "list[Servant]") -> Callable[[], None]:
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
            threading.Thread(
                target=self._work, args=(handlers,), name=f"{name}-worker-{n}", daemon=True
            )
            for n in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self, handlers: Handlers) -> None:
        while (io := self._inbox.get()) is not None:
            handlers.answer_from_here(io)
            del io  # kept, it would make the tag need a new one

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
        for io in batch:
            pool.submit(io)
        del batch[:]


class AsyncServer:
    """Serves queues on one event loop: requests finish in any order.

    The loop watches each queue's descriptor. The commits of one turn go together.
    """

    def __init__(self, handlers: Handlers, report: Callable[[object, IO], int]) -> None:
        self._handlers = handlers
        self._report = report
        self._loop = asyncio.get_running_loop()
        self._ended: dict[Queue, asyncio.Future[None]] = {}
        self._flushing: set[Queue] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def attach(self, queue: Queue) -> "asyncio.Future[None]":
        """Serves a fetched queue from now on; the future ends with it."""
        self._ended[queue] = self._loop.create_future()
        self._loop.add_reader(queue.fileno(), self._turn, queue)
        self._loop.call_soon(self._turn, queue)
        return self._ended[queue]

    def detach(self, queue: Queue, error: BaseException | None = None) -> None:
        """Stops watching a queue, before it is closed."""
        future = self._ended.pop(queue, None)
        if future is None:
            return
        self._loop.remove_reader(queue.fileno())
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(None)

    def _turn(self, queue: Queue) -> None:
        """Submits what was committed and takes what has come."""
        self._flushing.discard(queue)
        if queue not in self._ended:
            return
        try:
            batch = queue.wait(0)
        except Exception as error:
            self.detach(queue, error)
            return
        if batch is None:
            self.detach(queue)
            return
        for io in batch:
            task = self._loop.create_task(self._answer(queue, io))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _flush(self, queue: Queue) -> None:
        """A turn for commits, unless a turn that came before has taken them along."""
        if queue in self._flushing:
            self._turn(queue)

    async def _answer(self, queue: Queue, io: IO) -> None:
        error = 0
        try:
            handler: Coroutine[Any, Any, object] = self._handlers.start(io)
            outcome = await handler
            if outcome is not None:
                error = self._report(outcome, io)
        except asyncio.CancelledError:
            error = self._report(OSError(5, "cancelled"), io)
        except BaseException as raised:
            error = self._report(raised, io)
        if not io.completed and not io.deferred:
            if error:
                io.fail(error)
            else:
                io.complete()
        if queue not in self._flushing:
            self._flushing.add(queue)
            self._loop.call_soon(self._flush, queue)

    def hanging(self) -> list[str]:
        """The stacks of the coroutines that have not answered yet. [any thread]"""
        return [_stack_of_coroutine(task.get_coro()) for task in list(self._tasks)]

    def cancel_held(self) -> None:
        """Cancels every coroutine that still runs; its request fails with EIO. [any thread]"""

        def cancel() -> None:
            for task in self._tasks:
                task.cancel()

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(cancel)


def _stack_of_coroutine(coroutine: object) -> str:
    """Where it waits, from the outside in; a task tells only its outermost frame."""
    frames = []
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        frames.append((frame, frame.f_lineno))
        coroutine = getattr(coroutine, "cr_await", None)
    return "".join(traceback.StackSummary.extract(iter(frames)).format())


class Servant:
    """Whoever serves some queues of a device: a thread, or an event loop that was there before.

    `primed` is set when every tag of these queues was fetched, `ended` when they are closed; a
    failure before either is in `error`, and sets both.
    """

    def __init__(self, make_queues: Callable[[], list[Queue]], ended: threading.Event) -> None:
        self._make_queues = make_queues
        self._device_ended = ended
        self.queues: list[Queue] = []
        self.error: BaseException | None = None
        self.primed = threading.Event()
        self.ended = threading.Event()
        self._thread_id = 0

    def _open(self) -> None:
        self._thread_id = threading.get_ident()
        self.queues = self._make_queues()
        for queue in self.queues:
            queue.fetch()
        self.primed.set()

    def _close(self, error: BaseException | None = None) -> None:
        self.error = self.error or error
        for queue in self.queues:
            queue.close()
        self.primed.set()
        self.ended.set()
        self._device_ended.set()

    def runs_here(self) -> bool:
        """Whether the caller is a handler: on the thread that serves."""
        return threading.get_ident() == self._thread_id

    def holds(self) -> bool:
        """Whether requests are unanswered."""
        return any(queue.held for queue in self.queues)

    def stack(self) -> str:
        """Where the thread that serves is now."""
        return "".join(_stack(self._thread_id).format())


class ServingThread(Servant):
    """Queues served by `serve` on a thread of their own, kept to `cpus` if given."""

    def __init__(
        self,
        make_queues: Callable[[], list[Queue]],
        ended: threading.Event,
        serve: Callable[[list[Queue]], None],
        *,
        name: str,
        cpus: frozenset[int] | None,
    ) -> None:
        super().__init__(make_queues, ended)
        # A daemon: a handler that hangs must not keep the process from ending.
        self._thread = threading.Thread(
            target=self._run, args=(serve, cpus), name=name, daemon=True
        )
        self._thread.start()

    def _run(self, serve: Callable[[list[Queue]], None], cpus: frozenset[int] | None) -> None:
        error: BaseException | None = None
        try:
            if cpus:
                _keep_to(cpus)
            self._open()
            serve(self.queues)
        except BaseException as raised:
            error = raised
        self._close(error)


def _keep_to(cpus: frozenset[int]) -> None:
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        raise OSError(
            error.errno,
            f"a queue's thread cannot be kept to CPUs {sorted(cpus)}: {error.strerror}; this "
            f"process may use {sorted(os.sched_getaffinity(0))}",
        ) from None


class ServingLoop(Servant):
    """Queues served on the running event loop."""

    def __init__(
        self,
        make_queues: Callable[[], list[Queue]],
        ended: threading.Event,
        server: AsyncServer,
    ) -> None:
        super().__init__(make_queues, ended)
        try:
            self._open()
        except BaseException as error:
            self._close(error)
            return
        done = asyncio.gather(*map(server.attach, self.queues))
        done.add_done_callback(self._finish)

    def runs_here(self) -> bool:
        # The thread is the user's: it serves only while its loop runs.
        return super().runs_here() and asyncio._get_running_loop() is not None

    def _finish(self, done: "asyncio.Future[list[None]]") -> None:
        self._close(None if done.cancelled() else done.exception())


def serve_on_own_loop(
    queues: list[Queue],
    handlers: Handlers,
    report: Callable[[object, IO], int],
    servers: list[AsyncServer],
) -> None:
    """An event loop for these queues on the calling thread; its server is added to `servers`."""

    async def main() -> None:
        server = AsyncServer(handlers, report)
        servers.append(server)
        await asyncio.gather(*map(server.attach, queues))

    asyncio.run(main())
