"""Rules for a disk's requests: on disks without a kernel, served by the engines of real ones.

`tests/target_contract.py` has what holds on real disks as well.
"""

import asyncio
import errno
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pyublk
from pyublk._native import NULL_HANDLER, Queue
from pyublk.faults import Faults, profiles
from pyublk.targets import File, Ram, Zoned
from pyublk.testing import Disk
from pyublk.uapi import Op

SIZE = 1 << 20


class Memory(pyublk.Target):
    """With plain methods."""

    def __init__(self, **options: Any) -> None:
        super().__init__(size=SIZE, **options)
        self.data = bytearray(SIZE)

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview) -> None:
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        pass


class Coroutines(Memory):
    async def read(self, offset: int, buffer: memoryview) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        super().read(offset, buffer)

    async def write(self, offset: int, data: memoryview) -> None:  # type: ignore[override]
        super().write(offset, data)

    async def flush(self) -> None:  # type: ignore[override]
        pass


#: A target of each kind.
KINDS: dict[str, Callable[[Path], pyublk.Target]] = {
    "plain": lambda _: Memory(),
    "coroutines": lambda _: Coroutines(),
    "native": lambda _: Ram(size=SIZE),
    "mapped": lambda folder: File(folder / "disk.img", size=SIZE),
}


@pytest.fixture(params=KINDS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    with Disk(KINDS[request.param](tmp_path)) as opened:
        opened.pwrite(b"then" * 4096, 0)
        yield opened


def failure_of(call: Callable[[], object]) -> int | None:
    try:
        call()
    except OSError as error:
        return error.errno
    return None


# ---- which requests a rule fires for ----


@pytest.mark.parametrize(
    ("only", "fails"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"nth": 2}, [1]),
        ({"nth": 2, "every": True}, [1, 3, 5]),
        ({"times": 2}, [0, 1]),
        ({"nth": 2, "every": True, "times": 2}, [1, 3]),
        ({"range": (8192, 16384)}, [2, 3]),
        ({"range": (8000, 8193)}, [1, 2]),
        ({"range": (8192, 16384), "nth": 2}, [3]),
        ({"jumps": True}, [0]),
        ({"when": lambda op, offset, length: offset == 4096 and op is Op.READ}, [1]),
        ({"probability": 0.5, "seed": 3}, [0, 3, 4]),
    ],
)
def test_filters(only: dict[str, Any], fails: list[int]) -> None:
    with Disk(Memory()) as disk:
        rule = disk.faults.fail("read", **only)
        failed = [at for at in range(6) if failure_of(lambda at=at: disk.pread(4096, at * 4096))]
        assert failed == fails
        assert rule.fired == len(fails)
        disk.pwrite(bytes(512), 0)
        disk.flush()


def test_chance_comes_near_and_again() -> None:
    def fired(seed: int) -> int:
        with Disk(Memory()) as disk:
            rule = disk.faults.fail("read", probability=0.25, seed=seed)
            for _ in range(1000):
                failure_of(lambda: disk.pread(512, 0))
            assert rule.matched == 1000
            return rule.fired

    assert fired(1) == fired(1) != fired(2)
    assert 200 < fired(1) < 300


def test_a_flush_is_of_no_range() -> None:
    with Disk(Memory()) as disk:
        disk.faults.fail("all", range=(0, SIZE))
        disk.flush()
        assert failure_of(lambda: disk.pread(512, 0)) == errno.EIO
        disk.faults.fail("flush")
        assert failure_of(disk.flush) == errno.EIO


def test_a_predicate_that_raises_is_told_of_and_does_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def strange(op: Op, offset: int, length: int) -> bool:
        raise RuntimeError("strange")

    with Disk(Ram(size=SIZE)) as disk:
        disk.faults.fail("read", when=strange)
        assert disk.pread(512, 0) == bytes(512)
    assert "a rule's `when` raised" in caplog.text
    assert "strange" in caplog.text


