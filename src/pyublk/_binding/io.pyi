"""Requests as Python sees them, and who is called for them."""

from collections.abc import Callable
from typing import final

from typing_extensions import Buffer

from pyublk.uapi import Op

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
