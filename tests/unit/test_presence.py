"""Presence maps on disks without a kernel: the ring's I/O is real, on this machine's files."""

import asyncio
import errno
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pyublk import MappedTarget, Target
from pyublk.layers import Below, fetching
from pyublk.layers import durable as durable_module
from pyublk.layers.mapfile import HEADER_BYTES, PAGE, Header, MapFile, NotAMap
from pyublk.layers.presence import PresenceLayer
from pyublk.targets import File, Linear, Mirror, Stripe
from pyublk.testing import Disk
from pyublk.uapi import Op

BLOCK = 4096
SIZE = 64 * BLOCK


def fails_with(number: int) -> Any:
    return pytest.raises(OSError, match=rf"\[Errno {number}\]")


class Bytes(Target):
    """Plain, read only, and counted."""

    concurrency = "parallel"

    def __init__(self, content: bytes) -> None:
        super().__init__(size=len(content), read_only=True)
        self.content = bytearray(content)
        self.reads: list[tuple[int, int]] = []

    def read(self, offset: int, buffer: memoryview) -> None:
        self.reads.append((offset, len(buffer)))
        buffer[:] = self.content[offset : offset + len(buffer)]


class Awaited(Bytes):
    async def read(self, offset: int, buffer: memoryview) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        super().read(offset, buffer)


class Failing(Bytes):
    """Blocks that cannot be read."""

    bad: ClassVar[set[int]] = set()

    def read(self, offset: int, buffer: memoryview) -> None:
        if any(block * BLOCK in range(offset, offset + len(buffer)) for block in self.bad):
            raise OSError(errno.ENODATA, "gone")
        super().read(offset, buffer)


class Reversed(MappedTarget):
    """Each block from the file's other end, said for each request."""

    def map(self, op: str, offset: int, length: int) -> list[tuple[int, int, int]]:  # type: ignore[override]
        end = self.backing[0].size
        return [(0, end - at - 512, 512) for at in range(offset, offset + length, 512)]


def a_file(folder: Path, content: bytes, name: str = "base") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def files(folder: Path, content: bytes) -> Target:
    half = len(content) // 2
    return Linear(a_file(folder, content[:half], "1"), a_file(folder, content[half:], "2"))


def striped(folder: Path, content: bytes) -> Target:
    pieces = [content[at : at + BLOCK] for at in range(0, len(content), BLOCK)]
    names = [a_file(folder, b"".join(pieces[n::2]), str(n)) for n in range(2)]
    return Stripe(*names, chunk=BLOCK)


def mirrored(folder: Path, content: bytes) -> Target:
    return Mirror(a_file(folder, content, "leg1"), a_file(folder, content, "leg2"))


def backwards(folder: Path, content: bytes) -> Target:
    pieces = [content[at : at + 512] for at in range(0, len(content), 512)]
    return Reversed([a_file(folder, b"".join(reversed(pieces)))])


def another(folder: Path, content: bytes) -> Target:
    """A map over a file, both of which do not change any more."""
    changed = bytes(1000 * BLOCK)[: len(content)]
    base, upper = a_file(folder, content), folder / "middle"
    if not upper.exists():
        base.write_bytes(changed[: BLOCK * 9] + content[BLOCK * 9 :])
        with Disk(PresenceLayer(File(base, read_only=True), upper, granularity=8192)) as disk:
            disk.pwrite(content[: BLOCK * 9], 0)
    base.write_bytes(changed[: BLOCK * 9] + content[BLOCK * 9 :])
    return PresenceLayer(File(base, read_only=True), upper, read_only=True)


KINDS: dict[str, Callable[[Path, bytes], Target]] = {
    "file": lambda folder, content: File(a_file(folder, content), read_only=True),
    "files": files,
    "stripe": striped,
    "map": another,
    "plain": lambda _, content: Bytes(content),
    "coroutines": lambda _, content: Awaited(content),
    "mirror": mirrored,
    "by request": backwards,
}
#: Those that no Python is asked for.
FILES = ("file", "files", "stripe", "map")


