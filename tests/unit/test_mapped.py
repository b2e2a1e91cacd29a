"""Mapped targets without a kernel's disk: the ring's I/O is real, on this machine's files."""

import errno
import fcntl
import gc
import json
import os
import random
import select
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import pyublk
from pyublk import Layout, MappedQueue, MappedTarget, Mapper
from pyublk._native import MirrorLayout
from pyublk.targets import File, Linear, Mirror, Slice, Stripe, copying
from pyublk.targets.record import LegState
from pyublk.testing import Disk
from pyublk.uapi import Op

SIZE = 1 << 20


def make(folder: Path, name: str, size: int) -> Path:
    path = folder / name
    path.write_bytes(os.urandom(size))
    return path


class Chunked(MappedTarget):
    """Two files, 8 KiB from each in turn, said for each request."""

    def map(self, op: object, offset: int, length: int) -> object:
        parts = []
        while length:
            size = min(length, 8192 - offset % 8192)
            row = offset // 8192
            parts.append((row % 2, row // 2 * 8192 + offset % 8192, size))
            offset, length = offset + size, length - size
        return parts


LAYOUTS: dict[str, Callable[[Path], MappedTarget]] = {
    "file": lambda folder: File(make(folder, "a", SIZE)),
    "linear": lambda folder: Linear(
        make(folder, "a", SIZE // 2), make(folder, "b", SIZE // 4), make(folder, "c", SIZE // 4)
    ),
    "stripe": lambda folder: Stripe(*(make(folder, n, SIZE // 4) for n in "abcd"), chunk=4096),
    "stripe of one sector": lambda folder: Stripe(
        *(make(folder, n, SIZE // 4) for n in "abcd"), chunk=512
    ),
    "mirror": lambda folder: Mirror(make(folder, "a", SIZE), make(folder, "b", SIZE)),
    "slice": lambda folder: Slice(make(folder, "a", SIZE * 2), offset=SIZE // 2, size=SIZE),
    "map": lambda folder: Chunked([make(folder, n, SIZE // 2) for n in "ab"], size=SIZE),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_requests_read_what_was_written(layout: str, tmp_path: Path) -> None:
    chance = random.Random(layout)
    target = LAYOUTS[layout](tmp_path)
    with Disk(target, depth=4, max_io_size=128 * 1024) as disk:
        assert disk.size == SIZE
        expected = bytearray(disk.pread(SIZE, 0))
        for _ in range(200):
            length = chance.randrange(1, 512) * 512
            offset = chance.randrange((SIZE - length) // 512 + 1) * 512
            if (what := chance.random()) < 0.45:
                data = chance.randbytes(length)
                disk.pwrite(data, offset, fua=chance.random() < 0.1)
                expected[offset : offset + length] = data
            elif what < 0.9:
                assert disk.pread(length, offset) == expected[offset : offset + length]
            elif what < 0.95:
                disk.write_zeroes(offset, length, unmap=chance.random() < 0.5)
                expected[offset : offset + length] = bytes(length)
            else:
                disk.flush()
        assert disk.pread(SIZE, 0) == expected
    # And after a restart.
    with Disk(target) as disk:
        assert disk.pread(SIZE, 0) == expected


def test_a_stripe_puts_the_chunks_where_raid_0_does(tmp_path: Path) -> None:
    files = [make(tmp_path, name, 64 * 1024) for name in "abc"]
    data = os.urandom(48 * 1024)
    with Disk(Stripe(*files, chunk=4096)) as disk:
        disk.pwrite(data, 0)
    for number, file in enumerate(files):
        chunks = [data[at : at + 4096] for at in range(number * 4096, len(data), 3 * 4096)]
        assert file.read_bytes()[: len(chunks) * 4096] == b"".join(chunks)


def test_discards_punch_holes(tmp_path: Path) -> None:
    file = make(tmp_path, "a", SIZE)
    with Disk(File(file)) as disk:
        disk.flush()
        os.sync()
        before = file.stat().st_blocks
        disk.discard(65536, 262144)
        assert disk.pread(262144, 65536) == bytes(262144)
    assert file.stat().st_blocks <= before - 262144 // 512 // 2


def test_a_file_that_shrank_fails_reads(tmp_path: Path) -> None:
    file = make(tmp_path, "a", SIZE)
    with Disk(File(file)) as disk:
        os.truncate(file, SIZE // 2)
        with pytest.raises(OSError, match="READ at 524288 failed") as failure:
            disk.pread(4096, SIZE // 2)
        assert failure.value.errno == errno.EIO
        # Half of it is there: no short success.
        with pytest.raises(OSError, match="failed"):
            disk.pread(8192, SIZE // 2 - 4096)
        assert len(disk.pread(4096, 0)) == 4096


def test_map_that_raises_or_does_not_add_up_fails_the_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong(MappedTarget):
        answer: object = 0

        def map(self, op: object, offset: int, length: int) -> object:
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    target = Wrong([make(tmp_path, "a", SIZE)])
    with Disk(target) as disk:
        for answer, number in (
            ([(0, 0, 512)], errno.EIO),
            ([(1, 0, 4096)], errno.EIO),
            (None, errno.EIO),
            (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
            (RuntimeError("broken"), errno.EIO),
        ):
            target.answer = answer
            with pytest.raises(OSError, match="READ at 0 failed") as failure:
                disk.pread(4096, 0)
            assert failure.value.errno == number
        target.answer = 0
        assert len(disk.pread(4096, 0)) == 4096
    assert "its parts must be 4096 bytes together" in caplog.text


def test_bad_layouts_are_refused_by_name(tmp_path: Path) -> None:
    small, large = make(tmp_path, "small", 4096), make(tmp_path, "large", SIZE)
    odd = make(tmp_path, "odd", 1000)

    class Outside(MappedTarget):
        def extents(self) -> list[tuple[int, int, int]]:
            return [(0, 4096, 4096)]

    cases: list[tuple[MappedTarget, str]] = [
        (Outside([small]), "extent at 4096 of 4096 bytes is not inside .*small, which has 4096"),
        (Linear(large, odd), "odd has 1000 bytes: a disk needs a positive multiple"),
        (Stripe(small, large), "small has 4096 bytes, less than one chunk of 65536"),
        (Stripe(large, large, chunk=1000), "chunk is 1000 bytes: it must be a positive multiple"),
        (Stripe(large, large, size=4 * SIZE), "is more than the files give, 2097152 bytes"),
        (Slice(large, offset=100), "must be positive multiples of the block size, 512"),
        (Slice(large, partition=1), "large has no partition 1; there is: none"),
        (Mirror(small, large, size=8192), "more than the smallest leg has, 4096"),
        (Chunked([small, large]), "with map and several files needs a size"),
    ]
    for target, words in cases:
        with pytest.raises(ValueError, match=words):
            target.open()
        assert not target.backing
    with pytest.raises(ValueError, match="at least one file"):
        MappedTarget([])
    with pytest.raises(ValueError, match="a mirror needs at least two files"):
        Mirror(large)
    most = MirrorLayout.MAX_LEGS
    with pytest.raises(ValueError, match=f"a mirror has at most {most} files, not {most + 1}"):
        Mirror(*[Path("leg")] * (most + 1))
    with pytest.raises(ValueError, match="either a partition, or offset and size"):
        Slice(large, partition=1, offset=512)


def test_slice_finds_partitions(tmp_path: Path) -> None:
    mbr = bytearray(SIZE)
    struct.pack_into("<4xB3xII", mbr, 446 + 16, 0x83, 100, 50)
    mbr[510:512] = b"\x55\xaa"
    mbr[51200 : 51200 + 5] = b"hello"
    image = tmp_path / "mbr.img"
    image.write_bytes(mbr)
    with Disk(Slice(image, partition=2)) as disk:
        assert disk.size == 50 * 512
        assert disk.pread(512, 0)[:5] == b"hello"
    with pytest.raises(ValueError, match="has no partition 1; there is: 2"):
        Slice(image, partition=1).open()


def gpt_image(
    path: Path,
    *,
    sector: int = 512,
    table: int = 2,
    count: int = 128,
    entry: int = 128,
    partitions: dict[int, tuple[int, int]],
) -> Path:
    """An image with a GPT; partitions are first and last sector by number."""
    image = bytearray(SIZE)
    image[sector : sector + 8] = b"EFI PART"
    struct.pack_into("<QII", image, sector + 72, table, count, entry)
    for number, (first, last) in partitions.items():
        place = table * sector + (number - 1) * entry
        image[place] = 1
        struct.pack_into("<QQ", image, place + 32, first, last)
    path.write_bytes(image)
    return path


@pytest.mark.parametrize(
    ("number", "shape"),
    [
        (3, {}),
        (128, {}),
        (3, {"sector": 4096}),
        (1000, {"count": 1024}),  # beyond the 34 sectors of the usual table
        (5, {"table": 1000}),
        (100, {"entry": 512}),
    ],
)
def test_slice_finds_partitions_of_a_gpt(
    tmp_path: Path, number: int, shape: dict[str, int]
) -> None:
    image = gpt_image(tmp_path / "gpt.img", partitions={number: (40, 59), 2: (60, 69)}, **shape)
    sector = shape.get("sector", 512)
    with Disk(Slice(image, partition=number, block_size=sector)) as disk:
        assert disk.size == 20 * sector
    with pytest.raises(ValueError, match=f"has no partition 7; there is: 2, {number}"):
        Slice(image, partition=7, block_size=sector).open()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"entry": 0, "count": 0xFFFFFFFF}, "says that it has 4294967295 entries of 0 bytes: an"),
        ({"entry": 64}, "128 entries of 64 bytes: an entry has 128 bytes, 256, 512 and so on"),
        ({"entry": 136}, "128 entries of 136 bytes: "),
        ({"count": 8193}, "8193 entries of 128 bytes: .* and the table at most 1048576$"),
        ({"table": SIZE // 512 - 31}, "gpt.img ends within the table of its GPT$"),
        ({"table": 1 << 63}, "gpt.img ends within the table of its GPT$"),
    ],
)
def test_a_gpt_that_cannot_be_is_refused(
    tmp_path: Path, shape: dict[str, int], message: str
) -> None:
    image = gpt_image(tmp_path / "gpt.img", partitions={}, **shape)
    with pytest.raises(ValueError, match=message):
        Slice(image, partition=1).open()


def test_a_gpt_whose_header_is_cut_off(tmp_path: Path) -> None:
    image = tmp_path / "cut.img"
    image.write_bytes(bytes(512) + b"EFI PART")
    with pytest.raises(ValueError, match=r"cut\.img ends within the header of its GPT"):
        Slice(image, partition=1, size=None).open()


# ---- mirrors ----


def mirror_of(folder: Path, **options: object) -> Mirror:
    """Of two files, in step when it is made for the first time."""
    files = [folder / name for name in "ab"]
    if not all(file.exists() for file in files):
        for file in files:
            file.write_bytes(bytes(SIZE * 4))
        place = options.get("state", folder / "a.mirror")
        assert isinstance(place, Path)
        if not place.exists():
            put_on_record(place, *((file, "synced") for file in files))
    return Mirror(folder / "a", folder / "b", **options)  # type: ignore[arg-type]


def put_on_record(place: Path, *legs: tuple[Path, str], active: bool = False) -> None:
    found = [{"path": str(path), "state": state, "since": None} for path, state in legs]
    place.write_text(json.dumps({"active": active, "legs": found}))


def states(mirror: Mirror) -> list[str]:
    return [leg["state"] for leg in mirror.status()["legs"]]


def record(folder: Path) -> list[str]:
    return [leg["state"] for leg in json.loads((folder / "a.mirror").read_text())["legs"]]


def test_a_mirror_lives_on_without_a_leg_and_remembers(tmp_path: Path) -> None:
    mirror = mirror_of(tmp_path)
    data = os.urandom(65536)
    with Disk(mirror) as disk:
        disk.pwrite(data, 0)
        os.truncate(tmp_path / "a", 0)
        assert disk.pread(65536, 0) == data
        assert states(mirror) == ["failed", "synced"]
        assert record(tmp_path) == ["failed", "synced"]
        assert mirror.degraded
        disk.pwrite(data[::-1], 0)
    os.truncate(tmp_path / "a", SIZE * 4)
    # The leg that missed a write is not read, also after a restart.
    mirror = mirror_of(tmp_path)
    with Disk(mirror) as disk:
        assert states(mirror) == ["failed", "synced"]
        assert disk.pread(65536, 0) == data[::-1]
    mirror = mirror_of(tmp_path, rebuild=True)
    with Disk(mirror) as disk:
        assert mirror.wait_in_step(30)
        assert states(mirror) == ["synced", "synced"]
        assert disk.pread(65536, 0) == data[::-1]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_last_leg_s_errors_are_the_client_s(tmp_path: Path) -> None:
    mirror = mirror_of(tmp_path)
    with Disk(mirror) as disk:
        os.truncate(tmp_path / "a", 0)
        os.truncate(tmp_path / "b", 0)
        with pytest.raises(OSError, match="READ at 0 failed"):
            disk.pread(4096, 0)
        # Nobody is better than the other: both stay.
        assert "synced" in states(mirror)


def test_the_last_leg_in_step_is_never_given_up(tmp_path: Path) -> None:
    mirror = mirror_of(tmp_path)
    with Disk(mirror) as disk:
        mirror.leg_failed(0, errno.EIO)  # as two queues tell it
        mirror.leg_failed(1, errno.EIO)
        assert states(mirror) == ["failed", "synced"]
        # Nor for a leg that is being brought in step, where writes end well.
        mirror.layout.set_leg_state(0, LegState.RESYNC)
        broken = os.open(tmp_path / "b", os.O_RDONLY)
        mirror.layout.replace_file(1, broken, False, False)
        with pytest.raises(OSError, match="WRITE at 0 failed"):
            disk.pwrite(b"x" * 4096, 0)
        assert states(mirror) == ["resync", "synced"]
        assert disk.pread(4096, 0) == bytes(4096)
        os.close(broken)


def test_nothing_is_written_while_a_failure_is_not_on_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    mirror = mirror_of(tmp_path, state=folder / "state")
    broken = -1
    with Disk(mirror) as disk:
        broken = os.open(tmp_path / "a", os.O_RDONLY)
        mirror.layout.replace_file(0, broken, False, False)
        folder.rename(tmp_path / "away")
        for _ in range(2):
            with pytest.raises(OSError, match="WRITE at 0 failed") as failure:
                disk.pwrite(b"x" * 4096, 0)
            assert failure.value.errno == errno.EIO
        with pytest.raises(OSError, match="FLUSH at 0 failed"):
            disk.flush()
        assert len(disk.pread(SIZE * 4, 0)) == SIZE * 4
        assert states(mirror) == ["failed", "synced"]
        (tmp_path / "away").rename(folder)
        disk.pwrite(b"y" * 4096, 0)
        legs = json.loads((folder / "state").read_text())["legs"]
        assert [leg["state"] for leg in legs] == ["failed", "synced"]
        folder.rename(tmp_path / "away")  # the close does without
    os.close(broken)
    assert not mirror.backing
    assert caplog.text.count("cannot write the record") == 2


def test_a_leg_is_replaced_while_the_disk_is_written(tmp_path: Path) -> None:
    mirror = mirror_of(tmp_path)
    spare = make(tmp_path, "spare", SIZE * 4)
    chance = random.Random(1)
    with Disk(mirror) as disk:
        disk.pwrite(os.urandom(SIZE * 4), 0)
        os.truncate(tmp_path / "a", 0)
        disk.pread(4096, 0)
        with pytest.raises(ValueError, match="has not failed"):
            mirror.replace(1, spare)
        with pytest.raises(ValueError, match="the mirror needs"):
            mirror.replace(0, make(tmp_path, "small", 4096))
        mirror.replace(0, spare)
        while not mirror.wait_in_step(0):
            disk.pwrite(chance.randbytes(4096), chance.randrange(SIZE * 4 // 4096) * 4096)
        assert states(mirror) == ["synced", "synced"]
    assert spare.read_bytes() == (tmp_path / "b").read_bytes()
    assert json.loads((tmp_path / "a.mirror").read_text())["legs"][0]["path"] == str(spare)


def test_the_record_is_found_from_a_new_first_leg(tmp_path: Path) -> None:
    mirror = mirror_of(tmp_path)
    spare, b = make(tmp_path, "spare", SIZE * 4), tmp_path / "b"
    with Disk(mirror) as disk:
        disk.pwrite(os.urandom(SIZE * 4), 0)
        for path in (spare, tmp_path / "a", spare):
            mirror.leg_failed(0, errno.EIO)
            mirror.replace(0, path)
        assert mirror.wait_in_step(30)
        mirror.leg_failed(0, errno.EIO)
    with Disk(Mirror(spare, b)) as disk:
        assert disk.pread(SIZE * 4, 0) == b.read_bytes()
    assert record(tmp_path) == ["failed", "synced"]
    with pytest.raises(ValueError, match=r"spare\.mirror is the record"):
        Mirror(b, spare).open()
    (tmp_path / "a.mirror").rename(tmp_path / "away")
    with pytest.raises(ValueError, match=r"spare\.mirror points to .*a\.mirror, which is not"):
        Mirror(spare, b).open()
    (tmp_path / "away").rename(tmp_path / "spare.mirror")
    with Disk(Mirror(spare, b)) as disk:
        assert disk.pread(SIZE * 4, 0) == b.read_bytes()


def test_without_a_record_the_first_leg_is_copied_to_the_others(tmp_path: Path) -> None:
    first = make(tmp_path, "a", SIZE * 4)
    with open(first, "r+b") as file:
        file.seek(SIZE)
        file.write(bytes(2 * SIZE))
    fresh = tmp_path / "b"
    fresh.touch()
    os.truncate(fresh, SIZE * 4)
    mirror = Mirror(first, fresh)
    with Disk(mirror) as disk:
        assert disk.pread(SIZE * 4, 0) == first.read_bytes()
        assert mirror.wait_in_step(30)
        assert states(mirror) == ["synced", "synced"]
    assert fresh.read_bytes() == first.read_bytes()
    assert fresh.stat().st_blocks * 512 < 3 * SIZE  # where it was the same it stays a hole


def test_a_new_leg_that_cannot_be_read_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    legs = [make(tmp_path, name, SIZE * 2) for name in "ab"]

    def told(write: bool, path: Path, offset: int) -> None:
        if not write and path == legs[1]:
            raise OSError(errno.EIO, "unreadable")

    tell_copies(monkeypatch, told)
    mirror = Mirror(*legs)
    with Disk(mirror):
        assert mirror.wait_in_step(30)
    assert legs[0].read_bytes() == legs[1].read_bytes()


def test_a_leg_that_failed_is_written_also_where_it_looks_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page cache may have what the disk has not."""
    written: list[int] = []
    tell_copies(monkeypatch, lambda write, path, at: written.append(at) if write else None)
    mirror = mirror_of(tmp_path)
    with Disk(mirror):
        mirror.leg_failed(1, errno.EIO)
        mirror.replace(1)
        assert mirror.wait_in_step(30)
    assert written == [0, SIZE, 2 * SIZE, 3 * SIZE]


@pytest.mark.parametrize("known", [False, True])
def test_a_record_beside_another_leg_is_not_passed_over(tmp_path: Path, known: bool) -> None:
    mirror = mirror_of(tmp_path)
    a, b, c = (tmp_path / name for name in "abc")
    with Disk(mirror) as disk:
        mirror.leg_failed(1, errno.EIO)
        disk.pwrite(b"x" * 4096, 0)
    if known:
        put_on_record(tmp_path / "b.mirror", (b, "synced"), (a, "synced"))
    with pytest.raises(ValueError, match=r"a\.mirror is the record of a mirror with a as "):
        Mirror(b, a).open()
    if not known:
        assert not (tmp_path / "b.mirror").exists()
        with Disk(Mirror(b, a, state=tmp_path / "a.mirror")) as disk:
            assert disk.pread(4096, 0) == b"x" * 4096
    # Nor by a replacement, which the next start would refuse.
    make(tmp_path, "c", SIZE * 4)
    put_on_record(tmp_path / "c.mirror", (c, "synced"))
    (tmp_path / "b.mirror").unlink(missing_ok=True)
    mirror = mirror_of(tmp_path)
    with Disk(mirror), pytest.raises(ValueError, match=r"c\.mirror is the record"):
        mirror.replace(1, c)


def test_a_replacement_with_larger_blocks_than_the_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = mirror_of(tmp_path)
    spare = make(tmp_path, "spare", SIZE * 4)
    with Disk(mirror) as disk:
        mirror.leg_failed(1, errno.EIO)
        real = mirror.open_file
        with monkeypatch.context() as patch:
            patch.setattr(mirror, "open_file", lambda path: replace(real(path), block_size=4096))
            before = len(os.listdir("/proc/self/fd"))
            with pytest.raises(ValueError, match="spare takes blocks of 4096 bytes, larger"):
                mirror.replace(1, spare)
            assert len(os.listdir("/proc/self/fd")) == before
        assert states(mirror) == ["synced", "failed"]
        disk.pwrite(b"x" * 512, 0)


def tell_copies(monkeypatch: pytest.MonkeyPatch, told: Callable[[bool, Path, int], None]) -> None:
    """Before a mirror's copier reads or writes: `told(is a write, path, offset)`."""
    real = copying._transfer

    def transfer(call: object, fd: int, memory: memoryview, offset: int) -> None:
        told(call is os.pwritev, Path(f"/proc/self/fd/{fd}").readlink(), offset)
        real(call, fd, memory, offset)

    monkeypatch.setattr(copying, "_transfer", transfer)


def hold_copies(
    monkeypatch: pytest.MonkeyPatch, at: int | None = None
) -> tuple[threading.Event, threading.Event]:
    """A mirror's copier hangs when it writes (`at` that offset): events for that it does, and for
    that it may go on."""
    reached, go_on = threading.Event(), threading.Event()

    def told(write: bool, path: Path, offset: int) -> None:
        if write and at in (None, offset):
            reached.set()
            assert go_on.wait(60)

    tell_copies(monkeypatch, told)
    return reached, go_on


def test_a_leg_that_is_replaced_while_it_is_copied_to_is_copied_to_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on = hold_copies(monkeypatch, at=2 * SIZE)
    mirror = mirror_of(tmp_path)
    spare = make(tmp_path, "spare", SIZE * 4)
    with Disk(mirror) as disk:
        disk.pwrite(os.urandom(SIZE * 4), 0)
        mirror.leg_failed(1, errno.EIO)
        mirror.replace(1)
        assert reached.wait(30)
        mirror.leg_failed(1, errno.EIO)
        mirror.replace(1, spare)
        go_on.set()
        assert mirror.wait_in_step(30)
        assert states(mirror) == ["synced", "synced"]
    assert spare.read_bytes() == (tmp_path / "a").read_bytes()


def test_a_leg_that_hangs_while_it_is_copied_to_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on = hold_copies(monkeypatch)
    mirror = mirror_of(tmp_path, leg_timeout=0.3)
    try:
        with Disk(mirror) as disk:
            mirror.leg_failed(1, errno.EIO)
            mirror.replace(1)
            assert reached.wait(30)
            disk.pwrite(b"x" * 4096, 0)  # to the region that was being copied
            assert mirror.wait_in_step(30) is False
            assert states(mirror) == ["synced", "failed"]
            with pytest.raises(ValueError, match="b still holds requests"):
                mirror.replace(1)
            go_on.set()
            for job in mirror._jobs:
                job.join(30)
            mirror.replace(1)
            assert mirror.wait_in_step(30)
    finally:
        go_on.set()


def test_a_file_s_failure_is_not_charged_to_the_next_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    mirror = mirror_of(tmp_path, state=folder / "state")
    with Disk(mirror) as disk:
        folder.rename(tmp_path / "away")
        mirror.leg_failed(1, errno.EIO, 0)
        mirror.replace(1, make(tmp_path, "spare", SIZE * 4))
        with pytest.raises(OSError, match="WRITE at 0 failed"):
            disk.pwrite(b"x" * 4096, 0)  # it is still not on record that a leg had failed
        (tmp_path / "away").rename(folder)
        disk.pwrite(b"x" * 4096, 0)
        mirror.leg_failed(1, errno.ETIMEDOUT, 0)  # by a queue that notices late
        assert mirror.wait_in_step(30)
        # The same file, opened again, is the same.
        mirror.leg_failed(1, errno.EIO, 1)
        mirror.replace(1, tmp_path / "spare")
        mirror.leg_failed(1, errno.EIO, 1)
        assert states(mirror) == ["synced", "failed"]
        # And so is the first one, whenever it comes back.
        mirror.replace(1, tmp_path / "b")
        mirror.leg_failed(1, errno.EIO, 0)
        assert states(mirror) == ["synced", "failed"]
    assert "Success" not in caplog.text


def test_a_leg_has_two_files_that_hang_and_no_more(tmp_path: Path) -> None:
    mirror = mirror_of(tmp_path, leg_timeout=0.2)
    spares = [make(tmp_path, name, SIZE * 4) for name in ("spare", "other")]
    pipes = [os.pipe(), os.pipe()]
    with Disk(mirror) as disk:
        for hanging, spare in zip((end for _, end in pipes), spares, strict=True):
            fcntl.fcntl(hanging, fcntl.F_SETPIPE_SZ, 4096)
            mirror.layout.replace_file(1, hanging, False, False)
            disk.pwrite(b"x" * 65536, 0)
            assert states(mirror) == ["synced", "failed"]
            if spare == spares[0]:
                mirror.replace(1, spare)
                assert mirror.wait_in_step(30)
        with pytest.raises(ValueError, match=r"cannot have a third file while .*spare and the one"):
            mirror.replace(1, spares[1])
        while mirror.layout.leg_orphans(1)[1]:
            os.read(pipes[0][0], 4096)
            disk.pread(4096, 0)
        mirror.replace(1, spares[1])
        assert mirror.wait_in_step(30)
    for end in (*pipes[0], *pipes[1]):
        os.close(end)


def test_a_leg_that_may_write_late_is_not_taken_back(tmp_path: Path) -> None:
    mirror = mirror_of(tmp_path, leg_timeout=0.2)
    spare = make(tmp_path, "spare", SIZE * 4)
    output, hanging = os.pipe()
    fcntl.fcntl(hanging, fcntl.F_SETPIPE_SZ, 4096)
    with Disk(mirror) as disk:
        mirror.layout.replace_file(1, hanging, False, False)
        disk.pwrite(b"x" * 65536, 0)
        assert states(mirror) == ["synced", "failed"]
        for again in (None, tmp_path / "b"):
            with pytest.raises(ValueError, match="b still holds requests"):
                mirror.replace(1, again)
        mirror.replace(1, spare)
        assert mirror.wait_in_step(30)
        mirror.leg_failed(1, errno.EIO)
        with pytest.raises(ValueError, match="b still holds requests"):
            mirror.replace(1, tmp_path / "b")
        while any(mirror.layout.leg_orphans(1)):
            os.read(output, 4096)
            disk.pread(4096, 0)
        mirror.replace(1, tmp_path / "b")
        assert mirror.wait_in_step(30)
    os.close(output)
    os.close(hanging)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_record_names_files_whatever_directory_they_were_named_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "spare", SIZE * 4)
    monkeypatch.chdir(tmp_path)
    mirror = mirror_of(tmp_path)
    with Disk(mirror):
        mirror.leg_failed(1, errno.EIO)
        mirror.replace(1, Path("spare"))
        assert mirror.wait_in_step(30)
    legs = json.loads((tmp_path / "a.mirror").read_text())["legs"]
    assert legs[1]["path"] == str(tmp_path / "spare")


def test_a_stop_does_not_wait_for_a_leg_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on = hold_copies(monkeypatch)
    monkeypatch.setattr("pyublk.targets.mirror.STOP_SECONDS", 0.2)
    mirror = mirror_of(tmp_path, leg_timeout=0)
    try:
        with Disk(mirror):
            mirror.leg_failed(1, errno.EIO)
            mirror.replace(1)
            assert reached.wait(30)
        assert record(tmp_path) == ["synced", "failed"]
    finally:
        go_on.set()


def test_a_leg_that_cannot_be_read_does_not_fail_those_it_is_copied_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unreadable = {tmp_path / "a"}

    def told(write: bool, path: Path, offset: int) -> None:
        if not write and path in unreadable and offset == SIZE:
            if path.name == "b":
                unreadable.discard(path)  # when it is tried again, it can be
            raise OSError(errno.EIO, "unreadable")

    tell_copies(monkeypatch, told)
    monkeypatch.setattr("pyublk.targets.mirror.RETRY_SECONDS", 0.01)
    mirror_of(tmp_path)
    third = make(tmp_path, "c", SIZE * 4)
    legs = [tmp_path / "a", tmp_path / "b", third]
    put_on_record(tmp_path / "a.mirror", *((leg, "synced") for leg in legs))
    mirror = Mirror(*legs)
    with Disk(mirror) as disk:
        disk.pwrite(os.urandom(SIZE * 4), 0)
        mirror.leg_failed(2, errno.EIO)
        mirror.replace(2)
        mirror.wait_in_step(30)
        assert states(mirror) == ["failed", "synced", "synced"]
        # The last in step is tried again.
        mirror.leg_failed(2, errno.EIO)
        unreadable.add(tmp_path / "b")
        mirror.replace(2)
        mirror.wait_in_step(30)
        assert states(mirror) == ["failed", "synced", "synced"]
        assert f"({tmp_path / 'b'}) cannot be read" in caplog.text
    assert third.read_bytes() == (tmp_path / "b").read_bytes()


def test_after_a_crash_the_first_leg_is_copied_to_the_others(tmp_path: Path) -> None:
    mirror = mirror_of(tmp_path)
    with Disk(mirror) as disk:
        disk.pwrite(b"\1" * 4096, 0)
        crashed = (tmp_path / "a.mirror").read_bytes()
    (tmp_path / "a.mirror").write_bytes(crashed)
    with open(tmp_path / "b", "r+b") as leg:
        leg.write(b"\2" * 4096)
    mirror = mirror_of(tmp_path)
    with Disk(mirror) as disk:
        assert mirror.wait_in_step(30)
        assert disk.pread(4096, 0) == b"\1" * 4096
    assert (tmp_path / "b").read_bytes()[:4096] == b"\1" * 4096


def active(folder: Path) -> bool:
    return bool(json.loads((folder / "a.mirror").read_text())["active"])


def test_a_write_that_was_cut_off_makes_the_next_start_copy(tmp_path: Path) -> None:
    mirror = mirror_of(tmp_path, leg_timeout=0)
    output, hanging = os.pipe()
    fcntl.fcntl(hanging, fcntl.F_SETPIPE_SZ, 4096)
    mirror.open()
    mirror.layout.replace_file(1, hanging, False, False)
    under_way = threading.Event()

    def serve() -> None:  # a queue belongs to the thread that made it
        queue = MappedQueue.loopback(layout=mirror.layout, depth=1)
        queue.fetch()
        queue.inject(0, Op.WRITE, 0, 65536)
        threading.Timer(0.3, lambda: (queue.fail_held(errno.EIO), queue.wake())).start()
        queue.serve_mapped(None, mirror.leg_failed)
        under_way.set()
        queue.close()

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join(30)
    assert under_way.is_set()
    mirror.close()
    os.close(output)
    os.close(hanging)
    assert active(tmp_path)
    mirror = mirror_of(tmp_path)
    with Disk(mirror):
        assert mirror.wait_in_step(30)
    assert not active(tmp_path)


def no_thread(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_copy_that_gets_no_thread_is_tried_again_and_keeps_no_files_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pyublk.targets.mirror.RETRY_SECONDS", 0.001)
    mirror = mirror_of(tmp_path)
    with Disk(mirror):
        before = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patch:
            patch.setattr(copying.Job, "start", no_thread)
            mirror.leg_failed(1, errno.EIO)
            mirror.replace(1)
            while caplog.text.count("it is tried again") < 5:
                assert not mirror.wait_in_step(0.01)
        assert mirror.wait_in_step(30)
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("outcome", "found", "copies"),
    [
        ("fails", ["synced", "failed"], False),
        ("hangs", ["synced", "synced"], True),
        ("no threads", ["synced", "synced"], True),
    ],
)
def test_a_stop_syncs_the_legs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outcome: str,
    found: list[str],
    copies: bool,
) -> None:
    synced: list[Path] = []
    go_on = threading.Event()

    def sync(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink())
        if synced[-1] == tmp_path / "b":
            if outcome == "fails":
                raise OSError(errno.EIO, "not written")
            assert go_on.wait(60)

    def steps(fds: dict[int, int]) -> Iterator[copying.Step]:
        for leg, fd in fds.items():
            yield leg, partial(sync, fd)

    mirror = mirror_of(tmp_path)
    monkeypatch.setattr("pyublk.targets.mirror.STOP_SECONDS", 0.2)
    with Disk(mirror) as disk:
        disk.pwrite(b"x" * 4096, 0)
        monkeypatch.setattr("pyublk.targets.mirror.sync_steps", steps)
        if outcome == "no threads":
            monkeypatch.setattr(copying.Job, "start", no_thread)
    go_on.set()
    assert record(tmp_path) == found
    assert active(tmp_path) == copies


@pytest.mark.parametrize(
    ("record", "options", "words"),
    [
        (("failed", "failed"), {}, r"no leg is in step according to .*a\.mirror"),
        (("synced", "failed"), {"size": 1000}, "the size is 1000 bytes"),
        ("nonsense", {}, r"a\.mirror is not a mirror's record"),
        ("[1]", {}, r"a\.mirror is not a mirror's record"),
        ('{"active": false, "legs": [{"path": "a"}]}', {}, r"a\.mirror is not a mirror's record"),
    ],
    ids=["both failed", "bad size", "no JSON", "a list", "no state"],
)
def test_a_mirror_that_does_not_start_leaves_the_record_as_it_is(
    tmp_path: Path, record: str | tuple[str, str], options: dict[str, object], words: str
) -> None:
    if not isinstance(record, str):
        legs = [
            {"path": str(tmp_path / name), "state": state, "since": 1.0}
            for name, state in zip("ab", record, strict=True)
        ]
        record = json.dumps({"active": True, "legs": legs})
    place = tmp_path / "a.mirror"
    place.write_text(record)
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            mirror_of(tmp_path, state=place, **options).open()
        assert place.read_text() == record


def test_mapped_targets_announce_what_files_can_do(tmp_path: Path) -> None:
    target = File(make(tmp_path, "a", SIZE))
    target.open()
    try:
        params = target.profile().params(65536)
        assert params.basic.volatile_cache
        assert params.basic.fua
        assert params.discard is not None
        assert params.discard.max_write_zeroes_size
    finally:
        target.close()
    assert isinstance(target, pyublk.Target)


def test_a_mirror_tells_how_long_a_leg_may_hold_a_request(tmp_path: Path) -> None:
    assert mirror_of(tmp_path, leg_timeout=8).max_stall == 11
    assert mirror_of(tmp_path, leg_timeout=0).max_stall == 0
    assert File(tmp_path / "a").max_stall == 0


def test_a_mirror_with_a_timeout_takes_one_thread(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="threads=2 needs a mirror with leg_timeout 0"):
        pyublk.Device(mirror_of(tmp_path), threads=2)
    pyublk.Device(mirror_of(tmp_path, leg_timeout=0), threads=2)


def begin_a_read(reader: int, writer: int) -> MappedQueue:
    """A queue whose file does not answer: its read is under way though its request was failed."""
    layout = Layout.table([(reader, False, False)], [(0, 0, 65536)])
    queue = MappedQueue.loopback(layout=layout, depth=1)
    queue.fetch()
    queue.inject(0, Op.READ, 0, 65536)

    def give_up() -> None:
        end = time.monotonic() + 30
        # Only a read that is under way takes the byte.
        while select.select([reader], [], [], 0)[0] and time.monotonic() < end:
            time.sleep(0.01)
        queue.fail_held(errno.EIO)
        queue.wake()

    os.write(writer, b"1")
    fail = threading.Thread(target=give_up)
    fail.start()
    queue.serve_mapped()
    fail.join(30)
    return queue


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_an_idle_queue_is_small(tmp_path: Path) -> None:
    """What its requests may need takes memory when they come. Its ring is 28 KiB of it."""
    with (tmp_path / "file").open("w+b") as file, ExitStack() as stack:
        file.truncate(SIZE)
        layout = Layout.table([(file.fileno(), False, False)], [(0, 0, SIZE)])
        before = resident()
        for _ in range(50):
            stack.callback(MappedQueue.loopback(layout=layout, depth=128).close)
        assert (resident() - before) / 50 < 64 << 10


def test_one_thread_serves_several_queues_with_a_poller(tmp_path: Path) -> None:
    content = os.urandom(1 << 20)
    (tmp_path / "file").write_bytes(content)
    with (tmp_path / "file").open("r+b") as file, select.epoll() as poller, ExitStack() as stack:
        layout = Layout.table([(file.fileno(), False, False)], [(0, 0, 1 << 20)])
        queues = [MappedQueue.loopback(layout=layout, depth=4) for _ in range(3)]
        for queue in queues:
            stack.callback(queue.close)
            queue.fetch()
            poller.register(queue.fileno(), select.EPOLLIN)
        by_number = {queue.fileno(): queue for queue in queues}
        for number, queue in enumerate(queues):
            for tag in range(4):
                queue.inject(tag, Op.READ, (4 * number + tag) * 65536, 65536)
            assert queue.step(timeout=0)
        left = {(queue, tag) for queue in queues for tag in range(4)}
        until = time.monotonic() + 20
        while left := {(queue, tag) for queue, tag in left if queue.answered(tag) is None}:
            assert time.monotonic() < until
            for ready, _ in poller.poll(1):
                assert by_number[ready].step(timeout=0)
        for number, queue in enumerate(queues):
            for tag in range(4):
                assert queue.answered(tag) == 65536
                at = (4 * number + tag) * 65536
                assert queue.memory(tag, 65536) == content[at : at + 65536]


def test_a_step_waits_as_long_as_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4096))
    with (tmp_path / "file").open("r+b") as file:
        layout = Layout.table([(file.fileno(), False, False)], [(0, 0, 4096)])
        with MappedQueue.loopback(layout=layout, depth=1) as queue:
            queue.fetch()
            began = time.monotonic()
            assert queue.step(timeout=0.05)
            assert time.monotonic() - began >= 0.05


def test_a_step_that_must_ask_needs_a_mapper(tmp_path: Path) -> None:
    class Where:
        def map(self, op: Op, offset: int, length: int) -> int:
            return offset

    (tmp_path / "file").write_bytes(bytes(range(256)) * 16)
    with (tmp_path / "file").open("r+b") as file:
        layout = Layout.per_request([(file.fileno(), False, False)], 4096)
        with MappedQueue.loopback(layout=layout, depth=1) as queue:
            queue.fetch()
            queue.inject(0, Op.READ, 512, 512)
            with pytest.raises(ValueError, match="is asked for each request: pass a Mapper"):
                queue.step(timeout=1)
        with MappedQueue.loopback(layout=layout, depth=1) as queue:
            queue.fetch()
            queue.inject(0, Op.READ, 512, 512)
            mapper = Mapper(Where(), lambda outcome, io: errno.EIO)
            until = time.monotonic() + 20
            while queue.answered(0) is None:
                assert time.monotonic() < until
                queue.step(mapper, timeout=0.01)
            assert queue.memory(0, 512) == (bytes(range(256)) * 2)


def queues_alive() -> int:
    return sum(type(each) is MappedQueue for each in gc.get_objects())


@pytest.mark.parametrize("how", ["closed", "dropped", "by another thread", "by a late thread"])
def test_the_memory_of_a_queue_outlives_what_is_under_way(how: str) -> None:
    reader, writer = os.pipe()
    others = pyublk.Queue.loopback(depth=1)  # what all queues share is there while one is
    gc.collect()  # of the tests before, whose descriptors would go meanwhile
    before = len(os.listdir("/proc/self/fd"))
    alive = queues_alive()
    queues: list[MappedQueue] = []

    def begin() -> None:
        queues.append(begin_a_read(reader, writer))

    def end() -> None:
        queue = queues.pop()
        if how != "dropped":
            queue.close()
        del queue
        gc.collect()

    if how == "by a late thread":
        thread = threading.Thread(target=begin)
        thread.start()
        thread.join(30)
        while Path(f"/proc/self/task/{thread.native_id}").exists():
            time.sleep(0.01)
    else:
        begin()
    if how == "by another thread":
        thread = threading.Thread(target=end)
        thread.start()
        thread.join(30)
    else:
        end()
    # Only the thread that made it can wait for its I/O; while that lives, nobody knows.
    assert queues_alive() == alive + (how == "by another thread")
    assert len(os.listdir("/proc/self/fd")) == before
    others.close()
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(
    "content", ["", "[" * 100_000, '{"active": 1, "legs": []}', '{"legs": []}']
)
def test_a_mirror_does_not_start_on_another_s_record(tmp_path: Path, content: str) -> None:
    mirror = mirror_of(tmp_path)
    (tmp_path / "a.mirror").write_text(content)
    with pytest.raises(ValueError, match=r"a\.mirror is not a mirror's record$"):
        mirror.open()
    assert (tmp_path / "a.mirror").read_text() == content


def test_what_lies_in_the_place_of_a_mirror_s_record(tmp_path: Path) -> None:
    mirror = mirror_of(tmp_path)
    place = tmp_path / "a.mirror"
    place.unlink()
    place.mkdir()
    with pytest.raises(ValueError, match=r"a\.mirror is a directory, and not a mirror's record$"):
        mirror.open()
    place.rmdir()
    os.mkfifo(place)
    with pytest.raises(ValueError, match=r"a\.mirror is a FIFO, and not a mirror's record$"):
        mirror.open()
    place.unlink()
    place.symlink_to(place)
    with pytest.raises(ValueError, match=r"a\.mirror points to the mirror's record, .* not there"):
        mirror.open()


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
@pytest.mark.parametrize("follow", [False, True], ids=["record", "link"])
def test_a_mirror_s_record_that_another_user_wrote(tmp_path: Path, follow: bool) -> None:
    mirror = mirror_of(tmp_path)
    place = tmp_path / "a.mirror"
    if follow:
        place.rename(tmp_path / "elsewhere")
        place.symlink_to(tmp_path / "elsewhere")
    os.chown(place, 1234, 1234, follow_symlinks=False)
    words = r"is another user's link, and is not followed" if follow else "belongs to another user"
    with pytest.raises(ValueError, match=rf"a\.mirror {words}"):
        mirror.open()


def test_a_mirror_s_record_is_written_over_nobody_s_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("theirs")
    (tmp_path / "a.mirror.new").symlink_to(victim)
    with Disk(mirror_of(tmp_path)):
        pass
    assert victim.read_text() == "theirs"
    assert record(tmp_path) == ["synced", "synced"]


def test_the_numbers_of_files_are_taken_while_a_queue_may_use_them(tmp_path: Path) -> None:
    target = File(tmp_path / "image", size=1 << 20)
    target.open()
    fd = target.backing[0].fd
    queue = MappedQueue.loopback(layout=target.layout, depth=1)
    queue.fetch()
    target.close()  # as when a disk is given up: the queue has not ended
    assert os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"
    with pytest.raises(OSError, match=r"Illegal seek|Invalid argument"):
        os.pwrite(fd, b"late", 0)
    queue.close()
    del queue
    gc.collect()
    assert not Path(f"/proc/self/fd/{fd}").exists()
