# SPDX-License-Identifier: MIT
"""A disk without a kernel: a target behind the same dispatch code that serves real requests."""

import asyncio
import errno
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from pyublk import loops, serving
from pyublk._native import Handlers, MappedQueue, Queue
from pyublk.crew import check_workers
from pyublk.errors import DeviceClosed
from pyublk.mapped import MappedTarget
from pyublk.params import Params
from pyublk.stats import DeviceStats, QueueStats
from pyublk.target import FailureLog, NativeTarget, Target, dispatch_of
from pyublk.uapi import SECTOR_SIZE, IOFlag, Op
from pyublk.zones import REPORT_BYTES, Zone

NO_FLAGS = IOFlag(0)

#: The errnos that the kernel passes on to clients (block/blk-core.c); others become EIO.
_PASSED_ON = {
    errno.EOPNOTSUPP,
    errno.ETIMEDOUT,
    errno.ENOSPC,
    errno.ENOLINK,
    errno.EREMOTEIO,
    errno.EBADE,
    errno.ENODATA,
    errno.EILSEQ,
    errno.ENOMEM,
    errno.EBUSY,
    errno.EAGAIN,
    errno.ENODEV,
    errno.ETIME,
    errno.EINVAL,
    errno.ETOOMANYREFS,
    errno.EOVERFLOW,
}


