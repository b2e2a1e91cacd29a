# SPDX-License-Identifier: MIT
"""What a client can do with a kernel-free disk: the same as with a real one."""

import errno
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace

from pyublk._native import Queue
from pyublk.arguments import whole
from pyublk.errors import DeviceBusy, DeviceClosed
from pyublk.faults import Faults, WithFaults
from pyublk.params import Params
from pyublk.stats import DeviceStats, QueueStats, latency_of
from pyublk.target import Target
from pyublk.tracing import DEFAULT_MEGABYTES, Trace
from pyublk.uapi import SECTOR_SIZE, IOFlag, Op
from pyublk.zones import REPORT_BYTES, Zone

NO_FLAGS = IOFlag(0)

#: What the buffer of a read is full of before its handler has it.
POISON = b"\xa5"

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


class AsyncDisk(WithFaults):
    """A disk whose calls are awaited; from `async with pyublk.testing.Disk(target) as disk`.

    The calls and their rules are those of `Disk`. They suspend while the running event loop serves
    an async target. One call at a time.
    """

    def __init__(self, target: Target, faults: Faults, *, max_io_size: int, depth: int) -> None:
        self.target = target
        self._faults = faults
        self._max_io_size = max_io_size
        self._depth = depth
        self._queue: Queue | None = None
        self._trace: Trace | None = None
        self._params: Params | None = None
        self._serve: Callable[[Queue], Awaitable[None]]

    def _begin(
        self, queue: Queue, params: Params, serve: Callable[[Queue], Awaitable[None]]
    ) -> None:
        """`serve` answers the requests that the queue has, or some."""
        self._queue, self._params, self._serve = queue, params, serve

    def _end(self) -> None:
        if self._trace is not None:
            self._trace.end()
        self._queue = self._params = None

    # ---- looking at it ----

    @property
    def params(self) -> Params:
        """The parameters that a kernel would get."""
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

    def resize(self, size: int) -> None:
        """Gives the disk another size, and the target with it, as `Device.resize` does."""
        self.target.resize(size, self._update_size)

    def _update_size(self, size: int) -> None:
        self._params = replace(self.params, basic=replace(self.params.basic, size=size))
        self._faults.resize(size)

    def stats(self) -> DeviceStats:
        """Counters and latencies since the disk was opened."""
        queue = self._opened_queue()
        return DeviceStats(
            (QueueStats.from_counters(queue.counters()),), latency_of(queue.latency())
        )

    def trace(self, path: str | os.PathLike[str], *, megabytes: int = DEFAULT_MEGABYTES) -> Trace:
        """Records each request from now on, as `Device.trace` does; until `stop`, or the end of
        `with`."""
        queue = self._opened_queue()
        if self._trace is not None and not self._trace.is_over:
            raise DeviceBusy(f"the disk is traced already, to {self._trace.files[0]}")
        self._trace = Trace(path, [queue], megabytes=megabytes)
        return self._trace

    def _opened_queue(self) -> Queue:
        if self._queue is None:
            raise DeviceClosed("the disk is not open: use `with`")
        return self._queue

    # ---- a client's calls ----

    async def pread(self, length: int, offset: int) -> bytes:
        """Reads `length` bytes at `offset`."""
        self._check(offset, length, beyond=errno.EIO)
        found = bytearray(length)
        for batch in self._batches(offset, length, self._max_io_size):
            for tag, (_, size) in enumerate(batch):
                self._memory(tag, size)[:] = POISON * size
            await self._run(Op.READ, batch)
            for tag, (at, size) in enumerate(batch):
                found[at - offset : at - offset + size] = self._memory(tag, size)
        return bytes(found)

    async def pwrite(self, data: bytes, offset: int, *, fua: bool = False) -> int:
        """Writes `data` at `offset` and returns its length; `fua`: durable when it returns."""
        self._writable()
        self._check(offset, len(data), beyond=errno.ENOSPC)
        native_fua = fua and self.params.basic.fua
        flags = IOFlag.FUA if native_fua else NO_FLAGS
        for batch in self._batches(offset, len(data), self._max_io_size):
            for tag, (at, size) in enumerate(batch):
                self._memory(tag, size)[:] = data[at - offset : at - offset + size]
            await self._run(Op.WRITE, batch, flags)
        if fua and not native_fua:
            await self.flush()
        return len(data)

    async def flush(self) -> None:
        """Makes what was written durable; nothing happens when the target has no volatile cache."""
        if self.params.basic.volatile_cache:
            await self._run(Op.FLUSH, [(0, 0)])

    async def discard(self, offset: int, length: int) -> None:
        """Tells the target that these bytes are not needed any more."""
        self._writable()
        self._check(offset, length, beyond=errno.EINVAL)
        discard = self.params.discard
        if discard is None or not discard.max_discard_size:
            raise OSError(errno.EOPNOTSUPP, "the target does not take discards")
        for batch in self._batches(offset, length, discard.max_discard_size):
            await self._run(Op.DISCARD, batch)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        """Makes these bytes zero; with `unmap` false they stay allocated."""
        self._writable()
        self._check(offset, length, beyond=errno.EINVAL)
        discard = self.params.discard
        if discard is None or not discard.max_write_zeroes_size:
            await self.pwrite(bytes(length), offset)
            return
        flags = NO_FLAGS if unmap else IOFlag.NOUNMAP
        for batch in self._batches(offset, length, discard.max_write_zeroes_size):
            await self._run(Op.WRITE_ZEROES, batch, flags)

    # ---- zoned targets ----

    async def report_zones(self) -> list[Zone]:
        """Every zone of a zoned disk."""
        size = self._zone_size()
        count = self.size // size
        found: list[Zone] = []
        while len(found) < count:
            some = min(count - len(found), self._max_io_size // REPORT_BYTES)
            memory = self._memory(0, some * REPORT_BYTES)
            memory[:] = b"\xff" * len(memory)  # whatever was there before
            await self._run(Op.REPORT_ZONES, [(len(found) * size, some * SECTOR_SIZE)])
            for at in range(0, len(memory), REPORT_BYTES):
                found.append(Zone.unpack(memory[at : at + REPORT_BYTES]))
        return found

    async def zone_append(self, data: bytes, offset: int) -> int:
        """Appends to the zone at `offset`, in one request; returns where the data went."""
        self._zone_size()
        self._check(offset, len(data), beyond=errno.EIO)
        self._memory(0, len(data))[:] = data
        await self._run(Op.ZONE_APPEND, [(offset, len(data))])
        assert self._queue is not None
        return self._queue.zone_sector(0) * SECTOR_SIZE

    async def manage_zone(self, op: Op, offset: int = 0) -> None:
        """Sends ZONE_OPEN, _CLOSE, _FINISH, _RESET for the zone at `offset`, or ZONE_RESET_ALL."""
        self._zone_size()
        await self._run(op, [(offset, 0)])

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
        whole("offset", offset)
        whole("length", length)
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

    async def _run(self, op: Op, batch: list[tuple[int, int]], flags: IOFlag = NO_FLAGS) -> None:
        """Sends a batch of requests through the dispatcher and waits for the answers."""
        queue = self._queue
        assert queue is not None
        for tag, (offset, length) in enumerate(batch):
            queue.inject(tag, op | flags, offset, length)
        tags = range(len(batch))
        while any(queue.answered(tag) is None for tag in tags):
            await self._serve(queue)
        for tag in tags:
            result = queue.answered(tag)
            if result is not None and result < 0:
                number = -result if -result in _PASSED_ON else errno.EIO
                raise OSError(number, f"{op.name} at {batch[tag][0]} failed")
