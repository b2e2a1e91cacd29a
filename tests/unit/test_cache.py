"""Caches, on disks without a kernel, over targets that are slow, fail, come late or change."""

import asyncio
import errno
import itertools
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyublk
from pyublk.layers import build
from pyublk.layers.cache import Cache
from pyublk.layers.mapfile import MapFile
from pyublk.targets import File, Ram, Stripe
from pyublk.testing import Disk

TIMEOUT = 20.0
BLOCK = 64 << 10
SIZE = 32 << 20
NEVER = 3600.0


class Origin(pyublk.Target):
    """Bytes, and how they were asked for. What is planted is done once."""

    concurrency = "parallel"

    def __init__(self, size: int = SIZE, *, read_only: bool = False) -> None:
        super().__init__(size=size, read_only=read_only)
        self.data = bytearray(size)
        for block in range(0, size, BLOCK):
            self.data[block : block + 8] = block.to_bytes(8, "little")
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int]] = []
        self.flushes = 0
        self.opened = 0
        self.unreachable = False
        self.name = "one"
        self.fail_reads: dict[int, int] = {}  # errno by offset of a block
        self.fail_writes = 0
        self.gate = threading.Event()
        self.gate.set()
        self.asked = threading.Event()
        self._lock = threading.Lock()

    def identity(self) -> str:
        return self.name

    def open(self) -> None:
        if self.unreachable:
            raise OSError(errno.ENOLINK, "no network")
        self.opened += 1

    def read(self, offset: int, buffer: memoryview) -> None:
        with self._lock:
            self.reads.append((offset, len(buffer)))
        self.asked.set()
        assert self.gate.wait(TIMEOUT)
        for block, number in self.fail_reads.items():
            if offset <= block < offset + len(buffer):
                raise OSError(number, "planted")
        buffer[:] = self.data[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview) -> None:
        self.asked.set()
        assert self.gate.wait(TIMEOUT)
        if self.fail_writes:
            self.fail_writes -= 1
            raise OSError(errno.ENOLINK, "planted")
        with self._lock:
            self.writes.append((offset, len(data)))
            self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        self.flushes += 1


class Coroutines(pyublk.Target):
    def __init__(self) -> None:
        super().__init__(size=SIZE)
        self.data = bytearray(SIZE)

    async def read(self, offset: int, buffer: memoryview) -> None:
        await asyncio.sleep(0)
        buffer[:] = self.data[offset : offset + len(buffer)]

    async def write(self, offset: int, data: memoryview) -> None:
        await asyncio.sleep(0)
        self.data[offset : offset + len(data)] = data


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def cache(below: pyublk.Target, file: Path, **options: Any) -> Cache:
    """One that does nothing by itself, and waits for nothing."""
    quiet: dict[str, Any] = {"readahead": 0, "patience": 0.0, "drain_after": NEVER}
    return Cache(below, file, **{**quiet, **options})


def fails(number: int) -> Any:
    """What is inside fails with this errno."""
    return pytest.raises(OSError, match=rf"^\[Errno {number}\]")


