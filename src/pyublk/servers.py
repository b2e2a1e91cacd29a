# SPDX-License-Identifier: MIT
"""Threads that serve the queues of many disks.

A thread for each queue of each disk costs memory, even if it is idle. Here a few threads wait for
requests of all their queues (`QueueSet`), and serve those that have some in turn.
"""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pyublk import errors
from pyublk._native import Queue, QueueSet, process
from pyublk.arguments import whole
from pyublk.errors import InternalError
from pyublk.queue_servers import ROUND, QueueServer, ServingTask, end_child, refuse
from pyublk.scheduling import NamedThread, never_interrupt

if TYPE_CHECKING:  # event loops are for disks that need one
    import asyncio

#: More are no use to any machine.
MOST_THREADS = 1024


class Servers:
    """Threads that serve many disks: `Device(target, on=servers)`.

    ::

        with pyublk.Servers(threads=2) as servers:
            disks = [pyublk.Device(Ram(size=1 << 30), on=servers) for _ in range(1000)]
            for disk in disks:
                disk.start()

    Each queue goes to the thread that has the fewest. Disks can be started and stopped while others
    run. A slow handler delays every disk of its thread. One that hangs is given up when its own
    disk is stopped, but the thread's other disks hang until it returns. Disks with coroutines share
    one event loop, on one more thread.

    Args:
        threads: the number of threads.
        preempt: as for `Device`, whose own `preempt` is ignored.
    """

    def __init__(self, threads: int = 1, *, preempt: bool = False) -> None:
        if not 1 <= whole("threads", threads) <= MOST_THREADS:
            raise ValueError(f"threads must be 1 to {MOST_THREADS}, not {threads}")
        self._process = process()
        self._lock = threading.Lock()
        self._closed = False
        self._preempt = preempt
        self._threads = [_SharedThread(f"ublk-servers-{n}", preempt) for n in range(threads)]
        self._loop: _LoopThread | None = None
        self._on_loop = 0  # disks

    def begin(self, task: ServingTask) -> QueueServer:
        """Has the task's queues made and served by one of the threads."""
        with self._lock:
            self._check()
            return min(self._threads, key=len).begin(task)

    def _check(self) -> None:
        if self._process != process():
            raise errors.forked_error(self._process)
        if self._closed:
            raise errors.DeviceClosed("these servers are closed: they serve no disk any more")

    def loop(self) -> "asyncio.AbstractEventLoop":
        """The event loop of the disks with coroutines; it runs from now on."""
        with self._lock:
            self._check()
            if self._loop is None:
                self._loop = _LoopThread("ublk-servers-loop", self._preempt)
            return self._loop.loop

    def enter_loop(self) -> None:
        """One disk more is on the event loop."""
        with self._lock:
            self._on_loop += 1

    def leave_loop(self) -> None:
        """One less."""
        with self._lock:
            self._on_loop -= 1

    def __len__(self) -> int:
        """The number of queues, and of disks with coroutines, that are served now."""
        return sum(map(len, self._threads)) + self._on_loop

    def close(self) -> None:
        """Ends the threads; closing twice is allowed. Refused (RuntimeError) while a disk is open
        on them: stop the disks first."""
        if self._process != process():
            return
        with self._lock:
            names = [name for thread in self._threads for name in thread.names()]
            names += [f"{self._on_loop} on the event loop"] * bool(self._on_loop)
            if names:
                shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
                raise RuntimeError(
                    f"these servers still serve {len(self)} queue(s) ({shown}): stop their disks "
                    "first"
                )
            self._closed = True
        for thread in self._threads:
            thread.end()
        if self._loop is not None:
            self._loop.end()
            self._loop = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with nullcontext() if kind is None else suppress(RuntimeError):  # what came first is told
            self.close()

    def __del__(self) -> None:
        # Whatever is served holds this one by its Device.
        if not getattr(self, "_closed", True):
            with suppress(RuntimeError):
                self.close()


class _LoopThread:
    """An event loop for disks with coroutines, on a thread of its own. It holds no `Servers`."""

    def __init__(self, name: str, preempt: bool) -> None:
        from pyublk.engines.loops import serving_loop

        self.loop = serving_loop()
        self._preempt = preempt
        self._over = False
        self._thread = NamedThread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        from pyublk.engines.coroutines import run_on

        if not self._preempt:
            never_interrupt()
        while not self._over:  # a callback that ends the loop ends no disk
            run_on(self.loop)

    def end(self) -> None:
        import asyncio

        asyncio.run_coroutine_threadsafe(self.loop.shutdown_default_executor(), self.loop).result()
        self._over = True
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class SharedServer(QueueServer):
    """Queues of one task, served by a thread that has others too."""

    def __init__(self, task: ServingTask, thread: "_SharedThread") -> None:
        super().__init__(task)
        self.task = task
        self.left: list[Queue] = []  # of which the kernel has tags
        self.severed = False
        self.leaving = False
        self._shared = thread

    def open(self) -> None:
        """On the thread."""
        self._open()
        self.left = list(self.queues)

    def close(self) -> None:
        self._close()

    def sever(self) -> None:
        super().sever()
        self.severed = True
        self._shared.look_again()

    def leave(self) -> None:
        self.leaving = True
        self._shared.look_again()


