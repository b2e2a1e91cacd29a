"""Power cuts without a kernel: the states are those of the model, all of them, and no others."""

import asyncio
import errno
import itertools
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pyublk
from pyublk.targets import File, Mirror, Null, Ram, Stripe
from pyublk.testing import CheckFailed, Crash, Disk, PowerCut, PowerCutFailed, Shadow
from pyublk.testing.file_systems import run
from pyublk.testing.power_cuts.filesystems import file_system_of

BLOCK = 512
SIZE = 16 * BLOCK
#: Bounds a wait of a thread in seconds.
SOON = 30


def block(letter: str, count: int = 1) -> bytes:
    return letter.encode() * (BLOCK * count)


def image(crash: Crash) -> bytes:
    with crash.disk() as disk:
        return disk.pread(disk.size, 0)


def letters(crash: Crash) -> str:
    """The first byte of each block; a dot for zeroes."""
    return "".join(chr(byte) if byte else "." for byte in image(crash)[::BLOCK])


# ---- what there is, counted by hand ----


def test_the_states_of_a_known_workload() -> None:
    cut = PowerCut(4 * BLOCK)
    with Disk(cut) as disk:
        disk.pwrite(block("a"), 0)
        disk.pwrite(block("b", 2), BLOCK)
        disk.flush()
        cut.mark("flushed")
        disk.pwrite(block("A"), 0)
        disk.pwrite(block("d"), 3 * BLOCK, fua=True)
    before = [letters(one) for one in cut.crashes() if not one.reached("flushed")]
    after = [letters(one) for one in cut.crashes() if one.reached("flushed")]
    # Before the flush each of three blocks is old or new: 2 ** 3.
    blocks = itertools.product(".a", ".b", ".b", ".")
    assert sorted(before) == sorted(map("".join, blocks))
    # After it "abb" is there. The FUA write was in flight, or is there; it orders nothing else.
    assert sorted(after) == ["Abb.", "Abbd", "abb.", "abbd"]


def test_those_that_tell_most_come_first() -> None:
    cut = PowerCut(8 * BLOCK)
    with Disk(cut) as disk:
        disk.pwrite(block("a"), 0)
        disk.pwrite(block("b"), BLOCK)
        disk.pwrite(block("c", 4), 2 * BLOCK)
    assert [letters(crash).rstrip(".") for crash in cut.crashes(limit=64)][:20] == [
        "",  # all lost
        "abcccc",  # all kept
        *("a", "ab"),  # prefixes
        *(".bcccc", "a.cccc"),  # each lost: the third is "ab" again
        *(".b", "..cccc"),  # each kept: the first is "a" again
        # The last torn behind the first, in the middle, before the last: without its end, without
        # its begin.
        *("abc", "ab.ccc", "abcc", "ab..cc", "abccc", "ab...c"),
        # All others, in their order.
        *(".....c", "....c", "....cc", "...c", "...c.c", "...cc"),
    ]


def test_all_of_few_and_random_ones_of_many() -> None:
    cut = PowerCut(64 * BLOCK)
    with Disk(cut) as disk:
        for number in range(6):
            disk.pwrite(block("x"), number * BLOCK)
        assert len({letters(crash) for crash in cut.crashes(limit=64)}) == 64
        assert len(list(cut.crashes(limit=1000))) == 64
        for number in range(6, 40):
            disk.pwrite(block("x"), number * BLOCK)
    some, again, others = (
        [crash.id for crash in cut.crashes(limit=400, seed=seed)] for seed in (1, 1, 2)
    )
    assert some == again
    assert some != others
    assert len({letters(cut.crash(name)) for name in some}) == 400


# ---- what the model allows ----

Step = tuple[str, int, int, int]


class Model:
    """Another one, without any cleverness: at each time, the contents that each block may have."""

    def __init__(self, blocks: int) -> None:
        self.events: list[list[set[bytes]]] = []
        self.writes: list[dict[str, Any]] = []
        self.blocks = blocks
        self.tick()

    def tick(self) -> None:
        """The contents that each block may have now."""
        found = []
        for number in range(self.blocks):
            stable, newer = bytes(BLOCK), []
            for write in self.writes:
                if not write["first"] <= number < write["end"]:
                    continue
                if write["stable"]:
                    stable, newer = write["data"], []
                else:
                    newer.append(write["data"])
            found.append({stable, *newer})
        self.events.append(found)


