# SPDX-License-Identifier: MIT
"""The base class of targets, and what its methods and attributes mean for the disk."""

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

from pyublk.arguments import whole
from pyublk.methods import ARGUMENTS
from pyublk.params import Integrity
from pyublk.paths import DataPath
from pyublk.profile import MAX_DISCARD, Concurrency, Dispatch, Profile
from pyublk.uapi import Feature

#: The methods a kernel request can call; their presence announces the operation.
METHODS = tuple(name for name in ARGUMENTS if name != "map")


class Target:
    """Serves a disk's requests. Subclass it, define `read` and `write`, serve it with `Device`.

    Arguments of the constructor: `size` of the disk in bytes, a multiple of `block_size` (bytes, a
    power of two from 512 to the page size: the smallest unit that clients read and write).
    `physical_block_size`, `io_min` and `io_opt` (bytes, powers of two) are hints to file systems.
    `discard_granularity` and `max_discard` (bytes) limit discard and write-zeroes requests.

    These methods are called for requests; all are plain functions, or all `async def`:

    - ``read(offset, buffer)``: fill all of `buffer`, a writable memoryview of the request's length,
      which may still hold another request's data.
    - ``write(offset, data)``: take `data`, a read-only memoryview. Copy what you keep: you may keep
      `data`, and slices and arrays made of it, but each request of which one is kept takes
      `max_io_size` bytes of memory.
    - ``flush()``: make completed writes durable. Defining it declares a volatile write cache.
    - ``write_fua(offset, data)``: write and make durable at once. Without it, the kernel sends
      write and flush instead.
    - ``discard(offset, length)``: the client does not need these bytes any more.
    - ``write_zeroes(offset, length, unmap)``: make them read as zeroes; with `unmap` false they
      must stay allocated.
    - ``handle(io)``: instead of all of these, gets every request as an `IO`.

    `offset` and `length` are bytes, always multiples of the block size, inside the disk. A method
    returns None. If it raises an OSError, the request fails with that errno (the kernel passes only
    some errnos on to the client, and replaces the others by EIO). If it raises or returns anything
    else, the request fails with EIO, which is logged. So does a request that `handle` deferred
    (`IO.defer`) when no reference to its IO is left.

    Coroutines run on an asyncio event loop, each in its own copy of the context; they may use all
    of asyncio. A request whose coroutine never suspends is answered at once; one whose coroutine is
    cancelled fails with EIO.

    `concurrency` says which calls may run at the same time, and is enforced:

    - ``"serial"`` (the default): one call at a time over all queues. An async target runs on one
      event loop; its coroutines interleave where they await.
    - ``"per_queue"``: one call at a time for each queue; calls of different queues may run at once.
    - ``"parallel"``: any number of calls at once, from any thread; needed for `workers`.

    The same holds with and without the GIL; without it, calls that may run at once do run at once.
    """

    concurrency: ClassVar[Concurrency] = "serial"

    #: How it is served, for kinds of target whose methods do not show it.
    dispatch: ClassVar[Dispatch | None] = None

    #: The operations besides reads and writes of a target with `handle`, or of a native one. Other
    #: targets define the method instead.
    flushes: ClassVar[bool] = False
    discards: ClassVar[bool] = False
    writes_zeroes: ClassVar[bool] = False
    takes_fua: ClassVar[bool] = False

    #: The data paths that it supports, the best first.
    paths: tuple[DataPath, ...] = (DataPath.COPY, DataPath.USER_COPY, DataPath.GET_DATA)

    #: Device features that it cannot do without, besides those of its data path. On a kernel that
    #: lacks one, the start fails with FeatureMissing. Features that are not the target's choice
    #: (recovery, data paths, who owns the device) are refused (InvalidTarget).
    needs: Feature = Feature(0)

    #: Threads that serve it when nobody says how many (`workers`), for a "parallel" target with
    #: plain methods that wait, such as for a network.
    workers: int = 0

    #: Seconds that a request may take while nothing fails but a part that the target can do
    #: without, such as a mirror's leg: a stop waits at least so long for it.
    max_stall: float = 0.0

    #: Whether what was written is there again when another process opens such a target. One that is
    #: not recoverable can be taken over by hand, but is never restarted by itself.
    recoverable: bool = False

    #: The metadata beside the data (Linux 7.0). It needs Feature.INTEGRITY, user copy and `handle`.
    integrity: Integrity | None = None

    def __init__(
        self,
        *,
        size: int,
        block_size: int = 512,
        read_only: bool = False,
        rotational: bool = False,
        physical_block_size: int | None = None,
        io_min: int | None = None,
        io_opt: int | None = None,
        discard_granularity: int | None = None,
        max_discard: int | None = None,
    ) -> None:
        self.size = whole("size", size, least=0)
        self.block_size = whole("block_size", block_size, least=1)
        hints = {
            "physical_block_size": physical_block_size,
            "io_min": io_min,
            "io_opt": io_opt,
            "discard_granularity": discard_granularity,
            "max_discard": max_discard,
        }
        for name, value in hints.items():
            if value is not None:
                whole(name, value, least=0)
        self.read_only = read_only
        self.rotational = rotational
        self.physical_block_size = physical_block_size
        self.io_min = io_min
        self.io_opt = io_opt
        self.discard_granularity = discard_granularity
        self.max_discard = max_discard

    def open(self) -> Awaitable[None] | None:
        """Called in the serving process before the device appears: open files here, not before.

        In a target with coroutines it may be a coroutine as well, which is awaited on the event
        loop that serves the requests (the first queue's, if there are several); so may `close`.
        """

    def close(self) -> Awaitable[None] | None:
        """Called once after the last request, also when start-up failed after `open`."""

    def resize(self, size: int, update: Callable[[int], None]) -> None:
        """Called by `Device.resize`: `update(size)` gives the disk its new size.

        By default it does nothing else, which suits a target that needs no storage for the new
        size. Override it to allocate storage before `update` when the disk grows, and to free
        storage after `update` when it shrinks. Raise ValueError for a size that is not possible.
        """
        update(size)
        self.size = size

    def status(self) -> dict[str, Any] | None:
        """The target's state for `pyublk info` to show, as JSON; None if there is nothing to show.

        Called at any time, on a thread of the server's own. It must not wait for requests to end.
        """
        return None

    def identity(self) -> str | None:
        """A text that changes when the bytes do, of a target that is open and knows one, such as
        an ETag: what lies over it refuses another one. None if there is no such text."""
        return None

    def announces(self, method: str) -> bool:
        """Whether this target supports the requests of `method` (a name of METHODS)."""
        if not callable(getattr(self, "handle", None)) and self.dispatch is None:
            return callable(getattr(self, method, None))
        return {
            "read": True,
            "write": not self.read_only,
            "flush": self.flushes,
            "discard": self.discards,
            "write_zeroes": self.writes_zeroes,
            "write_fua": self.takes_fua,
        }.get(method, False)

    def profile(self) -> Profile:
        """The disk's properties, from attributes and methods; called once, when it is open.

        To change properties, override it and return `super().profile()` with changes.
        """
        physical = self.physical_block_size or self.block_size
        return Profile(
            kind=kind_of(self),
            concurrency=self.concurrency,
            operations=frozenset(one for one in METHODS if self.announces(one)),
            size=self.size,
            block_size=self.block_size,
            physical_block_size=physical,
            io_min=self.io_min or physical,
            io_opt=self.io_opt or 0,
            discard_granularity=self.discard_granularity or self.block_size,
            max_discard=self.max_discard or MAX_DISCARD,
            read_only=self.read_only,
            rotational=self.rotational,
            paths=self.paths,
            needs=self.needs,
            max_stall=self.max_stall,
            recoverable=self.recoverable,
            integrity=self.integrity,
        )


def kind_of(target: Target) -> Dispatch:
    """How requests reach a target."""
    if target.dispatch is not None:
        return target.dispatch
    methods = (getattr(target, method, None) for method in METHODS)
    return "async" if any(map(inspect.iscoroutinefunction, methods)) else "sync"


class NativeTarget(Target):
    """A target served by a C function pointer, without the GIL, from every queue's thread at once.

    Set `handler` (the address of a function) and `context` (passed as its first argument) before
    `open` returns, and keep alive what they point to. The function is::

        int64_t handler(void *context, uint32_t op, uint32_t flags,
                        uint64_t offset, uint64_t length, void *buffer);

    `op` is a `pyublk.uapi.Op`, `flags` are `pyublk.uapi.IOFlag` bits, `offset` and `length` bytes;
    0 or more means success, a negative errno fails the request. `flushes`, `discards`,
    `writes_zeroes` and `takes_fua` say which optional requests it supports.
    """

    dispatch: ClassVar[Dispatch | None] = "native"
    concurrency = "parallel"

    #: Whether the handler never looks at the buffer, so that no data need be copied to it.
    blind: ClassVar[bool] = False

    handler: int = 0
    context: int = 0
