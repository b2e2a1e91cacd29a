# SPDX-License-Identifier: MIT
"""`s3` on SeaweedFS, a real server: killed, restarted, and raced for by processes that are killed.

Takes a minute or two: `./run stores`.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from object_stores import free_port, put_bucket, use_endpoint, wait_for

from pyublk.targets.objects import disks
from pyublk.targets.objects.store import Objects, connect
from pyublk.targets.s3 import S3
from pyublk.testing import Disk

SIZE = 16 << 20
CHUNK = 1 << 20


class Weed:
    """The server, which can be killed and started again over the same folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = {
            name: free_port()
            for name in ("master.port", "volume.port", "filer.port", "s3.port", "master.port.grpc",
                         "volume.port.grpc", "filer.port.grpc", "s3.port.grpc")
        }  # fmt: skip
        self.endpoint = f"http://127.0.0.1:{self._ports['s3.port']}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    Path(sys.executable).parent / "weed", "server", "-s3", f"-dir={self._folder}",
                    "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.volumeSizeLimitMB=64",
                    "-s3.port.iceberg=0", "-s3.port.lance=0",  # one machine has one of them
                    "-volume.max=20", *(f"-{name}={port}" for name, port in self._ports.items()),
                ],
                stdout=log, stderr=log,
            )  # fmt: skip
        wait_for(self.endpoint, self._process)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    weed = Weed(tmp_path_factory.mktemp("weed"))
    weed.start()
    with pytest.MonkeyPatch.context() as patch:
        use_endpoint(patch, weed.endpoint)
        deadline = time.monotonic() + 60
        while True:  # it answers before it can
            try:
                put_bucket(weed.endpoint, "bucket")
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        yield weed
    weed.kill()


def fill(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


def content_of(name: str) -> bytes:
    with Disk(S3(f"bucket/{name}", read_only=True)) as disk:
        return disk.pread(disk.size, 0)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_disk(weed: Weed, compression: str) -> None:
    name = f"plain-{compression}"
    options = {"size": SIZE, "chunk_size": CHUNK, "compression": compression}
    with Disk(S3(f"bucket/{name}", **options)) as disk:
        disk.pwrite(fill(1, SIZE), 0)
        disk.flush()
        disk.pwrite(b"x" * 4096, 3 * CHUNK)
    expected = fill(1, SIZE)[: 3 * CHUNK] + b"x" * 4096 + fill(1, SIZE)[3 * CHUNK + 4096 :]
    assert content_of(name) == expected


def test_two_writers(weed: Weed) -> None:
    first = Disk(S3("bucket/two", size=SIZE, chunk_size=CHUNK))
    first.open()
    first.pwrite(fill(1, SIZE), 0)
    first.flush()
    second = Disk(S3("bucket/two"))
    second.open()
    first.pwrite(fill(3, SIZE), 0)
    second.pwrite(fill(2, CHUNK), CHUNK)
    with pytest.raises(OSError, match="FLUSH"):
        first.flush()
    second.close()
    first.close()
    expected = fill(1, CHUNK) + fill(2, CHUNK) + fill(1, SIZE)[2 * CHUNK :]
    assert content_of("two") == expected


def test_writers_that_open_at_once_get_an_epoch_each(weed: Weed) -> None:
    disks.create(Objects(connect("s3://bucket"), "race"), "race", size=SIZE, chunk_size=CHUNK)
    targets = [S3("bucket/race") for _ in range(8)]
    threads = [threading.Thread(target=target.open) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(target.volume.manifest.epoch for target in targets) == list(range(1, 9))
    flushed = 0
    for target in targets:
        target.write(0, memoryview(b"x" * 4096))
        try:
            target.flush()
            flushed += 1
        except OSError:
            continue
    assert flushed == 1


def test_the_server_is_killed_in_the_middle_of_flushes(weed: Weed) -> None:
    """It comes back within the budget: no error, and all that was flushed is there."""
    with Disk(S3("bucket/killed", size=SIZE, chunk_size=CHUNK, retry_for=120)) as disk:
        disk.pwrite(fill(0, SIZE), 0)
        disk.flush()
        for round_ in (1, 2):
            back = threading.Timer(1.0, weed.start)
            killer = threading.Timer(0.05 * round_, lambda back=back: (weed.kill(), back.start()))
            killer.start()
            disk.pwrite(fill(round_, SIZE), 0)
            disk.flush()
            killer.join()
            back.join()
            assert content_of("killed") == fill(round_, SIZE)


WRITER = """
import random, sys
from pyublk.targets.s3 import S3
target = S3("bucket/kill", buffer=4 << 20)
target.open()
print("open", flush=True)
for number in range(1000):
    for chunk in range(16):
        target.write(chunk << 20, memoryview(random.Random(number).randbytes(1 << 20)))
    target.flush()
    print(number, flush=True)
"""


def test_a_writer_is_killed_and_the_disk_is_as_flushed(weed: Weed) -> None:
    """Every flush wrote one number's bytes to all chunks: no two are ever mixed."""
    disks.create(Objects(connect("s3://bucket"), "kill"), "kill", size=SIZE, chunk_size=CHUNK)
    rng = random.Random(1)
    for _ in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER], stdout=subprocess.PIPE, env=os.environ, text=True
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        told = -1
        ahead = rng.randrange(3)
        for line in writer.stdout:
            told = int(line)
            if told >= ahead:
                break
        time.sleep(rng.random() * 0.5)
        writer.send_signal(signal.SIGKILL)
        told = max([told, *map(int, writer.stdout.read().split())])
        writer.wait()
        writer.stdout.close()
        content = content_of("kill")
        parts = {content[at : at + CHUNK] for at in range(0, SIZE, CHUNK)}
        assert len(parts) == 1
        assert parts <= {random.Random(number).randbytes(CHUNK) for number in (told, told + 1)}
    # What the last one had uploaded of a flush to come is spared until another writer is there.
    with Disk(S3("bucket/kill")):
        pass
    objects = Objects(connect("s3://bucket"), "kill")
    disks.clean_up(objects, "kill")
    assert content_of("kill") == content
    assert sum("/chunks/" in path for path in objects.paths("kill/")) == 16
