"""What a disk owes its clients, whatever target is behind it and whoever brings its requests: run
by tests/unit on disks without a kernel, and by tests/kernel on real ones."""

import asyncio
import ctypes
import errno
import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pytest

import pyublk
from pyublk.faults import Faults
from pyublk.stats import DeviceStats
from pyublk.targets import File, Mirror, Ram, Zoned
from pyublk.uapi import Op
from pyublk.zones import Zone, ZoneState

SIZE = 1 << 20
#: Tests that count, or want failures, keep to the second half: partitions are looked for below.
HALF = SIZE // 2
#: Of a zoned disk.
ZONE = 4 << 20


class Client(Protocol):
    """Somebody with the disk open. A transfer is whole, or an OSError."""

    @property
    def size(self) -> int: ...
    @property
    def faults(self) -> Faults: ...
    def pread(self, length: int, offset: int) -> bytes: ...
    def pwrite(self, data: bytes, offset: int) -> int: ...
    def flush(self) -> None: ...
    def discard(self, offset: int, length: int) -> None: ...
    def write_zeroes(self, offset: int, length: int) -> None: ...
    def stats(self) -> DeviceStats: ...
    def limit(self, *, iops: float | None = None, burst: float = 0.1) -> None: ...
    def report_zones(self) -> list[Zone]: ...
    def manage_zone(self, op: Op, offset: int = 0) -> None: ...


OpenDisk = Callable[..., Client]


def operations_of(disk: Client) -> dict[str, Callable[[], object]]:
    """What a client does to the second half of a disk, by the method behind it."""
    return {
        "read": lambda: disk.pread(4096, HALF),
        "write": lambda: disk.pwrite(b"w" * 4096, HALF),
        "flush": disk.flush,
        "discard": lambda: disk.discard(HALF, 4096),
        "write_zeroes": lambda: disk.write_zeroes(HALF, 4096),
    }


def zone_operations_of(disk: Client) -> dict[str, Callable[[], object]]:
    """What a client does to the second zone of a disk, in an order in which all can be done; the
    last two are for all zones."""
    return {
        "zone_open": lambda: disk.manage_zone(Op.ZONE_OPEN, ZONE),
        "write": lambda: disk.pwrite(b"w" * 4096, ZONE),
        "read": lambda: disk.pread(4096, ZONE),
        "zone_close": lambda: disk.manage_zone(Op.ZONE_CLOSE, ZONE),
        "zone_finish": lambda: disk.manage_zone(Op.ZONE_FINISH, ZONE),
        "zone_reset": lambda: disk.manage_zone(Op.ZONE_RESET, ZONE),
        "zone_reset_all": lambda: disk.manage_zone(Op.ZONE_RESET_ALL),
        "report_zones": disk.report_zones,
    }


# ---- targets ----