def run_steps(cut: PowerCut, model: Model, steps: list[Step]) -> set[int]:
    """Begins and ends requests in any order, as threads would; returns when cuts are made."""
    record = cut._record
    running: list[tuple[dict[str, Any], Any, list[dict[str, Any]]]] = []
    points: set[int] = set()
    for number, (what, first, count, which) in enumerate(steps):
        end = min(first + count, model.blocks)
        if what == "end" or any(
            request.get("end", 0) > first and request.get("first", 0) < end
            for request, _, _ in running
        ):
            if not running:
                continue
            request, context, covered = running.pop(which % len(running))
            context.__exit__(None, None, None)
            request["done"] = True
            if request["kind"] == "fua":
                request["stable"] = True
            for write in covered:
                write["stable"] = True
            model.tick()
            if request["kind"] in ("fua", "flush"):
                points |= {record.now - 1, record.now, record.now + 1}
        elif what == "flush":
            covered = [write for write in model.writes if write["done"]]
            running.append(({"kind": "flush"}, record.flushing(), covered))
            running[-1][1].__enter__()
            model.tick()
        else:
            letter = bytes([number + 1]) * BLOCK if what in ("write", "fua") else bytes(BLOCK)
            request = {"kind": what, "first": first, "end": end, "data": letter}
            request |= {"done": False, "stable": False}
            data = None if what == "discard" else letter * (end - first)
            kind = "discard" if what == "discard" else "write"
            length = (end - first) * BLOCK
            context = record.writing(kind, first * BLOCK, length, data, fua=what == "fua")  # type: ignore[arg-type]
            running.append((request, context, []))
            context.__enter__()
            model.writes.append(request)
            model.tick()
    for _, context, _ in running:  # which never end before the cut
        contexts.append(context)
    return {time for time in points if time <= record.now} | {record.now}


#: Requests that stay in flight: kept, so that nothing ends them.
contexts: list[Any] = []

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "fua", "discard", "flush", "end", "end"]),
        st.integers(0, 3),
        st.integers(1, 3),
        st.integers(0, 5),
    ),
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, start=st.integers(0, 8))
@example(
    steps=[("write", 0, 1, 0), ("flush", 0, 0, 0), ("end", 0, 0, 1), ("end", 0, 0, 0)], start=0
)
def test_the_states_are_those_of_an_independent_model(steps: list[Step], start: int) -> None:
    cut, model = PowerCut(4 * BLOCK), Model(4)
    cut.open()
    times = run_steps(cut, model, steps)
    cut._windows = [(start, None)]  # as `cut.record()` would have it from then on
    times = {time for time in times if time >= start} | {max(times)}
    expected = {b"".join(one) for time in times for one in itertools.product(*model.events[time])}
    found = [image(crash) for crash in cut.crashes(limit=10_000)]
    assert len(found) == len(set(found))
    assert set(found) == expected
    cut.close()


@settings(max_examples=50, deadline=None)
@given(
    writes=st.lists(st.tuples(st.integers(0, 15), st.integers(1, 8), st.booleans()), max_size=40),
    seed=st.integers(0, 9),
)
def test_some_states_of_many_are_allowed_and_have_names(
    writes: list[tuple[int, int, bool]], seed: int
) -> None:
    cut = PowerCut(SIZE)
    shadow: list[set[bytes]] = [{bytes(BLOCK)} for _ in range(16)]
    with Disk(cut) as disk:
        for number, (first, count, flush) in enumerate(writes):
            count = min(count, 16 - first)
            data = bytes([number + 1]) * BLOCK
            disk.pwrite(data * count, first * BLOCK)
            for at in range(first, first + count):
                shadow[at].add(data)
            if flush:
                disk.flush()
    for crash in cut.crashes(limit=60, seed=seed):
        left = image(crash)
        for at in range(16):
            assert left[at * BLOCK : (at + 1) * BLOCK] in shadow[at]
        assert image(cut.crash(crash.id)) == left


# ---- several requests in flight ----


class Slow(pyublk.Target):
    """Whose writes of "s" wait until they are let through."""

    concurrency = "parallel"

    def __init__(self) -> None:
        super().__init__(size=SIZE)
        self.data = bytearray(SIZE)
        self.begun, self.go = threading.Event(), threading.Event()

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview) -> None:
        if data[0] == ord("s"):
            self.begun.set()
            assert self.go.wait(SOON)
        self.data[offset : offset + len(data)] = data


