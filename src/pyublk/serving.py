# SPDX-License-Identifier: MIT
"""The ways a queue's requests reach a target: one function for each dispatcher.

Each runs on the thread that opened the queue and returns when the kernel has taken every tag back.
"""

import queue as queues
import sys
import threading
import traceback
from collections.abc import Callable

from pyublk._native import IO, Handlers, MappedQueue, Planner, Queue, become_io_flusher
from pyublk.mapped import MappedTarget
from pyublk.scheduling import keep_to, never_interrupt


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
        become_io_flusher()
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

    def holds_everything(self) -> bool:
        """Whether every request that some queue can carry is unanswered."""
        return any(queue.held == queue.depth for queue in self.queues)

    def stack(self) -> str:
        """Where the thread that serves is now."""
        return "".join(_stack(self._thread_id).format())


class ServingThread(Servant):
    """Queues served by `serve` on a thread of their own, kept to `cpus` if given.

    `preempt`: whether a request that comes may take the CPU from whoever runs on it.
    """

    def __init__(
        self,
        make_queues: Callable[[], list[Queue]],
        ended: threading.Event,
        serve: Callable[[list[Queue]], None],
        *,
        name: str,
        cpus: frozenset[int] | None,
        preempt: bool,
    ) -> None:
        super().__init__(make_queues, ended)
        # A daemon: a handler that hangs must not keep the process from ending.
        self._thread = threading.Thread(
            target=self._run, args=(serve, cpus, preempt), name=name, daemon=True
        )
        self._thread.start()

    def _run(
        self, serve: Callable[[list[Queue]], None], cpus: frozenset[int] | None, preempt: bool
    ) -> None:
        error: BaseException | None = None
        try:
            if cpus:
                keep_to(cpus)
            if not preempt:
                never_interrupt()
            self._open()
            serve(self.queues)
        except BaseException as raised:
            error = raised
        self._close(error)
