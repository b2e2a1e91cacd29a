# SPDX-License-Identifier: MIT
"""Targets with coroutines: queues served on an asyncio event loop.

Imported when a disk needs it: asyncio is half of what importing pyublk would cost.
"""

import asyncio
import contextvars
import inspect
import logging
import selectors
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from pyublk._native import Dispatcher, Handlers, Queue
from pyublk.engines.base import Engine, Setup
from pyublk.engines.loops import LoopThread, end_other_tasks, serving_loop
from pyublk.interruptions import run_shielded
from pyublk.queue_servers import ROUND, QueueServer, ServingTask, TagSet, refuse
from pyublk.target import Target

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

log = logging.getLogger("pyublk.loops")


class RingSelector(selectors.BaseSelector):
    """What an event loop of our own sleeps in: its queue's ring, which watches all else.

    Other descriptors (the user's, the loop's own) are in an epoll, and that is one descriptor to
    the ring. Requests are handled here, and asyncio runs only when it has something to do.
    """

    def __init__(self) -> None:
        self._others = selectors.EpollSelector()
        self._sleep: Callable[[int, float | None], bool] | None = None

    def sleep_by(self, sleep: Callable[[int, float | None], bool] | None) -> None:
        """From now on by `sleep`: called with the epoll's descriptor and the seconds, it returns
        whether the epoll has something. None: in the epoll."""
        self._sleep = sleep

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self._sleep is None:
            return self._others.select(timeout)
        return self._others.select(0) if self._sleep(self._others.fileno(), timeout) else []

    def register(
        self, fileobj: "FileDescriptorLike", events: int, data: Any = None
    ) -> selectors.SelectorKey:
        return self._others.register(fileobj, events, data)

    def unregister(self, fileobj: "FileDescriptorLike") -> selectors.SelectorKey:
        return self._others.unregister(fileobj)

    def modify(
        self, fileobj: "FileDescriptorLike", events: int, data: Any = None
    ) -> selectors.SelectorKey:
        return self._others.modify(fileobj, events, data)

    def get_map(self) -> "Mapping[FileDescriptorLike, selectors.SelectorKey]":
        return self._others.get_map()

    def close(self) -> None:
        self._others.close()


#: Batches that one turn takes from a queue before the loop's other callbacks have theirs.
BATCHES = 4


class AsyncServer:
    """Serves queues on the running event loop: requests finish in any order.

    The commits of one turn go together.
    """

    def __init__(self, handlers: Handlers) -> None:
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()  # what requests see, not one what another did
        self._dispatcher = Dispatcher(handlers, self._loop, self._flush_soon)
        self._ended: dict[Queue, asyncio.Future[None]] = {}
        self._rings: dict[Queue, RingSelector] = {}
        self._flushing: set[Queue] = set()

    def attach(self, queue: Queue, selector: RingSelector | None = None) -> "asyncio.Future[None]":
        """Serves a fetched queue from now on; the future ends with it.

        The loop sleeps in it when it has that `selector`, else it watches the queue's descriptor.
        """
        self._ended[queue] = self._loop.create_future()
        if selector is not None:
            self._rings[queue] = selector
            selector.sleep_by(partial(self._sleep, queue))
        else:
            self._loop.add_reader(queue.fileno(), self._turn, queue)
            self._loop.call_soon(self._turn, queue)
        return self._ended[queue]

    def detach(self, queue: Queue, error: BaseException | None = None) -> None:
        """Stops watching a queue, before it is closed."""
        future = self._ended.pop(queue, None)
        if future is None:
            return
        if (selector := self._rings.pop(queue, None)) is not None:
            selector.sleep_by(None)
        else:
            self._loop.remove_reader(queue.fileno())
        if future.done():  # the loop was told to end
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(None)

    def _sleep(self, queue: Queue, others: int, timeout: float | None) -> bool:
        """Sleeps in the queue's ring until the loop has something to do."""
        try:
            readable = self._dispatcher.sleep(queue, others, timeout)
        except Exception as error:
            self.detach(queue, error)
            return True
        if readable is None:
            self.detach(queue)
        return readable is not False

    def _turn(self, queue: Queue) -> None:
        """Submits what was committed, and takes and begins what has come."""
        self._flushing.discard(queue)
        if queue not in self._ended:
            return
        try:
            for _ in range(BATCHES):
                there = self._dispatcher.turn(queue)
                if not there:
                    break
        except Exception as error:
            self.detach(queue, error)
            return
        if there is None:
            self.detach(queue)
        elif there:
            self._flush_soon(queue)

    def _flush_soon(self, queue: Queue) -> None:
        if queue not in self._flushing and queue not in self._rings:
            self._flushing.add(queue)
            self._loop.call_soon(self._flush, queue, context=self._context)

    def _flush(self, queue: Queue) -> None:
        """A turn for commits, unless a turn that came before has taken them along."""
        if queue in self._flushing:
            self._turn(queue)

    def hanging(self) -> list[str]:
        """The stacks of the coroutines that have not answered yet. [any thread]"""
        return [_stack_of_coroutine(coroutine) for coroutine in self._dispatcher.waiting()]

    def cancel_held(self) -> None:
        """Cancels every coroutine that still runs; its request fails with EIO. [any thread]"""

        def cancel() -> None:
            for task in self._dispatcher.tasks():
                task.cancel()

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(cancel)

    async def end_held(self) -> None:
        """Cancels every coroutine that still runs, and waits for its end."""
        tasks = self._dispatcher.tasks()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _stack_of_coroutine(coroutine: object) -> str:
    """Where it waits, from the outside in; a task tells only its outermost frame."""
    frames = []
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        frames.append((frame, frame.f_lineno))
        coroutine = getattr(coroutine, "cr_await", None)
    return "".join(traceback.StackSummary.extract(iter(frames)).format())


