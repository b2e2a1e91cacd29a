"""The binding of the C core: `Ring`, `Queue`, `IO`, control commands, native targets."""

import socket
from asyncio import AbstractEventLoop, Task
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, Self, TypeAlias, final

from typing_extensions import Buffer, disjoint_base

from pyublk.uapi import Op
from pyublk.uring import Completion

__all__ = [
    "HELPER_PROGRAM",
    "IO",
    "NULL_HANDLER",
    "Buffers",
    "CharDevice",
    "ConnectedQueue",
    "Dispatcher",
    "FileMemory",
    "Gate",
    "GateRule",
    "Handlers",
    "Helper",
    "Layout",
    "MappedQueue",
    "Mapper",
    "MirrorLayout",
    "PresenceLayout",
    "Queue",
    "QueueSet",
    "Ram",
    "Ring",
    "ShardedLock",
    "SharedTable",
    "TraceBuffer",
    "WriteInChild",
    "address",
    "become_io_flusher",
    "name_thread",
    "open_private",
    "process",
    "spawn_helper_for",
    "spawn_helpers_by",
    "this_thread",
    "write_in_child",
]

NULL_HANDLER: int

@final
class Ring:
    """An io_uring: fill entries, submit, take completions.

    Args:
        entries: room in the submission queue, 1 to 32768 (the kernel rounds up to a power of two).
        cq_entries: room in the completion queue; 0: twice `entries`.
        required: `SetupFlag` bits that the kernel must accept (OSError EINVAL if it does not).
        wanted: `SetupFlag` bits to use if the kernel has them; by default
            `uring.RECOMMENDED`, whose bits are dropped, the newest first, until the kernel accepts
            the ring. `flags` says what was accepted.

    With SINGLE_ISSUER (part of the default), only the thread that made the ring may submit; others
    get OSError EEXIST. Raises OSError if io_uring is forbidden.
    See io_uring_setup(2), io_uring_enter(2), io_uring_register(2).
    """

    def __init__(
        self, entries: int = 64, *, cq_entries: int = 0, required: int = 0, wanted: int = ...
    ) -> None: ...
    def close(self) -> None:
        """Closes the ring. The end of its `with`, or of its last reference, does the same.

        Entries that were not submitted are dropped. Those in flight are cancelled and waited for,
        at most a second. The buffers of entries that are still in flight then are kept until the
        process ends, and there is a ResourceWarning. The same happens to all entries in flight when
        a ring with SINGLE_ISSUER is closed by another thread while its own thread still runs.

        In a forked child it gives up the child's copy, and changes nothing for the parent; any
        other use there is a ValueError. RuntimeError during `submit`, `completions` or `for_each`.
        """
    def __enter__(self) -> Self: ...
    def __exit__(self, *raised: object) -> None: ...
    def fileno(self) -> int:
        """The ring's descriptor: readable when there are completions.

        With DEFER_TASKRUN, completions are posted only in `submit`, and do not wake a poller: give
        an event loop an eventfd instead (`register_eventfd`).
        """
    @property
    def flags(self) -> int:
        """The `SetupFlag` bits the kernel accepted."""
    @property
    def features(self) -> int:
        """The kernel's `RingFeature` bits."""
    @property
    def entries(self) -> int:
        """Room of the submission queue."""
    @property
    def cq_entries(self) -> int:
        """Room of the completion queue."""
    @property
    def enters(self) -> int:
        """io_uring_enter calls so far."""
    @property
    def overflows(self) -> int:
        """Completions that did not fit and were lost (0 on every kernel with NODROP)."""
    @property
    def unsubmitted(self) -> int:
        """Entries filled but not yet taken by the kernel."""
    @property
    def ready(self) -> int:
        """Completions waiting to be taken."""
    def prepare(
        self,
        opcode: int,
        *,
        fd: int = -1,
        offset: int = 0,
        address: int = 0,
        length: int = 0,
        op_flags: int = 0,
        user_data: int = 0,
        sqe_flags: int = 0,
        ioprio: int = 0,
        buf_index: int = 0,
        file_index: int = 0,
        command: bytes = b"",
    ) -> None:
        """Fills any entry by its fields (struct io_uring_sqe).

        Keep the memory at `address` valid until the completion; `close` does not wait for it.
        `command` (16 bytes, 80 in an SQE128 ring) goes to offset 48. A full queue is submitted
        first; BlockingIOError if the kernel takes nothing then either.
        """
    def nop(self, user_data: int = 0) -> None:
        """Completes at once, with 0."""
    def timeout(self, seconds: float, user_data: int = 0) -> None:
        """Completes with -ETIME after `seconds`."""
    def read(self, fd: int, buffer: Buffer, offset: int, user_data: int = 0) -> None:
        """Reads at `offset` (bytes) into a writable buffer, which is kept until completion, also
        after `close`.

        `user_data` must not be that of another read, write or timeout in flight (ValueError).
        """
    def write(self, fd: int, buffer: Buffer, offset: int, user_data: int = 0) -> None:
        """Writes the buffer at `offset` (bytes); it is kept until completion."""
    def msg_ring(
        self, fd: int, *, target_user_data: int, result: int = 0, user_data: int = 0
    ) -> None:
        """Posts a completion to the ring whose descriptor is `fd`."""
    def submit(
        self, wait: int = 0, timeout: float | None = None, min_wait: float | None = None
    ) -> int:
        """Submits what was filled and waits for `wait` completions; returns how many it submitted.

        `timeout` and `min_wait` are seconds; after `min_wait` one completion is enough (Linux
        6.12, FeatureMissing before). A wait that times out, or is interrupted by a signal, whose
        handler runs, returns as well. OSError EBUSY: take completions first; EAGAIN: the kernel is
        short of memory. Entries that were not taken stay for the next call.
        """
    def completions(self) -> list[Completion]:
        """Takes all completions that there are."""
    def for_each(self, callback: Callable[[int, int], object]) -> int:
        """Calls `callback(user_data, result)` for every completion; returns how many there were.

        An exception stops it; completions that it was not called for stay. The callback may fill
        entries and submit, but must not take completions (RuntimeError).
        """
    def register_files(self, fds: Iterable[int]) -> None:
        """Registers descriptors: entries with sqe_flags 1 then name them by their index."""
    def unregister_files(self) -> None:
        """Undoes `register_files`."""
    def register_eventfd(self, fd: int) -> None:
        """Has the kernel write to an eventfd when completions, or work for `submit`, are there."""
    def register_self(self) -> None:
        """Registers the ring's own descriptor with the calling thread: cheaper submits."""