def test_a_predicate_may_change_the_rules() -> None:
    with Disk(Ram(size=SIZE)) as disk:

        def once(op: Op, offset: int, length: int) -> bool:
            rule.remove()
            disk.faults.fail("write")
            return True

        rule = disk.faults.fail("read", when=once)
        assert failure_of(lambda: disk.pread(512, 0)) == errno.EIO
        assert disk.pread(512, 0) == bytes(512)
        assert failure_of(lambda: disk.pwrite(bytes(512), 0)) == errno.EIO


# ---- what rules do, whatever the target ----


def test_errors(disk: Disk) -> None:
    with disk.faults.fail("write", errno.ENOSPC, times=1) as rule:
        assert failure_of(lambda: disk.pwrite(bytes(512), 0)) == errno.ENOSPC
        disk.pwrite(b"now." * 128, 0)
    assert (rule.matched, rule.fired) == (2, 1)
    with disk.faults.full():
        assert failure_of(lambda: disk.pwrite(bytes(512), 0)) == errno.ENOSPC
    with disk.faults.read_only():
        assert failure_of(lambda: disk.pwrite(bytes(512), 0)) == errno.EIO
    if disk.params.basic.volatile_cache:
        with disk.faults.fail("flush"):
            assert failure_of(disk.flush) == errno.EIO
    disk.flush()
    assert disk.pread(512, 0) == b"now." * 128
    assert len(disk.faults) == 0


def test_what_is_held_goes_on(disk: Disk) -> None:
    with disk.faults.delay("read", 0.01) as rule:
        assert disk.pread(8192, 0) == b"then" * 2048
    assert rule.fired == 1
    for by_clearing in (False, True):
        hung = disk.faults.hang("read", times=1)
        release = disk.faults.clear if by_clearing else hung.release
        timer = threading.Timer(0.02, release)
        timer.start()
        assert disk.pread(8192, 0) == b"then" * 2048
        timer.join()
        assert hung.fired == 1
    timer = threading.Timer(0.02, disk.faults.release)
    hung = disk.faults.hang("write")
    timer.start()
    disk.pwrite(bytes(512), 0)
    timer.join()
    hung.remove()
    hung.remove()
    assert list(disk.faults.removed).count(hung) == 1


def test_a_delay_may_end_in_a_failure(disk: Disk) -> None:
    held = disk.faults.delay("write", 0.01)
    failed = disk.faults.fail("write", errno.ETIMEDOUT)
    never = disk.faults.drop("write")
    assert failure_of(lambda: disk.pwrite(bytes(4096), 0)) == errno.ETIMEDOUT
    assert [held.fired, failed.fired, never.fired] == [1, 1, 0]
    assert list(disk.faults) == [held, failed, never]
    disk.faults.clear()
    assert disk.pread(4096, 0) == b"then" * 1024


def test_lost_torn_and_misdirected_writes(disk: Disk) -> None:
    with disk.faults.drop("write"):
        assert disk.pwrite(b"lost" * 1024, 0) == 4096
    assert disk.pread(4096, 0) == b"then" * 1024
    with disk.faults.tear("write", sectors=3) as torn:
        assert disk.pwrite(b"torn" * 1024, 0) == 4096
    assert disk.pread(4096, 0) == b"torn" * 384 + b"then" * 640
    assert torn.fired == 1
    with disk.faults.misdirect("write", offset=65536):
        assert disk.pwrite(b"away" * 1024, 0) == 4096
    assert disk.pread(4096, 0) == b"torn" * 384 + b"then" * 640
    assert disk.pread(4096, 65536) == b"away" * 1024
    with disk.faults.misdirect("read", offset=65536):
        assert disk.pread(4096, 0) == b"away" * 1024
    with disk.faults.misdirect("write", offset=SIZE - 512):
        disk.pwrite(b"last" * 1024, 0)
    assert disk.pread(4096, SIZE - 4096) == b"last" * 1024