class Store:
    """Bytes behind a target of any kind. `error` is raised from every `failing` request of the
    second half, and from a flush."""

    def __init__(self) -> None:
        self.data = memoryview(bytearray(SIZE))
        self.lengths: list[int] = []
        self.failing = "read"
        self.error: BaseException | None = None

    def _begin(self, method: str, offset: int = HALF) -> None:
        if self.error is not None and method == self.failing and offset >= HALF:
            raise self.error

    def read(self, offset: int, buffer: memoryview) -> None:
        self._begin("read", offset)
        self.lengths.append(len(buffer))
        buffer[:] = self.data[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview) -> None:
        self._begin("write", offset)
        self.lengths.append(len(data))
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        self._begin("flush")

    def discard(self, offset: int, length: int) -> None:
        self._begin("discard", offset)
        self.data[offset : offset + length] = bytes(length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._begin("write_zeroes", offset)
        self.data[offset : offset + length] = bytes(length)


class Sync(pyublk.Target):
    def __init__(self) -> None:
        super().__init__(size=SIZE)
        self.store = Store()
        for method in ("read", "write", "flush", "discard", "write_zeroes"):
            setattr(self, method, getattr(self.store, method))


class Workers(Sync):
    concurrency = "parallel"


class Async(pyublk.Target):
    def __init__(self) -> None:
        super().__init__(size=SIZE)
        self.store = Store()

    async def read(self, offset: int, buffer: memoryview) -> None:
        await asyncio.sleep(0)
        self.store.read(offset, buffer)

    async def write(self, offset: int, data: memoryview) -> None:
        await asyncio.sleep(0)
        self.store.write(offset, data)

    async def flush(self) -> None:
        self.store.flush()

    async def discard(self, offset: int, length: int) -> None:
        self.store.discard(offset, length)

    async def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self.store.write_zeroes(offset, length, unmap)


def handle(store: Store, op: int, offset: int, length: int, buffer: memoryview) -> None:
    if op == Op.READ:
        store.read(offset, buffer)
    elif op == Op.WRITE:
        store.write(offset, buffer)
    elif op == Op.FLUSH:
        store.flush()
    elif op == Op.DISCARD:
        store.discard(offset, length)
    else:
        assert op == Op.WRITE_ZEROES
        store.write_zeroes(offset, length, True)


class Handle(pyublk.Target):
    flushes = discards = writes_zeroes = True

    def __init__(self) -> None:
        super().__init__(size=SIZE)
        self.store = Store()

    def handle(self, io: pyublk.IO) -> None:
        handle(self.store, io.op, io.offset, io.length, io.buffer)


HANDLER = ctypes.CFUNCTYPE(
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_uint32,
    ctypes.c_uint32,
    ctypes.c_uint64,
    ctypes.c_uint64,
    ctypes.c_void_p,
)
HANDLER(lambda *_: 0)  # libffi may keep a descriptor from its first function on: not a test's


class Pointer(pyublk.NativeTarget):
    """A C function pointer, behind which ctypes has Python."""

    flushes = discards = writes_zeroes = True

    def __init__(self) -> None:
        super().__init__(size=SIZE)
        self.store = Store()
        self._function = HANDLER(self._handle)
        self.handler = ctypes.cast(self._function, ctypes.c_void_p).value or 0

    def _handle(
        self, context: int | None, op: int, flags: int, offset: int, length: int, buffer: int
    ) -> int:
        there = length if op in (Op.READ, Op.WRITE) else 0
        memory = memoryview((ctypes.c_char * there).from_address(buffer)).cast("B")
        try:
            handle(self.store, op, offset, length, memory)
        except OSError as error:
            return -(error.errno or errno.EIO)
        return 0


#: Each with the options of its disk.
FAILING: dict[str, tuple[Callable[[], Any], dict[str, int]]] = {
    "sync": (Sync, {}),
    "workers": (Workers, {"workers": 2}),
    "async": (Async, {}),
    "handle": (Handle, {}),
    "pointer": (Pointer, {}),
}
RAISING = [kind for kind in FAILING if kind != "pointer"]  # C raises nothing
KINDS = ["ram", "file", "sync", "async", "pointer"]
#: Kinds of which only faults could be different.
FAULTY = [*KINDS, "workers", "handle", pytest.param("mirror", marks=pytest.mark.thorough)]


def made(kind: str, folder: Path) -> pyublk.Target:
    if kind == "ram":
        return Ram(size=SIZE)
    if kind == "file":
        return File(folder / "disk", size=SIZE)
    if kind == "mirror":
        legs = [folder / "a", folder / "b"]
        for leg in legs:
            leg.write_bytes(bytes(SIZE))
        return Mirror(*legs, state=folder / "state")
    return FAILING[kind][0]()  # type: ignore[no-any-return]


LAYERED = ["file", "async"]  # the others differ from these by nothing that a layer sees


@pytest.fixture(
    params=[
        *KINDS,
        *(
            pytest.param(
                f"layer over {kind}", marks=[] if kind in LAYERED else pytest.mark.thorough
            )
            for kind in KINDS
        ),
    ]
)
def target(request: pytest.FixtureRequest, tmp_path: Path) -> pyublk.Target:
    layer, _, kind = request.param.rpartition(" ")
    target = made(kind, tmp_path)
    return pyublk.Layer(target) if layer else target


def pattern(length: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(length)


def failure_of(call: Callable[..., object], *arguments: object) -> int | None:
    with pytest.raises(OSError, match=r".") as failed:
        call(*arguments)
    return failed.value.errno


#: What clients see as it is; everything else becomes EIO.
PASSED_ON = [
    errno.EOPNOTSUPP,
    errno.ETIMEDOUT,
    errno.ENOSPC,
    errno.ENOLINK,
    errno.EREMOTEIO,
    errno.EBADE,
    errno.ENODATA,
    errno.EILSEQ,
    errno.ENOMEM,
    errno.EBUSY,
    errno.EAGAIN,
    errno.ENODEV,
    errno.ETIME,
    errno.EINVAL,
    errno.EIO,
]
OTHERS = [errno.ENOENT, errno.EPERM, errno.EROFS, errno.ENOSYS]


class Strange(BaseException):
    pass


STRANGE = [
    ValueError("wrong"),
    KeyboardInterrupt(),
    SystemExit(3),
    MemoryError(),
    GeneratorExit(),
    AssertionError("never"),
    StopIteration(),
    asyncio.CancelledError(),
    Strange("who knows"),
    OSError("without a number"),
    OSError(0, "zero"),
    OSError(-5, "negative"),
    OSError(99999, "no errno"),
]


# ---- what they owe ----


class TargetContract:
    """Whoever inherits it has a fixture `open_disk`: `open_disk(target, **options)` is a Client."""

    #: Options of a disk whose data passes through its server.
    COPIED: ClassVar[dict[str, Any]] = {}

    def test_what_is_written_is_read(self, open_disk: OpenDisk, target: pyublk.Target) -> None:
        disk = open_disk(target)
        assert disk.size == SIZE
        data = pattern(SIZE, 1)
        offset = 0
        for length in (4096, 512, 3584, 65536, 131072, SIZE - 204800):
            assert disk.pwrite(data[offset : offset + length], offset) == length
            offset += length
        assert offset == SIZE
        assert disk.pread(SIZE, 0) == data
        assert disk.pread(512, SIZE - 512) == data[-512:]
        disk.pwrite(b"!" * 1024, 1536)
        assert disk.pread(4096, 0) == data[:1536] + b"!" * 1024 + data[2560:4096]
        assert disk.stats().total.bytes_written == SIZE + 1024
        assert disk.stats().total.errors == 0

    def test_large_transfers_are_split(self, open_disk: OpenDisk, target: pyublk.Target) -> None:
        disk = open_disk(target, max_io_size=8192)
        data = pattern(40960, 2)
        assert disk.pwrite(data, HALF + 512) == 40960
        assert disk.pread(40960, HALF + 512) == data
        total = disk.stats().total
        assert total.bytes_written == 40960
        assert total.writes >= 5
        assert total.reads >= 5
        if store := getattr(target, "store", None):
            assert max(store.lengths) <= 8192

    def test_what_is_not_whole_blocks_is_refused(
        self, open_disk: OpenDisk, target: pyublk.Target
    ) -> None:
        disk = open_disk(target)
        data = pattern(4096, 3)
        disk.pwrite(data, 0)
        for offset, length in [(0, 100), (7, 512), (512, 513), (1000, 1000)]:
            assert failure_of(disk.pread, length, offset) == errno.EINVAL
            assert failure_of(disk.pwrite, bytes(length), offset) == errno.EINVAL
            assert failure_of(disk.discard, offset, length) == errno.EINVAL
            assert failure_of(disk.write_zeroes, offset, length) == errno.EINVAL
        assert disk.pread(4096, 0) == data
        assert disk.stats().total.errors == 0  # no target has seen them

    def test_nothing_is_beyond_the_end(self, open_disk: OpenDisk, target: pyublk.Target) -> None:
        disk = open_disk(target)
        disk.pwrite(b"e" * 512, SIZE - 512)
        for offset in (SIZE, SIZE + 4096, 1 << 40):
            assert failure_of(disk.pread, 512, offset) == errno.EIO
            assert failure_of(disk.pwrite, bytes(512), offset) == errno.ENOSPC
            assert failure_of(disk.discard, offset, 512) == errno.EINVAL
            assert failure_of(disk.write_zeroes, offset, 512) == errno.EINVAL
        assert failure_of(disk.pread, 1024, SIZE - 512) == errno.EIO
        assert failure_of(disk.discard, SIZE - 512, 1024) == errno.EINVAL
        assert failure_of(disk.write_zeroes, SIZE - 512, 1024) == errno.EINVAL
        assert disk.pread(512, SIZE - 512) == b"e" * 512
        assert failure_of(disk.pwrite, bytes(1024), SIZE - 512) == errno.ENOSPC
        assert disk.stats().total.errors == 0

    @pytest.mark.parametrize("method", ["discard", "write_zeroes"])
    def test_what_is_cleared_reads_as_zeroes(
        self, open_disk: OpenDisk, target: pyublk.Target, method: str
    ) -> None:
        disk = open_disk(target)
        data = pattern(HALF, 4)
        disk.pwrite(data, HALF)
        getattr(disk, method)(HALF + 8192, 65536)
        cleared = data[:8192] + bytes(65536) + data[73728:]
        assert disk.pread(HALF, HALF) == cleared
        disk.pwrite(b"again" * 1024, HALF + 8192 + 4096)
        again = cleared[:12288] + b"again" * 1024 + cleared[17408:]
        assert disk.pread(HALF, HALF) == again
        total = disk.stats().total
        assert (total.bytes_discarded, total.bytes_zeroed) == (
            (65536, 0) if method == "discard" else (0, 65536)
        )
        assert total.errors == 0

    def test_zeroes_are_zero_to_the_block(self, open_disk: OpenDisk, target: pyublk.Target) -> None:
        disk = open_disk(target)
        disk.pwrite(b"x" * 32768, HALF)
        disk.write_zeroes(HALF + 1536, 12800)
        expected = b"x" * 1536 + bytes(12800) + b"x" * (32768 - 14336)
        assert disk.pread(32768, HALF) == expected

    def test_a_flush_reaches_who_has_a_cache(
        self, open_disk: OpenDisk, target: pyublk.Target
    ) -> None:
        disk = open_disk(target)
        disk.pwrite(b"f" * 4096, 0)
        before = disk.stats().total.flushes
        disk.flush()
        assert disk.stats().total.flushes - before == target.announces("flush")

    @pytest.mark.parametrize("kind", FAILING)
    def test_an_errno_is_the_clients_or_eio(
        self, open_disk: OpenDisk, caplog: pytest.LogCaptureFixture, kind: str
    ) -> None:
        make, options = FAILING[kind]
        target = make()
        disk = open_disk(target, **options)
        seen = {}
        for number in [*PASSED_ON, *OTHERS]:
            target.store.error = OSError(number, "as told")
            seen[number] = failure_of(disk.pread, 4096, SIZE - 4096)
        target.store.error = None
        assert disk.pread(4096, SIZE - 4096) == bytes(4096)
        expected = {number: number for number in PASSED_ON} | dict.fromkeys(OTHERS, errno.EIO)
        assert seen == expected
        assert disk.stats().total.errors == len(seen)
        assert caplog.records == []  # an errno is an answer, not an accident

    @pytest.mark.parametrize("kind", FAILING)
    def test_every_operation_can_fail(self, open_disk: OpenDisk, kind: str) -> None:
        make, options = FAILING[kind]
        target = make()
        disk = open_disk(target, **options)
        calls = operations_of(disk)
        for method, call in calls.items():
            target.store.failing, target.store.error = method, OSError(errno.ENOSPC, "full")
            assert failure_of(call) == errno.ENOSPC, method
            target.store.error = None
            call()
        assert disk.stats().total.errors == len(calls)

    @pytest.mark.parametrize("kind", RAISING)
    def test_anything_raised_is_eio_and_the_disk_lives_on(
        self, open_disk: OpenDisk, caplog: pytest.LogCaptureFixture, kind: str
    ) -> None:
        make, options = FAILING[kind]
        target = make()
        disk = open_disk(target, **options)
        # No coroutine raises StopIteration: Python makes a RuntimeError of it, raised elsewhere.
        strange = [e for e in STRANGE if kind != "async" or not isinstance(e, StopIteration)]
        for error in strange:
            target.store.error = error
            assert failure_of(disk.pread, 4096, SIZE - 4096) == errno.EIO, repr(error)
            assert disk.pread(4096, 0) == bytes(4096)
        target.store.error = None
        disk.pwrite(b"w" * 4096, SIZE - 4096)
        assert disk.pread(4096, SIZE - 4096) == b"w" * 4096
        assert disk.stats().total.errors == len(strange)
        # One place, one report.
        [record] = caplog.records
        assert (record.name, record.levelno) == ("pyublk.target", logging.ERROR)
        assert record.getMessage() == (
            f"{make.__name__}: the handler of a READ raised ValueError; the client gets EIO"
        )
        assert record.exc_info is not None
        assert record.exc_info[1] is STRANGE[0]
        assert "raise self.error" in caplog.text

    @pytest.mark.parametrize("kind", FAULTY)
    def test_faults_over_every_kind(
        self, open_disk: OpenDisk, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
    ) -> None:
        target = made(kind, tmp_path)
        disk = open_disk(target, **FAILING[kind][1] if kind in FAILING else {})
        here = (HALF, SIZE)
        for operation, call in operations_of(disk).items():
            if not target.announces(operation):
                continue
            where = None if operation == "flush" else here
            with disk.faults.fail(operation, errno.ENOSPC, range=where) as rule:
                assert failure_of(call) == errno.ENOSPC, operation
                assert rule.fired == 1
            call()
        disk.pwrite(b"then" * 2048, HALF)
        with disk.faults.delay("write", 0.001, range=here) as delayed:
            disk.pwrite(b"late" * 1024, HALF)
        with disk.faults.hang("read", range=here) as hung:
            release = threading.Timer(0.1, hung.release)
            release.start()
            assert disk.pread(4096, HALF) == b"late" * 1024
            release.join()
        with disk.faults.drop("write", range=here) as dropped:
            disk.pwrite(b"lost" * 1024, HALF)
        assert disk.pread(4096, HALF) == b"late" * 1024
        block = target.block_size
        with disk.faults.tear("write", sectors=block // 512, range=here) as torn:
            disk.pwrite(b"torn" * 2048, HALF)
        assert (
            disk.pread(8192, HALF)
            == (b"torn" * 2048)[:block] + (b"late" * 1024 + b"then" * 1024)[block:]
        )
        with disk.faults.misdirect("write", offset=SIZE - 4096, range=here) as misdirected:
            disk.pwrite(b"lost" * 1024, HALF)
        assert disk.pread(4096, HALF)[:block] == (b"torn" * 1024)[:block]
        assert disk.pread(4096, SIZE - 4096) == b"lost" * 1024
        fired = [rule.fired for rule in (delayed, hung, dropped, torn, misdirected)]
        assert fired == [1] * 5
        # A new mirror warns that it has no record yet.
        assert [one for one in caplog.records if one.levelno > logging.WARNING] == []

    @pytest.mark.parametrize(
        "kind",
        [
            pytest.param(kind, marks=[] if kind in LAYERED else pytest.mark.thorough)
            for kind in (*KINDS, "workers", "handle", "mirror")
        ],
    )
    def test_faults_of_what_is_read_and_of_the_whole_disk(
        self, open_disk: OpenDisk, tmp_path: Path, kind: str
    ) -> None:
        options = FAILING[kind][1] if kind in FAILING else {}
        disk = open_disk(made(kind, tmp_path), **options, **self.COPIED)
        then, now = b"then" * 1024, b"now." * 1024
        disk.pwrite(then, HALF)
        with disk.faults.rot("read", bits=1, range=(HALF, SIZE)) as rot:
            found = disk.pread(4096, HALF)
        assert sum((a ^ b).bit_count() for a, b in zip(found, then, strict=True)) == 1
        with disk.faults.stale("read", range=(HALF, SIZE)) as stale:
            assert disk.pread(4096, HALF) == then
            disk.pwrite(now, HALF)
            assert disk.pread(4096, HALF) == then
        assert disk.pread(4096, HALF) == now
        place = SIZE - 4096
        with disk.faults.misdirect("read", offset=place, range=(HALF, HALF + 4096)) as misdirected:
            assert disk.pread(4096, HALF) == bytes(4096)
        with disk.faults.full(range=(HALF, SIZE)) as full:
            assert failure_of(disk.pwrite, then, HALF) == errno.ENOSPC
        with disk.faults.read_only(range=(HALF, SIZE)) as read_only:
            assert failure_of(disk.pwrite, then, HALF) == errno.EIO
        disk.limit(iops=10, burst=0)  # slower than an emulated machine reads by itself
        began = time.monotonic()
        assert [disk.pread(4096, HALF) for _ in range(6)] == [now] * 6
        assert time.monotonic() - began >= 0.5
        limit = disk.faults.disk_limit
        assert limit is not None
        assert limit.fired > 0
        disk.limit()
        fired = [rule.fired for rule in (rot, stale, misdirected, full, read_only)]
        assert fired == [1, 2, 1, 1, 1]

    @pytest.mark.thorough
    def test_faults_over_zones(self, open_disk: OpenDisk, caplog: pytest.LogCaptureFixture) -> None:
        disk = open_disk(Zoned(size=4 * ZONE, zone_size=ZONE, conventional=1))
        calls = zone_operations_of(disk)
        second = (ZONE + 512, ZONE + 1024)  # only a part of it
        for operation, call in calls.items():
            with disk.faults.fail(operation, errno.ENOSPC, range=second) as rule:
                assert failure_of(call) == errno.ENOSPC, operation
                assert rule.fired == 1
            disk.report_zones()  # after an error, the kernel wants to be told of the zone
            with disk.faults.hang(operation, range=second) as hung:
                release = threading.Timer(0.1, hung.release)
                release.start()
                call()
                release.join()
            assert hung.fired == 1, operation
        with disk.faults.fail("all", range=(2 * ZONE, 3 * ZONE)) as elsewhere:
            for call in [*calls.values()][:-2]:
                call()
            assert elsewhere.fired == 0
            for call in [*calls.values()][-2:]:
                assert failure_of(call) == errno.EIO
        with disk.faults.read_only() as read_only:
            for operation in ("write", "zone_finish", "zone_reset", "zone_reset_all"):
                assert failure_of(calls[operation]) == errno.EIO, operation
            disk.report_zones()
            calls["read"]()
        with disk.faults.full() as full:
            assert failure_of(calls["write"]) == errno.ENOSPC
            disk.report_zones()
        assert (read_only.fired, full.fired) == (4, 1)
        assert caplog.records == []

    @pytest.mark.thorough
    def test_lies_over_zones(self, open_disk: OpenDisk) -> None:
        """Clients believe that a zone is written up to some byte, and the disk knows better."""
        disk = open_disk(Zoned(size=4 * ZONE, zone_size=ZONE, conventional=1))

        def pointer() -> int:
            return disk.report_zones()[1].pointer - ZONE

        with disk.faults.drop("write", range=(ZONE, 2 * ZONE)) as dropped:
            disk.pwrite(b"lost" * 1024, ZONE)
        assert failure_of(disk.pwrite, b"next" * 1024, ZONE + 4096) == errno.EIO
        assert pointer() == 0
        with disk.faults.tear("write", sectors=3, range=(ZONE, 2 * ZONE)) as torn:
            disk.pwrite(b"torn" * 1024, ZONE)
        assert failure_of(disk.pwrite, b"next" * 1024, ZONE + 4096) == errno.EIO
        assert pointer() == 1536
        disk.pwrite(b"next" * 128, ZONE + 1536)
        assert disk.pread(2560, ZONE) == b"torn" * 384 + b"next" * 128 + bytes(512)
        with disk.faults.misdirect("write", offset=HALF, range=(ZONE, 2 * ZONE)) as misdirected:
            disk.pwrite(b"lost" * 128, ZONE + 2048)
        assert disk.pread(512, HALF) == b"lost" * 128
        assert pointer() == 2048
        with disk.faults.misdirect("read", offset=HALF, range=(ZONE, 2 * ZONE)) as elsewhere:
            assert disk.pread(512, ZONE) == b"lost" * 128
        disk.manage_zone(Op.ZONE_RESET, ZONE)
        with disk.faults.drop("write", range=(ZONE, 2 * ZONE), times=1):
            disk.pwrite(b"lost" * 128, ZONE)
        disk.manage_zone(Op.ZONE_RESET, ZONE)
        disk.pwrite(b"well" * 128, ZONE)
        assert disk.report_zones()[1].state is ZoneState.IMPLICITLY_OPEN
        fired = [rule.fired for rule in (dropped, torn, misdirected, elsewhere)]
        assert fired == [1] * 4
        for action in (disk.faults.rot, disk.faults.stale):
            with pytest.raises(ValueError, match="never passes through the server of Zoned"):
                action("read")