@final
class IO:
    """One request, as `Target.handle` and the iteration over a `Queue` get it.

    Valid until it is completed: then every use except `completed`, `tag` and `queue_id` raises
    StaleIO, also when its tag already has the next request.
    """

    @property
    def op(self) -> Op:
        """The operation; a plain number for one that this version does not know."""
    @property
    def flags(self) -> int:
        """The request's `IOFlag` bits."""
    @property
    def fua(self) -> bool:
        """Whether this write must be durable before it is completed."""
    @property
    def unmap(self) -> bool:
        """Whether a write-zeroes may deallocate."""
    @property
    def offset(self) -> int:
        """Bytes from the start of the disk; 0 for a FLUSH."""
    @property
    def length(self) -> int:
        """Bytes."""
    @property
    def tag(self) -> int:
        """Its tag, from 0 to the depth less 1; no other request of the queue has it now."""
    @property
    def queue_id(self) -> int:
        """The number of its queue."""
    @property
    def buffer(self) -> memoryview:
        """The request's bytes, to fill for a READ, read-only for a WRITE, empty for the others.

        With user copy, a write's data is copied when this is first used, and a read's when the
        request is completed. You may keep the view, or a slice or array made of it: its bytes do
        not change, but it takes `buffer_size` bytes of memory. (Memory that is shared with a client
        is the client's: that view is released when the request is completed.)
        """
    @property
    def zones(self) -> int:
        """How many zones a REPORT_ZONES asks for; 0 for every other request."""
    @property
    def metadata(self) -> bool:
        """Whether the request has integrity metadata besides its data."""
    def read_into(self, memory: Buffer, at: int = 0, *, metadata: bool = False) -> None:
        """Copies a write's data, from its byte `at` on, into `memory` (writable, contiguous).

        With user copy only these bytes are copied. `metadata`: its integrity metadata instead.
        Raises ValueError outside the request or for a read. From any thread.
        """
    def write_from(self, memory: Buffer, at: int = 0, *, metadata: bool = False) -> None:
        """Copies `memory` into a read's data, from its byte `at` on; as `read_into`."""
    @property
    def completed(self) -> bool:
        """Whether it has been answered, also from outside the handler."""
    @property
    def deferred(self) -> bool:
        """Whether `defer` was called."""
    def complete(self, *, zone_sector: int | None = None) -> None:
        """Completes the whole request successfully. From any thread. `zone_sector`: where a
        ZONE_APPEND was written, in 512-byte sectors."""
    def fail(self, error: int) -> None:
        """Ends the request with an errno (positive). From any thread."""
    def defer(self) -> None:
        """Called in `handle`: the request is completed after the method has returned, by any code
        that keeps the IO. If its last reference is dropped before, or the method raises, the
        request fails with EIO."""

