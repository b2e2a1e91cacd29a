"""Disks whose bytes are in a file, one for each way a request can reach Python: like `File` in all
respects, so that any of them can be the next server of a disk of another."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pyublk
from pyublk.targets import File


class PlainFile(pyublk.Target):
    """Plain methods."""

    concurrency = "parallel"
    recoverable = True

    def __init__(self, path: Path, *, size: int | None = None) -> None:
        super().__init__(size=size or path.stat().st_size)
        self.path = path

    def open(self) -> None:
        self.fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self.fd)

    def resize(self, size: int, update: Callable[[int], None]) -> None:
        if size > self.size:
            os.ftruncate(self.fd, size)
        super().resize(size, update)
        if size < os.fstat(self.fd).st_size:
            os.ftruncate(self.fd, size)

    def read(self, offset: int, buffer: memoryview) -> None:
        assert os.preadv(self.fd, [buffer], offset) == len(buffer)

    def write(self, offset: int, data: memoryview) -> None:
        assert os.pwrite(self.fd, data, offset) == len(data)

    def write_fua(self, offset: int, data: memoryview) -> None:
        self.write(offset, data)
        os.fdatasync(self.fd)

    def flush(self) -> None:
        os.fdatasync(self.fd)

    def discard(self, offset: int, length: int) -> None:
        """Kept: it is allowed, and nothing here looks."""

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self.write(offset, memoryview(bytes(length)))


class AsyncFile(pyublk.Target):
    """Coroutines that let others pass before they answer."""

    recoverable = True

    def __init__(self, path: Path, *, size: int | None = None) -> None:
        super().__init__(size=size or path.stat().st_size)
        self.plain = PlainFile(path)

    async def open(self) -> None:
        self.plain.open()

    async def close(self) -> None:
        self.plain.close()

    def resize(self, size: int, update: Callable[[int], None]) -> None:
        self.plain.resize(size, update)
        self.size = size

    async def read(self, offset: int, buffer: memoryview) -> None:
        await asyncio.sleep(0)
        self.plain.read(offset, buffer)

    async def write(self, offset: int, data: memoryview) -> None:
        await asyncio.sleep(0)
        self.plain.write(offset, data)

    async def write_fua(self, offset: int, data: memoryview) -> None:
        self.plain.write_fua(offset, data)

    async def flush(self) -> None:
        self.plain.flush()

    async def discard(self, offset: int, length: int) -> None:
        await asyncio.sleep(0)

    async def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self.plain.write_zeroes(offset, length, unmap)


class Over(pyublk.Layer):
    """A layer that changes nothing."""

    recoverable = True


def over(path: Path) -> pyublk.Target:
    """A layer over a mapped target."""
    return Over(File(path))


#: By name, from a file.
FILES: dict[str, Callable[..., pyublk.Target]] = {
    "file": File,
    "plain": PlainFile,
    "async": AsyncFile,
    "layer": over,
}