def test_bit_rot(disk: Disk) -> None:
    with disk.faults.rot("read", bits=1) as rule:
        found = [disk.pread(4096, 0) for _ in range(2)]
    assert rule.fired == 2
    for data in found:
        changed = [a ^ b for a, b in zip(data, b"then" * 1024, strict=True)]
        assert sum(one.bit_count() for one in changed) == 1
    assert found[0] != found[1]
    assert disk.pread(4096, 0) == b"then" * 1024


def test_stale_reads(disk: Disk) -> None:
    stale = disk.faults.stale("read", nth=3, every=True)
    assert disk.pread(8192, 0) == b"then" * 2048
    disk.pwrite(b"now." * 1024, 0)
    disk.pwrite(b"1st." * 1024, 65536)
    disk.pwrite(b"2nd." * 1024, 65536)
    assert disk.pread(8192, 0) == b"now." * 1024 + b"then" * 1024
    assert disk.pread(8192, 0) == b"then" * 2048
    assert [disk.pread(4096, 65536) for _ in range(2)] == [b"2nd." * 1024] * 2
    assert disk.pread(8192, 65536) == b"1st." * 1024 + bytes(4096)
    assert stale.fired == 2
    stale.remove()
    assert disk.pread(8192, 0) == b"now." * 1024 + b"then" * 1024


def test_limits(disk: Disk) -> None:
    disk.limit(iops=20, burst=0)  # slower than a busy machine reads by itself
    began = time.monotonic()
    for _ in range(21):
        disk.pread(512, 0)
    assert time.monotonic() - began >= 1.0
    assert disk.faults.disk_limit is not None
    assert disk.faults.disk_limit.fired >= 10
    assert len(disk.faults) == 0
    disk.faults.clear()
    assert disk.faults.disk_limit is not None
    disk.limit(bandwidth=1 << 20, burst=0)
    began = time.monotonic()
    for _ in range(3):
        disk.pread(65536, 0)
    assert time.monotonic() - began >= 0.12
    disk.limit(iops=1, burst=30)  # saved up at first
    for _ in range(31):
        disk.pread(512, 0)
    assert disk.faults.disk_limit.fired == 0
    disk.limit()
    assert disk.faults.disk_limit is None


# ---- many requests at once ----


def test_a_thousand_delays_hold_up_nobody() -> None:
    faults = Faults(Ram(size=1 << 30))
    delayed = faults.delay("read", 0.2, jitter=0.1, range=(0, 1000 * 512))
    with Queue.loopback(depth=4096, buffer_size=512, gate=faults.gate) as queue:
        queue.fetch()
        threads = {*threading.enumerate()}
        for tag in range(1000):
            queue.inject(tag, Op.READ, tag * 512, 512)
        queue.serve_native(NULL_HANDLER, blind=True)
        assert (queue.kept, queue.held) == (1000, 1000)
        others = 0
        while queue.kept:  # some go on at every moment, and the others all the while
            for tag in range(1000, 4096):
                queue.inject(tag, Op.READ, 1 << 20, 512)
            queue.serve_native(NULL_HANDLER, blind=True)
            assert all(queue.answered(tag) == 512 for tag in range(1000, 4096))
            others += 3096
        assert not {*threading.enumerate()} - threads
        assert all(queue.answered(tag) == 512 for tag in range(1000))
        assert others > 3096
    assert delayed.fired == 1000


def test_what_is_held_fails_with_all_that_is_held() -> None:
    faults = Faults(Ram(size=SIZE))
    hung = faults.hang("write")
    with Queue.loopback(depth=8, buffer_size=512, gate=faults.gate) as queue:
        queue.fetch()
        queue.inject(0, Op.WRITE, 0, 512)
        assert queue.wait(0) == []
        assert queue.held == 1
        queue.fail_held(errno.EIO)
        assert queue.wait(0) == []
        assert queue.answered(0) == -errno.EIO
        queue.inject(0, Op.WRITE, 512, 512)  # the tag's next request is held anew
        assert queue.wait(0) == []
        assert queue.answered(0) is None
        hung.remove()
        [io] = queue.wait(0) or []
        assert io.offset == 512
        io.complete()


