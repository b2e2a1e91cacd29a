"""Memory for the records of a queue's requests."""

from typing import final

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
