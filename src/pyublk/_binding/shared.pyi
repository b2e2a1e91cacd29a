"""Memory that a device shares with its clients."""

from typing_extensions import Buffer, disjoint_base

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