@pytest.fixture
def slow_write() -> Iterator[tuple[PowerCut, Slow, threading.Thread]]:
    target = Slow()
    cut = PowerCut(target)
    cut.open()
    thread = threading.Thread(target=cut.write, args=(0, memoryview(block("s"))))
    thread.start()
    assert target.begun.wait(SOON)
    yield cut, target, thread
    target.go.set()
    thread.join(SOON)
    cut.close()


def test_a_flush_covers_what_was_completed_when_it_arrived(
    slow_write: tuple[PowerCut, Slow, threading.Thread],
) -> None:
    cut, target, thread = slow_write
    cut.write(BLOCK, memoryview(block("b")))
    cut.flush()
    cut.mark("flushed")
    target.go.set()
    thread.join(SOON)
    assert cut.volatile().ranges == ((0, BLOCK),)
    assert letters(cut.cut()).rstrip(".") == ".b"
    assert {letters(one).rstrip(".") for one in cut.crashes() if one.marks} == {".b", "sb"}


def test_overlapping_requests_wait_for_each_other(
    slow_write: tuple[PowerCut, Slow, threading.Thread],
) -> None:
    cut, target, thread = slow_write
    second = threading.Thread(target=cut.write, args=(0, memoryview(block("2"))))
    second.start()
    cut.write(BLOCK, memoryview(block("b")))  # one beside it does not
    assert [str(write) for write in cut.volatile().writes] == [
        "write 1, 512 bytes at 0x0",
        "write 2, 512 bytes at 0x200",
    ]
    target.go.set()
    for one in (thread, second):
        one.join(SOON)
    assert bytes(target.data[:BLOCK]) == block("2") == image(cut.crash(f"{cut._record.now}-"))[:512]


