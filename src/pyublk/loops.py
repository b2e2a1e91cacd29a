# SPDX-License-Identifier: MIT
"""Queues served on an asyncio event loop.

Imported when a disk needs it: asyncio is half of what importing pyublk would cost.
"""

import asyncio
import contextvars
import selectors
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from pyublk._native import Dispatcher, Handlers, Queue
from pyublk.serving import ROUND, Servant, refuse

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike


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

    def hand_over(self) -> None:
        """Makes every coroutine that still runs a task, which the end of the loop cancels."""
        self._dispatcher.tasks()


def _stack_of_coroutine(coroutine: object) -> str:
    """Where it waits, from the outside in; a task tells only its outermost frame."""
    frames = []
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        frames.append((frame, frame.f_lineno))
        coroutine = getattr(coroutine, "cr_await", None)
    return "".join(traceback.StackSummary.extract(iter(frames)).format())


class ServingLoop(Servant):
    """Queues served on the running event loop."""

    def __init__(
        self,
        make_queues: Callable[[], list[Queue]],
        failed: Callable[[BaseException], None],
        over: Callable[[], None],
        server: AsyncServer,
    ) -> None:
        super().__init__(make_queues, failed, over)
        self._loop = asyncio.get_running_loop()
        try:
            self._open()
        except BaseException as error:
            failed(error)
            self._close()
            return
        done = asyncio.gather(*map(server.attach, self.queues))
        done.add_done_callback(self._finish)

    def runs_here(self) -> bool:
        # The thread is the user's: it serves only while its loop runs.
        return super().runs_here() and asyncio._get_running_loop() is not None

    def _finish(self, done: "asyncio.Future[list[None]]") -> None:
        if not done.cancelled() and (error := done.exception()) is not None:
            self._failed(error)
        self._refuse(self.queues)

    def _refuse(self, queues: list[Queue]) -> None:
        if left := refuse(queues):
            self._loop.call_later(ROUND, self._refuse, left)
        else:
            self._close()


def serve_on_own_loop(queues: list[Queue], handlers: Handlers, servers: list[AsyncServer]) -> None:
    """An event loop for these queues on the calling thread; its server is added to `servers`."""
    selector = RingSelector()

    async def main() -> None:
        server = AsyncServer(handlers)
        servers.append(server)
        try:
            if len(queues) == 1:
                await server.attach(queues[0], selector)
            else:
                await asyncio.gather(*map(server.attach, queues))
        finally:
            server.hand_over()

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        runner.run(main())