def tag(text: str, length: int = 4096) -> bytes:
    return text.encode().ljust(8, b".") * (length // 8)


@contextmanager
def killed(target: Cache, file: Path) -> Iterator[Path]:
    """What is on disk now, in another folder: as if the server had been killed."""
    folder = file.parent / f"killed-{len(os.listdir(file.parent))}"
    folder.mkdir()
    for one in file.parent.iterdir():
        if one.is_file():
            shutil.copy(one, folder / one.name)
    yield folder / file.name


# ---- reading ----


def test_a_block_is_fetched_once_and_then_read_from_the_file(file: Path) -> None:
    origin = Origin()
    with Disk(cache(origin, file)) as disk:
        for _ in range(3):
            assert disk.pread(512, BLOCK) == bytes(origin.data[BLOCK : BLOCK + 512])
            assert disk.pread(4096, 2 * BLOCK - 4096) == bytes(4096)
        assert origin.reads == [(BLOCK, BLOCK)]
        status = disk.target.status()
        assert status is not None
        assert status["hits"] >= 4
        assert status["present_bytes"] == BLOCK


def test_many_requests_for_one_block_fetch_it_once(file: Path) -> None:
    origin = Origin()
    with Disk(cache(origin, file), max_io_size=4096, depth=16) as disk:
        assert disk.pread(BLOCK, BLOCK) == bytes(origin.data[BLOCK : 2 * BLOCK])
    assert origin.reads == [(BLOCK, BLOCK)]


@pytest.mark.parametrize("mode", ["write-through", "write-back"])
@pytest.mark.parametrize("kind", ["plain", "async", "ram", "file", "stripe"])
def test_over_every_kind_of_target(file: Path, mode: Any, kind: str) -> None:
    folder = file.parent
    for name in ("a", "b"):
        (folder / name).write_bytes(bytes(SIZE // 2))
    below: pyublk.Target = {
        "plain": Origin,
        "async": Coroutines,
        "ram": lambda: Ram(size=SIZE),
        "file": lambda: File(folder / "file", size=SIZE),
        "stripe": lambda: Stripe(folder / "a", folder / "b", chunk=4096),
    }[kind]()
    target = cache(below, file, mode=mode)
    with Disk(target) as disk:
        before = disk.pread(3 * BLOCK, 0)
        disk.pwrite(tag("new"), BLOCK - 2048)
        disk.write_zeroes(2 * BLOCK, 4096)
        disk.flush()
        expected = bytearray(before)
        expected[BLOCK - 2048 : BLOCK + 2048] = tag("new")
        expected[2 * BLOCK : 2 * BLOCK + 4096] = bytes(4096)
        assert disk.pread(3 * BLOCK, 0) == bytes(expected)
        target.drain()
        target.invalidate()
        assert disk.pread(3 * BLOCK, 0) == bytes(expected), "below is what was written"


def test_a_reader_who_reads_on_is_fetched_ahead_for(file: Path) -> None:
    origin = Origin()
    with Disk(cache(origin, file, readahead=1 << 20)) as disk:
        for block in range(0, SIZE // 4, 4096):
            assert disk.pread(512, block) == bytes(origin.data[block : block + 512])
        status = disk.target.status()
        assert status is not None
        assert status["ahead_bytes"] >= SIZE // 8
    fetched = sorted(origin.reads)
    assert all(sum(one) <= other[0] for one, other in itertools.pairwise(fetched)), (
        "nothing is fetched twice"
    )


def test_a_reader_with_many_requests_at_once_is_fetched_ahead_for(file: Path) -> None:
    origin = Origin()
    with Disk(cache(origin, file, readahead=1 << 20), max_io_size=4096, depth=32) as disk:
        for at in range(0, SIZE // 2, 32 * 4096):
            assert disk.pread(32 * 4096, at) == bytes(origin.data[at : at + 32 * 4096])
        status = disk.target.status()
        assert status is not None
        assert status["ahead_bytes"] >= SIZE // 8
    assert max(length for _, length in origin.reads) > 4096


def test_the_last_block_may_be_short(file: Path) -> None:
    origin = Origin(size=SIZE + 4096)
    target = cache(origin, file, mode="write-back")
    with Disk(target) as disk:
        assert disk.pread(4096, SIZE) == bytes(origin.data[SIZE:])
        disk.pwrite(tag("end"), SIZE)
        target.drain()
    assert origin.data[SIZE:] == tag("end")


# ---- what fails below ----


def test_exactly_the_requests_concerned_fail(file: Path) -> None:
    origin = Origin()
    origin.fail_reads = {BLOCK: errno.ENOLINK}
    with Disk(cache(origin, file)) as disk:
        with fails(errno.ENOLINK):
            disk.pread(512, BLOCK)
        assert disk.pread(512, 0)[:8] == bytes(8)
        origin.fail_reads = {}
        assert disk.pread(512, BLOCK)[:8] == BLOCK.to_bytes(8, "little")


def test_a_slow_source_holds_up_no_hit(file: Path) -> None:
    origin = Origin()
    target = cache(origin, file)
    with Disk(target, depth=16) as disk:
        disk.pread(512, 0)
        origin.gate.clear()
        origin.asked.clear()
        waits = threading.Thread(target=target.prefetch, args=(BLOCK, BLOCK))
        waits.start()
        assert origin.asked.wait(TIMEOUT)
        assert disk.pread(512, 0)[:8] == bytes(8)
        origin.gate.set()
        waits.join(TIMEOUT)


@pytest.mark.parametrize("wrong", [17, b"x"])
def test_a_source_that_answers_wrong_is_an_error(file: Path, wrong: object) -> None:
    origin = Origin()
    origin.read = lambda offset, buffer: wrong  # type: ignore[method-assign]
    with Disk(cache(origin, file)) as disk, fails(errno.EIO):
        disk.pread(512, 0)


def test_a_write_that_fails_below_fails_and_what_is_below_counts(file: Path) -> None:
    origin = Origin()
    target = cache(origin, file)
    with Disk(target) as disk:
        before = disk.pread(4096, BLOCK)
        origin.fail_writes = 1
        with fails(errno.ENOLINK):
            disk.pwrite(tag("lost"), BLOCK)
        assert target._crew.drained(TIMEOUT)  # what is to be forgotten is
        assert disk.pread(4096, BLOCK) == before
        status = target.status()
        assert status is not None
        assert status["failed_writes"] == 1


# ---- writing ----


def test_write_through_is_done_when_it_is_below(file: Path) -> None:
    origin = Origin()
    with Disk(cache(origin, file)) as disk:
        disk.pwrite(tag("new"), 4096)
        assert origin.data[4096:8192] == tag("new")
        assert not origin.flushes
        disk.flush()
        assert origin.flushes == 1
        disk.flush()
        assert origin.flushes == 1, "nothing was written since"
        assert disk.pread(4096, 4096) == tag("new")


def test_write_back_is_done_when_the_file_has_it(file: Path) -> None:
    origin = Origin()
    target = cache(origin, file, mode="write-back")
    with Disk(target) as disk:
        disk.pwrite(tag("new"), 4096)
        disk.flush()
        assert not origin.writes
        assert target.status()["dirty_bytes"] == BLOCK
        told = target.drain()
        assert (told["dirty_bytes"], told["drained_bytes"]) == (0, BLOCK)
        assert origin.data[4096:8192] == tag("new")
        assert origin.flushes == 1
        disk.pwrite(tag("newer"), 4096)
    assert origin.data[4096:8192] == tag("newer"), "a stop drains"
    with Disk(cache(origin, file, mode="write-back")) as disk:
        assert disk.target.status()["dirty_bytes"] == 0  # type: ignore[index]


def test_write_back_drains_by_itself(file: Path) -> None:
    origin = Origin()
    target = cache(origin, file, mode="write-back", drain_after=0.01)
    with Disk(target) as disk:
        origin.asked.clear()
        disk.pwrite(tag("new", BLOCK), 0)
        assert origin.asked.wait(TIMEOUT)


def test_a_write_while_it_is_drained_is_drained_as_well(file: Path) -> None:
    origin = Origin()
    target = cache(origin, file, mode="write-back")
    with Disk(target) as disk:
        disk.pwrite(tag("one"), 0)
        origin.gate.clear()
        origin.asked.clear()
        draining = threading.Thread(target=target.drain)
        draining.start()
        assert origin.asked.wait(TIMEOUT)
        disk.pwrite(tag("two"), 0)
        origin.gate.set()
        draining.join(TIMEOUT)
        assert target.status()["dirty_bytes"] == BLOCK
        target.drain()
        assert origin.data[:4096] == tag("two")


def test_a_drain_that_fails_is_told_and_nothing_is_lost(file: Path) -> None:
    origin = Origin()
    target = cache(origin, file, mode="write-back")
    with Disk(target) as disk:
        disk.pwrite(tag("new"), 0)
        origin.fail_writes = 1
        with pytest.raises(OSError, match="planted"):
            target.drain()
        status = target.status()
        assert status["dirty_bytes"] == BLOCK
        assert "planted" in status["drain_trouble"]
        with pytest.raises(OSError, match="drain the cache first"):
            target.invalidate()
        assert disk.pread(4096, 0) == tag("new")
        target.drain()
        assert target.status()["drain_trouble"] is None
    assert origin.data[:4096] == tag("new")


def test_a_stop_that_cannot_drain_says_so_and_keeps_it(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    origin = Origin()
    with Disk(cache(origin, file, mode="write-back")) as disk:
        disk.pwrite(tag("new"), 0)
        disk.pwrite(tag("new"), 5 << 20)
        disk.flush()
        origin.fail_writes = 1 << 30
    assert "128KiB of" in caplog.text
    assert "stay in the file as dirty" in caplog.text
    origin.fail_writes = 0
    target = cache(origin, file, mode="write-back")
    with Disk(target) as disk:
        assert target.status()["dirty_bytes"] >= 2 * BLOCK
        assert disk.pread(4096, 0) == tag("new")
        target.drain()
    assert origin.data[:4096] == origin.data[5 << 20 :][:4096] == tag("new")


def test_dirty_bytes_are_not_served_in_another_mode(file: Path) -> None:
    origin = Origin()
    with Disk(cache(origin, file, mode="write-back")) as disk:
        disk.pwrite(tag("new"), 0)
        origin.fail_writes = 1 << 30
    with pytest.raises(ValueError, match="serve it in mode write-back until"):
        Disk(cache(origin, file)).open()
    origin.fail_writes = 0
    with Disk(cache(origin, file, mode="write-back")):
        pass
    with Disk(cache(origin, file)) as disk:
        assert disk.pread(4096, 0) == tag("new")


# ---- the limit ----


def test_a_limit_is_kept_and_what_is_used_stays(file: Path) -> None:
    origin = Origin()
    target = cache(origin, file, limit=8 << 20, patience=TIMEOUT)
    with Disk(target) as disk:
        for offset in range(0, SIZE, BLOCK):
            assert disk.pread(512, offset)[:8] == offset.to_bytes(8, "little")
            assert target.count_present() <= 8 << 20
        assert target.status()["evicted_bytes"] >= SIZE // 2
        used = os.stat(file).st_blocks * 512
        assert used <= (8 << 20) + BLOCK, "what is evicted takes no space"


def test_dirty_blocks_are_not_evicted_but_drained(file: Path) -> None:
    origin = Origin()
    target = cache(origin, file, mode="write-back", limit=8 << 20, patience=TIMEOUT)
    with Disk(target) as disk:
        for offset in range(0, SIZE, BLOCK):
            disk.pwrite(tag(f"{offset}", BLOCK), offset)
        for offset in range(0, SIZE, BLOCK):
            assert disk.pread(BLOCK, offset) == tag(f"{offset}", BLOCK)
        assert target.status()["drained_bytes"] >= SIZE - (8 << 20)


def test_a_cache_full_of_what_cannot_be_drained_refuses_writes(file: Path) -> None:
    origin = Origin()
    target = cache(origin, file, mode="write-back", limit=8 << 20, patience=0.1)
    with Disk(target) as disk:
        origin.fail_writes = 1 << 30
        with fails(errno.ENOLINK):
            for offset in range(0, SIZE, BLOCK):
                disk.pwrite(tag(f"{offset}", BLOCK), offset)
        assert disk.pread(BLOCK, 0) == tag("0", BLOCK)
        assert target.count_present() <= 8 << 20
        origin.fail_writes = 0
        target.drain()
    assert origin.data[:BLOCK] == tag("0", BLOCK)


steps = st.lists(
    st.tuples(
        st.sampled_from(["read", "write", "write", "zero", "drain", "invalidate", "again", "kill"]),
        st.integers(0, SIZE // 4096 - 1),
        st.integers(1, 96),
    ),
    max_size=40,
)


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=steps, mode=st.sampled_from(["write-through", "write-back"]), ahead=st.booleans())
def test_it_is_always_the_disk_below_with_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[str, int, int]],
    mode: Any,
    ahead: bool,
) -> None:
    folder = tmp_path_factory.mktemp("model")
    origin = Origin()
    model = bytearray(origin.data)
    options: dict[str, Any] = {
        "mode": mode, "limit": 8 << 20, "patience": TIMEOUT, "readahead": ahead << 20,
        "drain_after": 0.05,
    }  # fmt: skip
    file = folder / "cache"
    target = cache(origin, file, **options)
    disk = Disk(target)
    disk.open()
    try:
        for number, (what, at, count) in enumerate(steps):
            offset = at * 4096
            length = min(count * 4096, SIZE - offset)
            if what == "read":
                assert disk.pread(length, offset) == model[offset : offset + length]
            elif what == "write":
                data = tag(f"{number}", length)
                disk.pwrite(data, offset)
                model[offset : offset + length] = data
            elif what == "zero":
                disk.write_zeroes(offset, length)
                model[offset : offset + length] = bytes(length)
            elif what == "drain":
                target.drain()
                assert origin.data == model
            elif what == "invalidate" and not target.status()["dirty_bytes"]:
                target.invalidate()
            elif what == "again":
                disk.close()
                assert origin.data == model
                target = cache(origin, file, **options)
                disk = Disk(target)
                disk.open()
            elif what == "kill":
                with killed(target, file) as copy:
                    disk.close()
                    file = copy
                target = cache(origin, file, **options)
                disk = Disk(target)
                disk.open()
            assert target.count_present() <= 8 << 20
        assert disk.pread(SIZE, 0) == model
    finally:
        disk.close()
    assert origin.data == model


# ---- without the source ----


def test_what_is_there_is_served_without_the_source(file: Path) -> None:
    origin = Origin()
    with Disk(cache(origin, file)) as disk:
        disk.pread(2 << 20, 0)
    origin.unreachable = True
    target = cache(origin, file, mode="write-back", drain_within=0.1)
    with Disk(target) as disk:
        assert disk.size == SIZE
        assert disk.pread(512, BLOCK)[:8] == BLOCK.to_bytes(8, "little")
        assert target.status()["source"] == "not needed so far"
        disk.pwrite(tag("new"), BLOCK)
        disk.pwrite(tag("new", BLOCK), 4 << 20)
        disk.flush()
        assert disk.pread(4096, BLOCK) == tag("new")
        with fails(errno.ENOLINK):
            disk.pread(512, 8 << 20)
        assert "no network" in target.status()["source"]
        origin.unreachable = False
        target._source._next_attempt = 0.0
        assert disk.pread(512, 8 << 20)[:8] == (8 << 20).to_bytes(8, "little")
    assert origin.data[BLOCK : BLOCK + 4096] == tag("new")


@pytest.mark.parametrize("mode", ["write-through", "write-back"])
def test_what_was_fetched_soon_outlives_the_machine(file: Path, mode: Any) -> None:
    """Also when nobody flushes: who lies over the cache to write keeps that to himself."""
    origin = Origin()
    with Disk(cache(origin, file, mode=mode, drain_after=0.05)) as disk:
        for number in range(3):
            disk.pread(512, number << 20)
            deadline = time.monotonic() + TIMEOUT
            while not durably_present(file, number << 20):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        cut = file.with_name("cut")
        for suffix in ("", ".map", ".dirty"):
            shutil.copy(f"{file}{suffix}", f"{cut}{suffix}")
    origin.unreachable = True
    with Disk(cache(origin, cut, mode=mode, patience=0.1)) as disk:
        for number in range(3):
            assert disk.pread(512, number << 20)[:8] == (number << 20).to_bytes(8, "little")
        with fails(errno.ENOLINK):
            disk.pread(512, 8 << 20)


def durably_present(file: Path, offset: int) -> bool:
    block = offset // BLOCK
    return bool(MapFile.read_durable(file).bits[block // 8] >> block % 8 & 1)


def test_the_first_opening_needs_the_source(file: Path) -> None:
    origin = Origin()
    origin.unreachable = True
    with pytest.raises(OSError, match="no network"):
        Disk(cache(origin, file)).open()
    assert not list(file.parent.iterdir()), "nothing half-made is left"


def test_a_source_that_cannot_be_served_is_told_at_once(file: Path) -> None:
    class Half(pyublk.Target):
        def read(self, offset: int, buffer: memoryview) -> None:
            pass

    with pytest.raises(pyublk.InvalidTarget, match="Half has no write method"):
        Disk(Cache(Half(size=SIZE), file)).open()
    assert not list(file.parent.iterdir())


def test_a_changed_source_is_refused(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    origin = Origin()
    with Disk(cache(origin, file)) as disk:
        disk.pread(512, 0)
    origin.name = "two"
    with Disk(cache(origin, file)) as disk:
        assert disk.pread(512, 0)[:8] == bytes(8)
        with fails(errno.EIO):
            disk.pread(512, BLOCK)
    assert "is not the one that it was filled from: its bytes are others" in caplog.text


def test_a_file_that_has_all_serves_what_it_has_whatever_the_source_is_now(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It works offline, so it cannot ask. Nothing that it has is mixed with the other source."""
    origin = Origin()
    with Disk(cache(origin, file)) as disk:
        before = disk.pread(SIZE, 0)
    origin.name, origin.data[:] = "two", bytes(SIZE)
    target = cache(origin, file)
    with Disk(target) as disk:
        assert disk.pread(SIZE, 0) == before
        assert origin.opened == 1
        with fails(errno.EIO):
            disk.pwrite(tag("new"), 0)
        assert "is not the one that it was filled from: its bytes are others" in caplog.text
        assert target._crew.drained(TIMEOUT)  # what is to be forgotten is
        with fails(errno.EIO):  # what is below counts after a write that failed, and it is another
            disk.pread(512, 0)
        assert disk.pread(SIZE - BLOCK, BLOCK) == before[BLOCK:]
    assert origin.data == bytes(SIZE)
    assert not origin.writes
    with Disk(cache(origin, file, changed="invalidate")) as disk:
        assert disk.pread(SIZE, 0) == bytes(SIZE)


def test_a_changed_source_may_be_taken_up_anew(file: Path) -> None:
    origin = Origin()
    with Disk(cache(origin, file)) as disk:
        disk.pread(512, 0)
    origin.name, origin.data[:4] = "two", b"new!"
    with Disk(cache(origin, file, changed="invalidate")) as disk:
        assert disk.pread(512, 0)[:4] == b"new!"
    with Disk(cache(origin, file)) as disk:
        assert disk.pread(512, BLOCK)[:8] == BLOCK.to_bytes(8, "little")


def test_a_changed_source_is_not_taken_up_over_dirty_bytes(file: Path) -> None:
    origin = Origin()
    with Disk(cache(origin, file, mode="write-back", drain_within=0.1)) as disk:
        disk.pread(512, 0)
        disk.pwrite(tag("new"), 0)
        origin.unreachable = True
        target = disk.target
        assert isinstance(target, Cache)
        target._source.close()
    origin.unreachable = False
    origin.name = "two"
    with pytest.raises(ValueError, match="are not in that one yet"):
        Disk(cache(origin, file, mode="write-back", changed="invalidate")).open()


def test_our_own_writes_do_not_make_it_another_source(file: Path) -> None:
    origin = Origin()
    with Disk(cache(origin, file)) as disk:
        disk.pwrite(tag("new"), 0)
        origin.name = "after the write"
        assert MapFile.read_header(file).record["identity"] is None
    assert MapFile.read_header(file).record["identity"] == "after the write"


def test_another_size_is_another_source(file: Path) -> None:
    with Disk(cache(Origin(), file)):
        pass
    target = cache(Origin(size=SIZE // 2), file)
    with Disk(target) as disk, fails(errno.EIO):
        disk.pread(512, 0)
    assert "it has 16777216 bytes, not 33554432" in str(target._source.trouble())


def test_a_read_only_source_makes_a_read_only_disk(file: Path) -> None:
    for _ in range(2):
        with Disk(cache(Origin(read_only=True), file)) as disk:
            assert disk.params.basic.read_only
            assert disk.target.identity() == "one"  # type: ignore[attr-defined]
            assert disk.pread(512, BLOCK)[:8] == BLOCK.to_bytes(8, "little")
            assert not file.with_name("cache.dirty").exists()


# ---- the boot trace ----


def test_a_boot_is_recorded_and_warms_the_next_one(file: Path) -> None:
    origin = Origin()
    with Disk(cache(origin, file, record=True)) as disk:
        for block in (90, 3, 4, 200):
            disk.pread(512, block * BLOCK)
    trace = file.with_name("cache.boot").read_text().splitlines()
    assert trace[1:] == ["90 1", "3 2", "200 1"]
    for path in file.parent.iterdir():
        if path.name != "cache.boot":
            path.unlink()
    origin.reads.clear()
    target = cache(origin, file, record=True, fetchers=1)
    with Disk(target) as disk:
        target.prefetch(200 * BLOCK, BLOCK)
        assert target._crew.drained(TIMEOUT)
        assert target.status()["warmed"] == "3 of 3"
        fetched = sorted(origin.reads)
        assert fetched == [(3 * BLOCK, 2 * BLOCK), (90 * BLOCK, BLOCK), (200 * BLOCK, BLOCK)]
        disk.pread(512, 3 * BLOCK)
        assert len(origin.reads) == 3
    assert file.with_name("cache.boot").read_text().splitlines() == trace, "it is kept"


def test_another_server_may_have_it_when_nothing_is_lost_with_this_one(file: Path) -> None:
    """Asked before it is open."""
    assert not cache(Origin(), file).recoverable
    assert cache(Origin(), file, mode="write-back").recoverable
    assert cache(File(file.with_name("source"), size=SIZE), file).recoverable


# ---- as text ----


def test_as_a_layer_and_as_a_target(file: Path) -> None:
    from pyublk.targets import resolve
    from pyublk.targets.sources import make

    layer = build(f"cache:file={file},limit=16M,mode=write-back", Origin())
    assert isinstance(layer, Cache)
    assert layer.mode == "write-back"
    assert layer.outlives_below
    source = file.with_name("source")
    source.write_bytes(tag("source", 1 << 20))
    target = make("cache", [str(file), str(source)], {"granularity": "4K"})
    assert isinstance(target, resolve("cache"))
    with Disk(target) as disk:
        assert disk.pread(512, 0)[:8] == b"source.."
        assert MapFile.read_header(file).granularity == 4096


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"mode": "write-around"}, "must be write-through or write-back"),
        ({"changed": "ignore"}, "must be refuse or invalidate"),
        ({"limit": 1 << 20}, "limit is 1MiB: it must be at least 8MiB"),
        ({"limit": 8 << 20, "granularity": 1 << 20}, "must be at least 64MiB"),
        ({"granularity": 5000}, "granularity"),
        ({"fetchers": 0}, "fetchers"),
        ({"readahead": -1}, "readahead"),
    ],
)
def test_wrong_options_are_refused(file: Path, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Cache(Origin(), file, **options)


def test_the_file_of_something_else_is_refused(file: Path) -> None:
    with Disk(cache(Origin(), file)):
        pass
    found = MapFile.read(file)
    import dataclasses

    found.header = dataclasses.replace(found.header, record={"kind": "overlay"})
    found.write(file)
    with pytest.raises(ValueError, match="is not the file of a cache"):
        Disk(cache(Origin(), file)).open()


def test_a_fetch_that_nobody_asked_for_gives_back_what_it_held(file: Path) -> None:
    """Its failure fails nobody, and what it did not get to can be fetched by those who want it."""
    origin = Origin()
    origin.fail_reads[0] = errno.ENOLINK
    layer = cache(origin, file)
    with Disk(layer) as disk:
        with pytest.raises(OSError, match="can be fetched"):
            layer.fetch_now(0, 4 << 20)  # in several runs, of which the first fails
        assert origin.reads == [(0, 1 << 20)]
        assert disk.pread(512, 2 << 20) == origin.data[2 << 20 : (2 << 20) + 512]
        origin.fail_reads.clear()
        assert disk.pread(512, BLOCK) == origin.data[BLOCK : BLOCK + 512]
        assert disk.stats().total.errors == 0


class FailsFirst(Origin):
    def read(self, offset: int, buffer: memoryview) -> None:
        first = not self.reads
        super().read(offset, buffer)
        if first:
            raise OSError(errno.ENOLINK, "planted")


def test_who_waits_for_a_fetch_that_nobody_asked_for_does_not_fail_with_it(file: Path) -> None:
    origin = FailsFirst()
    layer = cache(origin, file)
    with Disk(layer) as disk, ThreadPoolExecutor(2) as pool:
        origin.gate.clear()
        ahead = pool.submit(layer.fetch_now, 0, BLOCK)
        assert origin.asked.wait(TIMEOUT)  # it holds the block
        threading.Timer(0.2, origin.gate.set).start()  # most likely it is waited for by then
        assert disk.pread(4096, BLOCK // 2) == origin.data[BLOCK // 2 : BLOCK // 2 + 4096]
        assert isinstance(ahead.exception(TIMEOUT), OSError)


def test_a_source_is_found_from_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server leaves the directory in which the disk was added before the source is opened."""
    monkeypatch.chdir(tmp_path)
    Path("source.img").write_bytes(os.urandom(BLOCK))
    layer = build("cache:file=disk.cache", File(Path("source.img")))
    with Disk(layer) as disk:  # reads the size
        disk.pread(512, 0)
    again = build("cache:file=disk.cache", File(Path("source.img")))
    with Disk(again) as disk:
        monkeypatch.chdir("/")
        again.invalidate()
        assert disk.pread(BLOCK, 0) == (tmp_path / "source.img").read_bytes()