def test_many_threads() -> None:
    cut = PowerCut(Ram(size=1 << 20))
    cut.open()

    def work(mine: int) -> None:
        for number in range(50):
            data = bytes([mine + 1, number]) * 256
            cut.write((mine * 50 + number) * BLOCK, memoryview(data))
            if number % 10 == 9:
                cut.flush()
                cut.mark(f"{mine} {number}")

    threads = [threading.Thread(target=work, args=(mine,)) for mine in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    for crash in cut.crashes(limit=100):
        left = image(crash)
        for mark in crash.marks:
            mine, last = map(int, mark.split())
            for number in range(last + 1):
                at = (mine * 50 + number) * BLOCK
                assert left[at : at + 2] == bytes([mine + 1, number]), crash.explain()
    cut.close()


# ---- over targets, and as one ----


class Coroutines(pyublk.Target):
    """Which opens and closes on the loop that its requests run on."""

    def __init__(self) -> None:
        super().__init__(size=SIZE)
        self.data = bytearray(SIZE)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.go = asyncio.Event()

    async def open(self) -> None:
        self.loop = asyncio.get_running_loop()

    async def close(self) -> None:
        assert self.loop is asyncio.get_running_loop()

    async def read(self, offset: int, buffer: memoryview) -> None:
        await asyncio.sleep(0)
        buffer[:] = self.data[offset : offset + len(buffer)]

    async def write(self, offset: int, data: memoryview) -> None:
        assert self.loop is asyncio.get_running_loop()
        if data[0] == ord("s"):
            await self.go.wait()
        self.data[offset : offset + len(data)] = data


def test_coroutines_are_recorded_while_they_wait() -> None:
    target = Coroutines()
    cut = PowerCut(target)
    assert cut.concurrency == "parallel"
    cut.open()
    thread = threading.Thread(target=cut.write, args=(0, memoryview(block("s"))))
    thread.start()
    while not cut.volatile():
        thread.join(0.01)
    cut.write(BLOCK, memoryview(block("b")))
    cut.flush()
    cut.mark("flushed")
    assert target.loop is not None
    target.loop.call_soon_threadsafe(target.go.set)
    thread.join(SOON)
    assert {letters(one).rstrip(".") for one in cut.crashes() if one.marks} == {".b", "sb"}
    cut.close()


@pytest.mark.parametrize("kind", ["ram", "file", "mirror", "stripe", "plain", "coroutines"])
def test_over_targets(kind: str, tmp_path: Path) -> None:
    files = [tmp_path / "one", tmp_path / "two"]
    for path in files:
        path.write_bytes(block("o", 64))
    below: dict[str, Callable[[], pyublk.Target]] = {
        "ram": lambda: Ram(size=SIZE),
        "file": lambda: File(files[0]),
        "mirror": lambda: Mirror(*files),
        "stripe": lambda: Stripe(*files, chunk=4096),
        "plain": Slow,
        "coroutines": Coroutines,
    }
    cut = PowerCut(below[kind]())
    with Disk(cut) as disk:
        old = disk.pread(BLOCK, 0)
        assert disk.params.basic.volatile_cache
        assert disk.params.basic.fua
        shadow = Shadow(disk)
        shadow.write(BLOCK, bytes(range(256)) * 8)
        shadow.write(0, block("f"), fua=True)
        shadow.write(3 * BLOCK, block("w"))
        shadow.read(0, 4 * BLOCK)
    # Closed, and opened again for what is left of it.
    assert {image(crash)[:BLOCK] for crash in cut.crashes()} == {old, block("f")}
    with Disk(cut) as disk:
        assert disk.pread(BLOCK, 3 * BLOCK) == block("w")


def test_a_crash_is_a_disk_of_its_own() -> None:
    cut = PowerCut(1 << 20)
    with Disk(cut) as disk:
        disk.pwrite(b"x" * 8192, 4096)
        crash = cut.crash(f"{cut._record.now}-")
        with crash.disk() as one, crash.disk() as other:
            shadow = Shadow(one)
            shadow.write(4096, b"y" * 512)
            shadow.write_zeroes(8192, 4096)
            shadow.write(4608, b"x" * 3584)
            shadow.write(1 << 19, b"z" * 4096)
            shadow.check()
            assert other.pread(8192, 4096) == disk.pread(8192, 4096) == b"x" * 8192
        disk.pwrite(b"later".ljust(512), 4096)
        assert image(crash)[4096:12288] == b"x" * 8192


def test_what_cannot_be_recorded_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4096))

    with (
        pytest.raises(pyublk.InvalidTarget, match="read-only"),
        Disk(PowerCut(File(tmp_path / "file", read_only=True))),
    ):
        pass
    with pytest.raises(ValueError, match="atomic must be a power of two"):
        PowerCut(4096, atomic=1536)
    with pytest.raises(ValueError, match="block_size must be at least 4096"):
        PowerCut(Ram(size=8192, block_size=4096), block_size=512)
    cut = PowerCut(4096)
    with pytest.raises(ValueError, match="nothing is recorded yet"):
        cut.mark("early")
    with Disk(cut) as disk:
        with pytest.raises(ValueError, match="nothing was written"):
            cut.check(lambda crash: None)
        with pytest.raises(ValueError, match="limit must be at least 1"):
            next(cut.crashes(limit=0))
        with pytest.raises(ValueError, match="name must be a text"):
            cut.mark("")
        with pytest.raises(ValueError, match="cannot be changed"):
            disk.resize(8192)
        disk.pwrite(block("x"), 0)
        disk.flush()
        with pytest.raises(ValueError, match="request 1 is durable"):
            cut.cut(keep=[1])
        for name, reason in {
            "nonsense": "is not the id of a crash",
            "99-": "has 4 events",
            "4-7": "no such write",
            "4-!1": "leaves garbage",
        }.items():
            with pytest.raises(ValueError, match=reason):
                cut.crash(name)


# ---- options of the model ----


def test_larger_units_are_whole_and_have_what_came_first() -> None:
    cut = PowerCut(8 * BLOCK, atomic=4 * BLOCK)
    with Disk(cut) as disk:
        disk.pwrite(block("a"), 0)
        disk.pwrite(block("b", 2), 3 * BLOCK)
    assert {letters(crash) for crash in cut.crashes()} == {
        *("........", "a.......", "a..b....", "a..bb...", "....b...", "a...b..."),
    }
    assert cut.profile().block_size == BLOCK


def test_blocks_of_4096_bytes() -> None:
    cut = PowerCut(1 << 16, block_size=4096)
    with Disk(cut) as disk:
        assert disk.block_size == 4096
        disk.pwrite(bytes(range(1, 33)) * 256, 4096)
    assert len(list(cut.crashes())) == 4


def test_garbage_is_neither_old_nor_new() -> None:
    cut = PowerCut(2 * BLOCK, garbage=True)
    with Disk(cut) as disk:
        disk.pwrite(block("o", 2), 0)
        disk.flush()
        cut.mark("old")
        disk.pwrite(block("n"), 0)
    states = [crash for crash in cut.crashes() if crash.marks]
    firsts = [image(crash)[:BLOCK] for crash in states]
    assert len(firsts) == 3
    assert {block("o"), block("n")} < set(firsts)
    assert all(image(crash)[BLOCK:] == block("o") for crash in states)
    garbled = next(crash for crash in states if "!" in crash.id)
    assert "garbage: 512 bytes at 0x0" in garbled.explain()
    assert image(cut.crash(garbled.id)) == image(garbled)


