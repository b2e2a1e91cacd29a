# SPDX-License-Identifier: MIT
"""What layers call of a target below that has no methods: each call is a request, or several."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from pyublk.target import Target
from pyublk.uapi import IOFlag, Op

NO_FLAGS = IOFlag(0)
#: The bytes of a request that has none.
_NOTHING = memoryview(bytearray())


class Request(NamedTuple):
    """A request; `memory` has a write's bytes, or is for those of a read."""

    op: Op
    flags: IOFlag
    offset: int
    length: int
    memory: memoryview = _NOTHING


class RequestMethods:
    """A target's methods, by requests.

    Args:
        piece: bytes that a request of a read or write moves at most.
    """

    def __init__(self, piece: int) -> None:
        self._piece = piece

    def send(self, requests: Iterable[Request]) -> None:
        """Does these, and waits for their ends. Raises OSError."""
        raise NotImplementedError

    def read(self, offset: int, buffer: memoryview) -> None:
        self._move(Op.READ, NO_FLAGS, offset, buffer)

    def write(self, offset: int, data: memoryview) -> None:
        self._move(Op.WRITE, NO_FLAGS, offset, data)

    def write_fua(self, offset: int, data: memoryview) -> None:
        self._move(Op.WRITE, IOFlag.FUA, offset, data)

    def _move(self, op: Op, flags: IOFlag, offset: int, memory: memoryview) -> None:
        self.send(
            Request(op, flags, offset + at, len(piece), piece)
            for at in range(0, len(memory), self._piece)
            if (piece := memory[at : at + self._piece])
        )

    def flush(self) -> None:
        self.send([Request(Op.FLUSH, NO_FLAGS, 0, 0)])

    def discard(self, offset: int, length: int) -> None:
        self.send([Request(Op.DISCARD, NO_FLAGS, offset, length)])

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        flags = NO_FLAGS if unmap else IOFlag.NOUNMAP
        self.send([Request(Op.WRITE_ZEROES, flags, offset, length)])


def announced(target: Target, methods: object) -> Mapping[str, Callable[..., Any]]:
    """Those of the methods whose requests the target takes."""
    names = ("read", "write", "write_fua", "flush", "discard", "write_zeroes")
    return {name: getattr(methods, name) for name in names if target.announces(name)}
