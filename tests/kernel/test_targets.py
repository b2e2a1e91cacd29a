"""Every kind of target as a real disk: what clients write is what the server gets, on every queue,
at every depth and size, and what the target declares is what the kernel's users see."""

import asyncio
import errno
import mmap
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from blocks import BLKIOOPT, BLKPBSZGET, BLKROGET, BLKSSZGET, Blocks
from conftest import Serve
from memory import KINDS, CompiledMemory, FullMemory, Memory, device_options, held, make
from needs import CPUs, needs
from variations import variations

import pyublk
from pyublk.targets import Null

MIB = 1 << 20
CPUS = sorted(os.sched_getaffinity(0))


def pattern(length: int, seed: object) -> bytes:
    return random.Random(str(seed)).randbytes(length)


def setting(disk: pyublk.Device, name: str) -> str:
    """An attribute of the disk's queue, as sysfs shows it."""
    return Path(f"/sys/block/{Path(disk.path).name}/queue/{name}").read_text().strip()


def change(disk: pyublk.Device, name: str, value: object) -> None:
    Path(f"/sys/block/{Path(disk.path).name}/queue/{name}").write_text(str(value))


def round_trip(disk: pyublk.Device, target: pyublk.Target) -> None:
    """Writes the whole disk in pieces of several sizes, and compares both ends."""
    data = pattern(target.size, "round trip")
    with Blocks(disk.path) as client:
        assert client.size == target.size
        offset = 0
        for length in (4096, 512, 3584, 65536, 131072, target.size - 204800):
            client.write(data[offset : offset + length], offset)
            offset += length
        assert offset == target.size
        assert client.read(target.size, 0) == data
        assert client.read(512, target.size - 512) == data[-512:]
    assert held(target) == data
    done = disk.stats().total
    assert done.bytes_written == target.size
    assert done.bytes_read >= target.size + 512
    assert done.errors == 0


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(serve: Serve, tmp_path: Path, kind: str) -> None:
    target = make(kind, MIB, tmp_path)
    round_trip(serve(target, **device_options(kind)), target)


def test_compiled_function(serve: Serve, tmp_path: Path) -> None:
    target = CompiledMemory(MIB, tmp_path)
    round_trip(serve(target), target)


def test_null(serve: Serve) -> None:
    """Everything succeeds, nothing is kept, of a disk as large as one likes."""
    disk = serve(Null(size=1 << 40))
    with Blocks(disk.path) as client:
        assert client.size == 1 << 40
        for offset in (0, MIB, (1 << 40) - 4096):
            assert client.write(b"x" * 4096, offset) == 4096
            assert len(client.read(4096, offset)) == 4096
        client.sync()
        client.discard(0, MIB)
        client.zero_out(0, MIB)
    done = disk.stats().total
    assert (done.writes, done.bytes_written) == (3, 3 * 4096)
    assert (done.flushes, done.discards, done.write_zeroes) == (1, 1, 1)
    assert done.errors == 0


# ---- queues ----