def test_zeroes_where_zeroes_were_are_no_change() -> None:
    cut = PowerCut(64 << 20)
    with Disk(cut) as disk:
        disk.pwrite(block("x"), BLOCK)
        disk.discard(0, disk.size)
        assert cut.volatile().ranges == ((BLOCK, BLOCK),)
        disk.flush()
        disk.pwrite(block("y"), BLOCK)
        disk.write_zeroes(0, 1 << 20)
    assert len({image(crash)[BLOCK] for crash in cut.crashes()}) == 3


def test_cuts_only_while_recording() -> None:
    cut = PowerCut(SIZE)
    with Disk(cut) as disk:
        disk.pwrite(block("a"), 0)
        disk.flush()
        disk.pwrite(block("b"), BLOCK)
        with cut.record():
            disk.pwrite(block("c"), 2 * BLOCK)
        disk.pwrite(block("d"), 3 * BLOCK)
        disk.flush()
    assert {letters(crash).rstrip(".") for crash in cut.crashes()} == {"a", "ab", "a.c", "abc"}


# ---- errors of a flush ----


@pytest.mark.parametrize("forget", [True, False])
def test_a_flush_that_fails_once(forget: bool) -> None:
    cut = PowerCut(SIZE)
    with Disk(cut) as disk:
        disk.pwrite(block("a"), 0)
        cut.fail_flush_once(forget=forget)
        with pytest.raises(OSError, match="FLUSH") as failed:
            disk.flush()
        assert failed.value.errno == errno.EIO
        disk.pwrite(block("b"), BLOCK)
        disk.flush()  # by whom the error is taken for a passing one
        cut.mark("committed")
        lost = ".b" if forget else "ab"
        assert letters(cut.cut()).rstrip(".") == lost
        assert bool(cut.volatile()) == forget
        disk.pwrite(block("a"), 0)  # written again, as it must be
        disk.flush()
        assert letters(cut.cut()).rstrip(".") == "ab"
    with pytest.raises(ValueError, match="errno"):
        cut.fail_flush_once(0)


# ---- in words ----


def test_explanations() -> None:
    cut = PowerCut(1 << 20)
    with Disk(cut) as disk:
        disk.pwrite(bytes([1]) * 4096, 0x1C000)
        disk.pwrite(bytes([2]) * 8192, 0x4000)
        disk.pwrite(bytes([3]) * 1536, 0)
        assert str(cut.volatile()) == (
            "not durable: write 1, 4 KiB at 0x1c000; write 2, 8 KiB at 0x4000; "
            "write 3, 1536 bytes at 0x0"
        )
        now = cut._record.now
        assert cut.crash(f"{now}-1,2/0..1.9").explain() == (
            "power cut 6-1,2/0..1.9, before any mark\n"
            "lost: write 1, 4 KiB at 0x1c000\n"
            "torn: write 2, 8 KiB at 0x4000: without 1 KiB at 0x4000, 512 bytes at 0x5200\n"
            "kept: 1 other requests that were not flushed"
        )
        disk.flush()
        cut.mark("committed 17")
        assert str(cut.volatile()) == "everything is durable"
        assert cut.cut().explain() == (
            f"power cut {now + 3}-, after the mark 'committed 17'\nnothing is lost"
        )
        for number in range(30):
            disk.pwrite(block("x"), number * BLOCK)
        assert cut.cut().explain().splitlines()[-1] == "lost: 10 more requests"


def test_values_that_are_allowed() -> None:
    cut = PowerCut(SIZE)
    with Disk(cut) as disk:
        disk.pwrite(block("1"), 0)
        disk.flush()
        cut.mark("one")
        disk.pwrite(block("2"), 0)
        disk.flush()
        cut.mark("two")
        cut.mark("something else")

    def check(crash: Crash) -> None:
        assert letters(crash)[0] in crash.allowed({"one": "12", "two": "2"}, before=".1")

    assert cut.check(check) == 6
    seen = [(crash.marks, letters(crash)[0]) for crash in cut.crashes()]
    assert ((), ".") in seen
    assert (("one",), "2") in seen
    assert (("one", "two", "something else"), "2") in seen


# ---- checks ----


