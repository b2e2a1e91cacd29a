"""The parts of a cache, each by itself."""

import asyncio
import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyublk
from pyublk.layers.caching import marks as marks_module
from pyublk.layers.caching.boot import BootTrace
from pyublk.layers.caching.crew import Crew, Urgency
from pyublk.layers.caching.dirty import DirtyBlocks
from pyublk.layers.caching.draining import Drainer
from pyublk.layers.caching.eviction import PIECE, Clock, every
from pyublk.layers.caching.identity import described, difference
from pyublk.layers.caching.marks import REGION, Marks
from pyublk.layers.caching.order import Order
from pyublk.layers.caching.readahead import FIRST_WINDOW, NEAR, READERS, ReadAhead
from pyublk.layers.caching.room import Room
from pyublk.layers.caching.source import Changed, Source
from pyublk.targets import File, Null, Ram

TIMEOUT = 20.0
BLOCK = 64 << 10
SIZE = 8 << 20


class TestMarks:
    @staticmethod
    def open(path: Path, purpose: str = "write-back", size: int = SIZE) -> Marks:
        return Marks(path, size=size, region=REGION, purpose=purpose)

    def test_a_mark_is_in_the_file_before_the_write(self, tmp_path: Path) -> None:
        marks = self.open(tmp_path / "m")
        marks.enter(3 * REGION - 512, 1024)
        found = self.open(tmp_path / "m")
        assert found.marked() == [2, 3]

    def test_it_is_synced_before_the_write(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        marks = self.open(tmp_path / "m")
        synced: list[bytes] = []
        real = os.fdatasync

        def fdatasync(fd: int) -> None:
            real(fd)
            synced.append((tmp_path / "m").read_bytes()[4096:])

        monkeypatch.setattr(marks_module.os, "fdatasync", fdatasync)
        marks.enter(0, 512)
        assert synced == [b"\1"]
        marks.enter(512, 512)
        assert len(synced) == 1, "a region that is marked is not marked again"

    def test_a_mark_that_cannot_be_written_fails_the_write_only(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        marks = self.open(tmp_path / "m")

        def full(fd: int) -> None:
            raise OSError(errno.ENOSPC, "full")

        with monkeypatch.context() as patch:
            patch.setattr(marks_module.os, "fdatasync", full)
            with pytest.raises(OSError, match="full"):
                marks.enter(0, 512)
        marks.enter(0, 512)
        assert self.open(tmp_path / "m").marked() == [0]

    def test_quiet_regions_lose_their_marks(self, tmp_path: Path) -> None:
        marks = self.open(tmp_path / "m")
        for region in range(3):
            marks.enter(region * REGION, 512)
        marks.leave(0, 512)
        marks.leave(REGION, 512)
        assert marks.quiet() == set(), "all were written to just now"
        quiet = marks.quiet()
        assert quiet == {0, 1}, "somebody still writes to 2"
        marks.enter(REGION, 512)
        marks.leave(REGION, 512)
        assert marks.clear(quiet) == 1, "1 was written to again"
        marks.write()
        assert self.open(tmp_path / "m").marked() == [1, 2]

    def test_a_mark_that_was_taken_off_is_durable_again_before_the_next_write(
        self, tmp_path: Path
    ) -> None:
        marks = self.open(tmp_path / "m")
        marks.enter(0, 512)
        marks.leave(0, 512)
        marks.quiet()
        assert marks.clear(marks.quiet()) == 1
        marks.enter(0, 512)
        assert self.open(tmp_path / "m").marked() == [0]

    def test_many_threads_mark_at_once(self, tmp_path: Path) -> None:
        marks = self.open(tmp_path / "m", size=1 << 30)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: marks.enter(n * REGION, REGION), range(256)))
        assert self.open(tmp_path / "m", size=1 << 30).marked() == list(range(256))

    def test_what_marks_are_for_does_not_change_while_there_are_any(self, tmp_path: Path) -> None:
        self.open(tmp_path / "m").close()
        self.open(tmp_path / "m", "write-through").close()
        marks = self.open(tmp_path / "m")
        assert marks.purpose == "write-back"
        marks.enter(0, 512)
        marks.leave(0, 512)
        found = self.open(tmp_path / "m", "write-through")
        assert (found.purpose, found.marked()) == ("write-back", [0])
        assert found.clear(found.quiet()) == 1
        found.use_for("write-through")
        found.enter(0, 512)
        assert self.open(tmp_path / "m").purpose == "write-through"

    @pytest.mark.parametrize(
        ("damage", "why"),
        [
            (lambda data: b"x" + data[1:], "does not begin as"),
            (lambda data: data[:4096], "too short"),
            (lambda data: data[:20] + b"\7" + data[21:], "does not begin as"),
        ],
    )
    def test_a_damaged_file_is_refused(
        self, tmp_path: Path, damage: Callable[[bytes], bytes], why: str
    ) -> None:
        path = tmp_path / "m"
        self.open(path).close()
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(ValueError, match=f"m is damaged.*{why}"):
            self.open(path)

    def test_the_file_of_another_disk_is_refused(self, tmp_path: Path) -> None:
        self.open(tmp_path / "m", size=SIZE - REGION).close()
        with pytest.raises(ValueError, match="of another disk"):
            self.open(tmp_path / "m")


