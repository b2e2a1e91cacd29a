"""What is written is what is read, in every pattern, across every boundary, and over the end of the
server."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
from blocks import Blocks
from conftest import Serve
from filesystems import SIZES, check_file_system, checksums, make_file_system, mounted, run
from fio import verified
from memory import device_options, held, make
from variations import variations

import pyublk

KIB, MIB = 1 << 10, 1 << 20

#: fio jobs, each on the target that is named: (kind, options of the device, options of fio).
JOBS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sequential 4k": ("ram", {}, {"rw": "write", "bs": "4k", "size": "2m"}),
    "sequential 128k, deep": (
        "file",
        {},
        {"rw": "write", "bs": "128k", "size": "8m", "iodepth": 32},
    ),
    "sequential 1m": ("sync", {}, {"rw": "write", "bs": "1m", "size": "16m", "iodepth": 4}),
    "random 4k, depth 1": ("ram", {}, {"rw": "randwrite", "bs": "4k", "size": "2m"}),
    "random 4k, depth 32": (
        "ram",
        {"queues": 2},
        {"rw": "randwrite", "bs": "4k", "size": "4m", "iodepth": 32},
    ),
    "random 512": ("sync", {}, {"rw": "randwrite", "bs": "512", "size": "256k", "iodepth": 8}),
    "random 4k, coroutines": (
        "async",
        {},
        {"rw": "randwrite", "bs": "4k", "size": "2m", "iodepth": 32},
    ),
    "random 4k, workers": (
        "workers",
        {"queues": 2},
        {"rw": "randwrite", "bs": "4k", "size": "2m", "iodepth": 32},
    ),
    "random 8k, deferred": (
        "deferred",
        {},
        {"rw": "randwrite", "bs": "8k", "size": "2m", "iodepth": 16},
    ),
    "random 4k, ctypes": (
        "ctypes",
        {"queues": 2},
        {"rw": "randwrite", "bs": "4k", "size": "2m", "iodepth": 32},
    ),
    "random 16k, direct file": (
        "file",
        {"queues": 2},
        {"rw": "randwrite", "bs": "16k", "size": "8m", "iodepth": 32},
    ),
    "mixed sizes, sequential": (
        "sync",
        {},
        {"rw": "write", "bssplit": "512/20:4k/30:17k/20:128k/20:1m/10", "size": "8m"},
    ),
    "mixed sizes, random": (
        "ram",
        {"queues": 2},
        {
            "rw": "randwrite",
            "bssplit": "512/20:4k/40:36k/20:256k/15:1m/5",
            "size": "8m",
            "iodepth": 16,
        },
    ),
    "reads between writes": (
        "ram",
        {"queues": 2},
        {"rw": "randrw", "bs": "4k", "size": "4m", "iodepth": 32},
    ),
    "reads between writes, mixed sizes": (
        "file",
        {},
        {"rw": "randrw", "bssplit": "4k/60:64k/40", "size": "4m", "iodepth": 8},
    ),
    "buffered, sequential": (
        "file",
        {},
        {
            "rw": "write",
            "bs": "64k",
            "size": "8m",
            "direct": 0,
            "ioengine": "psync",
            "end_fsync": 1,
        },
    ),
    "buffered, random": (
        "sync",
        {},
        {"rw": "randwrite", "bs": "3k", "size": "2m", "direct": 0, "ioengine": "psync"},
    ),
    "synced every 16": (
        "file",
        {},
        {"rw": "randwrite", "bs": "4k", "size": "1m", "fsync": 16, "iodepth": 4},
    ),
    "four clients beside each other": (
        "ram",
        {"queues": 4},
        {
            "rw": "randwrite",
            "bs": "4k",
            "size": "1m",
            "numjobs": 4,
            "offset_increment": "4m",
            "iodepth": 16,
        },
    ),
    "four clients, Python": (
        "parallel",
        {"queues": 4},
        {
            "rw": "randrw",
            "bs": "8k",
            "size": "1m",
            "numjobs": 4,
            "offset_increment": "4m",
            "iodepth": 8,
        },
    ),
    "io_uring clients": (
        "ram",
        {"queues": 2},
        {"rw": "randwrite", "bs": "4k", "size": "2m", "ioengine": "io_uring", "iodepth": 32},
    ),
    "with holes": ("sync", {}, {"rw": "write:12k", "bs": "4k", "size": "2m"}),
    "requests above the device's": (
        "ram",
        {"max_io_size": 64 * KIB},
        {"rw": "randwrite", "bs": "1m", "size": "8m", "iodepth": 4},
    ),
    "depth 1": (
        "ram",
        {"depth": 1},
        {"rw": "randwrite", "bs": "4k", "size": "1m", "iodepth": 32},
    ),
}

QUICK = [
    "random 4k, depth 32",
    "random 512",
    "random 4k, coroutines",
    "random 4k, workers",
    "random 16k, direct file",
    "mixed sizes, sequential",
    "reads between writes, mixed sizes",
    "buffered, random",
    "synced every 16",
    "four clients beside each other",
    "with holes",
    "requests above the device's",
]


@pytest.mark.parametrize("name", variations(JOBS, QUICK))
def test_fio_verifies(serve: Serve, tmp_path: Path, name: str) -> None:
    kind, device, job = JOBS[name]
    size = 16 * MIB
    disk = serve(make(kind, size, tmp_path), **{**device_options(kind), **device})
    done = verified(disk.path, **job)
    assert done.writes > 0
    assert done.reads > 0, "nothing was verified"
    assert disk.stats().total.errors == 0
    if job.get("direct", 1):
        assert disk.stats().total.bytes_written == done.bytes_written


def test_blocks_of_4096(serve: Serve, tmp_path: Path) -> None:
    disk = serve(make("ram", 16 * MIB, tmp_path, block_size=4096))
    verified(disk.path, rw="randwrite", bssplit="4k/70:12k/30", size="2m", iodepth=8)
    assert disk.stats().total.errors == 0


# ---- overlapping writes ----


@pytest.mark.parametrize("kind", ["ram", "sync", "async"])
def test_overlapping_writes_stay_whole(serve: Serve, tmp_path: Path, kind: str) -> None:
    """Two clients write ranges that overlap; no reader ever sees a mixture within the overlap."""
    length, overlap = 128 * KIB, 64 * KIB
    target = make(kind, MIB, tmp_path)
    disk = serve(target, queues=2)
    rounds = 12
    starts = threading.Barrier(3, timeout=30)
    failures: list[BaseException] = []

    def writer(mark: int, offset: int) -> None:
        with Blocks(disk.path) as client:
            for number in range(rounds):
                starts.wait()
                client.write(bytes([mark + number]) * length, offset)
                starts.wait()

    def reader() -> None:
        with Blocks(disk.path, os.O_RDONLY) as client:
            for number in range(rounds):
                starts.wait()
                during = client.read(overlap, length - overlap)
                starts.wait()
                after = client.read(2 * length - overlap, 0)
                middle = after[length - overlap : length]
                assert len(set(during)) == 1, f"round {number}: a mixture while it was written"
                assert len(set(middle)) == 1, f"round {number}: a mixture"
                assert middle[0] in (1 + number, 101 + number)
                assert set(after[: length - overlap]) == {1 + number}
                assert set(after[length:]) == {101 + number}

    def guarded(job: Any, *arguments: int) -> None:
        try:
            job(*arguments)
        except BaseException as error:
            failures.append(error)
            starts.abort()

    threads = [
        threading.Thread(target=guarded, args=(writer, 1, 0)),
        threading.Thread(target=guarded, args=(writer, 101, length - overlap)),
        threading.Thread(target=guarded, args=(reader,)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    real = [error for error in failures if not isinstance(error, threading.BrokenBarrierError)]
    assert not real, real[0]
    assert not failures


# ---- boundaries ----

BOTH = ["ram", "file", "sync"]

#: What is written in one call: offset (from the end when negative) and length.
SPANS = {
    "the first block": (0, 512),
    "the last block": (-512, 512),
    "the last page": (-4096, 4096),
    "a last part that is no whole request": (-(64 * KIB + 512), 64 * KIB + 512),
    "across a request's size": (64 * KIB - 512, 1024),
    "four requests and a bit": (512, 256 * KIB),
    "everything": (0, None),
}


@pytest.mark.parametrize("kind", BOTH)
def test_boundaries(serve: Serve, tmp_path: Path, kind: str) -> None:
    """A write has its bytes, and only those."""
    size = 512 * KIB + 3 * 512
    target = make(kind, size, tmp_path)
    disk = serve(target, max_io_size=64 * KIB)
    with Blocks(disk.path) as client:
        expected = random.Random(1).randbytes(size)
        client.write(expected, 0)
        for name, (offset, length) in SPANS.items():
            start = offset % size
            data = random.Random(name).randbytes(length or size)
            assert client.write(data, start) == len(data), name
            expected = expected[:start] + data + expected[start + len(data) :]
            assert client.read(len(data), start) == data, name
            assert client.read(size, 0) == expected, name
            assert held(target) == expected, name


@pytest.mark.parametrize("kind", BOTH)
def test_what_was_never_written_is_zero(serve: Serve, tmp_path: Path, kind: str) -> None:
    disk = serve(make(kind, 8 * MIB, tmp_path), queues=2)
    with Blocks(disk.path) as client:
        client.write(b"x" * 512, 4 * MIB)
        assert client.read(4 * MIB, 0) == bytes(4 * MIB)
        assert client.read(4096, 4 * MIB) == b"x" * 512 + bytes(3584)
        assert client.read(512, 8 * MIB - 512) == bytes(512)


@pytest.mark.parametrize("kind", ["ram", "file"])
def test_discarded_then_written(serve: Serve, tmp_path: Path, kind: str) -> None:
    disk = serve(make(kind, MIB, tmp_path), queues=2)
    half = MIB // 2
    with Blocks(disk.path) as client:
        for turn in range(3):
            data = random.Random(turn).randbytes(half)
            client.write(data, half)
            assert client.read(half, half) == data
            client.discard(half, half)
            client.write(data[:4096], half + 8192)
            assert client.read(half, half) == bytes(8192) + data[:4096] + bytes(half - 12288)
    verified(disk.path, rw="randwrite", bs="4k", size="512k", iodepth=16)


@pytest.mark.parametrize("kind", ["ram", "file"])
def test_zeroed_then_read(serve: Serve, tmp_path: Path, kind: str) -> None:
    target = make(kind, 4 * MIB, tmp_path)
    disk = serve(target)
    with Blocks(disk.path) as client:
        data = random.Random(3).randbytes(4 * MIB)
        client.write(data, 0)
        client.zero_out(MIB + 512, MIB)
        expected = data[: MIB + 512] + bytes(MIB) + data[2 * MIB + 512 :]
        assert client.read(4 * MIB, 0) == expected
        client.write(data[:512], MIB + 1024)
        expected = expected[: MIB + 1024] + data[:512] + expected[MIB + 1536 :]
        assert client.read(4 * MIB, 0) == expected
    assert held(target) == expected


# ---- beyond the end of the server ----


@pytest.mark.parametrize("direct", [False, True])
def test_a_file_keeps_its_data_over_a_restart(serve: Serve, tmp_path: Path, direct: bool) -> None:
    """Stop writes back what the disk's page cache still holds."""
    data = random.Random(4).randbytes(2 * MIB)
    disk = serve(make("file", 4 * MIB, tmp_path, direct=direct))
    with open(disk.path, "r+b", buffering=0) as client:
        client.seek(MIB)
        client.write(data)  # not synced
    disk.stop()
    assert (tmp_path / "disk").read_bytes() == bytes(MIB) + data + bytes(MIB)
    again = serve(make("file", 4 * MIB, tmp_path, direct=direct))
    with Blocks(again.path) as client:
        assert client.read(2 * MIB, MIB) == data


