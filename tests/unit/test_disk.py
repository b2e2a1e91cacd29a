"""Every kind of target behind the kernel-free driver: what goes in comes out, rules are kept."""

import asyncio
import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import pyublk
from pyublk import targets
from pyublk.testing import Disk, Shadow
from pyublk.uapi import Op

SIZE = 256 << 10


class Memory(pyublk.Target):
    def __init__(self, size: int = SIZE, **options: Any) -> None:
        super().__init__(size=size, **options)
        self.data = bytearray(size)
        self.flushed = 0

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview) -> None:
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        self.flushed += 1


class Parallel(Memory):
    concurrency = "parallel"


class Async(pyublk.Target):
    def __init__(self, size: int = SIZE) -> None:
        super().__init__(size=size)
        self.data = bytearray(size)

    async def read(self, offset: int, buffer: memoryview) -> None:
        await asyncio.sleep(0)
        buffer[:] = self.data[offset : offset + len(buffer)]

    async def write(self, offset: int, data: memoryview) -> None:
        await asyncio.sleep(0)
        self.data[offset : offset + len(data)] = data


class Handle(pyublk.Target):
    discards = writes_zeroes = flushes = True

    def __init__(self, size: int = SIZE) -> None:
        super().__init__(size=size)
        self.data = bytearray(size)
        self.seen: list[str] = []

    def handle(self, io: pyublk.IO) -> None:
        self.seen.append(repr(io))
        span = slice(io.offset, io.offset + io.length)
        if io.op is Op.READ:
            io.buffer[:] = self.data[span]
        elif io.op is Op.WRITE:
            assert io.buffer.readonly
            self.data[span] = io.buffer
        elif io.op in (Op.WRITE_ZEROES, Op.DISCARD):
            assert len(io.buffer) == 0
            self.data[span] = bytes(io.length)


def make(kind: str, folder: Path) -> tuple[pyublk.Target, dict[str, Any]]:
    return {
        "sync": lambda: (Memory(), {}),
        "workers": lambda: (Parallel(), {"workers": 3}),
        "async": lambda: (Async(), {}),
        "handle": lambda: (Handle(), {}),
        "ram": lambda: (targets.Ram(size=SIZE), {}),
        "file": lambda: (targets.File(folder / "disk.img", size=SIZE), {}),
        "layer": lambda: (pyublk.Layer(Memory()), {}),
    }[kind]()


KINDS = ["sync", "workers", "async", "handle", "ram", "file", "layer"]


