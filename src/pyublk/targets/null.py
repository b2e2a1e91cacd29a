# SPDX-License-Identifier: MIT
"""A disk that discards writes and returns arbitrary data: for measuring."""

from pyublk._native import NULL_HANDLER
from pyublk.paths import DataPath
from pyublk.target import NativeTarget


class Null(NativeTarget):
    """Answers every request at once, in C, and moves no data: reads leave the memory as it was.

    Except with the path copy, that is the client's own memory, as with null_blk.
    """

    blind = True
    recoverable = True
    paths = (
        DataPath.USER_COPY,
        DataPath.COPY,
        DataPath.AUTO_BUFFER,
        DataPath.ZERO_COPY,
        DataPath.GET_DATA,
    )

    flushes = True
    discards = True
    writes_zeroes = True

    def __init__(self, *, size: int = 250 << 30, block_size: int = 512) -> None:
        super().__init__(size=size, block_size=block_size)
        self.handler = NULL_HANDLER