def test_ram_keeps_its_data_while_the_target_lives(serve: Serve, tmp_path: Path) -> None:
    data = random.Random(5).randbytes(MIB)
    target = make("ram", MIB, tmp_path)
    disk = serve(target)
    with open(disk.path, "r+b", buffering=0) as client:
        client.write(data)
    disk.stop()
    again = serve(target)
    with Blocks(again.path) as client:
        assert client.read(MIB, 0) == data


CACHING_SERVER = """
    import os, sys
    import pyublk

    class Caching(pyublk.Target):
        '''Keeps what is written in memory until it is told to flush.'''

        def __init__(self, path):
            super().__init__(size=os.path.getsize(path))
            self.fd = os.open(path, os.O_RDWR)
            self.cache = {}

        def read(self, offset, buffer):
            for at in range(0, len(buffer), 512):
                block = self.cache.get(offset + at) or os.pread(self.fd, 512, offset + at)
                buffer[at : at + 512] = block

        def write(self, offset, data):
            for at in range(0, len(data), 512):
                self.cache[offset + at] = bytes(data[at : at + 512])

        def flush(self):
            for offset, block in self.cache.items():
                os.pwrite(self.fd, block, offset)
            os.fsync(self.fd)

    with pyublk.Device(Caching(sys.argv[1])) as disk:
        print(disk.id, flush=True)
        disk.wait()
"""