class _SharedThread:
    """One thread, and what it sleeps in. It holds no `Servers`."""

    def __init__(self, name: str, preempt: bool) -> None:
        self._process = process()
        self._preempt = preempt
        self._servers: list[SharedServer] = []  # those that came, until they are closed
        self._lock = threading.Lock()  # guards it, and `_new`
        self._new: deque[SharedServer] = deque()
        self._turns: dict[Queue, tuple[SharedServer, Callable[[], bool]]] = {}
        self._refusing: list[SharedServer] = []
        self._changed = False  # some server is severed, or leaves
        self._over = False
        self._ready = threading.Event()
        self._queues: QueueSet | None = None
        self._failure: BaseException | None = None
        self._thread = NamedThread(target=self._run, name=name, daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def __len__(self) -> int:
        with self._lock:
            return len(self._servers)

    def names(self) -> list[str]:
        """What it serves."""
        with self._lock:
            return [server.task.name for server in self._servers]

    def begin(self, task: ServingTask) -> QueueServer:
        server = SharedServer(task, self)
        with self._lock:
            self._servers.append(server)
            self._new.append(server)
        self.wake()
        return server

    def look_again(self) -> None:
        self._changed = True
        self.wake()

    def wake(self) -> None:
        if self._queues is not None:
            self._queues.wake()

    def end(self) -> None:
        self._over = True
        self.wake()
        self._thread.join()

    # ---- on the thread ----

    def _run(self) -> None:
        try:
            if not self._preempt:
                never_interrupt()
            self._queues = QueueSet()
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._ready.set()
        with self._queues as queues:
            while not self._over:
                self._take_turns(queues)
                self._look_around()

    def _take_turns(self, queues: QueueSet) -> None:
        for queue in queues.wait(ROUND if self._refusing else None):
            self._turn(queue)

    def _turn(self, queue: Queue) -> None:
        server, turn = self._turns[queue]
        try:
            goes_on = turn()
            self._leave_child(None)
            if not goes_on:
                self._leave(server, queue)
        except BaseException as error:
            self._leave_child(error)
            self._fail(server, error)

    def _leave_child(self, error: BaseException | None) -> None:
        """A process that a handler forked, and that leaves the handler, ends here."""
        if self._process != process():
            end_child(error)

    def _leave(self, server: SharedServer, queue: Queue) -> None:
        """The kernel has taken every tag of the queue back."""
        self._forget(queue)
        server.left.remove(queue)
        if server.left:
            return
        if refuse(server.queues):
            raise InternalError("a queue's turns ended before the kernel took its tags")
        self._close(server)

    def _forget(self, queue: Queue) -> None:
        assert self._queues is not None
        if self._turns.pop(queue, None) is not None:
            self._queues.remove(queue)

    def _fail(self, server: SharedServer, error: BaseException) -> None:
        for queue in server.queues:
            self._forget(queue)
        server.task.failed(error)
        self._refusing.append(server)
        server.left = server.queues if server.primed.is_set() else []

    def _close(self, server: SharedServer) -> None:
        with self._lock:
            self._servers.remove(server)
        server.close()

    def _look_around(self) -> None:
        """What others have asked for, and those whose serving failed."""
        while self._new:
            self._open(self._new.popleft())
        if self._changed:
            self._changed = False
            for server in {server for server, _ in self._turns.values()}:
                if server.severed:
                    lost = errors.DeviceLost("a queue was cut off while its thread hung")
                    self._fail(server, lost)
                elif server.leaving:
                    for queue in server.queues:
                        self._forget(queue)
                    self._close(server)
        for server in list(self._refusing):
            server.left = refuse(server.left)
            if not server.left:
                self._refusing.remove(server)
                self._close(server)

    def _open(self, server: SharedServer) -> None:
        assert self._queues is not None
        try:
            server.open()
            for queue in server.queues:
                self._queues.add(queue)
                self._turns[queue] = server, server.task.turns(queue)
        except BaseException as error:
            self._fail(server, error)
