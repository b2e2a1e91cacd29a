"""Targets whose bytes the ring moves: by every path, with parts that fail, with legs that die."""

import errno
import os
import random
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from blocks import Blocks
from conftest import Serve
from filesystems import SIZES, check_file_system, make_file_system, mounted
from fio import verified
from needs import needs, needs_what_it_asks_for
from servers import until
from variations import variations

import pyublk
from pyublk import DataPath, MappedTarget
from pyublk._native import MappedQueue
from pyublk.targets import File, Linear, Mirror, Slice, Stripe
from pyublk.uapi import Feature

MIB = 1 << 20
SIZE = 8 * MIB


def make(folder: Path, name: str, size: int) -> Path:
    path = folder / name
    with open(path, "wb") as file:
        file.truncate(size)
    return path


class Chunked(MappedTarget):
    """Two files, 64 KiB of each in turn, said for each request."""

    def map(self, op: object, offset: int, length: int) -> object:
        parts = []
        while length:
            size = min(length, 65536 - offset % 65536)
            row = offset // 65536
            parts.append((row % 2, row // 2 * 65536 + offset % 65536, size))
            offset, length = offset + size, length - size
        return parts


TARGETS: dict[str, Callable[[Path], MappedTarget]] = {
    "file": lambda folder: File(make(folder, "a", SIZE)),
    "linear": lambda folder: Linear(
        make(folder, "a", SIZE // 2), make(folder, "b", SIZE // 4), make(folder, "c", SIZE // 4)
    ),
    "stripe": lambda folder: Stripe(*(make(folder, n, SIZE // 4) for n in "abcd"), chunk=4096),
    "mirror": lambda folder: Mirror(
        make(folder, "a", SIZE), make(folder, "b", SIZE), leg_timeout=0
    ),
    "slice": lambda folder: Slice(make(folder, "a", SIZE * 2), offset=SIZE // 2, size=SIZE),
    "map": lambda folder: Chunked([make(folder, n, SIZE // 2) for n in "ab"], size=SIZE),
}
PATHS = [
    DataPath.COPY,
    DataPath.USER_COPY,
    DataPath.ZERO_COPY,
    DataPath.AUTO_BUFFER,
]


def started(serve: Serve, target: pyublk.Target, **options: object) -> pyublk.Device:
    """A disk, or a skip that names what this kernel lacks."""
    with needs_what_it_asks_for():
        return serve(target, **options)


def memory_folder(tmp_path: Path, kind: str) -> Path:
    """Files in memory are served on the spot, others by the ring: both are wanted."""
    if kind == "disk":
        return tmp_path
    folder = Path("/dev/shm") / tmp_path.name
    folder.mkdir(exist_ok=True)
    return folder


def quick(name: str, path: DataPath, batch: bool, kind: str) -> bool:
    """Whether `./run test` has this way: each path, file system, and kind of commands."""
    if name == "file":
        return batch == (kind == "disk")
    return (
        name == "stripe"
        and path in (DataPath.USER_COPY, DataPath.AUTO_BUFFER)
        and batch == (kind == "memory")
    )


#: Every way for a file, half of them for a stripe; for the others, whose parts take the same ways,
#: every path once.
WAYS = [
    pytest.param(
        name,
        path,
        batch,
        kind,
        id=f"{name}-{path}-{'batch' if batch else 'each'}-{kind}",
        marks=[] if quick(name, path, batch, kind) else pytest.mark.thorough,
    )
    for name in TARGETS
    for path in PATHS
    for batch in (False, True)
    for kind in ("disk", "memory")
    if name == "file"
    or (name == "stripe" and batch == (kind == "memory"))
    or batch == (path in (DataPath.USER_COPY, DataPath.AUTO_BUFFER)) == (kind == "memory")
]


@pytest.mark.parametrize(("name", "path", "batch", "kind"), WAYS)
def test_every_path_keeps_the_bytes(
    serve: Serve, tmp_path: Path, name: str, path: DataPath, batch: bool, kind: str
) -> None:
    folder = memory_folder(tmp_path, kind)
    target = TARGETS[name](folder)
    disk = started(serve, target, path=path, batch=batch, queues=2, max_io_size=256 * 1024)
    assert disk.data_path.path is path
    verified(disk.path, rw="randwrite", bsrange="4k-256k", size="4m", iodepth=16)
    data = os.urandom(MIB)
    with Blocks(disk.path) as blocks:
        blocks.write(data, 3 * MIB)
        blocks.zero_out(3 * MIB + 4096, 65536)
        blocks.discard(4 * MIB, MIB)
        blocks.sync()
        assert blocks.read(MIB, 4 * MIB) == bytes(MIB)
    disk.stop()
    # Data compared after a restart.
    again = serve(type(target)(*target.files) if name == "file" else target)
    with Blocks(again.path) as blocks:
        expected = data[:4096] + bytes(65536) + data[4096 + 65536 :]
        assert blocks.read(MIB, 3 * MIB) == expected


def test_several_threads_serve_a_mapped_queue(serve: Serve, tmp_path: Path) -> None:
    target = TARGETS["stripe"](tmp_path)
    disk = started(serve, target, threads=3)
    verified(disk.path, rw="randwrite", bsrange="4k-128k", size="4m", iodepth=16)


@pytest.mark.parametrize(
    ("faults", "batch"),  # 1: automatic registrations fail; 3: those by hand, too
    variations([(1, False), (1, True), (3, False), (3, True)], [(1, True), (3, False)]),
)
def test_registrations_that_fail_are_survived(
    serve: Serve, tmp_path: Path, faults: int, batch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(MappedQueue):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, faults=faults, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("pyublk.engines.mapped.MappedQueue", Failing)
    disk = started(serve, TARGETS["stripe"](tmp_path), path="auto-buffer", batch=batch)
    verified(disk.path, rw="randwrite", bsrange="4k-128k", size="4m", iodepth=16)
    total = disk.stats().total
    assert total.fallbacks > 0
    assert total.errors == 0


def test_a_write_that_fails_half_way_returns_the_error(serve: Serve, tmp_path: Path) -> None:
    class Memory(pyublk.Target):
        def __init__(self) -> None:
            super().__init__(size=SIZE)
            self.data = bytearray(SIZE)

        def read(self, offset: int, buffer: memoryview) -> None:
            buffer[:] = self.data[offset : offset + len(buffer)]

        def write(self, offset: int, data: memoryview) -> None:
            self.data[offset : offset + len(data)] = data

    bad = serve(Memory())
    target = Linear(make(tmp_path, "good", SIZE), Path(bad.path), direct=True)
    disk = serve(target, max_io_size=256 * 1024)
    bad.faults.fail("write", errno.ENOSPC)
    with Blocks(disk.path) as blocks:
        assert blocks.write(b"x" * 65536, SIZE - 65536) == 65536
        with pytest.raises(OSError, match="No space left") as failure:
            blocks.write(b"x" * 131072, SIZE - 65536)
        assert failure.value.errno == errno.ENOSPC
        bad.faults.clear()
        assert blocks.write(b"y" * 131072, SIZE - 65536) == 131072
        assert blocks.read(131072, SIZE - 65536) == b"y" * 131072


@pytest.mark.parametrize("kind", variations(["ext4", "xfs"], ["ext4"]))
def test_a_file_system_on_a_stripe(serve: Serve, tmp_path: Path, kind: str) -> None:
    size = SIZES[kind] // 4 // 65536 * 65536 + 65536
    target = Stripe(*(make(memory_folder(tmp_path, "memory"), n, size) for n in "abcd"))
    disk = serve(target)
    make_file_system(kind, disk.path)
    with mounted(disk.path, tmp_path / "mnt") as place:
        (place / "file").write_bytes(b"kept" * 10000)
    with mounted(disk.path, tmp_path / "mnt") as place:
        assert (place / "file").read_bytes() == b"kept" * 10000
    check_file_system(kind, disk.path)


# ---- mirrors of disks that fail ----


class Memory(pyublk.Target):
    def __init__(self) -> None:
        super().__init__(size=SIZE)
        self.data = bytearray(SIZE)

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview) -> None:
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        pass


def states(mirror: Mirror) -> list[str]:
    return [leg["state"] for leg in mirror.status()["legs"]]


@pytest.mark.parametrize("method", variations(["read", "write", "flush"], ["write"]))
def test_a_mirror_survives_a_leg_that_fails(serve: Serve, tmp_path: Path, method: str) -> None:
    legs = [serve(Memory()), serve(Memory())]
    paths = [Path(leg.path) for leg in legs]
    mirror = Mirror(*paths, state=tmp_path / "state", direct=True)
    disk = serve(mirror)
    assert mirror.wait_in_step(30)
    data = os.urandom(MIB)
    with Blocks(disk.path) as blocks:
        blocks.write(data, 0)
        legs[0].faults.fail(method)
        for number in range(4):
            blocks.write(data, number * MIB)
            blocks.sync()
            assert blocks.read(MIB, number * MIB) == data
        assert states(mirror) == ["failed", "synced"]
        # It comes back, while the disk is written.
        legs[0].faults.clear()
        mirror.replace(0)
        chance = random.Random(2)
        while not mirror.wait_in_step(0):
            blocks.write(chance.randbytes(8192), chance.randrange(SIZE // 8192) * 8192)
        assert states(mirror) == ["synced", "synced"]
    disk.stop()
    with Blocks(str(paths[0]), os.O_RDONLY) as one, Blocks(str(paths[1]), os.O_RDONLY) as other:
        for at in range(0, SIZE, MIB):
            assert one.read(MIB, at) == other.read(MIB, at)


@pytest.mark.parametrize("method", ["read", "write"])
def test_a_mirror_survives_a_leg_that_hangs(serve: Serve, tmp_path: Path, method: str) -> None:
    legs = [serve(Memory()), serve(Memory())]
    paths = [Path(leg.path) for leg in legs]
    mirror = Mirror(*paths, state=tmp_path / "state", leg_timeout=1, direct=True)
    disk = serve(mirror)
    assert mirror.wait_in_step(30)
    data = os.urandom(65536)
    try:
        with Blocks(disk.path) as blocks:
            blocks.write(data, 0)
            legs[0].faults.hang(method)
            for number in range(4):
                blocks.write(data, number * MIB)
                assert blocks.read(65536, number * MIB) == data
        assert states(mirror) == ["failed", "synced"]
    finally:
        for leg in legs:
            leg.faults.clear()
    disk.stop()


def test_a_stop_waits_until_a_leg_that_hangs_is_given_up(serve: Serve, tmp_path: Path) -> None:
    legs = [serve(Memory()), serve(Memory())]
    paths = [Path(leg.path) for leg in legs]
    mirror = Mirror(*paths, state=tmp_path / "state", leg_timeout=2, direct=True)
    disk = serve(mirror, stop_timeout=0.2)
    assert mirror.wait_in_step(30)
    outcome: list[object] = []

    def write() -> None:
        with Blocks(disk.path) as blocks:
            try:
                outcome.append(blocks.write(b"kept" * 1024, 0))
            except OSError as error:
                outcome.append(error)

    legs[0].faults.hang("write")
    client = threading.Thread(target=write)
    try:
        client.start()
        until(lambda: disk.stats().total.writes, what="the write is under way")
        disk.stop()
        client.join(30)
    finally:
        for leg in legs:
            leg.faults.clear()
    assert outcome == [4096]
    with Blocks(str(paths[1]), os.O_RDONLY) as other:
        assert other.read(4096, 0) == b"kept" * 1024


def test_a_mirror_of_one_good_leg_passes_errors_on(serve: Serve, tmp_path: Path) -> None:
    legs = [serve(Memory()), serve(Memory())]
    mirror = Mirror(*(Path(leg.path) for leg in legs), state=tmp_path / "s", direct=True)
    disk = serve(mirror)
    assert mirror.wait_in_step(30)
    with Blocks(disk.path) as blocks:
        blocks.write(b"a" * 4096, 0)
        for leg in legs:
            leg.faults.fail("read")
        with pytest.raises(OSError, match="Input/output error") as failure:
            blocks.read(4096, 0)
        assert failure.value.errno == errno.EIO
        for leg in legs:
            leg.faults.clear()
        assert blocks.read(4096, 0) == b"a" * 4096


def test_clients_do_not_notice_that_a_leg_dies(serve: Serve, tmp_path: Path) -> None:
    legs = [serve(Memory()), serve(Memory())]
    mirror = Mirror(*(Path(leg.path) for leg in legs), state=tmp_path / "s", direct=True)
    disk = serve(mirror, queues=2)
    assert mirror.wait_in_step(30)
    timer = threading.Timer(1.0, lambda: legs[1].faults.fail("write"))
    timer.start()
    verified(disk.path, rw="randwrite", bsrange="4k-64k", size="8m", iodepth=8, loops=2)
    timer.join()
    with Blocks(disk.path) as blocks:
        blocks.write(b"z" * 4096, 0)
    until(lambda: states(mirror) == ["synced", "failed"], what="the leg is given up")


def test_fua_and_flush_reach_every_file(serve: Serve, tmp_path: Path) -> None:
    class Counting(Memory):
        flushes_seen = 0

        def flush(self) -> None:
            self.flushes_seen += 1

    legs = [Counting(), Counting()]
    disk = serve(Linear(*(Path(serve(leg).path) for leg in legs), direct=True))
    with Blocks(disk.path) as blocks:
        blocks.write(b"a" * 4096, 0)
        before = [leg.flushes_seen for leg in legs]
        blocks.sync()
        assert all(leg.flushes_seen > seen for leg, seen in zip(legs, before, strict=True))
        before = [leg.flushes_seen for leg in legs]
        blocks.write(b"b" * 8192, SIZE - 4096, os.RWF_DSYNC)
        assert all(leg.flushes_seen > seen for leg, seen in zip(legs, before, strict=True))


def test_a_partition_of_an_image(serve: Serve, tmp_path: Path) -> None:
    image = make(tmp_path, "image", SIZE)
    table = "label: gpt\nstart=2048, size=4096\nstart=8192, size=2048\n"
    subprocess.run(["sfdisk", image], input=table, text=True, check=True, capture_output=True)
    disk = serve(Slice(image, partition=2))
    with Blocks(disk.path) as blocks:
        assert blocks.size == 2048 * 512
        blocks.write(b"p" * 4096, 0)
    disk.stop()
    assert image.read_bytes()[8192 * 512 :][:4096] == b"p" * 4096


def test_what_is_beyond_the_target_is_not_touched(
    serve: Serve, tmp_path: Path, controller: pyublk.Controller
) -> None:
    """Whoever has the rights may give a disk another size than its target has."""
    needs(Feature.UPDATE_SIZE)
    image = make(tmp_path, "image", SIZE)
    disk = serve(Slice(image, offset=MIB, size=MIB))
    controller.update_size(disk.id, 2 * MIB)
    with Blocks(disk.path) as client:
        client.write(b"i" * 4096, MIB - 4096)
        for offset in (MIB - 2048, MIB, 2 * MIB - 4096):
            with pytest.raises(OSError, match="Input/output error"):
                client.write(b"o" * 4096, offset)
            with pytest.raises(OSError, match="Input/output error"):
                client.read(4096, offset)
    assert image.read_bytes()[2 * MIB - 4096 :] == b"i" * 4096 + bytes(SIZE - 2 * MIB)