class TestDirtyBlocks:
    def test_runs_are_joined_and_cut(self) -> None:
        dirty = DirtyBlocks(BLOCK, REGION)
        dirty.add(14 * BLOCK, 5 * BLOCK)  # over the end of a region
        dirty.add(512, 512)
        assert dirty.runs(8 * BLOCK) == [(0, BLOCK), (14 * BLOCK, 5 * BLOCK)]
        assert dirty.runs(3 * BLOCK) == [
            (0, BLOCK),
            (14 * BLOCK, 2 * BLOCK),
            (16 * BLOCK, 3 * BLOCK),
        ]
        assert dirty.bytes() == 6 * BLOCK

    def test_what_is_on_its_way_is_not_clean(self) -> None:
        dirty = DirtyBlocks(BLOCK, REGION)
        dirty.add(BLOCK, BLOCK)
        dirty.begin(0, REGION)
        assert (dirty.bytes(), dirty.runs(REGION)) == (0, [])
        assert dirty.clean(0, 3 * BLOCK) == [(0, BLOCK), (2 * BLOCK, BLOCK)]
        assert dirty.regions() == {0}
        dirty.end(below=False)
        assert dirty.bytes() == BLOCK
        dirty.begin(0, REGION)
        dirty.add(BLOCK, 512)  # written again meanwhile
        dirty.end(below=True)
        assert dirty.runs(REGION) == [(BLOCK, BLOCK)]

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.tuples(st.sampled_from("abe"), st.integers(0, 60), st.integers(1, 30))))
    def test_as_sets_of_blocks(self, steps: list[tuple[str, int, int]]) -> None:
        dirty = DirtyBlocks(BLOCK, REGION)
        model: set[int] = set()
        moving: set[int] = set()
        for what, first, count in steps:
            blocks = set(range(first, first + count))
            if what == "a":
                dirty.add(first * BLOCK, count * BLOCK)
                model |= blocks
            elif what == "b":
                dirty.begin(first * BLOCK, count * BLOCK)
                moving |= model & blocks
                model -= blocks
            else:
                dirty.end(below=count % 2 == 0)
                model |= set() if count % 2 == 0 else moving
                moving = set()
            assert dirty.bytes() == len(model) * BLOCK
            found = {at for run in dirty.runs(REGION) for at in self.blocks(run)}
            assert found == model
            clean = {at for run in dirty.clean(0, 100 * BLOCK) for at in self.blocks(run)}
            assert clean == set(range(100)) - model - moving

    @staticmethod
    def blocks(run: tuple[int, int]) -> range:
        return range(run[0] // BLOCK, sum(run) // BLOCK)


class TestReadAhead:
    def test_who_jumps_is_not_fetched_ahead_for(self) -> None:
        ahead = ReadAhead(64, 1000)
        assert not any(ahead.asked(block, 1) for block in (5, 900, 30, 7, 100, 60, 8 + NEAR))

    def test_requests_that_come_at_once_are_of_one_reader(self) -> None:
        ahead = ReadAhead(64, 1000)
        found = [ahead.asked(first, 2) for first in (4, 0, 2, 8, 6, 10, 12)]
        assert [run for run in found if run] == [range(12, 16), range(16, 24)]

    def test_windows_grow_and_join(self) -> None:
        ahead = ReadAhead(16, 1000)
        assert not ahead.asked(0, 1)
        assert ahead.asked(1, 1) == range(2, 2 + FIRST_WINDOW)
        assert ahead.asked(2, 1) == range(6, 14)
        assert ahead.asked(6, 1) == range(14, 30)
        assert ahead.asked(14, 1) == range(30, 46), "and do not grow beyond the most"

    def test_it_ends_with_the_disk(self) -> None:
        ahead = ReadAhead(16, 10)
        ahead.asked(6, 1)
        assert ahead.asked(7, 1) == range(8, 10)
        assert not ahead.asked(8, 1)

    def test_readers_are_told_apart(self) -> None:
        ahead = ReadAhead(64, 10000)
        for reader in range(READERS):
            ahead.asked(reader * 100, 1)
        assert all(ahead.asked(reader * 100 + 1, 1) for reader in range(READERS))

    def test_none(self) -> None:
        ahead = ReadAhead(0, 100)
        assert not any(ahead.asked(block, 1) for block in range(10))


class TestBootTrace:
    @staticmethod
    def trace(path: Path, size: int = SIZE) -> BootTrace:
        return BootTrace(path, size=size, block_size=BLOCK)

    def test_order_is_kept_and_neighbours_are_joined(self, tmp_path: Path) -> None:
        trace = self.trace(tmp_path / "b")
        assert trace.read() is None
        for first, count in [(9, 1), (10, 2), (3, 1), (12, 1)]:
            trace.missed(first, count)
        trace.save()
        assert self.trace(tmp_path / "b").read() == [(9, 3), (3, 1), (12, 1)]
        trace.missed(13, 1)
        trace.save()
        assert self.trace(tmp_path / "b").read() == [(9, 3), (3, 1), (12, 1), (13, 1)]

    @pytest.mark.parametrize("text", ["", "x", "{title}\n1", "{title}\n1 2 3", "{title}\n127 2"])
    def test_what_is_no_trace_is_told_and_not_used(
        self, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "b"
        self.trace(path).save()
        path.write_text(text.format(title=f"pyublk boot 1 size={SIZE} block_size={BLOCK}"))
        assert self.trace(path).read() is None
        assert f"{path} cannot be used" in caplog.text

    def test_one_of_another_disk_is_not_used(self, tmp_path: Path) -> None:
        trace = self.trace(tmp_path / "b")
        trace.missed(0, 1)
        trace.save()
        assert self.trace(tmp_path / "b", size=2 * SIZE).read() is None


class Kept:
    """Blocks of a megabyte that are there, used, dirty."""

    def __init__(self, *there: int) -> None:
        self.there = set(there)
        self.used: set[int] = set()
        self.dirty: set[int] = set()

    def present(self, offset: int, length: int) -> Any:
        for piece in sorted(self.there):
            start, end = max(offset, piece * PIECE), min(offset + length, (piece + 1) * PIECE)
            if start < end:
                yield start, end - start

    def was_used(self, offset: int, length: int) -> bool:
        piece = offset // PIECE
        used = piece in self.used
        self.used.discard(piece)
        return used

    def clean(self, offset: int, length: int) -> list[tuple[int, int]]:
        return [] if offset // PIECE in self.dirty else [(offset, length)]


class TestClock:
    def test_what_was_used_is_spared_once(self) -> None:
        clock, kept = Clock(8 * PIECE), Kept(0, 1, 2, 3)
        kept.used = {0, 2}
        assert clock.choose(PIECE, kept) == [(PIECE, PIECE)]
        kept.there.discard(1)
        assert clock.choose(PIECE, kept) == [(3 * PIECE, PIECE)]
        kept.there.discard(3)
        assert clock.choose(PIECE, kept) == [(0, PIECE)], "it was not used again"

    def test_dirty_blocks_stay(self) -> None:
        clock, kept = Clock(8 * PIECE), Kept(0, 1)
        kept.dirty = {0, 1}
        assert clock.choose(PIECE, kept) == []
        kept.dirty = {0}
        assert clock.choose(4 * PIECE, kept)[0] == (PIECE, PIECE)
        assert every(8 * PIECE, kept) == [(PIECE, PIECE)]

    def test_what_was_just_fetched_counts_as_used(self) -> None:
        clock, kept = Clock(8 * PIECE), Kept(0, 1)
        clock.fetched(512, 512)
        assert clock.choose(PIECE, kept) == [(PIECE, PIECE)]

    def test_all_in_use_is_no_reason_to_find_none(self) -> None:
        clock, kept = Clock(8 * PIECE), Kept(*range(8))
        kept.used = set(range(8))
        assert sum(length for _, length in clock.choose(2 * PIECE, kept)) == 2 * PIECE


class TestRoom:
    def test_who_brings_too_much_waits_for_an_eviction(self) -> None:
        kept = [90]
        room = Room(100, lambda: kept[0], lambda: False)
        with room.coming(20, 0.0) as fits:
            assert not fits
        inside = threading.Event()

        def bring() -> None:
            with room.coming(20, TIMEOUT) as fits:
                assert fits
                inside.set()

        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(bring)
            assert room.short.wait(TIMEOUT)
            with room.leaving(40):
                kept[0] = 50
            done.result(TIMEOUT)
        assert inside.is_set()

    def test_what_comes_counts(self) -> None:
        room = Room(100, lambda: 0, lambda: False)
        with room.coming(60, 0.0) as first, room.coming(60, 0.0) as second:
            assert (first, second) == (True, False)
        with room.coming(100, 0.0) as fits:
            assert fits

    def test_nobody_waits_for_ever_without_hope(self) -> None:
        room = Room(100, lambda: 100, lambda: True)
        with room.coming(1, 0.01) as fits:
            assert not fits


class TestCrew:
    def test_demands_go_first_and_have_a_thread_left(self) -> None:
        crew = Crew(4, "test")
        gate, demanded = threading.Event(), threading.Event()
        for _ in range(10):
            crew.submit(Urgency.WARM, lambda: gate.wait(TIMEOUT))
        crew.submit(Urgency.DEMAND, demanded.set)
        assert demanded.wait(TIMEOUT)
        gate.set()
        assert crew.close(TIMEOUT)

    def test_a_job_that_raises_ends_no_thread(self, caplog: pytest.LogCaptureFixture) -> None:
        crew = Crew(1, "test")
        done = threading.Event()
        crew.submit(Urgency.DRAIN, lambda: 1 // 0)
        crew.submit(Urgency.DRAIN, done.set)
        assert done.wait(TIMEOUT)
        assert crew.close(TIMEOUT)
        assert "ZeroDivisionError" in caplog.text


def test_those_who_overlap_come_in_turn() -> None:
    order = Order()
    began = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        with order.alone(0, 100):
            with order.alone(100, 100):

                def second() -> None:
                    began.set()
                    with order.alone(99, 1):
                        pass

                waits = pool.submit(second)
                assert began.wait(TIMEOUT)
            assert not waits.done()
        waits.result(TIMEOUT)


class Memory(pyublk.Target):
    """A plain target that may fail to open, and says how often it was opened."""

    concurrency = "parallel"

    def __init__(self, *, failures: int = 0) -> None:
        super().__init__(size=SIZE)
        self.data = bytearray(SIZE)
        self.failures = failures
        self.opened = 0

    def open(self) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.ENETUNREACH, "no network")
        self.opened += 1

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview) -> None:
        self.data[offset : offset + len(data)] = data


class Coroutines(pyublk.Target):
    def __init__(self) -> None:
        super().__init__(size=SIZE)
        self.data = bytearray(SIZE)

    async def open(self) -> None:  # type: ignore[override]
        self.loop = asyncio.get_running_loop()

    async def close(self) -> None:  # type: ignore[override]
        assert asyncio.get_running_loop() is self.loop

    async def read(self, offset: int, buffer: memoryview) -> None:
        await asyncio.sleep(0)
        buffer[:] = self.data[offset : offset + len(buffer)]

    async def write(self, offset: int, data: memoryview) -> None:
        await asyncio.sleep(0)
        self.data[offset : offset + len(data)] = data


def source(target: pyublk.Target, patience: float = 0.0) -> Source:
    return Source(target, check=lambda _: None, patience=patience)


class TestSource:
    @pytest.mark.parametrize("kind", ["plain", "async", "file", "ram", "null"])
    def test_every_kind_is_called_from_any_thread(self, kind: str, tmp_path: Path) -> None:
        target = {
            "plain": Memory,
            "async": Coroutines,
            "file": lambda: File(tmp_path / "file", size=SIZE),
            "ram": lambda: Ram(size=SIZE),
            "null": lambda: Null(size=SIZE),
        }[kind]()
        below = source(target)
        below.open()

        def work(number: int) -> bytes:
            below.write(number * 4096, memoryview(bytes([number + 1]) * 4096))
            buffer = bytearray(4096)
            below.read(number * 4096, memoryview(buffer))
            return bytes(buffer)

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(work, range(16)))
        if kind != "null":
            assert found == [bytes([number + 1]) * 4096 for number in range(16)]
        below.write_zeroes(0, 8192)
        below.flush()
        if kind != "null":
            buffer = bytearray(b"x" * 4096)
            below.read(4096, memoryview(buffer))
            assert buffer == bytes(4096)
        below.close()

    def test_it_is_opened_when_it_is_needed_and_once(self) -> None:
        target = Memory()
        below = source(target)
        below.open()
        assert not target.opened
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: below.read(0, memoryview(bytearray(512))), range(8)))
        assert target.opened == 1
        below.close()

    def test_a_call_waits_for_it_to_be_there(self) -> None:
        below = source(Memory(failures=2), patience=TIMEOUT)
        below.open()
        below.read(0, memoryview(bytearray(512)))
        assert below.trouble() is None
        below.close()

    def test_a_call_fails_when_it_is_not_there_for_too_long(self) -> None:
        below = source(Memory(failures=100))
        below.open()
        with pytest.raises(OSError, match="no network") as caught:
            below.read(0, memoryview(bytearray(512)))
        assert caught.value.errno == errno.ENETUNREACH
        assert below.trouble() is not None
        below.close()

    def test_one_that_is_refused_is_refused_for_good(self) -> None:
        def check(_: pyublk.Target) -> None:
            raise Changed("it is another one")

        target = Memory()
        below = Source(target, check=check, patience=0.0)
        below.open()
        for _ in range(2):
            with pytest.raises(OSError, match="it is another one") as caught:
                below.read(0, memoryview(bytearray(512)))
            assert caught.value.errno == errno.EIO
        assert target.opened == 1
        below.close()

    @pytest.mark.parametrize("returned", [17, b""])
    def test_a_method_that_returns_something_has_not_done_it(self, returned: object) -> None:
        target = Memory()
        target.read = lambda offset, buffer: returned  # type: ignore[method-assign]
        below = source(target)
        below.open()
        with pytest.raises(OSError, match="must do the whole request") as caught:
            below.read(0, memoryview(bytearray(512)))
        assert caught.value.errno == errno.EIO
        below.close()

    def test_what_is_raised_is_an_errno(self) -> None:
        target = Memory()

        def read(offset: int, buffer: memoryview) -> None:
            raise KeyError("planted")

        target.read = read  # type: ignore[method-assign]
        below = source(target)
        below.open()
        with pytest.raises(OSError, match="planted") as caught:
            below.read(0, memoryview(bytearray(512)))
        assert caught.value.errno == errno.EIO
        below.close()


