"""The memory of requests, and the number of a char device."""

from typing import final

from typing_extensions import Buffer

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

def address(memory: Buffer) -> int:
    """Where the bytes of a buffer are."""
