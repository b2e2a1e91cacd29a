# SPDX-License-Identifier: MIT
"""What a target implements, and what follows from it for its disk."""

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
    """Where a disk's bytes live. Subclass it, define `read` and `write`, serve it with `Device`.

    Args of the constructor: `size` of the disk in bytes, a multiple of `block_size` (bytes, a
    power of two from 512 to the page size: the smallest unit clients read and write).
    `physical_block_size`, `io_min` and `io_opt` (bytes, powers of two) are hints to file systems.
    `discard_granularity` and `max_discard` (bytes) shape discard and write-zeroes requests.

    These methods are called by the kernel's requests; all are plain functions, or all `async def`:

    - ``read(offset, buffer)``: fill `buffer`, a writable memoryview of the request's length, whole:
      what is in it before is another request's.
    - ``write(offset, data)``: take `data`, a read-only memoryview. Copy what you keep: `data`, and
      slices and arrays made of it, stay as they are, but each request of which one is kept takes
      `max_io_size` bytes of memory.
    - ``flush()``: make completed writes durable. Defining it declares a volatile write cache.
    - ``write_fua(offset, data)``: write and make durable at once. Without it, the kernel sends
      write and flush instead.
    - ``discard(offset, length)``: the client needs these bytes no more.
    - ``write_zeroes(offset, length, unmap)``: make them read as zeroes; with `unmap` false they
      must stay allocated.
    - ``handle(io)``: instead of all of these, every request as an `IO`.

    `offset` and `length` are bytes, always multiples of the block size, inside the disk. A method
    returns None. An OSError it raises becomes that errno at the client (the kernel passes on only
    a few, the others as EIO); whatever else it raises or returns becomes EIO, and is logged. So is
    a request that `handle` deferred (`IO.defer`) when nobody has its IO any more.

    Coroutines run on an asyncio event loop, each in its own copy of the context; they may use all
    of asyncio. One that never suspends is answered at once. Cancelled, it fails with EIO.

    `concurrency` is a promise, and is enforced:

    - ``"serial"`` (the default): one call at a time over all queues. An async target runs on one
      event loop; its coroutines interleave where they await.
    - ``"per_queue"``: one call at a time for each queue; queues run beside each other.
    - ``"parallel"``: any number of calls at once, from any thread; needed for `workers`.

    The same holds with and without the GIL; without it, calls that may run at once do.
    """

    concurrency: ClassVar[Concurrency] = "serial"

    #: How it is served, for kinds of target whose methods do not tell.
    dispatch: ClassVar[Dispatch | None] = None

    #: What a target with `handle`, or a native one, takes beside reads and writes. Other targets
    #: say it by defining the method.
    flushes: ClassVar[bool] = False
    discards: ClassVar[bool] = False
    writes_zeroes: ClassVar[bool] = False
    takes_fua: ClassVar[bool] = False

    #: The data paths that it can be served by, the best first.
    paths: tuple[DataPath, ...] = (DataPath.COPY, DataPath.USER_COPY, DataPath.GET_DATA)

    #: Device features that it cannot do without, beside those of its path. A kernel that lacks one
    #: refuses the disk, by the feature's name.
    needs: Feature = Feature(0)

    #: Seconds that a request may take with nothing wrong but a part that the target can do without.
    max_stall: float = 0.0

    #: The metadata beside the data (Linux 7.0): needs Feature.INTEGRITY, user copy, and `handle`.
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
        #: Tells whoever shows `status` that it changed; set by the server.
        self.status_changed: Callable[[], None] = lambda: None

    def open(self) -> Awaitable[None] | None:
        """Called in the serving process before the device appears: open files here, not before.

        That of a target with coroutines may be one, too, and is then awaited on the event loop that
        serves the requests (the first queue's, where there are several); `close` likewise.
        """

    def close(self) -> Awaitable[None] | None:
        """Called once after the last request, also when start-up failed after `open`."""

    def status(self) -> dict[str, Any] | None:
        """What `pyublk info` shows of a target whose state changes, as JSON; None: nothing.

        A target calls `self.status_changed()` when it says something else now. From any thread.
        """
        return None

    def announces(self, method: str) -> bool:
        """Whether this target takes the requests behind `method` (a name of METHODS)."""
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
        """What its disk is like, from attributes and methods; asked for once it is open.

        A target that says more of its disk returns `super().profile()` with changes.
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
            resizable=True,
            paths=self.paths,
            needs=self.needs,
            max_stall=self.max_stall,
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
    0 or more means done, a negative errno fails the request. `flushes`, `discards`, `writes_zeroes`
    and `takes_fua` say which optional requests it takes.
    """

    dispatch: ClassVar[Dispatch | None] = "native"
    concurrency = "parallel"

    #: The handler never looks at the buffer: no data path needs to bring anything there.
    blind: ClassVar[bool] = False

    handler: int = 0
    context: int = 0
