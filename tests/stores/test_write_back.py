# SPDX-License-Identifier: MIT
"""`s3` under a cache that writes back: durable in a local file first, in the store later."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from object_stores import SmallS3, use_endpoint

from pyublk.layers.cache import Cache
from pyublk.targets.s3 import S3
from pyublk.testing import Disk

CHUNK = 65536
SIZE = 4 * CHUNK


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallS3]:
    with SmallS3() as server:
        use_endpoint(monkeypatch, server.endpoint)
        yield server


def fill(seed: int) -> bytes:
    return random.Random(seed).randbytes(SIZE)


def cached(file: Path) -> Disk:
    source = S3("bucket/disk", size=SIZE, chunk_size=CHUNK)
    return Disk(Cache(source, file, mode="write-back", drain_after=3600))


def in_the_store() -> bytes:
    with Disk(S3("bucket/disk", read_only=True)) as disk:
        return disk.pread(SIZE, 0)


#: Opens a disk that has the first bytes, flushes the second into the file, and drains them.
WRITER = """
import random, sys
from pathlib import Path
from pyublk.layers.cache import Cache
from pyublk.targets.s3 import S3
from pyublk.testing import Disk
source = S3("bucket/disk", retry_for=0)
cache = Cache(source, Path(sys.argv[1]), mode="write-back", drain_after=3600)
with Disk(cache) as disk:
    disk.pwrite(random.Random(2).randbytes(disk.size), 0)
    disk.flush()
    print("flushed", flush=True)
    sys.stdin.readline()
    cache.drain()
    print("drained", flush=True)
    sys.stdin.readline()
"""


def test_nothing_is_lost_with_a_server_that_is_killed_before_a_put(
    s3: SmallS3, tmp_path: Path
) -> None:
    """At each PUT between the file and the store, the last one and the time after it included."""
    with Disk(S3("bucket/disk", size=SIZE, chunk_size=CHUNK)) as disk:
        disk.pwrite(fill(1), 0)
    begin = dict(s3.objects)
    seen: list[bytes] = []
    for number in range(100):
        s3.objects = dict(begin)
        file = tmp_path / f"cache-{number}"
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, file],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as writer:  # fmt: skip
            assert writer.stdin is not None
            assert writer.stdout is not None
            assert writer.stdout.readline() == "flushed\n"
            left = iter(range(number, -1, -1))

            def before_put(path: str, left: Iterator[int] = left, pid: int = writer.pid) -> bool:
                if next(left, 0) == 0:
                    os.kill(pid, signal.SIGKILL)
                    return False
                return True

            s3.before_put = before_put
            writer.stdin.write("go\n")
            writer.stdin.flush()
            drained = writer.stdout.readline() == "drained\n"
            writer.kill()
        s3.before_put = lambda path: True
        seen.append(in_the_store())
        with cached(file) as disk:
            assert disk.pread(SIZE, 0) == fill(2)
        assert in_the_store() == fill(2)  # a stop drains
        if drained:
            break
    assert seen[0] == fill(1)
    assert seen[-1] == fill(2)
    assert set(seen) == {fill(1), fill(2)}  # the state of one flush, and nothing between them
    assert len(seen) > 5


def test_another_writer_between_two_uses_of_a_cache_is_found_out(
    s3: SmallS3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "cache"
    with cached(file) as disk:
        disk.pwrite(fill(1), 0)
    with cached(file) as disk:  # its own bytes, though their writer is another one
        assert disk.pread(SIZE, 0) == fill(1)
        disk.pwrite(fill(2)[:CHUNK], 0)
    assert in_the_store() == fill(2)[:CHUNK] + fill(1)[CHUNK:]
    with Disk(S3("bucket/disk")) as other:
        other.pwrite(fill(3)[:4096], 0)
    with cached(file) as disk:
        disk.pwrite(fill(2), 0)
        with pytest.raises(OSError, match="its bytes are others"):
            disk.target.drain()  # type: ignore[attr-defined]
    assert "stay in the file as dirty" in caplog.text
    assert "Traceback" not in caplog.text
    assert in_the_store()[:4096] == fill(3)[:4096]