@final
class Handlers:
    """A target's methods, and `report`, which is told what one raised, or returned instead of None,
    and says the errno for it. It is told None of a deferred request that nobody has any more. The
    request gets EIO when `report` raises; `sys.unraisablehook` is told once."""

    def __init__(self, target: object, report: Callable[[object, IO], int]) -> None: ...
    def answer_from_here(self, io: IO) -> None: ...

@final
class Buffers:
    """Memory for the requests of `depth` tags, `size` bytes each, that several threads share."""

    def __init__(self, depth: int, size: int) -> None: ...
    @property
    def depth(self) -> int: ...
    @property
    def size(self) -> int: ...

@final
class CharDevice:
    """An open char device: the number stays taken until everybody who may use it has gone. A thread
    that was given up, and comes back to copy a request's data, finds a file of its own under the
    number, never somebody else's. `fd` is taken over."""

    def __init__(self, fd: int) -> None: ...
    def fileno(self) -> int:
        """The number; -1 when it is closed."""
    def close(self) -> None:
        """Closes it; every queue on it must be closed already. Else let go of this object."""

def become_io_flusher() -> None:
    """For each thread that serves requests but makes no queue, which does it too: memory that it
    allocates does not wait for dirty pages that only it can write (prctl(2), PR_SET_IO_FLUSHER).
    Without CAP_SYS_RESOURCE nothing happens."""

def name_thread(name: str) -> None:
    """Gives the calling thread a name in the kernel, of which it keeps 15 bytes: what
    /proc/PID/task/*/comm and `ps -L` show."""

def address(memory: Buffer) -> int:
    """Where the bytes of a buffer are."""

def this_thread() -> int:
    """The calling thread's number. No other thread ever has it: idents go to new threads."""

@final
@final
class GateRule:
    """One rule of a `Gate`; whoever makes it checks its arguments.

    `ops` has a bit for each operation. The rule is for bytes from `begin` to `end` (0: all), for
    requests that jump, for which `when` is true. Of these, the `nth` (0: each), `times` at most.
    `delays` are in seconds, each as likely; costs are the seconds of a request, and of a byte.
    """

    def __init__(
        self,
        action: str,
        *,
        ops: int,
        begin: int = 0,
        end: int = 0,
        jumps: bool = False,
        when: Callable[[Op | int, int, int], object] | None = None,
        nth: int = 0,
        every: bool = False,
        times: int = 0,
        probability: float = 1.0,
        seed: int = 0,
        error: int = 0,
        delays: Sequence[float] = (),
        amount: int = 0,
        place: int = 0,
        request_cost: float = 0.0,
        byte_cost: float = 0.0,
        burst: float = 0.0,
    ) -> None: ...
    def counts(self) -> tuple[int, int]:
        """How many requests matched, and for how many it fired."""

@final
class Gate:
    """What a disk's rules do to the requests of its queues, which are made with it."""

    def exchange(self, rules: Sequence[GateRule]) -> None:
        """These are the rules from now on."""
    def release(self, rule: GateRule | None = None) -> None:
        """Lets go of what a rule holds now, or all of them."""
    def suspend(self, suspended: bool) -> None:
        """No rule applies, and nothing is held, until this is taken back."""
    def set_size(self, size: int, zone_size: int = 0) -> None:
        """Bytes of the disk."""

