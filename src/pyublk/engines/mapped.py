# SPDX-License-Identifier: MIT
"""Targets that say where their bytes live: each queue's own ring does the I/O."""

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any
from weakref import WeakSet

from pyublk._native import CharDevice, Gate, Layout, MappedQueue, Mapper, Queue
from pyublk.engines.base import Engine, Setup
from pyublk.engines.failures import FailureLog
from pyublk.engines.requests import Request, RequestMethods, announced
from pyublk.mapped import MappedTarget
from pyublk.uapi import Op

#: Bytes that a layer's read or write of files below it moves at once.
PIECE = 1 << 20
#: Seconds after which a call that is under way at a target's closing is left alone.
HANGS = 1.0


class MappedEngine(Engine):
    """Serves by the layout of a `MappedTarget`; Python is asked where the bytes are, if at all."""

    kind = "mapped"
    target: MappedTarget
    _files: "FileMethods | None" = None

    def check(
        self, *, threads: int = 1, workers: int | None = None, shared_memory: bool = False
    ) -> None:
        super().check(threads=threads, workers=workers, shared_memory=shared_memory)
        self.target.check_threads(threads)
        if shared_memory:
            self.target.check_shared_memory()

    def make_queue(self, char_device: CharDevice, number: int, **options: Any) -> Queue:
        return MappedQueue(char_device, number, layout=self.target.layout, **options)

    def loopback(self, *, depth: int, buffer_size: int, gate: Gate | None = None) -> MappedQueue:
        layout = self.target.layout
        return MappedQueue.loopback(layout=layout, depth=depth, buffer_size=buffer_size, gate=gate)

    def begin(self, setup: Setup) -> None:
        self.target.wake_queues = setup.wake

    def serve(self, queues: list[Queue]) -> None:
        queue = queues[0]
        assert isinstance(queue, MappedQueue)
        queue.serve_mapped(*policy(self.target, self.report))

    def turns(self, queue: Queue) -> Callable[[], bool]:
        assert isinstance(queue, MappedQueue)
        return partial(queue.step, *policy(self.target, self.report), timeout=0)

    def methods(self) -> Mapping[str, Callable[..., Any]]:
        self._files = FileMethods(self.target, self.report)
        return announced(self.target, self._files)

    def end_calls(self) -> None:
        if self._files is not None:
            self._files.close()

    def as_files(self) -> tuple[Layout, list[tuple[int, bool, bool]]] | None:
        return self.target.as_files()


#: What a queue asks Python: where bytes are, if at all, and who is told of a leg's failure.
Policy = tuple[Mapper | None, Callable[[int, int, int], None]]


def policy(target: MappedTarget, report: FailureLog) -> Policy:
    """That of a target, for one queue."""
    mapper = None if target.map is None else Mapper(target, report)

    def leg_failed(leg: int, error: int, file_generation: int) -> None:
        try:
            target.leg_failed(leg, error, file_generation)
        except BaseException as raised:
            report.tell(raised, None, "leg_failed")

    return mapper, leg_failed


class _Calling:
    """A queue without a kernel that one thread sends its calls through; gone with that thread."""

    def __init__(self, queue: MappedQueue, policy: Policy) -> None:
        self.queue = queue
        self.policy = policy
        self.lock = threading.Lock()  # a call is under way

    def end(self) -> None:
        """Gives the queue back; one that hangs in a call only when that returns. [any thread]"""
        free = self.lock.acquire(timeout=HANGS)
        try:
            self.queue.close()
            if free:  # else its thread may be in the ring
                self.queue.__del__()  # type: ignore[attr-defined]  # not when the collector comes
        finally:
            if free:
                self.lock.release()

    def __del__(self) -> None:
        self.end()


class FileMethods(RequestMethods):
    """Does to the files what a target's methods do: each call is a request of a queue that has no
    kernel, so that splitting, mirrors and maps are those of a disk of its own."""

    def __init__(self, target: MappedTarget, report: FailureLog) -> None:
        super().__init__(PIECE)
        self._target = target
        self._report = report
        self._of_thread = threading.local()
        self._all: WeakSet[_Calling] = WeakSet()
        self._lock = threading.Lock()

    def send(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self._run(request)

    def _run(self, request: Request) -> None:
        op, flags, offset, length, memory = request
        calling = self._calling()
        queue = calling.queue
        with calling.lock:
            if op is Op.WRITE:
                queue.memory(0, length)[:] = memory
            queue.inject(0, op | flags, offset, length)
            while (result := queue.answered(0)) is None:
                queue.serve_mapped(*calling.policy)
            if result < 0:
                raise OSError(-result, os.strerror(-result))
            if op is Op.READ:
                memory[:] = queue.memory(0, length)

    def _calling(self) -> _Calling:
        """The calling thread's own: a ring is its maker's."""
        calling: _Calling | None = getattr(self._of_thread, "calling", None)
        if calling is None:
            self._target.wake_queues = self.wake
            layout = self._target.layout
            queue = MappedQueue.loopback(layout=layout, depth=1, buffer_size=PIECE)
            calling = _Calling(queue, policy(self._target, self._report))
            queue.fetch()
            self._of_thread.calling = calling
            with self._lock:
                self._all.add(calling)
        return calling

    def wake(self) -> None:
        """Makes each queue look at the layout again. From any thread."""
        with self._lock:
            for calling in self._all:
                calling.queue.wake()

    def close(self) -> None:
        """Ends every thread's queue; the next call is of a target that was opened again."""
        self._target.wake_queues = lambda: None
        with self._lock:
            callings = list(self._all)
            self._all.clear()
        for calling in callings:
            calling.end()
        self._of_thread = threading.local()
