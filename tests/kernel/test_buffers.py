"""The memory of requests on each data path: who sees it keeps it; what is late goes nowhere."""

import ctypes
import os
import struct
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from blocks import Blocks
from conftest import Serve
from memory import Memory, ParallelMemory
from needs import needs
from servers import state_in, until
from variations import variations

import pyublk
from pyublk.uapi import Feature

MIB = 1 << 20
BLOCK = 4096


#: Each data path, with a command for each tag and, where it goes, with many in one.
WAYS = [(path, batch) for path in ("copy", "user-copy", "get-data") for batch in (False, True)][:-1]
each_way = pytest.mark.parametrize(
    ("path", "batch"),
    variations(WAYS, [("copy", True), ("user-copy", False)]),
    ids=[f"{path}{'-batch' * batch}" for path, batch in WAYS],
)


@pytest.fixture(autouse=True)
def kernel_can(request: pytest.FixtureRequest) -> None:
    batch = getattr(request.node, "callspec", None) and request.node.callspec.params.get("batch")
    if batch:
        needs(Feature.BATCH_IO)


class Stamped(ParallelMemory):
    """Keeps a slice of each request's buffer for a while, and compares it then with what it was."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.kept: list[tuple[memoryview, bytes]] = []
        self.wrong: list[tuple[bytes, bytes]] = []
        self.compared = 0

    def keep(self, data: memoryview) -> None:
        self.kept.append((data[:16], bytes(data[:16])))
        while len(self.kept) > 64:
            self.compare(*self.kept.pop(0))

    def compare(self, seen: memoryview, before: bytes) -> None:
        self.compared += 1
        if seen != before:
            self.wrong.append((before, bytes(seen)))

    def read(self, offset: int, buffer: memoryview) -> None:
        super().read(offset, buffer)
        self.keep(buffer)

    def write(self, offset: int, data: memoryview) -> None:
        super().write(offset, data)
        self.keep(data)


def stamped(client: int, turn: int) -> bytes:
    return struct.pack("<QQ", client, turn) * (BLOCK // 16)


#: Requests of each kind that a client makes, and twice as many as it has places for.
TURNS = 24


def write_and_read(path: str, client: int) -> None:
    with Blocks(path) as blocks:
        for turn in range(TURNS):
            offset = (client * 8 + turn % 8) * BLOCK
            blocks.write(stamped(client, turn), offset)
            assert blocks.read(BLOCK, offset) == stamped(client, turn)


@each_way
@pytest.mark.parametrize("workers", variations([0, 2], [2]))
def test_kept_slices(serve: Serve, path: str, batch: bool, workers: int) -> None:
    target = Stamped(MIB)
    queues = min(2, len(os.sched_getaffinity(0)))
    disk = serve(target, path=path, batch=batch, queues=queues, depth=4, workers=workers)
    with ThreadPoolExecutor(4) as clients:
        list(clients.map(lambda client: write_and_read(disk.path, client), range(4)))
    while target.kept:
        target.compare(*target.kept.pop())
    assert target.compared >= 4 * TURNS * 2
    assert target.wrong == []


def test_kept_slices_of_a_queue_with_several_threads(serve: Serve) -> None:
    needs(Feature.BATCH_IO)
    target = Stamped(MIB)
    disk = serve(target, path="copy", threads=3, depth=6)
    with ThreadPoolExecutor(4) as clients:
        list(clients.map(lambda client: write_and_read(disk.path, client), range(4)))
    while target.kept:
        target.compare(*target.kept.pop())
    assert target.wrong == []


def test_idle_memory_is_given_back_but_what_is_seen(serve: Serve) -> None:
    kept: list[memoryview] = []

    class Keeping(Memory):
        def write(self, offset: int, data: memoryview) -> None:
            if offset == MIB // 2:
                kept.append(data[:])

    disk = serve(Keeping(MIB), trim_after=0.2, depth=2, path="copy")
    with Blocks(disk.path) as client:
        client.write(b"K" * 65536, MIB // 2)
        client.write(b"z" * 65536, 0)
        last = disk.stats().total.enters
        until(lambda: disk.stats().total.enters > last + 1, what="the idle timer ends twice")
    assert set(kept[0]) == {ord("K")}


# ---- requests that are failed from outside ----


class HangingOnce(ParallelMemory):
    """The write at 512 KiB hangs until it is let go, and looks at its data then."""

    def __init__(self) -> None:
        super().__init__(MIB)
        self.entered, self.go, self.over = (threading.Event() for _ in range(3))
        self.others, self.answer = threading.Semaphore(0), threading.Event()
        self.seen: object = None

    def write(self, offset: int, data: memoryview) -> None:
        if offset == MIB // 2:
            self.entered.set()
            self.go.wait(60)
            try:
                self.seen = set(data)
            except ValueError:
                self.seen = "refused"
            self.over.set()
        elif self.entered.is_set():
            self.others.release()
            self.answer.wait(60)


def in_thread(step: Callable[[], object]) -> threading.Thread:
    def run() -> None:
        with suppress(OSError):
            step()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def waits_for_the_disk(thread: threading.Thread) -> bool:
    """Whether a thread cannot be interrupted, as one whose direct write has begun."""
    return state_in(Path(f"/proc/self/task/{thread.native_id}/stat").read_text()) == "D"


def write_once(path: str, byte: bytes, offset: int) -> None:
    with Blocks(path) as client:
        client.write(byte * BLOCK, offset)


@pytest.mark.leaves_threads
@each_way
def test_a_worker_that_wakes_up_after_it_was_given_up(path: str, batch: bool) -> None:
    """Its tag has the next request by then, which is not what it sees."""
    target = HangingOnce()
    depth = 2 if batch else 1
    disk = pyublk.Device(target, path=path, batch=batch, workers=1 + depth, depth=depth)
    disk.start()
    first = in_thread(lambda: write_once(disk.path, b"A", MIB // 2))
    assert target.entered.wait(30)
    clients = [in_thread(lambda n=n: write_once(disk.path, b"B", n * BLOCK)) for n in range(depth)]
    until(lambda: all(map(waits_for_the_disk, clients)), what="the clients' writes have begun")
    failure: list[BaseException] = []

    def stop() -> None:
        try:
            disk.stop(1)
        except pyublk.HandlerTimeout as error:
            failure.append(error)

    stopping = threading.Thread(target=stop)
    stopping.start()
    for _ in range(depth):  # one of them in the tag that was given up
        assert target.others.acquire(timeout=30)
    target.go.set()
    assert target.over.wait(30)
    target.answer.set()
    for thread in (first, *clients, stopping):
        thread.join(60)
        assert not thread.is_alive()
    assert failure
    assert target.seen in ({ord("A")}, "refused")


HANDLER = ctypes.CFUNCTYPE(
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_uint32,
    ctypes.c_uint32,
    ctypes.c_uint64,
    ctypes.c_uint64,
    ctypes.c_void_p,
)


@pytest.mark.leaves_threads
@pytest.mark.parametrize("path", ["copy", "user-copy"])
def test_a_native_handler_that_returns_after_it_was_given_up(path: str) -> None:
    """Nothing of what it has goes to whatever file has the char device's number by then."""
    armed, entered, go, over = (threading.Event() for _ in range(4))

    @HANDLER
    def handle(_context: int, op: int, _flags: int, offset: int, length: int, buffer: int) -> int:
        if op == 0 and length:
            if armed.is_set() and offset == MIB // 2:
                entered.set()
                go.wait(60)
                over.set()
            ctypes.memset(buffer, 0x5A, length)
        return 0

    class Native(pyublk.NativeTarget):
        handler = ctypes.cast(handle, ctypes.c_void_p).value or 0

    disk = pyublk.Device(Native(size=MIB), path=path, deadline=20)
    disk.start()
    serving = next(t for t in threading.enumerate() if t.name == f"ublk{disk.id}-q0")
    numbers = {int(fd) for fd in os.listdir("/proc/self/fd")}
    armed.set()
    client = in_thread(lambda: Blocks(disk.path, os.O_RDONLY).read(BLOCK, MIB // 2))
    assert entered.wait(30)
    with pytest.raises(pyublk.HandlerTimeout):
        disk.stop(0.5)
    client.join(30)
    with tempfile.NamedTemporaryFile() as victim:
        victim.write(b"precious")
        victim.flush()
        taken = [os.open(victim.name, os.O_RDWR)]
        while taken[-1] < max(numbers):
            taken.append(os.open(victim.name, os.O_RDWR))
        go.set()
        assert over.wait(30)
        serving.join(30)
        assert not serving.is_alive()
        assert os.stat(victim.name).st_size == 8
        for fd in taken:
            os.close(fd)
    # And the number is free once nobody can use it any more.
    until(
        lambda: len(os.listdir("/proc/self/fd")) <= len(numbers), what="the descriptors are closed"
    )