def test_synced_data_outlives_a_killed_server(
    controller: pyublk.Controller, tmp_path: Path
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    synced, lost = (random.Random(seed).randbytes(64 * KIB) for seed in (6, 7))
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CACHING_SERVER), path],
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            number = int(server.stdout.readline())
            with open(f"/dev/ublkb{number}", "r+b", buffering=0) as client:
                client.seek(128 * KIB)
                client.write(synced)
                os.fsync(client.fileno())
                with Blocks(f"/dev/ublkb{number}") as direct:
                    direct.write(lost, 512 * KIB)
                    assert direct.read(64 * KIB, 128 * KIB) == synced
                server.send_signal(signal.SIGKILL)
                server.wait(20)
        finally:
            server.kill()
    assert path.read_bytes() == bytes(128 * KIB) + synced + bytes(MIB - 192 * KIB)
    wait_until_deleted(controller, number)


def wait_until_deleted(controller: pyublk.Controller, number: int) -> None:
    """The guardian does it, once the kernel has seen the server's end."""
    until = threading.Event()
    for _ in range(400):
        if number not in {device.id for device in controller.devices()}:
            return
        until.wait(0.1)
    raise AssertionError(f"device {number} is still there")


# ---- trees of files ----


@pytest.mark.parametrize("file_system", ["ext4", "xfs"])
def test_copied_trees_are_equal(serve: Serve, tmp_path: Path, file_system: str) -> None:
    """cp -a of real packages, compared by checksum after the file system was mounted again."""
    library = Path(os.__file__).parent
    sources = [library / name for name in ("email", "json", "logging")]
    disk = serve(make("ram", SIZES[file_system], tmp_path), queues=2)
    make_file_system(file_system, disk.path)
    place = tmp_path / "mounted"
    with mounted(disk.path, place):
        run("cp", "-a", *sources, place)
    check_file_system(file_system, disk.path)
    with mounted(disk.path, place, "-o", "ro"):
        for source in sources:
            assert checksums(place / source.name) == checksums(source)
    assert disk.stats().total.errors == 0