class Ledger:
    """A client that commits numbers: to a slot each, then the count of them, with a flush before
    and after; `careless` leaves the first out."""

    def __init__(self, disk: Disk, cut: PowerCut, careless: bool = False) -> None:
        self.disk, self.cut, self.careless = disk, cut, careless

    def commit(self, number: int) -> None:
        self.disk.pwrite(struct.pack("<Q", number + 100).ljust(BLOCK), (number + 1) * BLOCK)
        if not self.careless:
            self.disk.flush()
        self.disk.pwrite(struct.pack("<Q", number + 1).ljust(BLOCK), 0)
        self.disk.flush()
        self.cut.mark(f"committed {number}")


def check_ledger(crash: Crash) -> None:
    left = image(crash)
    (count,) = struct.unpack_from("<Q", left)
    assert count >= len(crash.marks), f"{count} of {len(crash.marks)} commits are there"
    for number in range(count):
        (found,) = struct.unpack_from("<Q", left, (number + 1) * BLOCK)
        assert found == number + 100, f"number {number} is {found}"


def ledger(layer: Callable[[PowerCut], pyublk.Target], *, careless: bool = False) -> PowerCut:
    cut = PowerCut(SIZE)
    with Disk(layer(cut)) as disk:
        client = Ledger(disk, cut, careless)
        for number in range(4):
            client.commit(number)
    return cut


class IgnoresFlush(pyublk.Layer):
    def flush(self) -> None:
        pass


class AcknowledgesFuaEarly(pyublk.Layer):
    def write_fua(self, offset: int, data: memoryview) -> None:
        self.below.write(offset, data)


class FlushesTooLittle(pyublk.Layer):
    """Holds writes back, and passes on only the last one of them before a flush."""

    def __init__(self, below: pyublk.Target) -> None:
        super().__init__(below)
        self.held: list[tuple[int, bytes]] = []

    def write(self, offset: int, data: memoryview) -> None:
        self.held.append((offset, bytes(data)))

    def flush(self) -> None:
        if self.held:
            self.below.write(*self.held.pop())
        self.below.flush()
        for offset, data in self.held:
            self.below.write(offset, data)
        self.held.clear()


def test_a_careful_client_passes_and_a_careless_one_is_caught() -> None:
    # The empty disk, then for each commit: its slot, the count, the mark.
    assert ledger(lambda cut: cut).check(check_ledger) == 1 + 4 * 3
    with pytest.raises(PowerCutFailed, match="number 0 is 0") as failed:
        ledger(lambda cut: cut, careless=True).check(check_ledger)
    said = str(failed.value)
    assert "\nlost: write 1, 512 bytes at 0x200\n" in said
    assert re.search(r"the same state again: cut.crash\('5-1'\)$", said)


def test_a_disk_that_ignores_flushes_is_caught() -> None:
    with pytest.raises(PowerCutFailed, match="0 of 1 commits are there"):
        ledger(IgnoresFlush).check(check_ledger)


def test_a_disk_whose_flush_covers_too_little_is_caught() -> None:
    # Two writes before a flush, of which it makes the last one durable: what the careless do.
    ledger(FlushesTooLittle).check(check_ledger)
    with pytest.raises(PowerCutFailed, match="number"):
        ledger(FlushesTooLittle, careless=True).check(check_ledger)


@pytest.mark.parametrize("layer", [pyublk.Layer, AcknowledgesFuaEarly])
def test_a_disk_that_acknowledges_fua_early_is_caught(layer: type[pyublk.Layer]) -> None:
    cut = PowerCut(SIZE)
    with Disk(layer(cut)) as disk:
        for number in range(3):
            disk.pwrite(block("f"), number * BLOCK, fua=True)
            cut.mark(str(number))

    def check(crash: Crash) -> bool:
        return letters(crash).startswith("f" * len(crash.marks))

    if layer is pyublk.Layer:
        assert cut.check(check) == 7
    else:
        with pytest.raises(PowerCutFailed, match="the check returned False") as failed:
            cut.check(check)
        assert "lost: write 1, 512 bytes at 0x0" in str(failed.value)


def test_shrinking_leaves_what_is_needed() -> None:
    cut = PowerCut(256 * BLOCK)
    with Disk(cut) as disk:
        for number in range(30):
            disk.pwrite(block("x", 4), number * 4 * BLOCK)

    def check(crash: Crash) -> None:  # it takes both
        left = letters(crash)
        assert left[5] == "x" or left[50] == "x"

    crash = cut.shrink(cut.cut(), check)
    assert crash.id == "60-2/1,13/2"
    with pytest.raises(PowerCutFailed) as failed:
        cut.check(check)
    assert failed.value.crash.id == crash.id
    assert failed.value.first.id == "60+"
    few = cut.shrink(cut.cut(), check, tries=3)
    with pytest.raises(AssertionError):
        check(few)


