# SPDX-License-Identifier: MIT
"""A disk without a kernel: a target behind the same dispatch code that serves real requests."""

import asyncio
import os
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

from pyublk._native import Queue
from pyublk.arguments import DEFAULT_MAX_IO_SIZE, whole
from pyublk.engines import engine_for
from pyublk.engines.base import Setup
from pyublk.faults import Faults, WithFaults
from pyublk.params import Params
from pyublk.stats import DeviceStats
from pyublk.target import Target
from pyublk.testing.client import POISON, AsyncDisk
from pyublk.tracing import DEFAULT_MEGABYTES, Trace
from pyublk.uapi import Op
from pyublk.zones import Zone

T = TypeVar("T")

#: Seconds between two looks at requests that rules hold, on an event loop that has more to do.
LOOK = 0.001


def _now(call: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that never suspends."""
    try:
        call.send(None)
    except StopIteration as stop:
        returned: T = stop.value
        return returned
    raise AssertionError("it waits for an event loop, and there is none")


def _check_no_loop_runs() -> None:
    if asyncio._get_running_loop() is not None:
        raise RuntimeError(
            "this thread runs an event loop already, and the disk of an async target has its own: "
            "use `async with Disk(...) as disk` and `await` its calls, or call it on another "
            "thread (asyncio.to_thread)"
        )


class Disk(WithFaults):
    """Serves a target to `pread` and `pwrite` calls, without kernel or root.

    ::

        with Disk(MyTarget(1 << 20)) as disk:
            disk.pwrite(b"x" * 4096, 0)
            assert disk.pread(4096, 0) == b"x" * 4096

    Requests are split, checked and answered as on a real disk: whole blocks only (OSError EINVAL),
    inside the disk (EIO for reads, ENOSPC for writes), in pieces of at most `max_io_size` bytes, of
    which up to `depth` are in flight at once. If a handler fails, the caller gets its OSError, or
    EIO for an errno that the kernel does not pass on. An operation that the target does not define
    is refused with EOPNOTSUPP, except write-zeroes, which is done by writes, as the kernel does.
    Use it on one thread at a time.

    A read's buffer is filled with POISON before the handler gets it, so that a test notices bytes
    that the handler leaves out.

    An async target is served, opened and closed on an event loop of the disk's own, which runs in
    its calls. On a running loop, use ``async with Disk(target) as disk``: that loop serves it then,
    whatever kind it is, and `disk` is an `AsyncDisk`, whose calls are awaited.
    """

    #: The byte that a read's buffer is full of before its handler has it.
    POISON: ClassVar[bytes] = POISON

    def __init__(
        self,
        target: Target,
        *,
        max_io_size: int = DEFAULT_MAX_IO_SIZE,
        depth: int = 16,
        workers: int | None = None,
    ) -> None:
        whole("depth", depth, least=1)
        whole("max_io_size", max_io_size, least=512)
        self._engine = engine_for(target)
        self._engine.check(workers=workers)
        self.target = target
        self._max_io_size = max_io_size
        self._workers = workers
        self._queue: Queue | None = None
        self._depth = depth
        self._faults = Faults(target)
        self._client = AsyncDisk(target, self._faults, max_io_size=max_io_size, depth=depth)
        self._opened = False
        self._on_callers_loop = False
        self._runner: asyncio.Runner | None = None

    # ---- scope ----

    def open(self) -> None:
        """Opens the target; `with` does it too."""
        if not self._engine.needs_loop:
            _now(self._open())
            return
        _check_no_loop_runs()
        self._runner = self._engine.make_runner()
        try:
            self._runner.run(self._open())
        except BaseException:
            self._end_loop()
            raise

    async def _open(self) -> None:
        engine = self._engine
        try:
            await engine.call(self.target.open)
            self._opened = True
            profile = self.target.profile()
            params = profile.params(self._max_io_size)
            self._faults.serve(profile)
            self._queue = engine.loopback(
                depth=self._depth, buffer_size=self._max_io_size, gate=self._faults.gate
            )
            self._queue.fetch()
            engine.begin(
                Setup(name="disk", queues=1, threads=1, workers=self._workers, wake=self._wake)
            )
            engine.attach(self._queue)
            self._client._begin(self._queue, params, self._serve)
        except BaseException:
            await self._close()
            raise

    def _wake(self) -> None:
        if self._queue is not None:
            self._queue.wake()

    def close(self) -> None:
        """Closes the target; `with` does it too."""
        if self._runner is None:
            _now(self._close())
            return
        _check_no_loop_runs()
        try:
            self._runner.run(self._close())
        finally:
            self._end_loop()

    def _end_loop(self) -> None:
        assert self._runner is not None
        self._runner.close()
        self._runner = None

    async def _close(self) -> None:
        self._engine.end()
        if self._queue is not None:
            await self._engine.detach(self._queue)
            self._queue.close()
            self._queue = None
        self._client._end()
        if self._opened:
            self._opened = False
            await self._engine.call(self.target.close)

    async def _serve(self, queue: Queue) -> None:
        """Answers the requests that the queue has, or some."""
        if self._runner is not None:
            self._runner.get_loop().run_until_complete(self._engine.answer(queue))
        elif self._on_callers_loop and queue.kept:
            await self._answer_kept(queue)
        else:
            await self._engine.answer(queue)

    async def _answer_kept(self, queue: Queue) -> None:
        """Of what rules hold, what is due: the loop is not to wait for the others."""
        await asyncio.sleep(LOOK)
        if not self._engine.needs_loop:
            self._engine.turns(queue)()
        elif queue.is_due:
            queue.wake()

    def _now(self, call: Coroutine[Any, Any, T]) -> T:
        if self._runner is not None:
            try:
                _check_no_loop_runs()
            except RuntimeError:
                call.close()
                raise
        return _now(call)

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> AsyncDisk:
        self._on_callers_loop = True
        await self._open()
        return self._client

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._close()

    # ---- looking at it ----

    @property
    def params(self) -> Params:
        """The parameters that a kernel would get."""
        return self._client.params

    @property
    def size(self) -> int:
        """Bytes."""
        return self._client.size

    @property
    def block_size(self) -> int:
        """Bytes of the smallest request."""
        return self._client.block_size

    def resize(self, size: int) -> None:
        """Gives the disk another size, and the target with it, as `Device.resize` does."""
        self._client.resize(size)

    def stats(self) -> DeviceStats:
        """Counters and latencies since the disk was opened."""
        return self._client.stats()

    def trace(self, path: str | os.PathLike[str], *, megabytes: int = DEFAULT_MEGABYTES) -> Trace:
        """Records each request from now on, as `Device.trace` does; until `stop`, or the end of
        `with`."""
        return self._client.trace(path, megabytes=megabytes)

    # ---- a client's calls ----

    def pread(self, length: int, offset: int) -> bytes:
        """Reads `length` bytes at `offset`."""
        return self._now(self._client.pread(length, offset))

    def pwrite(self, data: bytes, offset: int, *, fua: bool = False) -> int:
        """Writes `data` at `offset` and returns its length; `fua`: durable when it returns."""
        return self._now(self._client.pwrite(data, offset, fua=fua))

    def flush(self) -> None:
        """Makes what was written durable; nothing happens when the target has no volatile cache."""
        self._now(self._client.flush())

    def discard(self, offset: int, length: int) -> None:
        """Tells the target that these bytes are not needed any more."""
        self._now(self._client.discard(offset, length))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        """Makes these bytes zero; with `unmap` false they stay allocated."""
        self._now(self._client.write_zeroes(offset, length, unmap=unmap))

    def report_zones(self) -> list[Zone]:
        """Every zone of a zoned disk."""
        return self._now(self._client.report_zones())

    def zone_append(self, data: bytes, offset: int) -> int:
        """Appends to the zone at `offset`, in one request; returns where the data went."""
        return self._now(self._client.zone_append(data, offset))

    def manage_zone(self, op: Op, offset: int = 0) -> None:
        """Sends ZONE_OPEN, _CLOSE, _FINISH, _RESET for the zone at `offset`, or ZONE_RESET_ALL."""
        self._now(self._client.manage_zone(op, offset))