@disjoint_base
class SharedTable:
    """The memory that a device shares with its clients, by the kernel's index.

    `changing` is to be set around REG_BUF and UNREG_BUF; one change at a time.
    """

    def __init__(self) -> None: ...
    def changing(self, now: bool) -> None: ...
    def put(self, index: int, memory: Buffer) -> None:
        """`memory` is kept as long as it is in the table or in use by a request."""
    def drop(self, index: int) -> None: ...
    def clear(self) -> None: ...

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

@final
class TraceBuffer:
    """Memory of `size` bytes for records of a queue's requests, as blktrace has them.

    `device` is the number that each record names (major << 20 | minor), `number` what it has for
    the CPU. Raises MemoryError.
    """

    def __init__(self, size: int, *, device: int = 0, number: int = 0) -> None: ...
    @property
    def kept(self) -> int:
        """How many records it has."""
    @property
    def lost(self) -> int:
        """How many it had no room for."""
    def records(self) -> memoryview:
        """Those that it has, when no queue records to it any more."""

@final
class Dispatcher:
    """Runs a target's coroutines on `loop`: a first step on the spot, the rest when what they wait
    for is done. `answered` is told of a queue, once, when requests of it were answered outside of
    `turn` and `sleep`: it wants one of these. For the loop's thread, except where it says so."""

    def __init__(
        self,
        handlers: Handlers,
        loop: AbstractEventLoop,
        answered: Callable[[Queue], None] | None = None,
    ) -> None: ...
    def turn(self, queue: Queue) -> int | None:
        """Submits the commits, takes what is there and begins it: how many requests. None when
        the kernel has taken every tag back."""
    def sleep(self, queue: Queue, other: int, timeout: float | None = None) -> bool | None:
        """Serves in the queue's ring until the loop has something to do, or for `timeout` seconds.

        True when the descriptor `other` is readable; None when the kernel has taken every tag back.
        """
    def waiting(self) -> list[Coroutine[Any, Any, object]]:
        """The coroutines that have not ended yet. From any thread."""
    def tasks(self) -> list[Task[object]]:
        """These as tasks, made where there are none yet."""

@final
class QueueSet:
    """Many queues of one thread, which waits until one of them has requests.

    ::

        with QueueSet() as queues:
            queues.add(queue)
            while len(queues):
                for queue in queues.wait():
                    if not queue.turn(handlers):
                        queues.remove(queue)
                        queue.close()

    Only the thread that made it and its queues may use it (RuntimeError otherwise), except for
    `wake` and `close`. Each queue has its own ring, so each busy queue takes system calls of its
    own; idle queues cost nothing.

    Args:
        room: the largest number of queues, as far as the process may open files; when it is full,
            `add` raises OSError ENOSPC.
    """

    def __init__(self, room: int = 4096) -> None: ...
    def close(self) -> None:
        """Closes the set, not its queues. Not while its thread waits."""
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...
    def __len__(self) -> int: ...
    def add(self, queue: Queue) -> None:
        """Watches a queue; the next `wait` returns it."""
    def remove(self, queue: Queue) -> None:
        """Stops watching a queue."""
    def wait(self, timeout: float | None = None) -> list[Queue]:
        """Waits until some queues have requests, and returns these queues: none after `timeout`
        seconds, a signal or a `wake`. Take a queue's requests by its own `wait(0)`, or a `turn`; if
        some are left, the next call returns that queue again, at once."""
    def wake(self) -> None:
        """Makes a wait return. [any thread]"""

@final
class WriteInChild:
    """A text on its way to a file of sysfs, by the helper: some such files wait for a disk's
    requests, beyond the reach of signals. One that is dropped is called off."""

    def __init__(self, path: str, text: str) -> None: ...
    def finish(self, *, deadline: float) -> int | None:
        """Waits for its end. Returns 0 or -errno (-ECANCELED: the helper was killed), or None when
        the deadline passed: the kernel goes on as long as it must."""

def write_in_child(path: str, text: str, *, deadline: float) -> int | None:
    """A `WriteInChild`, finished."""

