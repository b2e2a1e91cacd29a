# SPDX-License-Identifier: MIT
"""Requests that lie in memory shared with the client, on a queue without a kernel."""

import ctypes
import errno
import mmap
import threading
from pathlib import Path

import numpy as np
import pytest

import pyublk
from pyublk._native import IO, Handlers, Queue, Ram, SharedTable, address
from pyublk.sharing import check_share
from pyublk.targets import Mirror, Null
from pyublk.uapi import IOFlag, Op

PAGE = mmap.PAGESIZE
INDEX = 5


@pytest.fixture
def memory() -> mmap.mmap:
    return mmap.mmap(-1, 16 * PAGE)


@pytest.fixture
def table(memory: mmap.mmap) -> SharedTable:
    table = SharedTable()
    table.put(INDEX, memory)
    return table


def place(at: int, index: int = INDEX) -> int:
    return index << 32 | at


def shared(queue: Queue, tag: int, op: Op, at: int, length: int, index: int = INDEX) -> None:
    queue.inject(tag, op | IOFlag.SHMEM_ZC, 0, length, place(at, index))


class Looking(pyublk.Target):
    """Tells where the bytes of its requests are."""

    def __init__(self) -> None:
        super().__init__(size=1 << 20)
        self.seen: list[tuple[bytes, int, bool]] = []
        self.kept: list[memoryview] = []

    def handle(self, io: IO) -> None:
        view = io.buffer
        self.seen.append((bytes(view[:4]), address(view), view.readonly))
        assert io.buffer is view
        self.kept.append(view)
        if io.op is Op.READ:
            view[:] = b"r" * len(view)


def serve(queue: Queue, target: pyublk.Target) -> None:
    queue.serve(Handlers(target, lambda outcome, io: getattr(outcome, "errno", 0) or errno.EIO))


def test_the_buffer_is_the_shared_memory(memory: mmap.mmap, table: SharedTable) -> None:
    target = Looking()
    memory[PAGE : PAGE + 4] = b"wxyz"
    with Queue.loopback(depth=4, buffer_size=4 * PAGE, table=table) as queue:
        queue.fetch()
        shared(queue, 0, Op.WRITE, PAGE, PAGE)
        shared(queue, 1, Op.READ, 2 * PAGE, PAGE)
        serve(queue, target)
        assert [queue.answered(tag) for tag in (0, 1)] == [PAGE, PAGE]
    start = address(memory)
    assert target.seen == [(b"wxyz", start + PAGE, True), (bytes(4), start + 2 * PAGE, False)]
    assert memory[2 * PAGE : 4 * PAGE] == b"r" * PAGE + bytes(PAGE)
    for view in target.kept:
        with pytest.raises(ValueError, match="released"):
            view[0]


class Forgetting(Looking):
    def handle(self, io: IO) -> None:
        super().handle(io)
        self.kept.clear()  # a tag whose buffer is kept gets another


def test_a_tag_goes_back_to_its_own_buffer(memory: mmap.mmap, table: SharedTable) -> None:
    target = Forgetting()
    with Queue.loopback(depth=1, buffer_size=PAGE, table=table) as queue:
        queue.fetch()
        for _ in range(2):
            shared(queue, 0, Op.WRITE, PAGE, PAGE)
            serve(queue, target)
            queue.memory(0, PAGE)[:4] = b"mine"
            queue.inject(0, Op.WRITE, 0, PAGE)
            serve(queue, target)
    assert [seen[0] for seen in target.seen] == [bytes(4), b"mine"] * 2
    assert target.seen[0][1] == target.seen[2][1] == address(memory) + PAGE
    assert target.seen[1][1] == target.seen[3][1] != target.seen[0][1]


def test_bytes_are_copied_from_there_when_that_is_asked(
    memory: mmap.mmap, table: SharedTable
) -> None:
    memory[PAGE + 100 : PAGE + 104] = b"abcd"
    with Queue.loopback(depth=2, buffer_size=PAGE, table=table) as queue:
        queue.fetch()
        shared(queue, 0, Op.WRITE, PAGE, PAGE)
        shared(queue, 1, Op.READ, 0, PAGE)
        batch = queue.wait()
        assert batch is not None
        write, read = batch
        four = bytearray(4)
        write.read_into(four, 100)
        assert four == b"abcd"
        read.write_from(b"efgh", 8)
        assert memory[:16] == bytes(8) + b"efgh" + bytes(4)
        write.complete()
        read.complete()


