"""Caches as real disks: under fio, asked by the command, and after a kill."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
from blocks import Blocks
from command_line import added, run_here
from conftest import Serve
from fio import verified
from restarted import served_again

import pyublk
from pyublk.control import Controller
from pyublk.layers.cache import Cache

SIZE = 32 << 20


class Origin(pyublk.Target):
    """Memory, a millisecond away."""

    concurrency = "parallel"

    def __init__(self) -> None:
        super().__init__(size=SIZE)
        self.data = bytearray(SIZE)
        self.never = threading.Event()

    def read(self, offset: int, buffer: memoryview) -> None:
        self.never.wait(0.001)
        buffer[:] = self.data[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview) -> None:
        self.never.wait(0.001)
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        self.never.wait(0.001)


@pytest.mark.thorough
def test_write_back_with_a_limit_under_verifying_clients(serve: Serve, tmp_path: Path) -> None:
    origin = Origin()
    cache = Cache(
        origin, tmp_path / "cache", mode="write-back", limit=16 << 20, drain_after=0.1, patience=60
    )
    disk = serve(cache, queues=2)
    jobs = {"rw": "randwrite", "bs": "4k", "iodepth": 8, "numjobs": 2, "size": SIZE // 2}
    report = verified(
        disk.path, offset_increment=SIZE // 2, io_size="512k", fsync=32, timeout=240, **jobs
    )
    assert report.writes >= 2 * (512 << 10) // 4096
    status = cache.drain()
    assert status["drain_failures"] == 0
    assert status["present_bytes"] <= 16 << 20
    with Blocks(disk.path) as client:
        assert client.read(SIZE, 0) == origin.data


def test_write_through_under_verifying_clients(serve: Serve, tmp_path: Path) -> None:
    origin = Origin()
    cache = Cache(origin, tmp_path / "cache")
    disk = serve(cache, queues=2)
    verified(disk.path, rw="randwrite", bs="4k", iodepth=8, size=SIZE, io_size="512k", timeout=240)
    with Blocks(disk.path) as client:
        assert client.read(SIZE, 0) == origin.data


def test_a_killed_server_loses_nothing_and_the_command_drains(
    place: Path, controller: Controller
) -> None:
    source = Path("source.img")
    source.write_bytes(os.urandom(4096) * (SIZE // 4096))
    options = ("--option", "mode=write-back", "--option", "drain_after=3600")
    disk = added("cache", "disk.cache", str(source), *options)
    written = {offset: os.urandom(8192) for offset in range(0, SIZE, 3 << 20)}
    with Blocks(disk["path"]) as client:
        for offset, data in written.items():
            client.write(data, offset)
        os.kill(disk["server_pid"], signal.SIGKILL)
        served_again(controller, disk, disk["server_pid"])
        for offset, data in written.items():
            assert client.read(8192, offset) == data
    told = cache_of(disk, "info")
    assert told["dirty_bytes"] >= len(written) * 8192
    refused = run_here("cache", str(disk["id"]), "invalidate")
    assert refused.exit_code == 6
    assert "drain the cache first" in refused.stderr
    assert cache_of(disk, "drain")["dirty_bytes"] == 0
    below = source.read_bytes()
    assert all(below[offset : offset + 8192] == data for offset, data in written.items())
    assert cache_of(disk, "invalidate")["present_bytes"] == 0
    with Blocks(disk["path"]) as client:
        assert client.read(8192, 0) == written[0]
    shown = run_here("cache", str(disk["id"]), "info")
    assert "write-back" in shown.stdout
    assert run_here("stop", str(disk["id"])).exit_code == 0


def cache_of(disk: dict[str, object], action: str) -> dict[str, object]:
    done = run_here("cache", str(disk["id"]), action, "--json")
    assert done.exit_code == 0, done.stderr
    told: dict[str, object] = json.loads(done.stdout)
    return told