HELPER_PROGRAM: str

@final
class Helper:
    """This process's helper, which is started for the first of these and ends with the last. It
    issues control commands, and deletes guarded devices when this process ends without having done
    so. One that is killed is replaced. Commands need the `control_node`'s descriptor. Raises
    OSError where it cannot be started."""

    def __new__(cls, control_node: int = -1) -> Self: ...
    @property
    def pid(self) -> int:
        """Its process; 0 while it could not be replaced."""

    def control(
        self,
        command: int,
        device: int,
        *,
        queue: int = 0xFFFF,
        data: int = 0,
        payload: bytearray | None = None,
        path_length: int = 0,
        guarded: bool = False,
        memory: tuple[int, int, int, bool] | None = None,
        deadline: float = 30.0,
    ) -> tuple[Literal["ring", "enter", "command", "deadline"], int]:
        """Runs one command; `payload` is given to the kernel and rewritten with its answer.

        `memory`, for REG_BUF, is a file's (descriptor, offset, bytes, whether it is only read).
        Returns (stage, result): stage "ring", "enter" or "command" tells what `result` (0 or more,
        or -errno) is the result of; "deadline" that the command was given up, with result 1 when
        the kernel goes on with it all the same. Raises ChildProcessError when the helper was killed
        meanwhile.
        """

    def guard(
        self,
        device: int,
        cookie: int,
        guarded: bool,
        *,
        restarted: bool = False,
        memory: int = -1,
        hang_ms: int = 0,
        deadline: float,
    ) -> int:
        """Whether it deletes the device of that cookie when this process ends, or, if it is
        `restarted`, executes the program of `restart_by`, for which it holds the file `memory`. It
        kills this process when the disk has requests and answers none for `hang_ms` (0: never).
        0 or -errno."""

    def restart_by(self, program: int, *, deadline: float) -> int:
        """What it executes then: the file `program` has words, each ended by a 0: the command's, an
        empty one, the environment's. 0 or -errno."""

def open_private(path: str, flags: int) -> int:
    """As os.open, with O_CLOEXEC, for a `CharDevice`: a forked child lets go of it at once."""

def process() -> int:
    """This process, also after a fork, without a system call. What was made in another one is the
    parent's."""

def spawn_helpers_by(sock: int) -> None:
    """From now on another process, at the other end of `sock`, starts this one's helpers. It is
    sent what it calls `spawn_helper_for` with, and answers by an int32, the pid or -errno, and
    the pidfd. `sock` must stay open."""

def spawn_helper_for(sock: int, server: int) -> tuple[int, int]:
    """Starts the helper of another process, whose pidfd is `server`: returns the helper's pidfd and
    pid. Raises OSError."""

#: Descriptor, whether the file's bytes are in memory, whether it is a block device.
_File: TypeAlias = tuple[int, bool, bool]

@disjoint_base
class Layout:
    """Where a disk's bytes are, for a `MappedQueue`. `MappedTarget` makes it. Extents are (file's
    index, offset, length). All sizes are in bytes."""

    @classmethod
    def table(cls, files: Sequence[_File], extents: Iterable[tuple[int, int, int]]) -> Self:
        """Extents, one after the other."""
    @classmethod
    def stripe(cls, files: Sequence[_File], size: int, chunk: int) -> Self:
        """Chunks of `chunk` bytes, in turn from every file."""
    @classmethod
    def per_request(cls, files: Sequence[_File], size: int) -> Self:
        """A `Mapper` says for each request where its bytes are."""
    @property
    def size(self) -> int: ...
    def resize(self, size: int) -> None:
        """Gives it another size while queues use it: each request sees the old one or the new one.
        Of a table, the last extent grows. Raises ValueError when it cannot have that size."""
    @property
    def in_memory(self) -> bool:
        """Whether no file's I/O ever waits."""
    def protect(self, index: int) -> None:
        """Has requests fail for which a `Mapper` would have this file changed, and flushes leave it
        alone. Before queues use the layout."""
    def map_memory(self) -> None:
        """Maps the files in memory, for user copy straight between them and requests."""
    @property
    def in_use(self) -> bool:
        """Whether a queue may come to use the files: one that was cut off, and has not ended."""
    def give_up(self, fd: int) -> None:
        """Lets go of a file, and keeps its number from others as long as queues may use it."""
    def unmap_memory(self) -> None:
        """Lets go of them: a mapped file keeps its file system from being unmounted."""
    def defer(
        self, told: Callable[[MappedQueue, int, int, Op, int, int], object] | None, *, flushes: bool
    ) -> None:
        """`told` hears of each request that others finish: its queue, tag and generation, for
        `MappedQueue.resolve`, and its operation, offset and length. It is called by the queue's
        thread, and must not raise. `flushes`: of each flush, when the files are synced."""
    @property
    def defers_flushes(self) -> bool: ...

