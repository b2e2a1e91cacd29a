"""An io_uring for Python, usable on its own."""

from collections.abc import Callable, Iterable
from typing import Self, final

from typing_extensions import Buffer

from pyublk.uring import Completion

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