class Drained:
    """Counts what is drained; fails as often as it is told."""

    def __init__(self, dirty: DirtyBlocks) -> None:
        self.dirty = dirty
        self.passed: list[tuple[int, int]] = []
        self.failures = 0
        self.flushes = 0
        self.settled_once = threading.Event()

    def take(self, offset: int, length: int) -> bool:
        self.dirty.begin(offset, length)
        return True

    def pass_on(self, offset: int, length: int) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EIO, "planted")
        self.passed.append((offset, length))

    def flush_below(self) -> None:
        self.flushes += 1

    def settled(self) -> None:
        self.settled_once.set()

    def tidy(self) -> None:
        pass


class TestDrainer:
    def test_a_failure_is_told_and_nothing_is_lost(self) -> None:
        crew, dirty = Crew(2, "test"), DirtyBlocks(BLOCK, REGION)
        disk = Drained(dirty)
        drainer = Drainer(disk, dirty, crew, period=3600)
        dirty.add(0, BLOCK)
        dirty.add(REGION, BLOCK)
        disk.failures = 2
        with pytest.raises(OSError, match="planted"):
            drainer.drain()
        assert dirty.bytes() == 2 * BLOCK
        assert str(drainer.trouble) == "[Errno 5] planted"
        disk.failures = 0
        drainer.drain()
        assert (dirty.bytes(), drainer.trouble, disk.flushes) == (0, None, 1)
        assert {(0, BLOCK), (REGION, BLOCK)} <= set(disk.passed)
        crew.close(TIMEOUT)

    def test_it_drains_in_the_background_and_at_once_when_it_is_to_hurry(self) -> None:
        crew, dirty = Crew(2, "test"), DirtyBlocks(BLOCK, REGION)
        disk = Drained(dirty)
        drainer = Drainer(disk, dirty, crew, period=3600)
        drainer.start()
        dirty.add(0, BLOCK)
        drainer.hurry.set()
        assert disk.settled_once.wait(TIMEOUT)
        assert drainer.end(TIMEOUT)
        crew.close(TIMEOUT)


def test_what_is_noted_of_a_source() -> None:
    target = Memory()
    known = described(target)
    assert known["size"] == SIZE
    assert known["identity"] is None
    assert difference(known, known) is None
    pairs: list[tuple[dict[str, Any], str]] = [
        ({"size": 512}, "it has 512 bytes, not 8388608"),
        ({"block_size": 4096}, "its blocks have 4096 bytes, not 512"),
        ({"read_only": True}, "it is read-only now"),
    ]
    for change, why in pairs:
        assert difference(known, {**known, **change}) == why
    assert difference({**known, "identity": "a"}, {**known, "identity": "b"}) == (
        "its bytes are others (its identity is b, not a)"
    )
    assert difference({**known, "identity": "a"}, known) is None
