"""Who sees a request's memory has memory that stays as it was, whatever the tag serves next."""

import asyncio
import ctypes
import gc
import pickle
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import pyublk
from pyublk.testing import Disk
from pyublk.uapi import Op

BLOCK = 4096

View = Callable[[memoryview], object]


class Shown:
    """Gets a buffer of what it is given, as an extension would."""

    def __init__(self, data: memoryview) -> None:
        self.buffer = (ctypes.c_char * len(data)).from_buffer(data) if not data.readonly else None
        self.view = memoryview(data)

    def __bytes__(self) -> bytes:
        return bytes(self.view)


#: What a handler may make of its buffer, and what shows its bytes later.
SEEN_BY: dict[str, tuple[View, Callable[[object], bytes]]] = {
    "slice": (lambda data: data[:16], bytes),
    "whole slice": (lambda data: data[:], bytes),
    "slice of a slice": (lambda data: data[8:][:16], bytes),
    "every other byte": (lambda data: data[::2], lambda seen: bytes(seen)),
    "cast": (lambda data: data.cast("I"), lambda seen: seen.tobytes()),  # type: ignore[attr-defined]
    "memoryview": (memoryview, bytes),
    "toreadonly": (lambda data: data.toreadonly(), bytes),
    "numpy": (lambda data: np.frombuffer(data, np.uint8), lambda seen: seen.tobytes()),  # type: ignore[attr-defined]
    "pickle buffer": (pickle.PickleBuffer, lambda seen: bytes(seen.raw())),  # type: ignore[attr-defined]
    "ctypes": (Shown, bytes),
    "view that outlives the first": (lambda data: [data[:16], data.release()][0], bytes),
}


looking: list["Looking"] = []


@pytest.fixture(autouse=True)
def seen_no_longer() -> Iterator[None]:
    """Python 3.11 itself crashes when its collector finds a PickleBuffer together with its view."""
    yield
    while looking:
        looking.pop().seen.clear()