def test_what_is_not_there_fails(table: SharedTable) -> None:
    target = Looking()
    with Queue.loopback(depth=4, buffer_size=4 * PAGE, table=table) as queue:
        queue.fetch()
        shared(queue, 0, Op.WRITE, 0, PAGE, index=6)
        shared(queue, 1, Op.WRITE, 15 * PAGE, 2 * PAGE)
        serve(queue, target)
        assert [queue.answered(tag) for tag in (0, 1)] == [-errno.EIO, -errno.EIO]
        table.drop(INDEX)
        shared(queue, 0, Op.WRITE, 0, PAGE)
        serve(queue, target)
        assert queue.answered(0) == -errno.EIO
    assert target.seen == []


def test_a_server_without_shared_memory_fails_the_request() -> None:
    with Queue.loopback(depth=1, buffer_size=PAGE) as queue:
        queue.fetch()
        shared(queue, 0, Op.READ, 0, PAGE)
        serve(queue, Looking())
        assert queue.answered(0) == -errno.EIO


def test_a_request_waits_for_its_memory_to_be_known(memory: mmap.mmap) -> None:
    """The kernel knows a buffer before the registration returns."""
    table, target = SharedTable(), Looking()
    table.changing(True)

    def know() -> None:
        table.put(INDEX, memory)
        table.changing(False)

    later = threading.Timer(0.05, know)
    with Queue.loopback(depth=1, buffer_size=PAGE, table=table) as queue:
        queue.fetch()
        shared(queue, 0, Op.WRITE, 0, PAGE)
        later.start()
        serve(queue, target)
        later.join()
        assert queue.answered(0) == PAGE
    assert target.seen[0][1] == address(memory)


def test_native_handlers_work_in_the_shared_memory(memory: mmap.mmap, table: SharedTable) -> None:
    ram = Ram(1 << 20)
    memory[: 2 * PAGE] = b"s" * (2 * PAGE)
    with Queue.loopback(depth=2, buffer_size=PAGE, table=table) as queue:
        queue.fetch()
        shared(queue, 0, Op.WRITE, 0, PAGE)
        queue.serve_native(ram.handler, ram.context)
        shared(queue, 1, Op.READ, 8 * PAGE, 2 * PAGE)
        queue.serve_native(ram.handler, ram.context)
        assert [queue.answered(tag) for tag in (0, 1)] == [PAGE, 2 * PAGE]
        assert memory[8 * PAGE : 10 * PAGE] == b"s" * PAGE + bytes(PAGE)
        shared(queue, 0, Op.READ, 0, PAGE, index=9)
        queue.serve_native(ram.handler, ram.context)
        assert queue.answered(0) == -errno.EIO


def test_an_array_on_top_keeps_the_memory(memory: mmap.mmap, table: SharedTable) -> None:
    arrays: list[np.ndarray[tuple[int], np.dtype[np.uint8]]] = []

    class Keeping(pyublk.Target):
        def handle(self, io: IO) -> None:
            arrays.append(np.frombuffer(io.buffer, dtype=np.uint8))

    memory[:4] = b"keep"
    with Queue.loopback(depth=1, buffer_size=PAGE, table=table) as queue:
        queue.fetch()
        shared(queue, 0, Op.WRITE, 0, PAGE)
        serve(queue, Keeping(size=1 << 20))
    table.drop(INDEX)
    assert bytes(arrays[0][:4]) == b"keep"
    with pytest.raises(BufferError):
        memory.close()


def test_addresses_are_those_of_ctypes() -> None:
    data = bytearray(8)
    assert address(data) == ctypes.addressof((ctypes.c_char * 8).from_buffer(data))


@pytest.mark.parametrize(
    ("size", "fd", "said"),
    [
        (None, None, "give either the size"),
        (PAGE, 3, "give either the size"),
        (PAGE + 1, None, "size must be a multiple of"),
        (0, None, "size must be a multiple of"),
        ((4 << 30) + PAGE, None, "size must be a multiple of"),
    ],
)
def test_what_cannot_be_shared_is_refused(size: int | None, fd: int | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_share(size, fd)


def test_a_device_that_was_not_asked_for_it_shares_nothing() -> None:
    with pytest.raises(ValueError, match="shared_memory=True"):
        pyublk.Device(Null(size=1 << 20)).share(PAGE)
    with pytest.raises(pyublk.DeviceClosed, match="only a live one shares"):
        pyublk.Device(Null(size=1 << 20), shared_memory=True).share(PAGE)


def test_a_mirror_whose_legs_may_answer_late_shares_nothing(tmp_path: Path) -> None:
    legs = [tmp_path / name for name in "ab"]
    for leg in legs:
        leg.write_bytes(bytes(1 << 20))
    with pytest.raises(ValueError, match="shared_memory=True needs a mirror with leg_timeout 0"):
        pyublk.Device(Mirror(*legs), shared_memory=True)
    pyublk.Device(Mirror(*legs, leg_timeout=0), shared_memory=True)