def test_what_is_suspended_applies_to_nothing() -> None:
    faults = Faults(Ram(size=SIZE))
    faults.hang("write")
    failed = faults.fail("write")
    with Queue.loopback(depth=8, buffer_size=512, gate=faults.gate) as queue:
        queue.fetch()
        queue.inject(0, Op.WRITE, 0, 512)
        assert queue.wait(0) == []
        faults.suspend(True)
        assert queue.wait(0) == []
        assert queue.answered(0) == -errno.EIO  # as it was decided
        queue.inject(1, Op.WRITE, 0, 512)
        [io] = queue.wait(0) or []
        io.complete()
        faults.suspend(False)
        queue.inject(2, Op.WRITE, 0, 512)
        assert queue.wait(0) == []
    assert failed.fired == 2


def test_rules_change_while_requests_come() -> None:
    over = threading.Event()

    def change() -> None:
        while not over.is_set():
            with disk.faults.delay("read", 0.00001), disk.faults.tear(sectors=1):
                disk.faults.hang("read", probability=0.5)
                disk.faults.release()
            disk.faults.clear()

    with Disk(Ram(size=SIZE)) as disk:
        changer = threading.Thread(target=change)
        changer.start()
        try:
            for _ in range(2000):
                assert disk.pread(512, 0) == bytes(512)
        finally:
            over.set()
            changer.join()
        assert len(disk.faults) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_others_go_on_on_an_event_loop(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with Disk(KINDS[kind](tmp_path), max_io_size=4096, depth=2) as disk:
            disk.faults.hang("write")
            hanging = asyncio.create_task(disk.pwrite(b"w" * 4096, 0))
            await asyncio.sleep(0.01)
            assert not hanging.done()
            disk.faults.release()
            assert await hanging == 4096
            disk.faults.clear()
            with disk.faults.delay("read", 0.01) as delayed:
                assert await disk.pread(4096, 0) == b"w" * 4096
            assert delayed.fired == 1

    asyncio.run(main())


# ---- what is refused ----

NEVER: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("fail", ("writ",), {}, "'writ' is not an operation (did you mean 'write'?): operations are"),
    ("fail", ("discard",), {}, "no request of Memory is a 'discard': its operations are read, "),
    ("hang", ("zone_reset",), {}, "no request of Memory is a 'zone_reset'"),
    ("hang", ("",), {}, "'' is not an operation"),
    ("hang", ((),), {}, "a rule needs an operation"),
    ("drop", ("read",), {}, "drop is for write, flush, discard, write_zeroes, not for 'read'"),
    ("tear", ("flush",), {}, "tear is for write, not for 'flush'"),
    ("rot", ("write",), {}, "rot is for read, not for 'write'"),
    ("fail", ("write",), {"nth": 0}, "nth must be at least 1, not 0"),
    ("fail", ("write",), {"nth": 1.5}, "nth must be a whole number, not 1.5"),
    ("fail", ("write",), {"nth": True}, "nth must be a whole number, not True"),
    ("fail", ("write",), {"every": True}, "every needs nth"),
    ("fail", ("write",), {"times": 0}, "times must be at least 1"),
    ("fail", ("write",), {"range": (5, 5)}, "range must not be empty: 5 is not before 5"),
    ("fail", ("write",), {"range": 5}, "range must be a tuple of the first byte and the"),
    ("fail", ("write",), {"probability": 0}, "probability must be above 0, up to 1, not 0"),
    ("fail", ("write",), {"probability": 2}, "probability must be above 0, up to 1, not 2"),
    ("fail", ("write", -5), {}, "error must be an errno value such as errno.EIO, not -5"),
    ("fail", ("write", True), {}, "error must be an errno value"),
    ("fail", ("write", 0), {}, "error must be an errno value"),
    ("fail", ("write", "EIO"), {}, "error must be an errno value such as errno.EIO, not 'EIO'"),
    ("delay", ("write", -1), {}, "seconds must be a number of seconds"),
    ("delay", ("write", float("nan")), {}, "seconds must be a number of seconds"),
    ("delay", ("write", "1"), {}, "seconds must be a number of seconds"),
    (
        "delay",
        ("write", 1),
        {"jitter": 1, "distribution": "norma"},
        "distribution must be one of uniform, normal, exponential, not 'norma' (did you mean",
    ),
    ("limit", (), {}, "a limit needs iops or bandwidth"),
    ("limit", (), {"iops": 0}, "iops must be a number above 0, not 0"),
    ("limit", (), {"bandwidth": "1M"}, "bandwidth must be a number above 0, not '1M'"),
    ("tear", (), {"sectors": 0}, "sectors must be at least 1"),
    ("misdirect", (), {"offset": 100}, "offset must be whole blocks of Memory, of 512 bytes"),
    ("rot", (), {"bits": 0}, "bits must be at least 1"),
    ("add", ("fails:op=read",), {}, "'fails:op=read' is not a rule (did you mean 'fail'?)"),
    ("add", ("fail:errno=EIO",), {}, "fail needs op=..., as in fail:op=write,errno=EIO"),
    ("add", ("fail:op=read,nht=3",), {}, "fail takes no 'nht' (did you mean 'nth'?)"),
    ("add", ("fail:op=read,errno=EOI",), {}, "errno of fail: 'EOI' is not an errno such as"),
    ("add", ("fail:op=read,nth=x",), {}, "nth of fail: 'x' is not a whole number"),
    ("add", ("fail:op=read,nth",), {}, "nth of fail needs a value"),
    ("add", ("fail:op=read,nth=1,nth=2",), {}, "nth is given twice"),
    ("add", ("fail:op=read,range=4K",), {}, "range of fail: '4K' is not a range of bytes"),
    ("add", ("delay:op=read,seconds=1h",), {}, "seconds of delay: '1h' is not a time"),
    ("add", ("full:op=read",), {}, "full takes no 'op'"),
]