class Looking(pyublk.Target):
    """Makes something of the buffer of each request at `at`."""

    def __init__(self, look: View, at: int = 0) -> None:
        super().__init__(size=1 << 20)
        self.look, self.at = look, at
        self.seen: list[object] = []
        looking.append(self)

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = bytes([offset // BLOCK + 1]) * len(buffer)
        if offset == self.at:
            self.seen.append(self.look(buffer))

    def write(self, offset: int, data: memoryview) -> None:
        if offset == self.at:
            self.seen.append(self.look(data))


class LookingWhole(Looking):
    read = write = None  # type: ignore[assignment]

    def handle(self, io: pyublk.IO) -> None:
        method = Looking.read if io.op is Op.READ else Looking.write
        method(self, io.offset, io.buffer)


class LookingLater(LookingWhole):
    """Answers from another thread."""

    def handle(self, io: pyublk.IO) -> None:
        io.defer()
        threading.Thread(target=self._answer, args=[io]).start()

    def _answer(self, io: pyublk.IO) -> None:
        super().handle(io)
        io.complete()


class LookingAsync(Looking):
    async def read(self, offset: int, buffer: memoryview) -> None:  # type: ignore[override]
        super().read(offset, buffer)
        await asyncio.sleep(0)

    async def write(self, offset: int, data: memoryview) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        super().write(offset, data)


class LookingParallel(Looking):
    concurrency = "parallel"


WAYS: dict[str, tuple[type[Looking], dict[str, int]]] = {
    "methods": (Looking, {}),
    "handle": (LookingWhole, {}),
    "deferred": (LookingLater, {}),
    "coroutines": (LookingAsync, {}),
    "workers": (LookingParallel, {"workers": 2}),
}


@pytest.mark.parametrize("how", SEEN_BY)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_seen_of_a_write_stays(open_disk: Callable[..., Disk], way: str, how: str) -> None:
    look, show = SEEN_BY[how]
    make, options = WAYS[way]
    target = make(look)
    disk = open_disk(target, depth=1, **options)
    for byte in b"ABC":
        disk.pwrite(bytes([byte]) * BLOCK, 0)
        disk.pwrite(b"z" * BLOCK, BLOCK)
        assert disk.pread(BLOCK, BLOCK) == b"\2" * BLOCK
    assert [set(show(seen)) for seen in target.seen] == [{65}, {66}, {67}]


@pytest.mark.parametrize("how", SEEN_BY)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_seen_of_a_read_stays_and_is_no_bodys_else(
    open_disk: Callable[..., Disk], way: str, how: str
) -> None:
    look, show = SEEN_BY[how]
    make, options = WAYS[way]
    target = make(look)
    disk = open_disk(target, depth=1, **options)
    assert disk.pread(BLOCK, 0) == b"\1" * BLOCK  # the answer is whole, though it was kept
    disk.pwrite(b"z" * BLOCK, BLOCK)
    assert set(show(target.seen[0])) == {1}
    writable = target.seen[0]
    if isinstance(writable, memoryview) and not writable.readonly and writable.format == "B":
        writable[:1] = b"!"  # late: it reaches nobody
        assert disk.pread(BLOCK, 2 * BLOCK) == b"\3" * BLOCK


@pytest.mark.parametrize("length", [512, BLOCK, 65536])
def test_requests_of_other_lengths_find_nothing_of_it(
    open_disk: Callable[..., Disk], length: int
) -> None:
    target = Looking(lambda data: data[-16:])
    disk = open_disk(target, depth=1)
    disk.pwrite(b"A" * BLOCK, 0)
    disk.pwrite(b"z" * length, BLOCK)
    assert disk.pread(length, 16 * BLOCK) == b"\x11" * length
    assert target.seen == [b"A" * 16]


@pytest.mark.parametrize("way", WAYS)
def test_a_view_that_its_handler_released_is_made_anew(
    open_disk: Callable[..., Disk], way: str
) -> None:
    def release(data: memoryview) -> object:
        with data:
            return bytes(data[:1])

    make, options = WAYS[way]
    target = make(release)
    disk = open_disk(target, depth=1, **options)
    for byte in b"ABC":
        disk.pwrite(bytes([byte]) * BLOCK, 0)
        assert disk.pread(BLOCK, 0) == b"\1" * BLOCK
    assert target.seen == [b"A", b"\1", b"B", b"\1", b"C", b"\1"]


def test_a_released_view_is_made_anew_within_its_request(open_disk: Callable[..., Disk]) -> None:
    class Twice(pyublk.Target):
        seen: list[bytes]

        def handle(self, io: pyublk.IO) -> None:
            with io.buffer as first:
                kept = first[:1]
            self.seen = [bytes(io.buffer[:1]), bytes(kept)]
            self.kept = kept

    target = Twice(size=1 << 20)
    disk = open_disk(target, depth=1)
    disk.pwrite(b"A" * BLOCK, 0)
    assert target.seen == [b"A", b"A"]
    first = target.kept
    disk.pwrite(b"B" * BLOCK, 0)
    assert bytes(first) == b"A"


def mapped() -> int:
    """Bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * 4096


def test_memory_goes_back_when_nobody_sees_it_any_more(open_disk: Callable[..., Disk]) -> None:
    size = 8 << 20  # of address space, so that what others take does not count
    target = Looking(lambda data: data[:1])
    disk = open_disk(target, depth=1, max_io_size=size)
    disk.pwrite(bytes(BLOCK), 0)
    before = mapped()
    for _ in range(32):
        disk.pwrite(bytes(BLOCK), 0)
    assert mapped() - before >= 24 * size
    target.seen.clear()
    assert mapped() - before < 8 * size
    # What does not keep anything takes nothing.
    for _ in range(32):
        disk.pwrite(bytes(BLOCK), BLOCK)
    assert mapped() - before < 8 * size


def test_what_is_seen_outlives_the_disk() -> None:
    target = Looking(lambda data: np.frombuffer(data, np.uint8))
    with Disk(target, depth=2) as disk:
        disk.pwrite(b"A" * BLOCK, 0)
        disk.pwrite(b"B" * BLOCK, 0)
    assert [seen.tobytes() for seen in target.seen] == [b"A" * BLOCK, b"B" * BLOCK]  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", [how for how in SEEN_BY if how != "pickle buffer"])
@pytest.mark.parametrize("which", ["the views", "the target", "the disk"])
def test_what_is_seen_goes_by_the_collector(how: str, which: str) -> None:
    """Whatever keeps the views is found in a cycle, and nobody else has them."""
    gc.collect()
    gc.disable()
    try:
        target = Looking(SEEN_BY[how][0])
        disk = Disk(target)
        with disk:
            for _ in range(3):
                disk.pread(BLOCK, 0)
        found = threading.Event()  # a list has no weak references
        gone = weakref.ref(found)
        kept = {"views": target.seen, "target": target, "disk": disk}[which[4:]]
        cycle: list[object] = [kept, found]
        cycle.append(cycle)
        del target, disk, kept, found, cycle
        looking.clear()
        deadline = time.monotonic() + 30
        # It does nothing while another thread, of an earlier test, is in it.
        while gone() is not None:
            gc.collect()
            assert time.monotonic() < deadline
    finally:
        gc.enable()


def test_a_thread_that_goes_on_after_a_time_out(tmp_path: Path) -> None:
    """The request failed, its thread did not notice, and writes what it was given."""
    go_on, over = threading.Event(), threading.Event()
    stored: list[bytes] = []

    class Slow(pyublk.Target):
        async def read(self, offset: int, buffer: memoryview) -> None:
            pass

        async def write(self, offset: int, data: memoryview) -> None:
            if offset == 0:
                async with asyncio.timeout(0.05):
                    await asyncio.to_thread(self.store, data)

        def store(self, data: memoryview) -> None:
            with memoryview(data) as view:  # as os.pwrite takes it
                go_on.wait(30)
                stored.append(bytes(view))
            over.set()

    with Disk(Slow(size=1 << 20), depth=1) as disk:
        with pytest.raises(OSError, match="WRITE at 0 failed"):
            disk.pwrite(b"A" * BLOCK, 0)
        disk.pwrite(b"B" * BLOCK, BLOCK)
        go_on.set()
        assert over.wait(30)
    assert stored == [b"A" * BLOCK]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="older ones copy what they cannot send")
def test_what_a_stream_could_not_send_at_once() -> None:
    """StreamWriter.write keeps a slice of the buffer until the peer takes it."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    length = 60 << 10
    got = bytearray()

    class Proxy(pyublk.Target):
        writer: asyncio.StreamWriter | None = None

        async def read(self, offset: int, buffer: memoryview) -> None:
            if offset and self.writer is not None:
                self.writer.close()
                await self.writer.wait_closed()

        async def write(self, offset: int, data: memoryview) -> None:
            if self.writer is None:
                _, self.writer = await asyncio.open_connection(sock=ours)
            self.writer.write(data)

    with theirs, Disk(Proxy(size=1 << 20), depth=1) as disk:
        for byte in b"ABC":
            disk.pwrite(bytes([byte]) * length, 0)
        theirs.setblocking(False)
        until = time.monotonic() + 30
        while len(got) < 3 * length and time.monotonic() < until:
            try:
                got += theirs.recv(65536)
            except BlockingIOError:
                disk.pread(512, 0)  # lets the loop send more
        disk.pread(512, 512)
    assert bytes(got) == b"A" * length + b"B" * length + b"C" * length


@pytest.mark.parametrize("held", ["nothing", "the request", "its view", "a slice"])
def test_a_request_that_is_failed_from_outside(held: str) -> None:
    """Whatever its handler has of it, the tag's next request comes in other memory."""
    with pyublk.Queue.loopback(depth=1, buffer_size=BLOCK) as queue:  # type: ignore[attr-defined]
        queue.fetch()
        queue.memory(0, BLOCK)[:] = b"A" * BLOCK
        queue.inject(0, Op.WRITE, 0, BLOCK)
        (io,) = queue.wait()
        view = io.buffer
        kept = {"nothing": None, "the request": io, "its view": view, "a slice": view[:16]}[held]
        del io, view
        queue.fail_held(5)
        queue.wait(0)
        assert queue.answered(0) == -5
        assert set(queue.memory(0, BLOCK)) == {0}
        queue.memory(0, BLOCK)[:] = b"B" * BLOCK
        queue.inject(0, Op.WRITE, 0, BLOCK)
        (io,) = queue.wait()
        assert bytes(io.buffer) == b"B" * BLOCK
        if isinstance(kept, memoryview):
            assert set(kept) == {65}
        io.complete()


def test_a_copy_of_a_request_that_is_answered_is_refused() -> None:
    with pyublk.Queue.loopback(depth=1, buffer_size=BLOCK) as queue:  # type: ignore[attr-defined]
        queue.fetch()
        queue.inject(0, Op.WRITE, 0, BLOCK)
        (io,) = queue.wait()
        queue.fail_held(5)
        queue.wait(0)
        queue.memory(0, BLOCK)[:] = b"B" * BLOCK
        queue.inject(0, Op.WRITE, 0, BLOCK)
        (again,) = queue.wait()
        memory = bytearray(BLOCK)
        with pytest.raises(pyublk.StaleIO):
            io.read_into(memory)
        assert memory == bytes(BLOCK)
        again.read_into(memory)
        assert memory == b"B" * BLOCK
        again.complete()