class LoopProvider:
    """Serves tasks on the running event loop."""

    def __init__(self, server: AsyncServer) -> None:
        self._server = server

    def begin(self, task: ServingTask) -> QueueServer:
        return ServingLoop(task, self._server)


class ServingLoop(QueueServer):
    """Queues served on the running event loop."""

    def __init__(self, task: ServingTask, server: AsyncServer) -> None:
        super().__init__(task)
        self._loop = asyncio.get_running_loop()
        try:
            self._open()
        except BaseException as error:
            task.failed(error)
            self._close()
            return
        done = asyncio.gather(*map(server.attach, self.queues))
        done.add_done_callback(self._finish)

    def runs_here(self) -> bool:
        # The thread is the user's: it serves only while its loop runs.
        return super().runs_here() and asyncio._get_running_loop() is not None

    def _finish(self, done: "asyncio.Future[list[None]]") -> None:
        if not done.cancelled() and (error := done.exception()) is not None:
            self._task.failed(error)
        self._refuse(self.queues)

    def _refuse(self, queues: list[Queue]) -> None:
        if left := refuse(queues):
            self._loop.call_later(ROUND, self._refuse, left)
        else:
            self._close()


class TargetLoop:
    """The event loop that serves an async target, or the first of several, from before the target's
    `open` until after its `close`. Both are awaited on it.

    It is `callers`, which runs anyway, or one of our own, which runs while somebody uses it: first
    `open`, then the thread that serves, then `close`.
    """

    def __init__(self, callers: asyncio.AbstractEventLoop | None = None) -> None:
        self._callers = callers
        self._context = contextvars.copy_context()  # of `open`, the queues and `close`
        self._runner = asyncio.Runner(loop_factory=self._make)
        self._loop = callers or self._runner.get_loop()
        self._task: asyncio.Task[Any] | None = None
        self._given_up = False

    def _make(self) -> asyncio.AbstractEventLoop:
        self.selector = RingSelector()
        return serving_loop(self.selector)

    def serve(self, main: Coroutine[Any, Any, None]) -> None:
        """Runs `main` on a loop of our own, on this thread, until it ends."""
        try:
            self._runner.run(main, context=self._context)
        finally:
            if self._given_up:
                self._close_own()

    def call(self, step: Callable[[], object]) -> None:
        """Calls it; when that gives an awaitable, it is awaited on the loop. Not on a thread on
        which the caller's loop runs."""
        outcome = step()
        if not inspect.isawaitable(outcome):
            return
        loop = self._loop
        if loop.is_closed() or (self._callers is None and loop.is_running()):
            if inspect.iscoroutine(outcome):
                outcome.close()
            name = getattr(step, "__qualname__", step)
            log.warning("%s is not awaited: its event loop has ended, or hangs", name)
        elif loop.is_running():
            asyncio.run_coroutine_threadsafe(self._await(outcome), loop).result()
        else:
            # Not on this thread, on which another loop may run.
            run = self._run_on_own if self._callers is None else loop.run_until_complete
            run_shielded(partial(run, self._await(outcome)), self.cancel)

    async def _await(self, outcome: Awaitable[object]) -> None:
        self._task = asyncio.current_task()
        try:
            await outcome
        finally:
            self._task = None

    def cancel(self) -> None:
        """Cancels what `call` waits for, if it does. [any thread]"""
        task = self._task
        if task is not None:
            self._loop.call_soon_threadsafe(task.cancel)

    def close(self) -> None:
        """The end of a loop of our own; what still runs there is cancelled."""
        if self._callers is not None:
            return
        self._given_up = self._loop.is_running()  # then it is closed once it comes to its end
        if not self._given_up:
            run_shielded(self._close_own, lambda: None)

    def _run_on_own(self, main: Coroutine[Any, Any, None]) -> None:
        """Runs it to its end on a loop of our own, whatever else ends the loop before."""
        done: list[asyncio.Task[None]] = []

        def stop(task: asyncio.Task[None]) -> None:
            done.append(task)
            self._loop.stop()

        self._loop.create_task(main, context=self._context).add_done_callback(stop)
        while not done:  # whatever else stops it
            run_on(self._loop)
        done[0].result()

    def _close_own(self) -> None:
        self._run_on_own(end_other_tasks())
        with _logged_exits():
            self._runner.close()


