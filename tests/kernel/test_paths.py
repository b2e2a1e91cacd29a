"""Every data path, each by each command and by batch: the bytes are right, also when it fails."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from blocks import Blocks
from conftest import Serve
from fio import verified
from needs import needs_what_it_asks_for
from servers import until
from variations import variations

import pyublk
from pyublk import DataPath, Device
from pyublk._native import Queue
from pyublk.targets import Null, Ram
from pyublk.uapi import Op

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB

COPYING = [DataPath.COPY, DataPath.GET_DATA, DataPath.USER_COPY]
WAYS = [
    pytest.param(
        path,
        batch,
        id=f"{path}{'-batch' if batch else ''}",
        marks=[] if batch or path is DataPath.COPY else pytest.mark.thorough,
    )
    for path in COPYING
    for batch in (False, True)
    if not (path is DataPath.GET_DATA and batch)
]


class Sync(pyublk.Target):
    concurrency = "parallel"

    def __init__(self) -> None:
        super().__init__(size=SIZE)
        self.data = bytearray(SIZE)

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview) -> None:
        self.data[offset : offset + len(data)] = data


class Async(pyublk.Target):
    def __init__(self) -> None:
        super().__init__(size=SIZE)
        self.data = bytearray(SIZE)

    async def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]

    async def write(self, offset: int, data: memoryview) -> None:
        self.data[offset : offset + len(data)] = data


def started(serve: Serve, target: pyublk.Target, **options: Any) -> Device:
    """A disk, or a skip that names what this kernel lacks."""
    with needs_what_it_asks_for():
        return serve(target, **options)


@pytest.mark.parametrize(("path", "batch"), WAYS)
def test_every_kind_of_target_keeps_the_bytes(serve: Serve, path: DataPath, batch: bool) -> None:
    disks = [
        started(serve, target, path=path, batch=batch, max_io_size=256 * KIB, **options)
        for target, options in (
            (Ram(size=SIZE), {"queues": 2}),
            (Sync(), {"queues": 2}),
            (Sync(), {"workers": 2}),
            (Async(), {}),
        )
    ]
    assert {disk.data_path.path for disk in disks} == {path}
    assert {disk.data_path.batch for disk in disks} == {batch}
    failures: list[BaseException] = []

    def check(disk: Device) -> None:
        try:
            verified(disk.path, rw="randwrite", bsrange="4k-128k", size="2m", iodepth=16)
        except BaseException as failure:
            failures.append(failure)

    clients = [threading.Thread(target=check, args=(disk,)) for disk in disks]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert not failures
    assert all(disk.stats().total.errors == 0 for disk in disks)


@pytest.mark.parametrize("batch", variations([False, True], [True]))
@pytest.mark.parametrize("path", variations([DataPath.COPY, DataPath.USER_COPY], [DataPath.COPY]))
def test_several_threads_serve_one_queue(serve: Serve, path: DataPath, batch: bool) -> None:
    native = started(serve, Ram(size=SIZE), path=path, batch=batch, threads=3)
    sync = started(serve, Sync(), path=path, batch=batch, threads=3, queues=2)
    verified(native.path, rw="randwrite", bsrange="4k-128k", size="2m", iodepth=32)
    verified(sync.path, rw="randwrite", bsrange="4k-128k", size="2m", iodepth=32)
    assert len(native.stats().queues) == 1
    assert len(sync.stats().queues) == 2


@pytest.mark.parametrize("batch", [False, True], ids=["each", "batch"])
@pytest.mark.parametrize("path", [DataPath.ZERO_COPY, DataPath.AUTO_BUFFER])
def test_null_is_served_without_copies(serve: Serve, path: DataPath, batch: bool) -> None:
    disk = started(serve, Null(size=SIZE), path=path, batch=batch)
    with Blocks(disk.path) as blocks:
        for _ in range(100):
            assert blocks.write(bytes(64 * KIB), 0) == 64 * KIB
            assert len(blocks.read(64 * KIB, 4096)) == 64 * KIB


def test_auto_tells_what_it_took_and_why(serve: Serve) -> None:
    disk = serve(Null(size=SIZE))
    assert disk.data_path.path is DataPath.USER_COPY
    assert disk.data_path.reason
    assert disk.info().flags & disk.data_path.flags == disk.data_path.flags


def test_a_deep_queue_by_batch(serve: Serve) -> None:
    disk = started(serve, Ram(size=SIZE), batch=True, depth=4096, max_io_size=4096)
    verified(disk.path, rw="randwrite", bs="4k", size="4m", iodepth=256)


# ---- only what is looked at is copied ----


class Looking(pyublk.Target):
    """Looks at the first sector of each write, and answers reads with a mark at their end."""

    def __init__(self) -> None:
        super().__init__(size=SIZE)
        self.seen: list[bytes] = []

    def handle(self, io: pyublk.IO) -> None:
        if io.op is Op.WRITE:
            sector = bytearray(512)
            io.read_into(sector)
            self.seen.append(bytes(sector))
        elif io.op is Op.READ:
            io.write_from(b"\7" * 512, io.length - 512)


def touched() -> int:
    """Bytes of memory behind the queues' buffers.

    They are what this process keeps from its children, but for what has a file; the whole process's
    memory would tell of the interpreter's allocator too.
    """
    total = anonymous = rss = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            anonymous = len(words) == 5
        elif words[0] == "Rss:":
            rss = int(words[1]) * KIB
        elif words[0] == "VmFlags:" and anonymous and "dc" in words:
            total += rss
    return total


@pytest.mark.parametrize("batch", [False, True], ids=["each", "batch"])
def test_user_copy_brings_what_is_looked_at(serve: Serve, batch: bool) -> None:
    target = Looking()
    disk = started(serve, target, path="user-copy", batch=batch, max_io_size=MIB)
    before = touched()
    with Blocks(disk.path) as blocks:
        for number in range(8):
            blocks.write(bytes([number]) * 512 + b"x" * (MIB - 512), number * MIB)
        assert blocks.read(MIB, 0)[-512:] == b"\7" * 512
    assert target.seen == [bytes([number]) * 512 for number in range(8)]
    # The buffers of these requests, of a mebibyte each, were never touched.
    assert touched() - before < MIB // 4


def test_idle_buffers_go_back_to_the_kernel(serve: Serve) -> None:
    others = touched()  # of disks before, whose mirrors' legs may still hold requests
    disk = serve(Sync(), max_io_size=MIB, path="copy", trim_after=1)
    until(lambda: touched() - others < MIB, what="what the start touched is given back")
    before = touched()
    with Blocks(disk.path) as blocks:
        blocks.write(b"x" * MIB, 0)
    assert touched() - before >= MIB
    verified(disk.path, rw="randwrite", bs="1m", size="8m", iodepth=8)
    until(lambda: touched() <= before, what="the buffers are given back")
    verified(disk.path, rw="randwrite", bs="4k", size="1m", iodepth=8)
    with pytest.raises(
        ValueError, match="trim_after must be a number of seconds above 0 or None, not 0"
    ):
        Device(Sync(), trim_after=0)


# ---- paths that fail on the way ----


@pytest.fixture
def faulty_queues(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Queues are made with the faults in this list."""
    faults = [0]

    class Failing(Queue):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, faults=faults[0], **options)

    monkeypatch.setattr("pyublk.engines.base.Queue", Failing)
    return faults


