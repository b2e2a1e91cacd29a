# SPDX-License-Identifier: MIT
"""Targets whose server the queues' own rings talk to."""

import errno
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pyublk._native import CharDevice, ConnectedQueue, Gate, Queue
from pyublk.connected import ConnectedTarget
from pyublk.engines.base import Engine, Setup
from pyublk.engines.failures import FailureLog
from pyublk.engines.requests import Request, RequestMethods, announced
from pyublk.uapi import Op

#: Bytes that a layer's read or write of what is below it moves at once, and how many of these.
PIECE = 256 << 10
PIECES = 16
#: Seconds after which calls that are under way at a target's closing are left alone.
HANGS = 1.0

Lost = Callable[[ConnectedQueue, int, socket.socket, int], None]


class ConnectedEngine(Engine):
    """Serves by the connections that a `ConnectedTarget` makes."""

    kind = "connected"
    target: ConnectedTarget
    _calls: "Calls | None" = None

    def check(
        self, *, threads: int = 1, workers: int | None = None, shared_memory: bool = False
    ) -> None:
        super().check(threads=threads, workers=workers, shared_memory=shared_memory)
        if shared_memory:
            raise ValueError(
                f"{type(self.target).__name__} sends its data to a server: it cannot share memory "
                "with clients"
            )

    def make_queue(self, char_device: CharDevice, number: int, **options: Any) -> Queue:
        self.target.check_size_of_requests(options["buffer_size"])
        links = self.target.links_per_queue()
        queue = ConnectedQueue(char_device, number, links=links, **options)
        self.target.queue_made(queue)
        return queue

    def loopback(self, *, depth: int, buffer_size: int, gate: Gate | None = None) -> ConnectedQueue:
        self.target.check_size_of_requests(buffer_size)
        return loopback(self.target, depth, buffer_size, gate)

    def begin(self, setup: Setup) -> None:
        self.target.check_queues(setup.queues * setup.threads)
        self._lost = lost(self.target, self.report)

    def serve(self, queues: list[Queue]) -> None:
        queue = queues[0]
        assert isinstance(queue, ConnectedQueue)
        queue.serve_connected(self._lost)

    def turns(self, queue: Queue) -> Callable[[], bool]:
        assert isinstance(queue, ConnectedQueue)
        return partial(queue.step, self._lost, timeout=0)

    def methods(self) -> Mapping[str, Callable[..., Any]]:
        self._calls = Calls(self.target, self.report)
        return Announced(self.target, self._calls)

    def end_calls(self) -> None:
        if self._calls is not None:
            self._calls.close()


def loopback(
    target: ConnectedTarget, depth: int, buffer_size: int, gate: Gate | None = None
) -> ConnectedQueue:
    """A queue without a kernel."""
    links = target.links_per_queue()
    queue = ConnectedQueue.loopback(links=links, depth=depth, buffer_size=buffer_size, gate=gate)
    target.queue_made(queue)
    return queue


def lost(target: ConnectedTarget, report: FailureLog) -> Lost:
    """Who is told of a connection that is lost: the target, and the log if it raises."""

    def connection_lost(
        queue: ConnectedQueue, link: int, connection: socket.socket, reason: int
    ) -> None:
        try:
            target.connection_lost(queue, link, connection, reason)
        except BaseException as raised:
            report.tell(raised, None, "connection_lost")

    return connection_lost


class Announced(Mapping[str, Callable[..., Any]]):
    """The methods of the operations that a target takes, which it knows once it is open."""

    def __init__(self, target: ConnectedTarget, methods: "Calls") -> None:
        self._target = target
        self._methods = methods

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return announced(self._target, self._methods)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(announced(self._target, self._methods))

    def __len__(self) -> int:
        return len(announced(self._target, self._methods))


@dataclass(eq=False, slots=True)
class _Call:
    """A request that a caller waits for."""

    request: Request
    result: int = 0
    done: threading.Event = field(default_factory=threading.Event)


class Calls(RequestMethods):
    """Does what a target's methods do: each call is a request of one queue without a kernel, which
    a thread of its own serves, for all who call. So they share its connections."""

    def __init__(self, target: ConnectedTarget, report: FailureLog) -> None:
        super().__init__(PIECE)
        self._target = target
        self._lost = lost(target, report)
        self._lock = threading.Lock()
        self._new: deque[_Call] = deque()
        self._thread: threading.Thread | None = None
        self._queue: ConnectedQueue | None = None
        self._closing = False

    def send(self, requests: Iterable[Request]) -> None:
        calls = [_Call(request) for request in requests]
        with self._lock:
            if self._closing:
                raise RuntimeError("the target is closed")
            self._new.extend(calls)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="calls", daemon=True)
                self._thread.start()
            elif self._queue is not None:
                self._queue.wake()
        for call in calls:
            call.done.wait()
        for call in calls:
            if call.result < 0:
                raise OSError(-call.result, os.strerror(-call.result))

    def _serve(self) -> None:
        under_way: dict[int, _Call] = {}
        try:
            queue = loopback(self._target, PIECES, PIECE)
            try:
                queue.fetch()
                with self._lock:
                    self._queue = queue
                while self._begin_some(queue, under_way):
                    queue.step(self._lost)
                    self._end_some(queue, under_way)
            finally:
                with self._lock:
                    self._queue = None
                queue.close()
        finally:
            with self._lock:
                left = [*under_way.values(), *self._new]
                self._new.clear()
                self._thread = None
            for call in left:
                call.result = -errno.EIO
                call.done.set()

    def _begin_some(self, queue: ConnectedQueue, under_way: dict[int, _Call]) -> bool:
        """False: it is over."""
        free = iter([tag for tag in range(PIECES) if tag not in under_way])
        with self._lock:
            if self._closing:
                return False
            while self._new and (tag := next(free, None)) is not None:
                under_way[tag] = call = self._new.popleft()
                op, flags, offset, length, memory = call.request
                if op is Op.WRITE:
                    queue.memory(tag, length)[:] = memory
                queue.inject(tag, op | flags, offset, length)
        return True

    def _end_some(self, queue: ConnectedQueue, under_way: dict[int, _Call]) -> None:
        for tag, call in list(under_way.items()):
            result = queue.answered(tag)
            if result is None:
                continue
            del under_way[tag]
            call.result = result
            if result >= 0 and call.request.op is Op.READ:
                call.request.memory[:] = queue.memory(tag, call.request.length)
            call.done.set()

    def close(self) -> None:
        """Ends the queue; the next call is of a target that was opened again."""
        with self._lock:
            thread, self._closing = self._thread, True
            if self._queue is not None:
                self._queue.wake()
        if thread is not None:
            thread.join(HANGS)
        self._closing = False