@pytest.mark.parametrize(("call", "arguments", "options", "words"), NEVER)
def test_faults_that_could_never_happen_are_refused(
    call: str, arguments: tuple[Any, ...], options: dict[str, Any], words: str
) -> None:
    with Disk(Memory()) as disk:
        with pytest.raises(ValueError, match=re.escape(words)):
            getattr(disk.faults, call)(*arguments, **options)
        assert len(disk.faults) == 0
        disk.pwrite(bytes(512), 0)
        disk.pread(512, 0)


def test_a_filter_that_there_is_not_is_a_type_error() -> None:
    faults: Any = Faults(Memory())
    with pytest.raises(TypeError, match=r"a rule takes no 'tims' \(did you mean 'times'\?\)"):
        faults.fail("read", tims=2)
    with pytest.raises(TypeError, match="when must be callable, not 5"):
        faults.fail("read", when=5)


def test_a_read_only_target_is_never_written_to() -> None:
    faults = Faults(Memory(read_only=True))
    with pytest.raises(ValueError, match="no request of a read-only Memory is a 'write'"):
        faults.fail("write")
    with pytest.raises(ValueError, match="no request of a read-only Memory is a 'write'"):
        faults.full()
    faults.fail("read")


def test_the_operations_of_zones() -> None:
    with Disk(Zoned(size=256 << 20)) as disk:
        disk.faults.fail("zone_reset")
        assert failure_of(lambda: disk.manage_zone(Op.ZONE_RESET)) == errno.EIO
        disk.faults.fail("all")
        assert failure_of(disk.report_zones) == errno.EIO


def test_blocks_are_torn_whole() -> None:
    faults = Faults(Memory(block_size=4096))
    with pytest.raises(ValueError, match="sectors must be whole blocks of Memory, of 4096 bytes"):
        faults.tear(sectors=1)
    faults.tear(sectors=8)


# ---- as texts ----