@pytest.mark.parametrize(
    ("path", "fault"),  # 4: few buffers; 8: commits in part
    variations(
        [(path, fault) for path in (DataPath.COPY, DataPath.USER_COPY) for fault in (4, 8)],
        [(DataPath.COPY, 4), (DataPath.USER_COPY, 8)],
    ),
)
def test_batches_that_fail_in_part_are_survived(
    serve: Serve, faulty_queues: list[int], fault: int, path: DataPath
) -> None:
    faulty_queues[0] = fault
    disk = started(serve, Ram(size=SIZE), path=path, batch=True)
    verified(disk.path, rw="randwrite", bsrange="4k-64k", size="4m", iodepth=64)
    total = disk.stats().total
    assert total.fallbacks > 0
    assert total.errors == 0


def test_a_registration_that_fails_is_survived(serve: Serve, faulty_queues: list[int]) -> None:
    faulty_queues[0] = 1
    disk = started(serve, Null(size=SIZE), path="auto-buffer")
    with Blocks(disk.path) as blocks:
        for _ in range(50):
            blocks.write(bytes(4096), 0)


# ---- the end of it ----


@pytest.mark.leaves_threads
@pytest.mark.parametrize(
    "options", [{"batch": True}, {"threads": 3}, {"path": "user-copy"}], ids=str
)
def test_a_handler_that_hangs_does_not_keep_the_disk(serve: Serve, options: dict[str, Any]) -> None:
    hangs, release = threading.Event(), threading.Event()

    class Hanging(Sync):
        def write(self, offset: int, data: memoryview) -> None:
            if bytes(data[:4]) == b"hang":
                hangs.set()
                release.wait()

    disk = started(serve, Hanging(), **options)
    outcome: list[int] = []

    def client() -> None:
        with Blocks(disk.path) as blocks:
            try:
                blocks.write(b"hang" * 1024, 0)
            except OSError as error:
                outcome.append(error.errno or 0)

    thread = threading.Thread(target=client)
    thread.start()
    assert hangs.wait(20)
    with pytest.raises(pyublk.HandlerTimeout):
        disk.stop(0.5)
    thread.join(20)
    release.set()
    assert outcome == [errno.EIO]
    until(lambda: not os.path.exists(disk.path), what="the disk goes away")