@disjoint_base
class MirrorLayout(Layout):
    """The same bytes in every file, its legs; one that takes `leg_timeout` seconds has failed."""

    MAX_LEGS: ClassVar[int]
    def __init__(
        self, files: Sequence[_File], size: int, *, leg_timeout: float | None = None
    ) -> None: ...
    def leg_state(self, leg: int) -> int:
        """0: in step; 1: being brought in step, written but not read; 2: failed, left alone."""
    def set_leg_state(self, leg: int, state: int) -> None: ...
    def fail_leg(self, leg: int, file_generation: int | None = None) -> bool:
        """Leaves a leg alone from now on, and holds writes until `set_recorded`. False, and nothing
        is done, for one that has failed, whose `file_generation` is another now (it has another
        file), or that is the last in step, which is never given up."""
    @property
    def recorded(self) -> bool:
        """Whether all legs that have failed are on record; no write is done while not."""
    def set_recorded(self) -> None: ...
    def leg_errors(self, leg: int) -> int:
        """Requests that failed on it."""
    def leg_orphans(self, leg: int) -> tuple[int, int]:
        """Operations that nobody waits for any more, of a leg's file and of the one before it."""
    def replace_file(
        self, index: int, fd: int, memory: bool, device: bool, file_generation: int | None = None
    ) -> None:
        """Puts a file in a place; queues see it with their next request. What the one before does
        late is not charged to it where it has another number, its `file_generation`: a file has the
        same whenever it is in that place. None: it is the same file, opened again."""
    @property
    def region_bytes(self) -> int:
        """The unit in which a mirror's leg is brought in step."""
    def block_writes(self, region: int | None = None) -> None:
        """No write begins in this region of a mirror (None: any may); wake the queues then."""
    def is_drained(self, region: int) -> bool:
        """Whether no write to the region is under way."""

@final
class Mapper:
    """Calls `target.map(op, offset, length)` to find out where a request's bytes are, for a
    `MappedQueue` with a `Layout.per_request`. It may return what `MappedTarget.map` may.

    `report` is called with the exception that it raised, and returns the errno of the request.
    """

    def __init__(self, target: object, report: Callable[[object, IO], int]) -> None: ...

@final
class FileMemory(Buffer):
    """A part of a file in memory, which changes the file; the mapping keeps that, and takes no
    descriptor, as mmap.mmap does before Python 3.13. `offset` is a page's start.

    Raises OSError when it cannot be mapped.
    """

    def __init__(self, fd: int, length: int, *, offset: int = 0) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@disjoint_base
