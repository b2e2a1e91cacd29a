# SPDX-License-Identifier: MIT
"""Python targets that do as little as their kind allows: what remains is pyublk's own cost."""

from collections.abc import Sequence
from pathlib import Path

from pyublk import IO, MappedTarget, Target
from pyublk.uapi import Op


class Returns(Target):
    """Every request as an `IO`, answered at once."""

    concurrency = "per_queue"

    def handle(self, io: IO) -> None:
        return


class ReadsRequest(Target):
    """Looks at what a real handler looks at: operation, place, and its slice of the buffer."""

    concurrency = "per_queue"

    def handle(self, io: IO) -> None:
        io.op  # noqa: B018 -- reading it is what is measured
        io.offset  # noqa: B018
        io.length  # noqa: B018
        io.buffer  # noqa: B018


class Methods(Target):
    """The two methods that every target starts with."""

    concurrency = "per_queue"

    def read(self, offset: int, buffer: memoryview) -> None:
        return

    def write(self, offset: int, data: memoryview) -> None:
        return


class Coroutines(Target):
    """The same as coroutines."""

    concurrency = "per_queue"

    async def read(self, offset: int, buffer: memoryview) -> None:
        return

    async def write(self, offset: int, data: memoryview) -> None:
        return


class Concatenates(MappedTarget):
    """Says for each request what the `linear` target says once; the files are equally long."""

    def __init__(self, files: Sequence[Path], *, direct: bool) -> None:
        self._each = files[0].stat().st_size
        super().__init__(files, size=self._each * len(files), direct=direct)

    def map(self, op: Op, offset: int, length: int) -> object:
        number, inside = divmod(offset, self._each)
        if inside + length <= self._each:
            return number, inside, length
        first = self._each - inside
        return [(number, inside, first), (number + 1, 0, length - first)]