def run_on(loop: asyncio.AbstractEventLoop) -> None:
    """Runs a loop until it is stopped, or a callback of it raises: that is logged, and not raised,
    though asyncio lets SystemExit and KeyboardInterrupt through."""
    with _logged_exits():
        loop.run_forever()


@contextmanager
def _logged_exits() -> Iterator[None]:
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as error:
        log.error("a callback on a target's event loop raised", exc_info=error)


class CoroutinesEngine(Engine):
    """Serves by methods that are coroutines, on the running event loop or on loops of its own."""

    kind = "async"
    needs_loop = True

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._servers: list[AsyncServer] = []
        self._first: TargetLoop | None = None
        self._selector: RingSelector | None = None
        self._below: LoopThread | None = None

    def check(
        self, *, threads: int = 1, workers: int | None = None, shared_memory: bool = False
    ) -> None:
        super().check(threads=threads, workers=workers, shared_memory=shared_memory)
        if threads > 1:
            raise ValueError(
                f"threads={threads} needs a target without coroutines, which one event loop runs; "
                f"{type(self.target).__name__} is async"
            )

    # ---- the target's own beginning and end ----

    def prepare(self, *, on_this_loop: bool) -> None:
        self._first = TargetLoop(asyncio.get_running_loop() if on_this_loop else None)

    def cancel_opening(self) -> None:
        if self._first is not None:
            self._first.cancel()

    def close(self, *, opened: bool) -> None:
        try:
            super().close(opened=opened)
        finally:
            if self._first is not None:
                self._first.close()

    def _call(self, step: Callable[[], object]) -> None:
        assert self._first is not None
        self._first.call(step)

    async def call(self, step: Callable[[], object]) -> None:
        outcome = step()
        if inspect.isawaitable(outcome):
            await outcome

    # ---- below a layer ----

    def blocking_methods(self) -> Mapping[str, Callable[..., Any]]:
        below = self._below = LoopThread("ublk-below")
        return {name: below.blocking(method) for name, method in self.methods().items()}

    def open_below(self) -> Awaitable[None] | None:
        if self._below is None:
            return self.target.open()
        self._below.begin()
        try:
            self._below.blocking(self.target.open)()
        except BaseException:
            self._below.end()
            raise
        return None

    def close_below(self) -> Awaitable[None] | None:
        if self._below is None:
            return self.target.close()
        try:
            self._below.blocking(self.target.close)()
        finally:
            self._below.end()
        return None

    # ---- serving ----

    def groups(self, tag_sets: list[TagSet]) -> list[list[TagSet]]:
        return [tag_sets] if self.target.concurrency == "serial" else super().groups(tag_sets)

    def begin(self, setup: Setup) -> None:
        self._handlers = Handlers(self.target, self.report)
        self._servers.clear()

    def loop_provider(self) -> LoopProvider:
        return LoopProvider(self._new_server())

    def _new_server(self) -> AsyncServer:
        server = AsyncServer(self._handlers)
        self._servers.append(server)
        return server

    def serve(self, queues: list[Queue]) -> None:
        """On an event loop of its own; with the first queue it is that of the target's `open`,
        which goes on afterwards."""
        first = self._first
        assert first is not None
        loop = first if queues[0].id == 0 else TargetLoop()

        async def main() -> None:
            server = self._new_server()
            try:
                if len(queues) == 1:
                    await server.attach(queues[0], loop.selector)
                else:
                    await asyncio.gather(*map(server.attach, queues))
            finally:
                await server.end_held()

        try:
            loop.serve(main())
        finally:
            if loop is not first:
                loop.close()

    # ---- without a kernel ----

    def make_runner(self) -> asyncio.Runner:
        self._selector = selector = RingSelector()
        return asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector))

    def attach(self, queue: Queue) -> None:
        self._new_server().attach(queue, self._selector)

    async def answer(self, queue: Queue) -> None:
        await asyncio.sleep(0)

    async def detach(self, queue: Queue) -> None:
        for server in self._servers:
            server.detach(queue)
            await server.end_held()
        self._servers.clear()

    # ---- what hangs ----

    def waiting(self) -> list[str]:
        return [stack for server in self._servers for stack in server.hanging()]

    def cancel(self) -> None:
        for server in self._servers:
            server.cancel_held()

    def leave(self) -> None:
        self.cancel()

    def has_left(self) -> bool:
        return not self.waiting()
