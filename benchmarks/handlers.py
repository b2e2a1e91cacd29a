# SPDX-License-Identifier: MIT
"""Python targets that do as little as their kind allows: what remains is pyublk's own cost."""

import asyncio

from pyublk import IO, Target


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


class Sleepers(Target):
    """Coroutines that suspend once for each request, as those that ask somebody do."""

    concurrency = "per_queue"

    async def read(self, offset: int, buffer: memoryview) -> None:
        await asyncio.sleep(0)

    async def write(self, offset: int, data: memoryview) -> None:
        await asyncio.sleep(0)
