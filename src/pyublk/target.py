# SPDX-License-Identifier: MIT
"""What a target implements, and how its methods become device parameters."""

import errno
import inspect
import logging
import operator
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import CoroutineType, TracebackType
from typing import Any, ClassVar, Literal

from pyublk._native import IO
from pyublk.arguments import whole
from pyublk.errors import InvalidTarget, StaleIO
from pyublk.methods import ARGUMENTS, check_handlers, check_plain
from pyublk.params import Basic, Discard, Integrity, Params
from pyublk.paths import DataPath
from pyublk.uapi import Feature

Concurrency = Literal["serial", "per_queue", "parallel"]
Dispatch = Literal["native", "mapped", "sync", "async"]

log = logging.getLogger("pyublk.target")

#: The methods a kernel request can call; their presence announces the operation.
METHODS = tuple(name for name in ARGUMENTS if name != "map")
#: What a target says of itself: asked for by threads without an event loop.
_SAID = ("params", "status", "announces")
_SCOPE = ("open", "close")

#: The most one DISCARD or WRITE_ZEROES request covers unless the target says otherwise (bytes).
MAX_DISCARD = 1 << 30


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

    def open(self) -> Awaitable[None] | None:
        """Called in the serving process before the device appears: open files here, not before.

        That of a target with coroutines may be one, too, and is then awaited on the event loop that
        serves the requests (the first queue's, where there are several); `close` likewise.
        """

    def close(self) -> Awaitable[None] | None:
        """Called once after the last request, also when start-up failed after `open`."""

    def resize(self, size: int, update: Callable[[int], None]) -> None:
        """Called by `Device.resize`: `update(size)` gives the disk its new size.

        As it stands, that is all: for a target that has the room. One that has to make room
        overrides it, does so before `update` when the disk grows, and gives it up after `update`
        when it shrinks. Raise ValueError for a size that it cannot have.
        """
        update(size)
        self.size = size

    def status(self) -> dict[str, Any] | None:
        """What `pyublk info` shows of a target whose state changes, as JSON; None: nothing.

        Asked at any time on a thread of the server's own: it must not wait for requests to end.
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
        }[method]

    def params(self, max_io_size: int) -> Params:
        """The device parameters that follow from attributes and methods.

        Raises ValueError, naming field, value and what is allowed.
        """
        flushes = self.announces("flush")
        discards = self.announces("discard")
        zeroes = self.announces("write_zeroes")
        physical = self.physical_block_size or self.block_size
        discard = None
        if (discards or zeroes) and not self.read_only:
            granularity = self.discard_granularity or self.block_size
            limit = self.max_discard or MAX_DISCARD
            limit -= limit % granularity
            discard = Discard(
                granularity=granularity,
                max_discard_size=limit if discards else 0,
                max_write_zeroes_size=limit if zeroes else 0,
            )
        return Params(
            basic=Basic(
                size=self.size,
                logical_block_size=self.block_size,
                physical_block_size=physical,
                io_min=self.io_min or physical,
                io_opt=self.io_opt or 0,
                max_io_size=max_io_size,
                read_only=self.read_only,
                rotational=self.rotational,
                volatile_cache=flushes or self.announces("write_fua"),
                fua=self.announces("write_fua"),
            ),
            discard=discard,
            integrity=self.integrity,
        )


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


#: What Target.__init__ gives every target.
_OWN = frozenset(vars(Target(size=0)))


def dispatch_of(target: Target) -> Dispatch:
    """How a target is served; raises InvalidTarget for one that cannot be."""
    name = type(target).__name__
    if isinstance(target, type):
        raise InvalidTarget(
            f"a disk is of an object, and {target.__name__} is a class: call it, as in "
            f"{target.__name__}(...)"
        )
    if not isinstance(target, Target):
        raise InvalidTarget(f"{name} is not a pyublk.Target: subclass it and define read and write")
    if missing := sorted(_OWN - {one for one in _OWN if hasattr(target, one)}):
        raise InvalidTarget(
            f"{name} lacks {', '.join(missing)}: its __init__ must call super().__init__(size=...)"
        )
    check_plain(target, _SAID, "it is asked for outside of any event loop")
    if target.concurrency not in ("serial", "per_queue", "parallel"):
        raise InvalidTarget(
            f"{name}.concurrency is {target.concurrency!r}: use 'serial', 'per_queue' or 'parallel'"
        )
    if target.dispatch is not None:
        check_plain(target, (*_SCOPE, "map"), "no event loop serves this target")
        if callable(planned := getattr(target, "map", None)):
            check_handlers(name, {"map": planned})
        return target.dispatch
    methods = {m: f for m in METHODS if (f := getattr(target, m, None)) is not None}
    for method, function in methods.items():
        if not callable(function):
            raise InvalidTarget(f"{name}.{method} is {function!r}, not a method: rename it")
    if "handle" in methods:
        if extra := sorted(methods.keys() - {"handle"}):
            raise InvalidTarget(
                f"{name} defines handle and {', '.join(extra)}: handle gets every request, "
                "define either it or the others"
            )
    elif "read" not in methods:
        raise InvalidTarget(f"{name} has no read method: define read(self, offset, buffer)")
    elif not ({"write", "write_fua"} & methods.keys()) and not target.read_only:
        raise InvalidTarget(
            f"{name} has no write method: define write(self, offset, data), or pass read_only=True"
        )
    check_handlers(name, methods)
    coroutines = {m for m, f in methods.items() if inspect.iscoroutinefunction(f)}
    if coroutines and coroutines != methods.keys():
        plain = ", ".join(sorted(methods.keys() - coroutines))
        raise InvalidTarget(
            f"{name} mixes async methods ({', '.join(sorted(coroutines))}) with plain ones "
            f"({plain}): make all of them async, or none"
        )
    if not coroutines:
        check_plain(target, _SCOPE, "no event loop serves a target with plain handlers")
    return "async" if coroutines else "sync"


#: A class's name and an exception's traceback, whatever the class says they are.
_name_of: Callable[[type], str] = vars(type)["__name__"].__get__
_trace_of: Callable[[Any], TracebackType | None] = vars(BaseException)["__traceback__"].__get__


def _errno_of(outcome: object) -> int:
    """The errno that an OSError came with; 0 without one that a client can be given."""
    if not issubclass(type(outcome), OSError):  # isinstance would ask the object itself
        return 0
    try:
        number = outcome.errno  # type: ignore[attr-defined]
        number = 0 if type(number) is bool else operator.index(number)
    except BaseException:
        return 0
    return number if 0 < number < 4096 else 0


def _place_of(trace: TracebackType | None) -> tuple[str, int]:
    """The line that raised."""
    if trace is None:
        return "", 0
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_filename, trace.tb_lineno or 0


class FailureLog:
    """Turns what a handler raised into an errno, and tells of it once per place and minute.

    It is what stands between a handler and its answer, so it raises nothing, whatever the handler
    raised or returned, and whatever the program has the log do.
    """

    INTERVAL = 60.0  # seconds between two reports from the same line of code

    def __init__(self, target: Target) -> None:
        self._name = type(target).__name__
        self._lock = threading.Lock()
        self._last: dict[tuple[str, int], float] = {}
        self._silent: dict[tuple[str, int], int] = {}
        self._log_failed = False

    def __call__(self, outcome: object, io: IO) -> int:
        """The errno (positive) for an exception, or for a return value that is not None.

        None: the request was deferred, and nobody has it any more.
        """
        number = _errno_of(outcome)
        if number == 0:
            self.tell(outcome, io)
        return number or errno.EIO

    def tell(self, outcome: object, io: IO | None, method: str = "") -> None:
        """Logs it: what came of a request, or, without one, what `method` of the target raised."""
        try:
            self._tell(outcome, io, method)
        except BaseException as failure:  # of a handler, a filter or a factory of the program's
            if not self._log_failed:
                self._log_failed = True
                with suppress(BaseException):
                    print(
                        f"pyublk: {_name_of(type(outcome))} of {self._name} could not be logged: "
                        f"{_name_of(type(failure))}",
                        file=sys.stderr,
                    )

    def _tell(self, outcome: object, io: IO | None, method: str) -> None:
        kind = _name_of(type(outcome))
        who, result = f"{method}()", "nobody is told"
        if io is not None:
            operation, result = _describe(io)
            who = f"the handler of a {operation}"
        if outcome is None:
            self._report(
                ("dropped", 0),
                f"{self._name}: {who} deferred it, and nobody has its IO any more; {result}",
            )
        elif not issubclass(type(outcome), BaseException):
            if type(outcome) is CoroutineType:
                outcome.close()
            self._report(
                (f"return {who}", 0),
                f"{self._name}: {who} returned {kind} instead of None (to read, fill the buffer); "
                f"{result}",
            )
        else:
            trace = _trace_of(outcome)
            shown: Any = (type(outcome), outcome, trace)
            message = f"{self._name}: {who} raised {kind}; {result}"
            try:
                traceback.format_exception(*shown)
            except BaseException:
                shown = None
                message += " (its traceback cannot be shown)"
            self._report(_place_of(trace), message, shown)

    def _report(self, place: tuple[str, int], message: str, exc_info: Any = None) -> None:
        now = time.monotonic()
        with self._lock:
            if now - self._last.get(place, -self.INTERVAL) < self.INTERVAL:
                self._silent[place] = self._silent.get(place, 0) + 1
                return
            self._last[place] = now
            silent = self._silent.pop(place, 0)
        if silent:
            message += f" ({silent} more since the last report)"
        log.error(message, exc_info=exc_info)


def _describe(io: IO) -> tuple[str, str]:
    """The operation of a request, and what its client gets."""
    try:
        return str(getattr(io.op, "name", io.op)), "the client gets EIO"
    except StaleIO:
        return "request", "which was answered already"