@pytest.mark.parametrize(
    "text",
    [
        "fail:op=write,errno=EIO,range=4KiB-8KiB,times=1",
        "fail:op=read+write,errno=ENOSPC,nth=3,every=yes",
        "delay:op=read,seconds=0.01,jitter=0.005,distribution=normal,probability=0.5,seed=7",
        "hang:op=flush,jumps=yes",
        "limit:op=all,iops=100,bandwidth=1MiB,burst=2",
        "drop:op=write",
        "tear:op=write,sectors=2",
        "misdirect:op=write,offset=64KiB",
        "rot:op=read,bits=3",
        "stale:op=read,range=4KiB-8KiB",
    ],
)
def test_a_rule_is_told_as_it_is_written(text: str) -> None:
    faults = Faults(Memory())
    rule = faults.add(text)
    assert rule.text == text
    assert faults.add(rule.text).text == text
    assert [one.number for one in faults] == [1, 2]


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("full", "fail:op=write,errno=ENOSPC"),
        ("read_only:", "fail:op=write,errno=EROFS"),
        ("delay:op=write,seconds=10ms", "delay:op=write,seconds=0.01"),
        ("fail:op=write", "fail:op=write,errno=EIO"),
        ("limit:iops=1000000", "limit:op=all,iops=1000000,burst=0.1"),
        (" hang : op = flush , every = no", "hang:op=flush"),
    ],
)
def test_shorter_texts(text: str, means: str) -> None:
    assert Faults(Memory()).add(text).text == means


# ---- disk profiles ----


@pytest.mark.parametrize("name", profiles.names())
def test_a_profile_says_where_it_comes_from_and_works(name: str) -> None:
    profile = profiles.load(name)
    assert profile.about
    assert all(source and says for source, says in profile.sources)
    page = (Path(__file__).parents[2] / "docs" / "faults.md").read_text()
    for source, says in profile.sources:
        assert source.partition(" (")[0] in page
        assert says in page
    with Disk(Memory()) as disk:
        rules = disk.faults.profile(name)
        assert len(rules) == len(profile.rules) == len(disk.faults)
        disk.pwrite(b"slow" * 1024, 0)
        assert disk.pread(4096, 0) == b"slow" * 1024
        disk.faults.clear()
        disk.faults.extend(f"full; profile:{name}")
        assert len(disk.faults) == len(rules) + 1


def test_a_disk_with_a_head_is_fast_in_order() -> None:
    with Disk(Memory(), max_io_size=4096) as disk:
        disk.faults.profile("hdd-7200")
        for at in range(16):
            disk.pread(4096, at * 4096)
        disk.pread(4096, 0)
        [limit, seek, _] = disk.faults
        assert [limit.matched, seek.fired] == [2, 2]


def test_credits_are_spent_and_then_it_is_slow() -> None:
    faults = Faults(Ram(size=SIZE))
    credit = faults.limit(iops=300, burst=1)
    with Queue.loopback(depth=400, buffer_size=512, gate=faults.gate) as queue:
        queue.fetch()
        for tag in range(400):
            queue.inject(tag, Op.READ, 0, 512)
        queue.serve_native(NULL_HANDLER, blind=True)
        assert 301 <= 400 - queue.kept <= 399
        assert credit.fired == queue.kept


def test_there_is_no_such_profile() -> None:
    faults = Faults(Memory())
    with pytest.raises(ValueError, match=r"no disk profile 'sd-cart' \(did you mean 'sd-card'\?\)"):
        faults.extend("full; profile:sd-cart")
    assert len(faults) == 0


def test_all_rules_of_a_text_or_none() -> None:
    faults = Faults(Memory())
    with pytest.raises(ValueError, match="'discard'"):
        faults.extend("full; fail:op=discard")
    assert len(faults) == 0
    assert [rule.number for rule in faults.extend("full; hang:op=flush;")] == [2, 3]
    with pytest.raises(ValueError, match="there is no rule 7: there are 2, 3"):
        faults.find(7)
    assert faults.find(3).told() == {
        "number": 3,
        "rule": "hang:op=flush",
        "matched": 0,
        "fired": 0,
    }