@pytest.mark.parametrize("kind", KINDS)
def test_random_operations_agree_with_a_shadow(
    kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    spans = st.tuples(st.integers(0, SIZE // 512), st.integers(0, 64)).map(
        lambda pair: (min(pair[0] * 512, SIZE), min(pair[1] * 512, SIZE - min(pair[0] * 512, SIZE)))
    )

    class Operations(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            target, options = make(kind, tmp_path_factory.mktemp("disk"))
            self.disk = Disk(target, max_io_size=8192, depth=4, **options)
            self.disk.open()
            self.shadow = Shadow(self.disk)

        @rule(span=spans, seed=st.integers(1, 255), fua=st.booleans())
        def write(self, span: tuple[int, int], seed: int, fua: bool) -> None:
            offset, length = span
            data = bytes((seed + at // 512) % 256 for at in range(length))
            self.shadow.write(offset, data, fua=fua)

        @rule(span=spans)
        def read(self, span: tuple[int, int]) -> None:
            self.shadow.read(*span)

        @rule(span=spans, unmap=st.booleans())
        def write_zeroes(self, span: tuple[int, int], unmap: bool) -> None:
            self.shadow.write_zeroes(*span, unmap=unmap)

        @rule(span=spans)
        def discard(self, span: tuple[int, int]) -> None:
            if self.disk.params.discard and self.disk.params.discard.max_discard_size:
                self.shadow.discard(*span)

        @rule()
        def flush(self) -> None:
            self.disk.flush()

        @invariant()
        def nothing_is_held(self) -> None:
            assert self.disk.stats().total.errors == 0

        def teardown(self) -> None:
            self.shadow.check()
            self.disk.close()

    Operations.TestCase.settings = settings(
        max_examples=15,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    Operations.TestCase().runTest()


def test_requests_are_split_and_counted(open_disk: Callable[..., Disk]) -> None:
    disk = open_disk(Memory(), max_io_size=4096, depth=8)
    disk.pwrite(bytes(40960), 512)
    disk.pread(4096, 0)
    total = disk.stats().total
    assert (total.writes, total.bytes_written) == (10, 40960)
    assert (total.reads, total.bytes_read) == (1, 4096)
    assert total.largest_batch == 8
    assert total.requests == 11


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda disk: disk.pread(100, 0), errno.EINVAL, "must be multiples of the block size, 512"),
        (lambda disk: disk.pread(512, 7), errno.EINVAL, "must be multiples of the block size, 512"),
        (lambda disk: disk.pread(1024, SIZE - 512), errno.EIO, "reach past the end"),
        (lambda disk: disk.pwrite(bytes(512), SIZE), errno.ENOSPC, "reach past the end"),
        (lambda disk: disk.discard(0, 512), errno.EOPNOTSUPP, "does not take discards"),
    ],
)
def test_what_a_block_device_refuses_is_refused(
    call: Callable[[Disk], object], error: int, message: str, open_disk: Callable[..., Disk]
) -> None:
    with pytest.raises(OSError, match=message) as raised:
        call(open_disk(Memory()))
    assert raised.value.errno == error


def test_fua_is_emulated_by_flush_unless_the_target_takes_it(
    open_disk: Callable[..., Disk],
) -> None:
    class Durable(Memory):
        durable = 0

        def write_fua(self, offset: int, data: memoryview) -> None:
            self.durable += 1
            self.write(offset, data)

    plain, durable = Memory(), Durable()
    assert not open_disk(plain).params.basic.fua
    durable_disk = open_disk(durable)
    assert durable_disk.params.basic.fua
    open_disk(plain).pwrite(bytes(512), 0, fua=True)
    durable_disk.pwrite(bytes(512), 0, fua=True)
    assert plain.flushed == 1
    assert (durable.durable, durable.flushed) == (1, 0)


def test_an_os_error_is_the_clients_errno(open_disk: Callable[..., Disk]) -> None:
    class Full(Memory):
        def write(self, offset: int, data: memoryview) -> None:
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="WRITE at 0 failed") as raised:
        open_disk(Full()).pwrite(bytes(512), 0)
    assert raised.value.errno == errno.ENOSPC


def test_returning_bytes_is_told(
    open_disk: Callable[..., Disk], caplog: pytest.LogCaptureFixture
) -> None:
    class Returning(Memory):
        def read(self, offset: int, buffer: memoryview) -> Any:
            return bytes(buffer)

    with pytest.raises(OSError, match="READ at 0 failed"):
        open_disk(Returning()).pread(512, 0)
    assert "returned bytes instead of None (to read, fill the buffer)" in caplog.text


def test_a_buffer_kept_too_long_stays_as_it_was(open_disk: Callable[..., Disk]) -> None:
    class Keeping(Memory):
        kept: memoryview | None = None

        def write(self, offset: int, data: memoryview) -> None:
            with pytest.raises(TypeError, match="read-only"):
                data[0] = 1
            self.kept = self.kept or data

    target = Keeping()
    disk = open_disk(target, depth=1)
    disk.pwrite(b"A" * 512, 0)
    disk.pwrite(b"B" * 512, 0)
    assert target.kept == b"A" * 512
    with pytest.raises(TypeError, match="read-only"):
        target.kept[0] = 1


def test_a_stale_io_raises_even_when_its_tag_serves_again(open_disk: Callable[..., Disk]) -> None:
    class Keeping(Handle):
        kept: list[pyublk.IO]

        def handle(self, io: pyublk.IO) -> None:
            if hasattr(self, "kept"):
                with pytest.raises(pyublk.StaleIO, match="was completed already"):
                    self.kept[0].offset  # noqa: B018
                return
            self.kept = [io]
            io.complete()
            with pytest.raises(pyublk.StaleIO, match="complete it once"):
                io.complete()
            assert io.completed

    target = Keeping()
    disk = open_disk(target, depth=1)
    disk.pread(512, 0)
    disk.pread(512, 512)
    assert repr(target.kept[0]) == "<IO tag 0 (completed)>"


def test_a_deferred_request_is_completed_from_another_thread() -> None:
    class Deferring(Handle):
        def handle(self, io: pyublk.IO) -> None:
            io.defer()
            if io.op is Op.READ:
                io.buffer[:5] = b"later"
                threading.Timer(0.01, io.complete).start()
            else:
                threading.Timer(0.01, io.fail, (errno.ENOSPC,)).start()

    with Disk(Deferring()) as disk:
        assert disk.pread(512, 0)[:5] == b"later"
        with pytest.raises(OSError, match="WRITE at 0 failed") as raised:
            disk.pwrite(bytes(512), 0)
        assert raised.value.errno == errno.ENOSPC


def test_requests_of_an_async_target_overlap(open_disk: Callable[..., Disk]) -> None:
    class Meeting(Async):
        """Reads end only when two are there."""

        waiting: asyncio.Future[None] | None = None

        async def read(self, offset: int, buffer: memoryview) -> None:
            if self.waiting is None:
                self.waiting = asyncio.get_running_loop().create_future()
                await self.waiting
            else:
                self.waiting.set_result(None)

    open_disk(Meeting(), max_io_size=4096).pread(8192, 0)


def test_workers_run_beside_each_other(open_disk: Callable[..., Disk]) -> None:
    class Meeting(Parallel):
        barrier = threading.Barrier(2, timeout=10)

        def read(self, offset: int, buffer: memoryview) -> None:
            self.barrier.wait()

    open_disk(Meeting(), workers=2, max_io_size=4096).pread(8192, 0)


class Said(Handle):
    """Says more of itself than its methods tell."""

    flushes = True
    discards = True

    def __init__(self) -> None:
        super().__init__()
        self.physical_block_size = 4096

    def status(self) -> dict[str, Any]:
        return {"mood": "good"}


class ReadOnly(pyublk.Target):
    def read(self, offset: int, buffer: memoryview) -> None:
        pass


def test_a_layer_says_what_its_target_says() -> None:
    with Disk(Said()) as plain, Disk(pyublk.Layer(Said())) as layer:
        assert layer.params == plain.params
        assert layer.params.basic.volatile_cache
        assert layer.target.status() == {"mood": "good"}
    with Disk(pyublk.Layer(ReadOnly(size=SIZE, read_only=True))) as disk:
        assert disk.params.basic.read_only


def test_workers_are_refused_as_by_a_device() -> None:
    words = "workers=4 needs a target with plain methods and concurrency 'parallel'; Memory is sync"
    with pytest.raises(ValueError, match=words):
        Disk(Memory(), workers=4)


def test_a_closed_disk_says_so() -> None:
    disk = Disk(Memory())
    with pytest.raises(pyublk.DeviceClosed, match="not open: use `with`"):
        disk.pread(512, 0)


def test_a_start_that_fails_closes_the_target() -> None:
    class Refusing(Memory):
        closed = 0

        def close(self) -> None:
            self.closed += 1

    target = Refusing(size=1000)
    with pytest.raises(ValueError, match="size"), Disk(target):
        pass
    assert target.closed == 1
