"""Disks in a bytearray, one for each way a request can reach Python: what they hold can be compared
with what clients wrote and read."""

import asyncio
import ctypes
import queue
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyublk
from pyublk.targets import File, Ram
from pyublk.uapi import Op


class Memory(pyublk.Target):
    """Plain methods, one call at a time."""

    def __init__(self, size: int, **options: object) -> None:
        super().__init__(size=size, **options)  # type: ignore[arg-type]
        self.data = memoryview(bytearray(size))

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview) -> None:
        self.data[offset : offset + len(data)] = data


class PerQueueMemory(Memory):
    concurrency = "per_queue"


class ParallelMemory(Memory):
    concurrency = "parallel"


class FullMemory(Memory):
    """Every operation, and a list of what came: (operation, offset, length[, unmap])."""

    def __init__(self, size: int, **options: object) -> None:
        super().__init__(size, **options)
        self.calls: list[tuple[Any, ...]] = []

    def write(self, offset: int, data: memoryview) -> None:
        self.calls.append(("write", offset, len(data)))
        super().write(offset, data)

    def flush(self) -> None:
        self.calls.append(("flush",))

    def discard(self, offset: int, length: int) -> None:
        self.calls.append(("discard", offset, length))
        self.data[offset : offset + length] = bytes(length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self.calls.append(("write_zeroes", offset, length, unmap))
        self.data[offset : offset + length] = bytes(length)


class AsyncMemory(pyublk.Target):
    """Coroutines that let others pass before they answer."""

    def __init__(self, size: int, **options: object) -> None:
        super().__init__(size=size, **options)  # type: ignore[arg-type]
        self.data = memoryview(bytearray(size))

    async def read(self, offset: int, buffer: memoryview) -> None:
        await asyncio.sleep(0)
        buffer[:] = self.data[offset : offset + len(buffer)]

    async def write(self, offset: int, data: memoryview) -> None:
        await asyncio.sleep(0)
        self.data[offset : offset + len(data)] = data


class AsyncPerQueueMemory(AsyncMemory):
    concurrency = "per_queue"


class HandleMemory(pyublk.Target):
    """Every request as an IO, answered before `handle` returns."""

    def __init__(self, size: int, **options: object) -> None:
        super().__init__(size=size, **options)  # type: ignore[arg-type]
        self.data = memoryview(bytearray(size))

    def handle(self, io: pyublk.IO) -> None:
        self.move(io)

    def move(self, io: pyublk.IO) -> None:
        there = self.data[io.offset : io.offset + io.length]
        if io.op is Op.READ:
            io.buffer[:] = there
        else:
            there[:] = io.buffer


class DeferredMemory(HandleMemory):
    """Every request answered later, by a thread of the target."""

    def __init__(self, size: int, **options: object) -> None:
        super().__init__(size, **options)
        self._inbox: queue.SimpleQueue[pyublk.IO | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="deferred-memory")

    def open(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join(10)

    def handle(self, io: pyublk.IO) -> None:
        io.defer()
        self._inbox.put(io)

    def _work(self) -> None:
        while (io := self._inbox.get()) is not None:
            self.move(io)
            io.complete()


HANDLER = ctypes.CFUNCTYPE(
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_uint32,
    ctypes.c_uint32,
    ctypes.c_uint64,
    ctypes.c_uint64,
    ctypes.c_void_p,
)


class _PointerMemory(pyublk.NativeTarget):
    def __init__(self, size: int, **options: object) -> None:
        super().__init__(size=size, **options)  # type: ignore[arg-type]
        self._bytes = (ctypes.c_char * size)()
        self.data = memoryview(self._bytes).cast("B")
        self.context = ctypes.addressof(self._bytes)


class CallbackMemory(_PointerMemory):
    """A Python function behind a C pointer that ctypes made."""

    def open(self) -> None:
        self._function = HANDLER(self._handle)
        pointer = ctypes.cast(self._function, ctypes.c_void_p).value
        assert pointer is not None
        self.handler = pointer

    def _handle(
        self, context: int, op: int, flags: int, offset: int, length: int, buffer: int
    ) -> int:
        if op == Op.READ:
            ctypes.memmove(buffer, context + offset, length)
        else:
            ctypes.memmove(context + offset, buffer, length)
        return 0


SOURCE = """
#include <stdint.h>
#include <string.h>
int64_t handle(char *context, uint32_t op, uint32_t flags, uint64_t offset, uint64_t length,
               void *buffer)
{
        if (op > 1)
                return -95;
        if (op == 0)
                memcpy(buffer, context + offset, length);
        else
                memcpy(context + offset, buffer, length);
        return (int64_t)length;
}
"""


class CompiledMemory(_PointerMemory):
    """A function of a shared library, compiled into `directory`."""

    def __init__(self, size: int, directory: Path, **options: object) -> None:
        super().__init__(size, **options)
        library = directory / "memory.so"
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O1", "-xc", "-", "-o", library],
            input=SOURCE.encode(),
            check=True,
            timeout=50,
        )
        self._library = ctypes.CDLL(str(library))
        pointer = ctypes.cast(self._library.handle, ctypes.c_void_p).value
        assert pointer is not None
        self.handler = pointer


#: Every kind of target that holds bytes, by how its requests are handled.
KINDS: dict[str, Callable[..., pyublk.Target]] = {
    "sync": Memory,
    "per_queue": PerQueueMemory,
    "parallel": ParallelMemory,
    "workers": ParallelMemory,
    "async": AsyncMemory,
    "async_per_queue": AsyncPerQueueMemory,
    "handle": HandleMemory,
    "deferred": DeferredMemory,
    "ctypes": CallbackMemory,
    "ram": Ram,
    "file": File,
}


def make(kind: str, size: int, directory: Path, **options: object) -> pyublk.Target:
    """A target of this kind, its file, if it has one, in `directory`."""
    if kind == "file":
        return File(directory / "disk", size=size, **options)  # type: ignore[arg-type]
    return KINDS[kind](size=size, **options)


def device_options(kind: str) -> dict[str, object]:
    return {"workers": 3} if kind == "workers" else {}


def held(target: pyublk.Target) -> bytes:
    """What the target holds, seen from behind the disk."""
    if isinstance(target, File):
        return target.path.read_bytes()
    if isinstance(target, Ram):
        content = (ctypes.c_char * target.size)()
        read = HANDLER(target.handler)
        assert read(target.context, Op.READ, 0, 0, target.size, ctypes.addressof(content)) >= 0
        return content.raw
    return bytes(target.data)  # type: ignore[attr-defined]