def test_what_fails_without_any_loss_is_found_by_one_try() -> None:
    cut = PowerCut(256 * BLOCK)
    with Disk(cut) as disk:
        for number in range(30):
            disk.pwrite(block("x"), number * BLOCK)
    tried = []

    def check(crash: Crash) -> None:  # what it wants was never written
        tried.append(crash.id)
        assert letters(crash)[40] == "y"

    with pytest.raises(PowerCutFailed, match="it fails also when the disk loses nothing"):
        cut.check(check)
    assert tried == ["60+", "60-"]


def test_shrinking_garbage() -> None:
    cut = PowerCut(SIZE, garbage=True)
    with Disk(cut) as disk:
        disk.pwrite(block("x", 8), 0)

    def check(crash: Crash) -> None:
        assert letters(crash)[3] in ".x"

    with pytest.raises(PowerCutFailed) as failed:
        cut.check(check)
    assert failed.value.crash.id == "2-1/3!3"


def test_commands_as_checks(tmp_path: Path) -> None:
    cut = PowerCut(SIZE)
    with Disk(cut) as disk:
        disk.pwrite(block("x"), 0)
        disk.flush()
        cut.mark("there")
    program = "import sys; sys.exit(open(sys.argv[1], 'rb').read(1) not in (b'x', b'\\0'))"
    assert cut.check([sys.executable, "-c", program, "{image}"]) == 3
    program = "import sys; print('I see', open(sys.argv[1], 'rb').read(1)); sys.exit(3)"
    with pytest.raises(PowerCutFailed, match=r"exit code 3\nI see b'x'"):
        cut.check([sys.executable, "-c", program, "{image}"])
    with pytest.raises(ValueError, match=r"must have \{path\}"):
        cut.check("fsck.ext4 -n disk.img")
    with pytest.raises(
        PowerCutFailed, match="'nothing-like-it' is not installed\nit fails also when the disk"
    ):
        cut.check("nothing-like-it {image}")
    with pytest.raises(CheckFailed, match="there is no file system on the disk"):
        cut.check(None)
    with (
        pytest.raises(ValueError, match="file_system must be one of ext4"),
        cut.cut().mounted("ntfs"),
    ):
        pass


def test_of_a_long_output_both_ends_are_shown() -> None:
    """mkfs.xfs says first what is wrong, and then how it is used; e2fsck says it last."""
    with pytest.raises(CheckFailed) as failed:
        run(["sh", "-c", "seq 21; exit 3"])
    said = [*"123456", "... 1 more lines ...", *map(str, range(8, 22))]
    assert str(failed.value).splitlines()[1:] == said
    with pytest.raises(CheckFailed, match=r"exit code 3\n1\n2$"):
        run(["sh", "-c", "seq 2; exit 3"])


# ---- the format of dm-log-writes ----


def read_log(path: Path) -> list[tuple[int, int, int, bytes]]:
    """(flags, sector, count, data or name), read as xfstests' log-writes.c does, which calls an
    entry malformed that is all zeroes, or has something behind its header and is no mark."""
    data = path.read_bytes()
    magic, version, count = struct.unpack_from("<QQQ", data)
    (sector,) = struct.unpack_from("<I", data, 24)
    assert (magic, version) == (0x6A736677736872, 1)
    at, entries = sector, []
    for _ in range(count):
        first, many, flags, length = struct.unpack_from("<QQQQ", data, at)
        assert flags or many
        assert flags == 8 or not any(data[at + 32 : at + sector])
        name = data[at + 32 : at + 32 + length]
        at += sector
        size = 0 if flags & 4 else many * sector
        entries.append((flags, first, many, name or data[at : at + size]))
        at += size
    assert at == len(data)
    return entries