class Disk:
    """Serves a target to `pread` and `pwrite` calls, without kernel or root.

    ::

        with Disk(MyTarget(1 << 20)) as disk:
            disk.pwrite(b"x" * 4096, 0)
            assert disk.pread(4096, 0) == b"x" * 4096

    Requests are split, checked and answered as on a real disk: whole blocks only (OSError EINVAL),
    inside the disk (EIO for reads, ENOSPC for writes), at most `max_io_size` bytes apiece, a
    request of several pieces in flight at once up to `depth`; a handler's failure is the caller's
    OSError, with EIO for an errno that the kernel does not pass on. What the target does not
    announce is refused with EOPNOTSUPP, but write-zeroes, which the kernel does by writing. One
    thread at a time.
    """

    def __init__(
        self,
        target: Target,
        *,
        max_io_size: int = 512 * 1024,
        depth: int = 16,
        workers: int = 0,
    ) -> None:
        self._dispatch = dispatch_of(target)
        check_workers(target, workers)
        self.target = target
        self._max_io_size = max_io_size
        self._workers = workers
        self._queue: Queue | None = None
        self._depth = depth
        self._params: Params | None = None
        self._opened = False
        self._pool: serving.WorkerPool | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    # ---- scope ----

    def open(self) -> None:
        """Opens the target; `with` does it too."""
        self.target.open()
        self._opened = True
        try:
            self._params = self.target.params(self._max_io_size)
            self._queue = self._make_queue()
            self._queue.fetch()
            self._report = FailureLog(self.target)
            self._handlers = Handlers(self.target, self._report)
            if self._workers:
                self._pool = serving.WorkerPool(self._handlers, self._workers, "disk")
            if self._dispatch == "async":
                selector = loops.RingSelector()
                self._loop = asyncio.SelectorEventLoop(selector)
                self._server = self._loop.run_until_complete(self._attach(selector))
        except BaseException:
            self.close()
            raise

    def _make_queue(self) -> Queue:
        depth, size = self._depth, self._max_io_size
        if isinstance(self.target, MappedTarget):
            self.target.wake_queues = self._wake
            return MappedQueue.loopback(layout=self.target.layout, depth=depth, buffer_size=size)
        return Queue.loopback(depth=depth, buffer_size=size)

    def _wake(self) -> None:
        if self._queue is not None:
            self._queue.wake()

    async def _attach(self, selector: loops.RingSelector) -> loops.AsyncServer:
        assert self._queue is not None
        server = loops.AsyncServer(self._handlers)
        server.attach(self._queue, selector)
        return server

    def close(self) -> None:
        """Closes the target; `with` does it too."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        if self._loop is not None:
            if self._queue is not None:
                self._server.detach(self._queue)
            self._loop.close()
            self._loop = None
        if self._queue is not None:
            self._queue.close()
            self._queue = None
        self._params = None
        if self._opened:
            self._opened = False
            self.target.close()

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

    # ---- looking at it ----

    @property
    def params(self) -> Params:
        """The parameters a kernel would be given."""
        if self._params is None:
            raise DeviceClosed("the disk is not open: use `with`")
        return self._params

    @property
    def size(self) -> int:
        """Bytes."""
        return self.params.basic.size

    @property
    def block_size(self) -> int:
        """Bytes of the smallest request."""
        return self.params.basic.logical_block_size

    def stats(self) -> DeviceStats:
        """Counters since the disk was opened."""
        if self._queue is None:
            raise DeviceClosed("the disk is not open: use `with`")
        return DeviceStats((QueueStats.from_counters(self._queue.counters()),))

    # ---- a client's calls ----

    def pread(self, length: int, offset: int) -> bytes:
        """Reads `length` bytes at `offset`."""
        self._check(offset, length, beyond=errno.EIO)
        found = bytearray(length)
        for batch in self._batches(offset, length, self._max_io_size):
            self._run(Op.READ, batch)
            for tag, (at, size) in enumerate(batch):
                found[at - offset : at - offset + size] = self._memory(tag, size)
        return bytes(found)

    def pwrite(self, data: bytes, offset: int, *, fua: bool = False) -> int:
        """Writes `data` at `offset` and returns its length; `fua`: durable when it returns."""
        self._writable()
        self._check(offset, len(data), beyond=errno.ENOSPC)
        native_fua = fua and self.params.basic.fua
        flags = IOFlag.FUA if native_fua else NO_FLAGS
        for batch in self._batches(offset, len(data), self._max_io_size):
            for tag, (at, size) in enumerate(batch):
                self._memory(tag, size)[:] = data[at - offset : at - offset + size]
            self._run(Op.WRITE, batch, flags)
        if fua and not native_fua:
            self.flush()
        return len(data)

    def flush(self) -> None:
        """Makes what was written durable; nothing happens when the target has no volatile cache."""
        if self.params.basic.volatile_cache:
            self._run(Op.FLUSH, [(0, 0)])

    def discard(self, offset: int, length: int) -> None:
        """Tells that these bytes are needed no more."""
        self._writable()
        self._check(offset, length, beyond=errno.EINVAL)
        discard = self.params.discard
        if discard is None or not discard.max_discard_size:
            raise OSError(errno.EOPNOTSUPP, "the target does not take discards")
        for batch in self._batches(offset, length, discard.max_discard_size):
            self._run(Op.DISCARD, batch)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        """Makes these bytes zero; with `unmap` false they stay allocated."""
        self._writable()
        self._check(offset, length, beyond=errno.EINVAL)
        discard = self.params.discard
        if discard is None or not discard.max_write_zeroes_size:
            self.pwrite(bytes(length), offset)
            return
        flags = NO_FLAGS if unmap else IOFlag.NOUNMAP
        for batch in self._batches(offset, length, discard.max_write_zeroes_size):
            self._run(Op.WRITE_ZEROES, batch, flags)

    # ---- zoned targets ----

    def report_zones(self) -> list[Zone]:
        """Every zone of a zoned disk."""
        size = self._zone_size()
        count = self.size // size
        found: list[Zone] = []
        while len(found) < count:
            some = min(count - len(found), self._max_io_size // REPORT_BYTES)
            memory = self._memory(0, some * REPORT_BYTES)
            memory[:] = b"\xff" * len(memory)  # whatever was there before
            self._run(Op.REPORT_ZONES, [(len(found) * size, some * SECTOR_SIZE)])
            for at in range(0, len(memory), REPORT_BYTES):
                found.append(Zone.unpack(memory[at : at + REPORT_BYTES]))
        return found

    def zone_append(self, data: bytes, offset: int) -> int:
        """Appends to the zone at `offset`, in one request; returns where the data went."""
        self._zone_size()
        self._check(offset, len(data), beyond=errno.EIO)
        self._memory(0, len(data))[:] = data
        self._run(Op.ZONE_APPEND, [(offset, len(data))])
        assert self._queue is not None
        return self._queue.zone_sector(0) * SECTOR_SIZE

    def manage_zone(self, op: Op, offset: int = 0) -> None:
        """Sends ZONE_OPEN, _CLOSE, _FINISH, _RESET for the zone at `offset`, or ZONE_RESET_ALL."""
        self._zone_size()
        self._run(op, [(offset, 0)])

    def _zone_size(self) -> int:
        if self.params.zoned is None:
            raise OSError(errno.EOPNOTSUPP, "the disk has no zones")
        return self.params.basic.chunk_size

    # ---- as the kernel does ----

    def _writable(self) -> None:
        if self.params.basic.read_only:
            raise OSError(errno.EPERM, "the disk is read-only")

    def _check(self, offset: int, length: int, *, beyond: int) -> None:
        block = self.block_size
        if offset % block or length % block or offset < 0 or length < 0:
            raise OSError(
                errno.EINVAL,
                f"offset {offset} and length {length} must be multiples of the block size, {block}",
            )
        if offset + length > self.size:
            raise OSError(
                beyond, f"offset {offset} and length {length} reach past the end, {self.size}"
            )

    def _batches(self, offset: int, length: int, limit: int) -> Iterator[list[tuple[int, int]]]:
        """(offset, length) of each request, as many at once as there are tags."""
        chunk, end = self.params.basic.chunk_size, offset + length
        pieces = []
        while offset < end:
            size = min(limit, end - offset, chunk - offset % chunk if chunk else limit)
            pieces.append((offset, size))
            offset += size
        for first in range(0, len(pieces), self._depth):
            yield pieces[first : first + self._depth]

    def _memory(self, tag: int, size: int) -> memoryview:
        assert self._queue is not None
        return self._queue.memory(tag, size)

    def _run(self, op: Op, batch: list[tuple[int, int]], flags: IOFlag = NO_FLAGS) -> None:
        """Sends a batch of requests through the dispatcher and waits for the answers."""
        queue = self._queue
        assert queue is not None
        for tag, (offset, length) in enumerate(batch):
            queue.inject(tag, op | flags, offset, length)
        tags = range(len(batch))
        while any(queue.answered(tag) is None for tag in tags):
            self._serve(queue)
        for tag in tags:
            result = queue.answered(tag)
            if result is not None and result < 0:
                number = -result if -result in _PASSED_ON else errno.EIO
                raise OSError(number, f"{op.name} at {batch[tag][0]} failed")

    def _serve(self, queue: Queue) -> None:
        if isinstance(self.target, NativeTarget):
            queue.serve_native(self.target.handler, self.target.context)
        elif isinstance(self.target, MappedTarget):
            serving.serve_mapped(queue, self.target, self._report)
        elif self._loop is not None:
            self._loop.run_until_complete(asyncio.sleep(0))
        elif self._pool is not None:
            for io in queue.wait() or ():
                self._pool.submit(io)
        else:
            queue.serve(self._handlers)
