# SPDX-License-Identifier: MIT
"""A target of any kind behind the calls that nbdkit makes, from whichever of its threads."""

import errno
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pyublk.arguments import DEFAULT_MAX_IO_SIZE
from pyublk.engines import engine_for
from pyublk.engines.loops import LoopThread
from pyublk.errors import InvalidTarget
from pyublk.layers import Below
from pyublk.params import Params
from pyublk.target import Target
from pyublk.testing import Disk

#: Threads for a target that may be called by many at once, as many as nbdkit has.
THREADS = 16


class Serving:
    """One target, from its `open` to its `close`.

    Its methods run on threads of our own: for nbdkit's, Python forgets between two calls what it
    keeps for each thread. Those of a target with coroutines run on an event loop. A target with
    `handle` is served as a kernel-free disk. A request's bytes are copied, since nbdkit has its
    memory back when the request ends, whatever the target keeps.

    Raises InvalidTarget for a target that needs what only ublk has.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        if target.needs or target.integrity is not None:
            raise InvalidTarget(
                f"{type(target).__name__} needs what NBD does not have ({target.needs!r}): it can "
                "only be served by ublk"
            )
        self._engine = engine_for(target)
        self._whole = callable(getattr(target, "handle", None))
        self._disk: Disk | None = None
        self._calls: LoopThread | _Threads
        self.params: Params

    @property
    def is_parallel(self) -> bool:
        """Whether it may be called by many threads at once."""
        if self._whole:
            return False
        return self._engine.needs_loop or self.target.concurrency == "parallel"

    def open(self) -> None:
        """Opens the target. Call it after the last fork: it starts threads."""
        if self._whole:
            self._calls = _Threads(1)
            self._disk = Disk(self.target)
            self._methods = self._methods_of_disk(self._disk)
            steps: tuple[Callable[[], Any], Callable[[], Any]]
            steps = self._disk.open, self._disk.close
        else:
            if self._engine.needs_loop:
                self._calls = LoopThread("pyublk-loop")
                self._calls.begin()
            else:
                self._calls = _Threads(self._threads())
            below = Below(self.target)
            self._methods = dict(below.methods)
            steps = self.target.open, self.target.close
        opening, self._closing = steps
        try:
            self._calls.run(opening)
        except BaseException:
            self._calls.end()
            raise
        self.params = self._calls.run(self._profiled)

    def _profiled(self) -> Params:
        return self.target.profile().params(DEFAULT_MAX_IO_SIZE)

    def _threads(self) -> int:
        return THREADS if self.target.concurrency == "parallel" else 1

    def _methods_of_disk(self, disk: Disk) -> dict[str, Callable[..., Any]]:
        def read(offset: int, buffer: memoryview) -> None:
            buffer[:] = disk.pread(len(buffer), offset)

        def write(offset: int, data: memoryview) -> None:
            disk.pwrite(bytes(data), offset)

        def write_fua(offset: int, data: memoryview) -> None:
            disk.pwrite(bytes(data), offset, fua=True)

        def write_zeroes(offset: int, length: int, unmap: bool) -> None:
            disk.write_zeroes(offset, length, unmap=unmap)

        return {
            "read": read,
            "write": write,
            "write_fua": write_fua,
            "flush": disk.flush,
            "discard": disk.discard,
            "write_zeroes": write_zeroes,
        }

    def close(self) -> None:
        """Closes the target, once; no request comes any more."""
        calls = self._calls
        try:
            if not self._whole:
                self._engine.end_calls()
            calls.run(self._closing)
        finally:
            calls.end()

    # ---- what it is ----

    @property
    def size(self) -> int:
        """Bytes."""
        return self.params.basic.size

    @property
    def block_sizes(self) -> tuple[int, int, int]:
        """Bytes of the smallest request, one that suits it, and the largest."""
        basic = self.params.basic
        block = basic.logical_block_size
        preferred = max(block, 4096, basic.io_opt if basic.io_opt <= 32 << 20 else 0)
        return block, preferred, 32 << 20

    def can(self, method: str) -> bool:
        """Whether it takes requests of that method."""
        basic = self.params.basic
        if method == "write":
            return not basic.read_only
        if method in ("flush", "write_fua"):
            return basic.fua if method == "write_fua" else basic.volatile_cache
        discard = self.params.discard
        if discard is None:
            return False
        sizes = {"discard": discard.max_discard_size, "write_zeroes": discard.max_write_zeroes_size}
        return bool(sizes[method])

    # ---- requests ----

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fills the buffer."""
        self._check(offset, len(buffer))
        for begin, end in pieces(len(buffer), DEFAULT_MAX_IO_SIZE):
            mine = bytearray(end - begin)
            self._call("read", offset + begin, memoryview(mine))
            buffer[begin:end] = mine

    def write(self, data: memoryview, offset: int, *, fua: bool) -> None:
        """Takes the data; `fua`: durable when it returns."""
        self._check(offset, len(data))
        method = "write_fua" if fua and self.can("write_fua") else "write"
        for begin, end in pieces(len(data), DEFAULT_MAX_IO_SIZE):
            self._call(method, offset + begin, memoryview(bytes(data[begin:end])))
        self._make_durable(fua and method == "write")

    def flush(self) -> None:
        """Makes durable what was written."""
        self._call("flush")

    def discard(self, length: int, offset: int, *, fua: bool) -> None:
        """These bytes are not needed any more, but for what is not whole units of the target's."""
        self._check(offset, length)
        told = self.params.discard
        assert told is not None
        unit = told.granularity
        first, last = -(-offset // unit) * unit, (offset + length) // unit * unit
        for begin, end in pieces(max(last - first, 0), told.max_discard_size):
            self._call("discard", first + begin, end - begin)
        self._make_durable(fua)

    def write_zeroes(self, length: int, offset: int, *, unmap: bool, fua: bool) -> None:
        """Makes these bytes zero."""
        self._check(offset, length)
        told = self.params.discard
        assert told is not None
        for begin, end in pieces(length, told.max_write_zeroes_size):
            self._call("write_zeroes", offset + begin, end - begin, unmap)
        self._make_durable(fua)

    def _make_durable(self, wanted: bool) -> None:
        if wanted and self.can("flush"):
            self.flush()

    def _check(self, offset: int, length: int) -> None:
        block = self.params.basic.logical_block_size
        if offset % block or length % block:
            raise OSError(errno.EINVAL, f"a request of {length} bytes at {offset} is not of blocks")

    def _call(self, method: str, *arguments: Any) -> None:
        returned = self._calls.run(self._methods[method], *arguments)
        if returned is not None:
            name = type(self.target).__name__
            raise TypeError(f"{method} of {name} returned {returned!r}, and not None")


class _Threads:
    """Runs plain functions, on as many threads as may call the target at once."""

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="pyublk")

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._pool.submit(function, *arguments).result()

    def end(self) -> None:
        self._pool.shutdown(wait=False)


def pieces(length: int, largest: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each part of a request of which none is larger than that."""
    for begin in range(0, length, largest):
        yield begin, min(begin + largest, length)


def errno_of(error: BaseException) -> int:
    """What a client is told of an exception."""
    number = error.errno if isinstance(error, OSError) else None
    return number if number is not None and number in errno.errorcode else errno.EIO