class PresenceLayout(Layout):
    """Blocks of `block_bytes` are in the first file where their bit is set, else below: where
    `below`, a layout of all files but the first, has them; without it, they are asked for.

    `bits` is memory of `map_bytes` bytes, the lowest bit of each byte first, which is changed as
    blocks come and go. `gated`: a block is written only when it is writable, or somebody allows it.
    `evicts`: requests are counted by region. `writes_through`: writes are deferred once the file
    has them. `always_deferred`: every flush is. What the map guarantees is said in
    _core/presence.h.
    """

    def __init__(
        self,
        files: Sequence[_File],
        size: int,
        bits: Buffer,
        *,
        block_bytes: int,
        below: Layout | None = None,
        gated: bool = False,
        evicts: bool = False,
        writes_through: bool = False,
        always_deferred: bool = False,
    ) -> None: ...
    @staticmethod
    def can_lie_over(below: Layout) -> bool:
        """Whether its files have its bytes, in a way that can be told without asking."""
    @staticmethod
    def map_bytes(size: int, block_bytes: int) -> int:
        """Bytes of the bits for a disk: whole pages."""
    def ask(
        self,
        *,
        fetch: Callable[[PresenceLayout, int, int], object] | None,
        write: Callable[[MappedQueue, int, int, int, int], object] | None,
        wake: Callable[[], object] | None,
    ) -> None:
        """Whom the queues' threads tell, which must not raise: `fetch(layout, offset, length)` of
        absent blocks that are wanted, held for him until `let_go`; `write(queue, tag, generation,
        offset, length)` of a write that waits for `MappedQueue.resolve`; `wake()` is to wake all
        queues. None, when no queue is left."""
    @property
    def block_bytes(self) -> int: ...
    def is_present(self, offset: int, length: int) -> bool:
        """Whether all blocks that the range touches are."""
    def run(self, offset: int, end: int) -> tuple[int, bool]:
        """The length (bytes) of the run of blocks that are alike from `offset` on, a block's start,
        at most up to `end`; and whether they are present."""
    def count_present(self) -> int:
        """How many blocks are."""
    def counters(self) -> tuple[int, int, int]:
        """Requests that found all blocks present, those that did not, and parts copied up."""
    def claim(self, offset: int, length: int, most: int) -> list[tuple[int, int]]:
        """Holds absent blocks of the range that nobody holds, in runs of at most `most` bytes; the
        runs (offset, length), each to be ended by `let_go`."""
    def let_go(self, offset: int, length: int, present: bool) -> None:
        """Of blocks that were held: they are in the upper file whole now, or are absent still."""
    def fail(self, offset: int, length: int, error: int) -> None:
        """Requests that wait for one of the blocks fail with this errno. Before `let_go`."""
    @property
    def synced(self) -> bool:
        """Whether the map's file says what the bits say."""
    def begin_sync(self) -> None: ...
    def end_sync(self) -> None: ...
    def take_dirty(self) -> list[tuple[int, bytes]]:
        """The pages that changed: (their place among the bits in bytes, a copy), which count as
        written from now on, or are to be marked dirty again."""
    def mark_dirty(self, place: int) -> None:
        """The page of the bits at this byte is out of date in the file."""
    @property
    def region_bytes(self) -> int: ...
    def block_region(self, region: int | None = None) -> None:
        """No request begins in this region (None: any may); `wake` the queues then."""
    def is_drained(self, region: int) -> bool:
        """Whether no request to the region is under way."""
    def uses(self, region: int) -> int:
        """How many requests have begun in a region; wraps around at 2**32."""
    def evict(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Makes the present blocks of the range absent, but for writable ones, and holds them; runs
        as of `claim`. Its region is blocked and drained."""
    def take_touched(self, offset: int, length: int) -> bool:
        """Whether a request touched one of the blocks since this was asked last."""
    def set_writable(self, offset: int, length: int, writable: bool) -> None: ...
    def is_writable(self, offset: int, length: int) -> bool: ...

@disjoint_base
class MappedQueue(Queue):
    """A queue that serves its requests from a layout's files, by its own ring.

    As `Queue`, but its requests are not returned: `serve_mapped` or `step` serve them. The files of
    the layout must stay open until it is closed.
    """

    def __init__(
        self,
        fd: int | CharDevice,
        queue_id: int = 0,
        *,
        layout: Layout,
        depth: int = 128,
        buffer_size: int = 524288,
        flags: int = 0,
        first_tag: int = 0,
        tag_step: int = 1,
        buffers: Buffers | None = None,
        trim_after: float | None = None,
        faults: int = 0,
        gate: Gate | None = None,
    ) -> None: ...
    @classmethod
    def loopback(  # type: ignore[override]
        cls,
        *,
        layout: Layout,
        depth: int = 128,
        buffer_size: int = 524288,
        gate: Gate | None = None,
    ) -> Self: ...
    def resolve(self, tag: int, generation: int, error: int) -> None:
        """How a request ends that was deferred, or whether one that waits may begin: 0, or an
        errno. [any thread]"""
    def serve_mapped(
        self,
        mapper: Mapper | None = None,
        leg_failed: Callable[[int, int, int], object] | None = None,
    ) -> None:
        """Serves until the device stops. `leg_failed` is called with a mirror's leg that failed,
        its errno (0: a known failure that only has to be recorded) and the generation of its file,
        before the requests that noticed it are answered."""
    def step(
        self,
        mapper: Mapper | None = None,
        leg_failed: Callable[[int, int, int], object] | None = None,
        *,
        timeout: float | None = None,
    ) -> bool:
        """Waits for requests, at most `timeout` seconds (None: for ever), and serves those that
        have come; False when the device has been stopped. With `fileno` in a poller, one thread can
        serve several queues in this way; it must be the thread that made them."""

@disjoint_base
class ConnectedQueue(Queue):
    """A queue whose requests an NBD server does; `ConnectedTarget` has these.

    As `Queue`, but its requests are not returned: `serve_connected` or `step` serve them, over as
    many `links` as there are sockets for, on which the handshake is over. Requests that find no
    link wait for one. Sockets are the queue's until their link is lost: it closes them at its end,
    but for the `unfinished`, whose server may still do something. They are shut down for sending.
    """

    def __init__(
        self,
        fd: int | CharDevice,
        queue_id: int = 0,
        *,
        links: int = 1,
        depth: int = 128,
        buffer_size: int = 524288,
        flags: int = 0,
        first_tag: int = 0,
        tag_step: int = 1,
        buffers: Buffers | None = None,
        trim_after: float | None = None,
        faults: int = 0,
        gate: Gate | None = None,
    ) -> None: ...
    @classmethod
    def loopback(  # type: ignore[override]
        cls,
        *,
        links: int = 1,
        depth: int = 128,
        buffer_size: int = 524288,
        gate: Gate | None = None,
    ) -> Self: ...
    unfinished: list[socket.socket]
    def attach(self, link: int, socket: socket.socket) -> bool:
        """Gives a link that is down a socket; False when the queue is closed. From any thread, as
        what follows."""
    def drop(self, link: int, reason: int) -> None:
        """Gives a link up, for that reason (an errno)."""
    def release(self, link: int) -> None:
        """Has the requests that went down with a link sent again, over whichever is up."""
    def set_fail(self, fail: bool) -> None:
        """Whether requests that find no link up fail with EIO, instead of waiting; a link that is
        attached ends that."""
    def links(self) -> list[tuple[bool, int, int]]:
        """Of each link: whether it has a socket, requests in flight, answers so far."""
    @property
    def resent(self) -> int:
        """Requests that were sent again, so far."""
    def serve_connected(
        self, lost: Callable[[ConnectedQueue, int, socket.socket, int], object]
    ) -> None:
        """Serves until the device stops. `lost` is called with each link that went down: this
        queue, its number, its socket, which nobody uses any more and whose sending side is shut
        down, and why: an errno, or a key of `pyublk.connected.REASONS`."""
    def step(  # as of MappedQueue
        self,
        lost: Callable[[ConnectedQueue, int, socket.socket, int], object],
        *,
        timeout: float | None = None,
    ) -> bool:
        """Waits for requests, at most `timeout` seconds (None: for ever), and serves those that
        have come; False when the device has been stopped."""

@final
class Ram:
    def __init__(self, size: int, file: int = -1) -> None: ...
    @property
    def handler(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def file(self) -> int:
        """Its own descriptor of the file that has the bytes; -1: there is none."""

    def resident(self) -> int: ...

@final
class ShardedLock:
    """Reader-writer locks over byte ranges, for `parallel` targets.

    The disk is divided into granules of `granule` bytes, each of which belongs to one of `shards`
    locks. A range takes the locks of all its granules, always in the same order. So overlapping
    ranges exclude each other as readers and writers do; distant ranges rarely share a lock.
    The GIL is released while waiting. Not reentrant.
    """

    def __init__(self, shards: int = 64, granule: int = 1048576) -> None: ...
    def reading(self, offset: int, length: int) -> AbstractContextManager[None]:
        """``with lock.reading(offset, length):`` shares the range with other readers."""
    def writing(self, offset: int, length: int) -> AbstractContextManager[None]:
        """``with lock.writing(offset, length):`` has the range exclusively."""