def use(disk: Disk, expected: bytearray, seed: int, rounds: int = 60) -> None:
    chance = random.Random(seed)
    for _ in range(rounds):
        offset = chance.randrange(len(expected) // 512) * 512
        length = min(chance.choice([512, 1024, 4096, 12800, 40960]), len(expected) - offset)
        what = chance.choice(["read", "read", "write", "write", "zeroes", "discard", "flush"])
        if what == "read":
            assert disk.pread(length, offset) == expected[offset : offset + length]
        elif what == "write":
            data = chance.randbytes(length)
            disk.pwrite(data, offset)
            expected[offset : offset + length] = data
        elif what == "zeroes":
            disk.write_zeroes(offset, length, unmap=chance.random() < 0.5)
            expected[offset : offset + length] = bytes(length)
        elif what == "discard":  # whole blocks, as the kernel's are
            whole = -(-offset // BLOCK) * BLOCK
            length = max((offset + length - whole) // BLOCK * BLOCK, 0)
            if length:
                disk.discard(whole, length)
                expected[whole : whole + length] = bytes(length)
        else:
            disk.flush()
    assert disk.pread(len(expected), 0) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_has_what_was_written_or_what_is_below(kind: str, tmp_path: Path) -> None:
    content = random.Random(kind).randbytes(SIZE)
    expected = bytearray(content)
    for opening in range(3):
        layer = PresenceLayer(KINDS[kind](tmp_path, content), tmp_path / "upper")
        with Disk(layer, max_io_size=16384) as disk:
            use(disk, expected, opening)
            counters = layer.counters()
            assert (counters["fetches"] == 0) == (kind in FILES or opening > 0)
        assert not (tmp_path / "upper.live").exists()
    assert b"".join(path.read_bytes() for path in sorted(tmp_path.glob("leg1"))) in (b"", content)


def test_larger_blocks_and_a_disk_that_is_larger_than_what_is_below(tmp_path: Path) -> None:
    content = random.randbytes(SIZE - 1536)
    expected = bytearray(content) + bytes(SIZE + 1536)
    below = File(a_file(tmp_path, content), read_only=True)
    with Disk(PresenceLayer(below, tmp_path / "upper", granularity=65536, size=2 * SIZE)) as disk:
        assert disk.pread(2 * SIZE, 0) == expected
        use(disk, expected, 1)
    with Disk(PresenceLayer(below, tmp_path / "upper")) as disk:
        assert disk.pread(2 * SIZE, 0) == expected


def test_what_is_below_is_fetched_once(tmp_path: Path) -> None:
    below = Bytes(random.randbytes(SIZE))
    layer = PresenceLayer(below, tmp_path / "upper", granularity=32768)
    with Disk(layer, max_io_size=4096) as disk:
        assert disk.pread(65536, 0) == below.content[:65536]  # 16 requests
        disk.pwrite(bytes(512), 512)
        assert sorted(below.reads) == [(0, 32768), (32768, 32768)]
    with Disk(layer) as disk:
        disk.pwrite(b"x" * 32768, 65536)  # whole blocks need nothing
        disk.pwrite(b"x" * 4096, 3 * 32768)
        assert sorted(below.reads)[2:] == [(3 * 32768, 32768)]
        assert disk.pread(8192, 3 * 32768) == b"x" * 4096 + below.content[102400:106496]


def test_exactly_those_fail_that_need_what_cannot_be_had(tmp_path: Path) -> None:
    below = Failing(random.randbytes(SIZE))
    below.bad = {3}  # type: ignore[misc]
    layer = PresenceLayer(below, tmp_path / "upper")
    with Disk(layer) as disk:
        with fails_with(errno.ENODATA):
            disk.pread(BLOCK, 3 * BLOCK)
        with fails_with(errno.ENODATA):
            disk.pwrite(bytes(512), 3 * BLOCK)
        assert disk.pread(BLOCK, 4 * BLOCK) == below.content[4 * BLOCK : 5 * BLOCK]
        assert layer.counters()["fetch_errors"] == 2
        with fails_with(errno.ENODATA):
            layer.prefetch(0, SIZE)
        below.bad = set()  # type: ignore[misc]
        assert disk.pread(BLOCK, 3 * BLOCK) == below.content[3 * BLOCK : 4 * BLOCK]
        layer.prefetch(0, SIZE)
        assert layer.count_present() == SIZE


def test_a_slow_fetch_holds_up_nobody_else(tmp_path: Path) -> None:
    class Slow(Bytes):
        go = threading.Event()

        def read(self, offset: int, buffer: memoryview) -> None:
            if offset == 0:
                assert self.go.wait(20)
            super().read(offset, buffer)

    layer = PresenceLayer(Slow(random.randbytes(SIZE)), tmp_path / "upper")
    layer.open()
    calls = Below(layer)
    waiting = threading.Thread(target=calls.read, args=(0, memoryview(bytearray(512))))
    try:
        waiting.start()
        calls.write(BLOCK, memoryview(b"x" * 512))
        calls.read(2 * BLOCK, memoryview(bytearray(512)))
        calls.flush()
        assert waiting.is_alive()
    finally:
        Slow.go.set()
        waiting.join(20)
        calls.end_calls()
        layer.close()
    assert not waiting.is_alive()


def test_policies_read_ahead_and_fill(tmp_path: Path) -> None:
    class Ahead(PresenceLayer):
        seen: ClassVar[list[tuple[int, int]]] = []

        def widen(self, offset: int, length: int) -> tuple[int, int]:
            return offset // 32768 * 32768, 32768

        def fetched(self, offset: int, length: int) -> None:
            self.seen.append((offset, length))

    below = Bytes(random.randbytes(SIZE))
    layer = Ahead(below, tmp_path / "upper")
    with Disk(layer) as disk:
        disk.pwrite(b"x" * BLOCK, BLOCK)
        disk.pread(512, 3 * BLOCK)
        assert layer.is_present(0, 32768)
        assert not layer.is_present(0, 32769)
        assert sum(length for _, length in layer.seen) == 32768 - BLOCK
        assert layer.fill(0, b"y" * 40960) == 8192  # nothing over what is there
        assert disk.pread(512, BLOCK) == b"x" * 512
        assert disk.pread(8192, 32768) == b"y" * 8192
        with pytest.raises(ValueError, match="whole blocks"):
            layer.fill(512, b"y" * BLOCK)
        assert list(layer.runs()) == [(0, 40960, True), (40960, SIZE - 40960, False)]


def test_evicted_blocks_show_what_is_below(tmp_path: Path) -> None:
    class Evicting(PresenceLayer):
        evicts = True

    below = Bytes(random.randbytes(SIZE))
    layer = Evicting(below, tmp_path / "upper")
    with Disk(layer) as disk:
        disk.pwrite(b"x" * SIZE, 0)
        disk.flush()
        assert layer.take_touched(0, BLOCK)
        assert not layer.take_touched(0, BLOCK)
        used = layer.uses(0)
        assert layer.evict([(512, 3 * BLOCK), (10 * BLOCK, BLOCK)]) == 3 * BLOCK  # whole ones
        durable = MapFile.read_durable(layer.file).bits
        assert durable[0] == 0b11111001
        assert durable[1] == 0b11111011
        assert os.pread(layer.upper_fd, BLOCK, BLOCK) == bytes(BLOCK)
        assert disk.pread(3 * BLOCK, 0) == b"x" * BLOCK + below.content[BLOCK : 3 * BLOCK]
        assert layer.uses(0) > used
        assert layer.counters()["evicted_bytes"] == 3 * BLOCK
        with layer.hold(0, BLOCK), pytest.raises(ValueError, match="one region"):
            layer._served(layer._eviction).hold(0, 2 << 20).__enter__()


def test_writes_ask_and_tell(tmp_path: Path) -> None:
    class Through(PresenceLayer):
        gated = True
        writes_through = True
        asked: ClassVar[list[tuple[int, int]]] = []
        told: ClassVar[list[tuple[Op, int, int]]] = []
        error = 0

        def may_write(self, offset: int, length: int) -> None:
            self.asked.append((offset, length))
            if self.error == errno.EDQUOT:
                raise OSError(self.error, "no")

        def written(self, op: Op, offset: int, length: int) -> None:
            self.told.append((op, offset, length))
            assert os.pread(self.upper_fd, length, offset) == b"x" * length
            if self.error:
                raise OSError(self.error, "no")

    layer = Through(Bytes(random.randbytes(SIZE)), tmp_path / "upper")
    with Disk(layer) as disk:
        disk.pwrite(b"x" * 512, 512)
        assert (layer.asked, layer.told) == ([(0, BLOCK)], [(Op.WRITE, 512, 512)])
        for layer.error in (errno.EDQUOT, errno.ENOSPC):
            with fails_with(errno.EIO if layer.error == errno.EDQUOT else layer.error):
                disk.pwrite(b"x" * 512, 512)
        assert (len(layer.asked), len(layer.told)) == (3, 2)


# ---- servers that are killed, and power cuts ----

KILLED = """
import os, signal, sys
from pathlib import Path
from pyublk.layers.presence import PresenceLayer
from pyublk.targets import File
from pyublk.testing import Disk
from pyublk.uapi import Op

disk = Disk(PresenceLayer(File(Path(sys.argv[1]), read_only=True), Path(sys.argv[2])))
disk.open()
disk.pwrite(b"1" * 4096, 0)
disk.flush()
disk.pwrite(b"2" * 4096, 4096)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_server_has_written_is_there(tmp_path: Path) -> None:
    base, upper = a_file(tmp_path, b"0" * SIZE), tmp_path / "upper"
    done = subprocess.run([sys.executable, "-c", KILLED, base, upper], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    live = upper.with_name("upper.live")
    assert MapFile.read_durable(upper).bits[0] == 1
    assert MapFile.read(upper).bits[0] == 3
    saved = live.read_bytes()
    disk = Disk(PresenceLayer(File(base, read_only=True), upper))
    for patience in range(1000):  # its ring lets go of its files a little later
        try:
            disk.open()
            break
        except OSError as error:
            if error.errno != errno.EBUSY or patience == 999:
                raise
            time.sleep(0.01)
    with closing(disk):
        assert disk.pread(12288, 0) == b"1" * 4096 + b"2" * 4096 + b"0" * 4096
    assert MapFile.read_durable(upper).bits[0] == 3
    assert not live.exists()
    # Of another boot: who knows what of the data came to the disk. Or of another map.
    found = MapFile.read_durable(upper)
    found.bits[0] = 1
    found.write(upper)
    live.write_bytes(saved)
    assert MapFile.read(upper).bits[0] == 1
    with Disk(PresenceLayer(File(base, read_only=True), upper)) as disk:
        assert disk.pread(8192, 0) == b"1" * 4096 + b"0" * 4096


class Machine:
    """What of the two files a power cut leaves: what was synced, and any of the rest."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, check: Callable[[], None]):
        self.folder = folder
        self.synced = {"upper": b"", "upper.map": b""}
        self._check = check
        self._fdatasync = os.fdatasync
        self._write_all = durable_module.write_all
        monkeypatch.setattr(durable_module.os, "fdatasync", self.fdatasync)
        monkeypatch.setattr(durable_module, "write_all", self.write_all)

    def fdatasync(self, fd: int) -> None:
        self._check()
        self._fdatasync(fd)
        self.sync(Path(f"/proc/self/fd/{fd}").readlink().name)
        self._check()

    def sync(self, name: str) -> None:
        self.synced[name] = (self.folder / name).read_bytes()

    def write_all(self, fd: int, data: bytes, offset: int) -> None:
        self._write_all(fd, data, offset)
        self._check()

    def cut(self, to: Path, chance: random.Random) -> None:
        """Of what was not synced, some pages of the data and some sectors of the map."""
        for name, unit in (("upper", 4096), ("upper.map", 512)):
            now, left = (self.folder / name).read_bytes(), bytearray(self.synced[name])
            left = left.ljust(len(now), b"\0")
            wanted = chance.choice([0, 0.3, 1])
            for at in range(0, len(now), unit):
                if chance.random() < wanted:
                    left[at : at + unit] = now[at : at + unit]
            (to / name).write_bytes(left)


@pytest.mark.parametrize("seed", range(3))
def test_a_power_cut_leaves_what_was_flushed_and_nothing_strange(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each step of flushes and evictions: a sector has what it had when the last flush ended, or
    what was written since."""

    class Evicting(PresenceLayer):
        evicts = True

    size, chance = 16 * BLOCK, random.Random(seed)
    below = Bytes(b"".join(sector(n, 0) for n in range(size // 512)))
    may_have = [{0} for _ in range(size // 512)]
    last = [0] * (size // 512)
    served, cuts = tmp_path / "served", tmp_path / "cut"
    served.mkdir()
    cuts.mkdir()
    checked = [0]

    def check() -> None:
        machine.cut(cuts, chance)
        left = PresenceLayer(Bytes(bytes(below.content)), cuts / "upper")
        with monkeypatch.context() as real:
            real.setattr(durable_module.os, "fdatasync", machine._fdatasync)
            real.setattr(durable_module, "write_all", machine._write_all)
            with Disk(left) as disk:
                found = disk.pread(size, 0)
        for number, versions in enumerate(may_have):
            content = found[number * 512 : number * 512 + 512]
            assert content in [sector(number, one) for one in versions], (number, content[:16])
        checked[0] += 1

    machine = Machine(served, monkeypatch, check)
    layer = Evicting(below, served / "upper")
    with Disk(layer) as disk:
        machine.sync("upper")
        machine.sync("upper.map")
        for version in range(1, 30):
            first = chance.randrange(size // 512)
            count = min(chance.choice([1, 3, 8, 20]), size // 512 - first)
            for number in range(first, first + count):
                may_have[number].add(version)
                last[number] = version
            disk.pwrite(
                b"".join(sector(n, version) for n in range(first, first + count)), first * 512
            )
            check()
            if chance.random() < 0.3:
                disk.flush()
                machine.sync("upper")  # by the ring, where the map is synced already
                may_have[:] = [{version} for version in last]
                check()
            if chance.random() < 0.3:  # as a cache does with what is durable below
                disk.flush()
                machine.sync("upper")  # by the ring, where the map is synced already
                may_have[:] = [{version} for version in last]
                below.content[:] = disk.pread(size, 0)
                layer.evict([(chance.randrange(8) * BLOCK, 8 * BLOCK)])
                check()
    assert checked[0] > 60


def sector(number: int, version: int) -> bytes:
    return f"{number:8}{version:8}".encode() * 32


def test_a_flush_that_fails_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = PresenceLayer(Bytes(bytes(SIZE)), tmp_path / "upper")
    real = os.fdatasync

    def fails(fd: int) -> None:
        raise OSError(errno.EIO, "no")

    with Disk(layer) as disk:
        disk.pwrite(b"x" * BLOCK, 0)
        monkeypatch.setattr(durable_module.os, "fdatasync", fails)
        for _ in range(2):
            with fails_with(errno.EIO):
                disk.flush()
            monkeypatch.setattr(durable_module.os, "fdatasync", real)
        assert MapFile.read_durable(layer.file).bits[0] == 0
    assert (tmp_path / "upper.live").exists()  # what is in memory is all there is
    with Disk(PresenceLayer(Bytes(bytes(SIZE)), tmp_path / "upper")) as disk:
        assert disk.pread(BLOCK, 0) == b"x" * BLOCK
        disk.flush()
    assert MapFile.read_durable(layer.file).bits[0] == 1


# ---- its files ----


def made(folder: Path, **options: Any) -> Path:
    upper = folder / "upper"
    with Disk(PresenceLayer(Bytes(bytes(SIZE)), upper, **options)) as disk:
        disk.pwrite(b"x" * BLOCK, 0)
    return upper


def spoilt(folder: Path, at: int, data: bytes) -> None:
    with (folder / "upper.map").open("r+b") as file:
        file.seek(at)
        file.write(data)


def cut_short(path: Path, size: int) -> None:
    os.truncate(path, size)


STRANGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda folder: spoilt(folder, 0, b"hello"), "is not the map of an overlay or a cache"),
    "checksum": (lambda folder: spoilt(folder, 16, b"\x01"), "is damaged"),
    "version": (lambda folder: spoilt(folder, 8, b"\x07"), "version 7"),
    "short map": (lambda folder: cut_short(folder / "upper.map", HEADER_BYTES + 1), "is cut short"),
    "short file": (lambda folder: cut_short(folder / "upper", BLOCK), "was cut short"),
    "no map": (lambda folder: (folder / "upper.map").unlink(), "name another file"),
    "no file": (lambda folder: (folder / "upper").unlink(), "is not there"),
    "a FIFO": (
        lambda folder: ((folder / "upper.map").unlink(), os.mkfifo(folder / "upper.map")),
        "no regular file",
    ),
}


@pytest.mark.parametrize("how", STRANGE)
def test_what_is_none_of_ours_is_refused(how: str, tmp_path: Path) -> None:
    spoil, message = STRANGE[how]
    made(tmp_path)
    spoil(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=message) as caught:
        PresenceLayer(Bytes(bytes(SIZE)), tmp_path / "upper").open()
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("below", "options", "message"),
    [
        (SIZE, {"granularity": 8192}, "not of 8192"),
        (SIZE, {"size": 2 * SIZE}, "leave the size out"),
        (SIZE // 2, {}, "was cut short"),
    ],
)
def test_a_map_is_of_one_disk(
    below: int, options: dict[str, int], message: str, tmp_path: Path
) -> None:
    upper = made(tmp_path)
    with pytest.raises(ValueError, match=message):
        PresenceLayer(Bytes(bytes(below)), upper, **options).open()  # type: ignore[arg-type]
    with Disk(PresenceLayer(Bytes(bytes(2 * SIZE)), upper)) as disk:  # which has grown
        assert disk.pread(BLOCK, 0) == b"x" * BLOCK


def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Refusing(PresenceLayer):
        def check_metadata(self, metadata: dict[str, Any]) -> None:
            raise ValueError("no")

    upper = tmp_path / "upper"
    for layer in (
        PresenceLayer(File(tmp_path / "missing", read_only=True), upper),
        PresenceLayer(Bytes(bytes(SIZE)), upper, size=SIZE // 2),
        PresenceLayer(Bytes(bytes(SIZE)), upper, metadata={"text": "x" * HEADER_BYTES}),
        PresenceLayer(Bytes(bytes(SIZE)), upper, read_only=True),
        PresenceLayer(None, upper),
        Refusing(Bytes(bytes(SIZE)), upper),
    ):
        with pytest.raises((ValueError, OSError)):
            layer.open()
        assert list(tmp_path.iterdir()) == []
    upper.touch()  # what a start leaves that was killed
    assert made(tmp_path) == upper


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": 6000}, "power of two"),
        ({"granularity": 512}, "4096"),
        ({"workers": 0}, "1"),
    ],
)
def test_arguments(options: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        PresenceLayer(Bytes(bytes(SIZE)), tmp_path / "upper", **options)  # type: ignore[arg-type]


def test_one_disk_writes_or_many_read(tmp_path: Path) -> None:
    upper = made(tmp_path)
    with Disk(PresenceLayer(Bytes(bytes(SIZE)), upper)), fails_with(errno.EBUSY):
        PresenceLayer(Bytes(bytes(SIZE)), upper, read_only=True).open()
    before = (tmp_path / "upper.map").read_bytes()
    one, two = (PresenceLayer(Bytes(bytes(SIZE)), upper, read_only=True) for _ in range(2))
    with Disk(one) as disk, Disk(two) as other:
        assert disk.pread(8192, 0) == other.pread(8192, 0) == b"x" * BLOCK + bytes(BLOCK)
    assert (tmp_path / "upper.map").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["upper", "upper.map"]


def test_a_disk_that_is_closed_keeps_no_file(tmp_path: Path) -> None:
    upper = made(tmp_path)
    gc.disable()
    try:
        with Disk(PresenceLayer(Bytes(bytes(SIZE)), upper)) as disk:
            disk.pread(512, 4096)
        with Disk(PresenceLayer(Bytes(bytes(SIZE)), upper, read_only=True)) as disk:
            disk.pread(512, 8192)
        del disk
        numbers = [int(path.name) for path in Path("/proc/self/fd").iterdir()]
        opened = []
        for number in numbers:
            with suppress(OSError):
                opened.append(os.readlink(f"/proc/self/fd/{number}"))
        assert not [name for name in opened if str(tmp_path) in name]
    finally:
        gc.enable()
    with pytest.raises(AttributeError):
        _ = PresenceLayer(None, upper).below


def test_as_many_fetches_as_serve_what_is_below(tmp_path: Path) -> None:
    class Wide(Target):
        concurrency = "parallel"
        workers = 12

        def __init__(self) -> None:
            super().__init__(size=SIZE, read_only=True)
            self.all_there = threading.Barrier(self.workers)

        def read(self, offset: int, buffer: memoryview) -> None:
            self.all_there.wait(10)
            buffer[:] = bytes([offset // BLOCK]) * len(buffer)

    layer = PresenceLayer(Wide(), tmp_path / "upper")
    with Disk(layer, max_io_size=BLOCK, depth=12) as disk:
        assert disk.pread(12 * BLOCK, 0)[::BLOCK] == bytes(range(12))


def test_fetches_take_over_the_memory_of_those_before_them() -> None:
    buffers = fetching._Buffers()
    with buffers.lend(BLOCK) as first:
        with buffers.lend(fetching.PIECE) as second:
            second[:] = b"2" * fetching.PIECE
        with buffers.lend(BLOCK) as third:
            assert bytes(third) == b"2" * BLOCK  # not fresh
        with buffers.lend(2 * fetching.PIECE) as large:
            assert (len(large), bytes(large[:BLOCK])) == (2 * fetching.PIECE, bytes(BLOCK))
        with pytest.raises(OSError, match="gone"), buffers.lend(BLOCK):
            raise OSError("gone")
        assert len(first) == BLOCK
    with buffers.lend(BLOCK) as alone:
        assert bytes(alone) == bytes(BLOCK)  # nothing was kept when none was under way


def test_its_record(tmp_path: Path) -> None:
    upper = made(tmp_path, metadata={"base": "b"})
    assert PresenceLayer.read_header(upper).record == {"base": "b"}
    layer = PresenceLayer(Bytes(bytes(SIZE)), upper)
    with Disk(layer) as disk:
        disk.pwrite(b"y" * BLOCK, BLOCK)
        layer.set_metadata({"base": "c"})
        assert layer.metadata == {"base": "c"}
        with pytest.raises(ValueError, match="has at most"):
            layer.set_metadata({"base": "c" * HEADER_BYTES})
        disk.flush()
        with pytest.raises(ValueError, match="cannot have another size: its map is of this one"):
            layer.resize(2 * SIZE, lambda size: None)
        assert layer.status() == layer.counters()
    assert layer.status() is None
    found = MapFile.read(upper)
    assert (found.record, found.bits[0]) == ({"base": "c"}, 3)


def test_maps_without_a_disk(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    upper.write_bytes(bytes(SIZE))
    found = MapFile.new(size=SIZE, below_size=SIZE - 9 * BLOCK - 512, record={"a": 1})
    assert found.bits[: SIZE // BLOCK // 8] == bytes(6) + b"\xc0\xff"
    found.write(upper)
    again = MapFile.read(upper)
    assert (again.size, again.granularity, again.record) == (SIZE, BLOCK, {"a": 1})
    assert again.bits == found.bits
    assert len(again.bits) == PAGE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["upper", "upper.map"]
    with pytest.raises(NotAMap):
        Header.unpacked(upper, b"")


# ---- metadata of other mapped targets ----


class Noted(MappedTarget):
    """A file that notes of each flush what of the data is in the file then."""

    error = 0

    def __init__(self, file: Path) -> None:
        super().__init__([file], size=SIZE)
        self.seen: list[bytes] = []

    def sync_metadata(self) -> None:
        self.seen.append(os.pread(self.backing[0].fd, 512, 0))
        if self.error:
            raise OSError(self.error, "no")


def test_metadata_is_synced_after_the_data_and_before_the_answer(tmp_path: Path) -> None:
    target = Noted(tmp_path / "file")
    with Disk(target) as disk:
        assert "write_fua" not in target.profile().operations
        disk.pwrite(b"1" * 512, 0)
        assert target.seen == []
        disk.flush()
        assert target.seen == [b"1" * 512]
        target.error = errno.ENOSPC
        with fails_with(errno.ENOSPC):
            disk.flush()
        target.error = 0
        disk.flush()
        assert len(target.seen) == 3


@pytest.fixture(autouse=True)
def _no_threads_stay() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before