@pytest.mark.parametrize("size", [512, 4096])
def test_the_format_of_dm_log_writes(tmp_path: Path, size: int) -> None:
    cut = PowerCut(16 * size, block_size=size)
    with Disk(cut) as disk:
        disk.pwrite(b"a" * size, 0)
        disk.pwrite(b"f" * size, size, fua=True)
        disk.pwrite(b"b" * 2 * size, 2 * size)
        disk.flush()
        cut.mark("flushed")
        disk.discard(2 * size, size)
        disk.write_zeroes(0, size)
        disk.flush()
        disk.pwrite(b"z" * size, 5 * size)
        whole = disk.pread(disk.size, 0)
    cut.write_log(tmp_path / "log")
    entries = read_log(tmp_path / "log")
    assert entries == [
        (2, 1, 1, b"f" * size),
        (0, 0, 1, b"a" * size),
        (0, 2, 2, b"b" * 2 * size),
        (1, 0, 0, b""),
        (8, 0, 0, b"flushed"),
        (4, 2, 1, b""),
        (0, 0, 1, bytes(size)),
        (1, 0, 0, b""),
        (0, 5, 1, b"z" * size),
        (8, 0, 0, b"dm-log-writes-end"),
    ]
    replayed = bytearray(16 * size)
    for flags, first, count, data in entries:
        if not flags & 9:
            replayed[first * size : (first + count) * size] = data or bytes(count * size)
    assert bytes(replayed) == whole


def test_a_record_of_nothing_but_reads() -> None:
    cut = PowerCut(Null(size=SIZE))
    with ExitStack() as stack:
        disk = stack.enter_context(Disk(cut))
        disk.pread(BLOCK, 0)
        disk.flush()
        assert len(list(cut.crashes())) == 1


# ---- kept for later ----


def test_a_saved_record_has_the_same_crashes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(block("o", 64))
    cut = PowerCut(File(tmp_path / "file"), atomic=2 * BLOCK, garbage=True)
    with Disk(cut) as disk:
        disk.pwrite(block("a", 3), 0)
        disk.write_zeroes(8 * BLOCK, 4 * BLOCK)
        disk.flush()
        with cut.record():
            disk.pwrite(block("b"), BLOCK)
            disk.pwrite(block("c", 4), 2 * BLOCK, fua=True)
            cut.mark("done")
            disk.discard(9 * BLOCK, BLOCK)
            disk.pwrite(block("d"), 20 * BLOCK)
    cut.save(tmp_path / "saved")
    loaded = PowerCut.load(tmp_path / "saved")
    ids = [crash.id for crash in loaded.crashes(limit=100, seed=3)]
    assert ids == [crash.id for crash in cut.crashes(limit=100, seed=3)]
    assert len(ids) > 40
    assert {crash.marks for crash in loaded.crashes()} == {(), ("done",)}
    with Disk(loaded) as disk:
        assert disk.pread(BLOCK, 20 * BLOCK) == block("d")
        assert disk.pread(BLOCK, 60 * BLOCK) == block("o")
        disk.pwrite(block("e"), 0)
        assert loaded.volatile().writes[-1].number == 8
    for crash_id in ids:
        assert loaded.crash(crash_id).explain() == cut.crash(crash_id).explain()
        assert image(loaded.crash(crash_id)) == image(cut.crash(crash_id))
    with pytest.raises(ValueError, match="is not the record of a PowerCut"):
        PowerCut.load(__file__)


@pytest.mark.skipif(shutil.which("debugfs") is None, reason="needs e2fsprogs")
def test_files_without_a_kernel(tmp_path: Path) -> None:
    disk_file, file = tmp_path / "disk.img", tmp_path / "file"
    file.write_bytes(b"content" * 100)
    disk_file.write_bytes(bytes(1 << 20))
    for command in (["mkfs.ext4", "-q", "-F"], ["debugfs", "-w", "-R", f"write {file} copied"]):
        subprocess.run([*command, disk_file], check=True, capture_output=True)
    cut = PowerCut(File(disk_file))
    with Disk(cut) as disk:
        with cut.cut().extracted() as files:
            assert (files / "copied").read_bytes() == b"content" * 100
        disk.pwrite(b"broken".ljust(1024, b"!") * 64, 1024)
        with pytest.raises(CheckFailed, match="e2fsck"), cut.cut(keep=[1]).extracted():
            pass


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "vfat"])
def test_file_systems_are_recognized(kind: str, tmp_path: Path) -> None:
    if (make := shutil.which(f"mkfs.{kind}")) is None:
        pytest.skip(f"needs mkfs.{kind}")
    image_file = tmp_path / "disk.img"
    with image_file.open("wb") as file:
        file.truncate(300 << 20)
    subprocess.run([make, image_file], check=True, capture_output=True)
    assert file_system_of(File(image_file)) == kind
