"""Queues, and the loop that calls a target's methods."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Self

from typing_extensions import disjoint_base

from pyublk._binding.buffers import Buffers, CharDevice
from pyublk._binding.gate import Gate
from pyublk._binding.io import IO, Handlers
from pyublk._binding.shared import SharedTable
from pyublk._binding.trace import TraceBuffer

@disjoint_base
class Queue:
    """One queue of an open char device (`/dev/ublkcN`), served by the thread that makes it.

    Args: `fd` of the char device (a number, which the queue duplicates, or a CharDevice),
    the queue's number, its `depth` (1 to 4096, that of the device), `buffer_size` in
    bytes for each tag (the device's max_io_size), and the device's `flags`, which determine the
    data path. Several objects may serve one queue, each on its own thread with its
    own tags (`first_tag`, and each `tag_step` further), and with batch I/O the same `buffers`.
    After `trim_after` seconds without a request, the memory of its buffers goes back to the kernel.
    `faults` makes a data path fail, for tests.

    Call ``queue.fetch()``, then START_DEV from another thread, then ``for io in queue: ...``
    with ``io.complete()`` or ``io.fail(errno)``. Commits are submitted with the next wait.
    """

    def __init__(
        self,
        fd: int | CharDevice,
        queue_id: int = 0,
        *,
        depth: int = 128,
        buffer_size: int = 524288,
        flags: int = 0,
        first_tag: int = 0,
        tag_step: int = 1,
        buffers: Buffers | None = None,
        extra_entries: int = 0,
        files: Iterable[int] = (),
        trim_after: float | None = None,
        faults: int = 0,
        table: SharedTable | None = None,
        gate: Gate | None = None,
    ) -> None: ...
    @classmethod
    def loopback(
        cls,
        *,
        depth: int = 128,
        buffer_size: int = 524288,
        extra_entries: int = 0,
        table: SharedTable | None = None,
        gate: Gate | None = None,
    ) -> Self:
        """A kernel-free queue: requests are injected, answers are read back (pyublk.testing)."""
    def close(self) -> None:
        """Frees its ring, map and buffers. IOs that were kept become stale.

        The end of its last reference does the same. I/O on files that is in flight in its ring is
        cancelled and waited for, at most a second; if some is still in flight then, the queue's
        memory is kept until the process ends. If another thread than its own closes it, a wait of
        its own thread ends with DeviceClosed, and the rest is freed with the last reference.
        """
    def __enter__(self) -> Self: ...
    def __exit__(self, *raised: object) -> None: ...
    @property
    def id(self) -> int:
        """The queue's number."""
    @property
    def depth(self) -> int:
        """The number of its tags."""
    @property
    def held(self) -> int:
        """Requests taken and not yet committed."""
    @property
    def kept(self) -> int:
        """Of these, what its gate holds."""
    @property
    def is_due(self) -> bool:
        """Whether the next wait brings some of that."""
    @property
    def ending(self) -> bool:
        """Whether the kernel has begun to take the tags back, as the device is stopped or quiesced.

        No request comes any more. When those that the queue holds are answered, `wait` returns
        None.
        """
    @property
    def ring_flags(self) -> int:
        """The `SetupFlag` bits of the queue's ring."""
    def fileno(self) -> int:
        """An eventfd, readable when there is something to `wait` for; every `wait` resets it."""
    def fetch(self) -> None:
        """Fetches every tag, once; the queue is then ready for START_DEV."""
    def wait(self, timeout: float | None = None) -> list[IO] | None:
        """Submits the commits and waits for requests, at most `timeout` seconds.

        An empty list after a time-out or a wake; None when the device is stopped or quiesced, and
        every request is answered. An IO that is dropped unanswered fails with EIO in the next wait,
        and is logged.
        """
    def __iter__(self) -> Iterator[IO]: ...
    def serve_native(self, handler: int, context: int = 0, *, blind: bool = False) -> None:
        """Serves by a C function (see NativeTarget) until the device stops."""
    def turn_native(self, handler: int, context: int = 0, *, blind: bool = False) -> bool:
        """As `turn`, by a C function."""
    def serve(self, handlers: Handlers, lock: AbstractContextManager[object] | None = None) -> None:
        """Serves by a target's methods until the device stops, under `lock` if there is one.
        Answers are sent every 5 ms, even if other requests of the batch are not handled yet."""
    def turn(self, handlers: Handlers, lock: AbstractContextManager[object] | None = None) -> bool:
        """As `serve`, but only for requests that have come, without waiting: for a queue in a
        `QueueSet`. False: the device has stopped."""
    def counters(self) -> tuple[tuple[int, ...], tuple[int, ...], int, int, int, int]:
        """For `QueueStats.from_counters`."""
    def latency(self) -> tuple[tuple[int, tuple[tuple[int, int], ...]], ...]:
        """For `pyublk.stats.latency_of`: of each operation, the sum of all latencies in
        nanoseconds, and for each bucket that is not empty its upper bound, likewise, and count."""
    def trace(self, buffer: TraceBuffer | None) -> None:
        """Records each request from now on in `buffer`; None: no more. When it returns, nothing is
        written to the buffer before any more. From any thread."""
    def wake(self) -> None:
        """Makes a `wait` return. From any thread."""
    def fail_held(self, error: int = 5) -> None:
        """Fails every request not yet answered; each tag gets other memory. From any thread."""
    def sever(self) -> None:
        """Closes the device under a serving thread that hangs. From any thread."""
    def inject(self, tag: int, op_flags: int, offset: int, length: int, address: int = 0) -> None:
        """Loopback: a request (bytes) appears on a tag."""
    def answered(self, tag: int) -> int | None:
        """Loopback: the tag's result, or None while it is unanswered."""
    def zone_sector(self, tag: int) -> int:
        """Loopback: where the tag's zone append was written, as answered."""
    def memory(self, tag: int, length: int) -> memoryview:
        """The tag's buffer as the kernel sees it."""