@contextmanager
def pinned(cpu: int) -> Iterator[None]:
    """The calling thread on this CPU only, whose requests go to the queue that the kernel chose."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def in_threads(*jobs: Callable[[], object]) -> None:
    """Runs the jobs at once; the first failure is the test's."""
    failures: list[BaseException] = []

    def run(job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(45)
        assert not thread.is_alive(), "a client hangs"
    if failures:
        raise failures[0]


@pytest.mark.parametrize(
    ("kind", "queues"),
    variations(
        [(kind, 4) for kind in KINDS]
        + [(kind, n) for n in (1, 2) for kind in ("sync", "async", "ram")],
        [("sync", 4), ("async", 4), ("ram", 4), ("sync", 1), ("ram", 2)],
    ),
)
def test_each_queue_carries_its_own_data(
    serve: Serve, controller: pyublk.Controller, tmp_path: Path, kind: str, queues: int
) -> None:
    """A client on each CPU writes and reads its own pattern, all at once."""
    needs(CPUs(queues))
    area, piece = 128 * 1024, 16 * 1024
    target = make(kind, area * len(CPUS), tmp_path)
    disk = serve(target, queues=queues, depth=7, **device_options(kind))
    data = {cpu: pattern(area, cpu) for cpu in CPUS}
    before = disk.stats()

    def client(index: int, cpu: int) -> None:
        start = index * area
        with pinned(cpu), Blocks(disk.path) as blocks:
            for offset in range(0, area, piece):
                blocks.write(data[cpu][offset : offset + piece], start + offset)
            for offset in range(0, area, piece):
                found = blocks.read(piece, start + offset)
                assert found == data[cpu][offset : offset + piece], f"CPU {cpu}, byte {offset}"

    in_threads(*(lambda i=i, cpu=cpu: client(i, cpu) for i, cpu in enumerate(CPUS)))
    assert held(target) == b"".join(data[cpu] for cpu in CPUS)
    after = disk.stats().queues
    assert len(after) == queues
    served: set[int] = set()
    for number, (now, then) in enumerate(zip(after, before.queues, strict=True)):
        cpus = controller.queue_affinity(disk.id, number) & set(CPUS)
        served |= cpus
        assert cpus, f"queue {number} has no CPU"
        assert now.writes - then.writes == len(cpus) * area // piece, f"queue {number}"
        # More, where the partition scan is not over.
        assert now.reads - then.reads >= len(cpus) * area // piece, f"queue {number}"
    assert served == set(CPUS)


# ---- depth ----


class Holding(pyublk.Target):
    """Answers reads of the second half only when `wanted` of them are held at once."""

    def __init__(self, size: int, wanted: int) -> None:
        super().__init__(size=size)
        self.wanted = wanted
        self.held: list[pyublk.IO] = []
        self.most = 0

    def handle(self, io: pyublk.IO) -> None:
        if io.offset < self.size // 2:
            return
        io.buffer[:] = (io.offset // 512).to_bytes(8, "little") * (io.length // 8)
        io.defer()
        self.held.append(io)
        self.most = max(self.most, len(self.held))
        if len(self.held) == self.wanted:
            for held in self.held:
                held.complete()
            self.held.clear()


@pytest.mark.parametrize("depth", [1, 2, 3, 127, 128, 1024, 4096])
def test_depth(serve: Serve, depth: int) -> None:
    """The server really gets `depth` requests at once, each with its own tag and buffer."""
    half = 4096 * 8192
    target = Holding(2 * half, depth)
    disk = serve(target, depth=depth, max_io_size=4096)
    assert disk.info().depth == depth
    change(disk, "scheduler", "none")  # another one holds requests back
    change(disk, "nomerges", 2)
    memory = mmap.mmap(-1, 4096 * depth)
    buffers = [memoryview(memory)[4096 * n : 4096 * n + 512] for n in range(depth)]
    with (
        Blocks(disk.path, os.O_RDONLY) as client,
        pyublk.Ring(256, cq_entries=max(512, 2 * depth)) as ring,
    ):
        for n, buffer in enumerate(buffers):
            ring.read(client.fd, buffer, half + 1024 * n, n)
        results: dict[int, int] = {}
        until = time.monotonic() + 40
        while len(results) < depth:
            assert time.monotonic() < until, f"{target.most} of {depth} requests came at once"
            ring.submit(1, timeout=5)
            results |= {done.user_data: done.result for done in ring.completions()}
    assert set(results.values()) == {512}
    for n, buffer in enumerate(buffers):
        assert buffer == ((half + 1024 * n) // 512).to_bytes(8, "little") * 64
        buffer.release()
    assert target.most == depth
    memory.close()


# ---- sizes ----


@pytest.mark.parametrize("block_size", [512, 4096])
def test_block_size(serve: Serve, block_size: int) -> None:
    target = FullMemory(MIB, block_size=block_size)
    disk = serve(target)
    assert setting(disk, "logical_block_size") == str(block_size)
    with Blocks(disk.path) as client:
        assert client.number(BLKSSZGET) == block_size
        data = pattern(block_size, block_size)
        client.write(data, 3 * block_size)
        assert client.read(block_size, 3 * block_size) == data
        half = block_size // 2
        for length, offset in ((half, 0), (block_size, half), (block_size + half, block_size)):
            with pytest.raises(OSError, match="Invalid argument") as refused:
                client.read(length, offset)
            assert refused.value.errno == errno.EINVAL
            with pytest.raises(OSError, match="Invalid argument"):
                client.write(bytes(length), offset)
    with open(disk.path, "r+b", buffering=0) as cached:
        cached.seek(3 * block_size + 1)
        cached.write(b"!")  # the page cache makes whole blocks of it
        os.fsync(cached.fileno())
    assert bytes(target.data[3 * block_size : 4 * block_size]) == data[:1] + b"!" + data[2:]
    for operation, *place in target.calls:
        assert operation == "flush" or all(n % block_size == 0 for n in place)


class Sizes(pyublk.Target):
    """Remembers how long the requests were."""

    def __init__(self, size: int) -> None:
        super().__init__(size=size)
        self.reads: Counter[int] = Counter()
        self.writes: Counter[int] = Counter()

    def read(self, offset: int, buffer: memoryview) -> None:
        self.reads[len(buffer)] += 1

    def write(self, offset: int, data: memoryview) -> None:
        self.writes[len(data)] += 1
        assert data[0] == data[-1] == 7


MAP_HUGETLB = 0x40000


@contextmanager
def client_memory(length: int) -> Iterator[mmap.mmap]:
    """Memory to write from and read to.

    In small pages a request beyond 1 MiB has more segments than the kernel puts into one.
    """
    if length <= 2 * MIB:
        with mmap.mmap(-1, length) as memory:
            yield memory
        return
    pool = Path("/proc/sys/vm/nr_hugepages")
    before = int(pool.read_text())
    pool.write_text(str(before + length // (2 * MIB)))
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB
        with mmap.mmap(-1, length, flags=flags) as memory:
            yield memory
    finally:
        pool.write_text(str(before))


@pytest.mark.parametrize("size", [4096, 65536, MIB, 4 * MIB])
def test_max_io_size(serve: Serve, size: int) -> None:
    """Requests are as large as the device allows, and never larger."""
    target = Sizes(16 * MIB)
    disk = serve(target, depth=8, max_io_size=size)
    assert int(setting(disk, "max_hw_sectors_kb")) == size // 1024
    change(disk, "max_sectors_kb", size // 1024)  # some kernels keep it at 1280
    total = max(2 * size, 65536)
    with Blocks(disk.path) as client, client_memory(total) as buffer:
        buffer[:] = b"\7" * total
        assert os.pwritev(client.fd, [buffer], MIB) == total
        target.reads.clear()
        assert os.preadv(client.fd, [buffer], MIB) == total
    assert target.writes == {size: total // size}
    assert target.reads == {size: total // size}
    assert disk.stats().total.errors == 0


@pytest.mark.parametrize("blocks", [1, 3, 2047])
def test_odd_disk_sizes(serve: Serve, blocks: int) -> None:
    target = Memory(blocks * 512)
    disk = serve(target)
    with Blocks(disk.path) as client:
        assert client.size == blocks * 512
        data = pattern(blocks * 512, blocks)
        client.write(data, 0)
        assert client.read(blocks * 512, 0) == data
        assert client.read(4096, blocks * 512) == b""
        with pytest.raises(OSError, match="No space left") as refused:
            client.write(bytes(512), blocks * 512)
        assert refused.value.errno == errno.ENOSPC
    assert bytes(target.data) == data


# ---- what the target declares ----


class ReadOnly(pyublk.Target):
    def __init__(self) -> None:
        super().__init__(size=MIB, read_only=True)

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = b"r" * len(buffer)


def test_read_only(serve: Serve) -> None:
    disk = serve(ReadOnly())
    with Blocks(disk.path, os.O_RDONLY) as client:
        assert client.number(BLKROGET) == 1
        assert client.read(4096, 0) == b"r" * 4096

    def write() -> None:
        with Blocks(disk.path) as writer:
            writer.write(bytes(512), 0)

    with pytest.raises(OSError, match=r"Read-only|not permitted") as refused:
        write()
    assert refused.value.errno in (errno.EROFS, errno.EPERM)
    assert disk.stats().total.writes == 0


def test_hints(serve: Serve) -> None:
    disk = serve(
        Memory(
            MIB,
            block_size=512,
            physical_block_size=4096,
            io_min=8192,
            io_opt=65536,
            rotational=True,
        )
    )
    expected = {
        "logical_block_size": 512,
        "physical_block_size": 4096,
        "minimum_io_size": 8192,
        "optimal_io_size": 65536,
        "rotational": 1,
        "discard_max_bytes": 0,
        "write_zeroes_max_bytes": 0,
    }
    assert {name: int(setting(disk, name)) for name in expected} == expected
    with Blocks(disk.path) as client:
        assert client.number(BLKPBSZGET) == 4096
        assert client.number(BLKIOOPT) == 65536
        assert client.number(BLKROGET) == 0
    plain = serve(Memory(MIB))
    assert setting(plain, "rotational") == "0"
    assert setting(plain, "physical_block_size") == "512"


def test_discard_limits(serve: Serve) -> None:
    disk = serve(FullMemory(MIB, discard_granularity=65536, max_discard=262144))
    expected = {
        "discard_granularity": 65536,
        "discard_max_bytes": 262144,
        "write_zeroes_max_bytes": 262144,
    }
    assert {name: int(setting(disk, name)) for name in expected} == expected


# ---- flush and FUA ----


class FuaMemory(FullMemory):
    def write_fua(self, offset: int, data: memoryview) -> None:
        self.calls.append(("write_fua", offset, len(data)))
        self.data[offset : offset + len(data)] = data


def test_without_flush_nothing_is_flushed(serve: Serve) -> None:
    disk = serve(Memory(MIB))
    assert setting(disk, "write_cache") == "write through"
    with Blocks(disk.path) as client:
        client.write(bytes(4096), 0, os.RWF_DSYNC)
        client.sync()
    assert disk.stats().total.flushes == 0


def test_fsync_and_dsync_become_flushes(serve: Serve) -> None:
    target = FullMemory(MIB)
    disk = serve(target)
    assert (setting(disk, "write_cache"), setting(disk, "fua")) == ("write back", "0")
    with Blocks(disk.path) as client:
        client.write(bytes(4096), 0)
        assert target.calls == [("write", 0, 4096)]
        client.sync()
        assert target.calls[1:] == [("flush",)]
        client.write(bytes(4096), 8192, os.RWF_DSYNC)
        assert target.calls[2:4] == [("write", 8192, 4096), ("flush",)]
    assert disk.stats().total.flushes >= 2


def test_dsync_becomes_write_fua(serve: Serve) -> None:
    target = FuaMemory(MIB)
    disk = serve(target)
    assert (setting(disk, "write_cache"), setting(disk, "fua")) == ("write back", "1")
    with Blocks(disk.path) as client:
        client.write(bytes(4096), 0)
        assert target.calls == [("write", 0, 4096)]
        client.write(b"f" * 4096, 8192, os.RWF_DSYNC)
        assert target.calls[1] == ("write_fua", 8192, 4096)
        with Blocks(disk.path, os.O_RDWR | os.O_DSYNC) as durable:
            durable.write(b"d" * 512, 16384)
        assert ("write_fua", 16384, 512) in target.calls
        client.sync()
        assert target.calls[-1] == ("flush",)
        assert client.read(4096, 8192) == b"f" * 4096


# ---- the concurrency a target declares ----


class Measured(pyublk.Target):
    """Counts how many of its reads run at once, over all queues and on each thread's queue."""

    def __init__(self) -> None:
        super().__init__(size=MIB)
        self._lock = threading.Lock()
        self._now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.threads: set[str] = set()

    def enter(self, place: str) -> None:
        with self._lock:
            for name in ("all", place):
                self._now[name] += 1
                self.most[name] = max(self.most[name], self._now[name])
            self.threads.add(place)

    def leave(self, place: str) -> None:
        with self._lock:
            for name in ("all", place):
                self._now[name] -= 1

    def read(self, offset: int, buffer: memoryview) -> None:
        place = threading.current_thread().name
        self.enter(place)
        os.sched_yield()  # lets go of the GIL: whoever may run now does
        time.sleep(0)
        self.leave(place)

    def write(self, offset: int, data: memoryview) -> None:
        raise AssertionError("nobody writes here")


class MeasuredPerQueue(Measured):
    concurrency = "per_queue"


def read_from_every_cpu(disk: pyublk.Device, count: int = 40, clients: int = 1) -> None:
    def client(cpu: int) -> None:
        with pinned(cpu), Blocks(disk.path, os.O_RDONLY) as blocks:
            for n in range(count):
                blocks.read(4096, n * 4096)

    in_threads(*(lambda cpu=cpu: client(cpu) for cpu in CPUS * clients))


def test_serial_is_one_call_at_a_time(serve: Serve) -> None:
    needs(CPUs(2))
    target = Measured()
    disk = serve(target, queues=min(4, len(CPUS)))
    read_from_every_cpu(disk)
    assert len(target.threads) == min(4, len(CPUS))
    assert target.most["all"] == 1


def test_per_queue_is_one_call_for_each_queue(serve: Serve) -> None:
    needs(CPUs(2))
    target = MeasuredPerQueue()
    disk = serve(target, queues=2)
    read_from_every_cpu(disk, clients=2)
    assert len(target.threads) == 2
    assert [target.most[thread] for thread in target.threads] == [1, 1]


#: Where clients of these tests read: the scan for partitions, which may still go on, does not.
QUIET = MIB // 4


class Meeting(pyublk.Target):
    """A read of the quiet part returns when `parties` of them have come together."""

    concurrency: ClassVar[Literal["serial", "per_queue", "parallel"]] = "parallel"

    def __init__(self, parties: int) -> None:
        super().__init__(size=MIB, read_only=True)
        self.barrier = threading.Barrier(parties)

    def read(self, offset: int, buffer: memoryview) -> None:
        if QUIET <= offset < 3 * QUIET:
            self.barrier.wait(20)


class MeetingPerQueue(Meeting):
    concurrency = "per_queue"


def meet(disk: pyublk.Device, cpus: list[int]) -> None:
    def client(cpu: int, number: int) -> None:
        with pinned(cpu), Blocks(disk.path, os.O_RDONLY) as blocks:
            blocks.read(4096, QUIET + number * 8192)

    in_threads(*(lambda cpu=cpu, n=n: client(cpu, n) for n, cpu in enumerate(cpus)))
    assert disk.stats().total.errors == 0


@pytest.mark.parametrize("make", [Meeting, MeetingPerQueue])
def test_queues_run_beside_each_other(
    serve: Serve, controller: pyublk.Controller, make: type[Meeting]
) -> None:
    needs(CPUs(2))
    disk = serve(make(2), queues=2)
    cpus = [min(controller.queue_affinity(disk.id, queue) & set(CPUS)) for queue in range(2)]
    meet(disk, cpus)


def test_workers_run_beside_each_other(serve: Serve) -> None:
    disk = serve(Meeting(3), workers=3)
    meet(disk, [CPUS[0]] * 3)


class AsyncMeeting(pyublk.Target):
    """As Meeting, in coroutines."""

    def __init__(self, parties: int) -> None:
        super().__init__(size=MIB, read_only=True)
        self.parties = parties
        self.threads: set[int] = set()
        self.waiting: list[asyncio.Future[None]] = []

    async def read(self, offset: int, buffer: memoryview) -> None:
        self.threads.add(threading.get_ident())
        if not QUIET <= offset < 3 * QUIET:
            return
        self.waiting.append(asyncio.get_running_loop().create_future())
        if len(self.waiting) == self.parties:
            for waiting in self.waiting:
                waiting.set_result(None)
        await asyncio.wait_for(self.waiting[-1], 20)


def test_coroutines_interleave_on_one_thread(serve: Serve) -> None:
    queues = min(2, len(CPUS))
    target = AsyncMeeting(4)
    disk = serve(target, queues=queues)
    meet(disk, (CPUS * 4)[:4])
    assert len(target.threads) == 1
    used = [queue.reads for queue in disk.stats().queues]
    assert all(used), f"reads by queue: {used}"


class AsksAround(pyublk.Target):
    """Its reads need a timer, another thread, and a descriptor of their own."""

    concurrency = "per_queue"

    def __init__(self) -> None:
        super().__init__(size=MIB, read_only=True)

    async def read(self, offset: int, buffer: memoryview) -> None:
        if not QUIET <= offset < 3 * QUIET:
            return
        loop = asyncio.get_running_loop()
        near, far = socket.socketpair()
        with near, far:
            near.setblocking(False)
            async with asyncio.timeout(20), asyncio.TaskGroup() as group:
                receiving = group.create_task(loop.sock_recv(near, 1))
                group.create_task(asyncio.sleep(0.001))
                await asyncio.to_thread(far.send, b"x")
        buffer[:] = receiving.result() * len(buffer)


def test_a_loop_in_the_ring_wakes_for_all_else(serve: Serve) -> None:
    disk = serve(AsksAround())
    with Blocks(disk.path, os.O_RDONLY) as client:
        for n in range(8):
            assert client.read(4096, QUIET + n * 8192) == b"x" * 4096
    assert disk.stats().total.errors == 0


class Reversed(pyublk.Target):
    """Answers its reads of the quiet part eight at a time, the last one first."""

    def __init__(self) -> None:
        super().__init__(size=MIB)
        self.held: list[pyublk.IO] = []

    def handle(self, io: pyublk.IO) -> None:
        if not QUIET <= io.offset < 3 * QUIET:
            return
        io.defer()
        self.held.append(io)
        if len(self.held) == 8:
            for held in reversed(self.held):
                held.buffer[:] = bytes([held.offset % QUIET // 8192]) * held.length
                held.complete()
            self.held.clear()


def test_answers_in_any_order(serve: Serve) -> None:
    disk = serve(Reversed())
    pages = [mmap.mmap(-1, 4096) for _ in range(8)]
    with Blocks(disk.path, os.O_RDONLY) as client, pyublk.Ring(8) as ring:
        for n, page in enumerate(pages):
            ring.read(client.fd, page, QUIET + n * 8192, n)
            ring.submit()
        ring.submit(8, timeout=30)
        answers = [(done.user_data, done.result) for done in ring.completions()]
    assert answers == [(n, 4096) for n in range(7, -1, -1)]
    assert [page[:] for page in pages] == [bytes([n]) * 4096 for n in range(8)]
