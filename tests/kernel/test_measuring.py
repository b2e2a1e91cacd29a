"""What queues measure and record of real requests, by every path and whoever answers."""

import errno
import json
import os
import signal
import stat
import threading
import time
from pathlib import Path

import pytest
from blocks import Blocks
from click.testing import CliRunner
from command_line import added, run_here
from conftest import Serve
from needs import needs
from servers import end_recorded_servers, until

import pyublk
from pyublk import DataPath, Target
from pyublk.cli.recording import record
from pyublk.service.channel import Client
from pyublk.service.records import socket_place
from pyublk.targets import File, Null
from pyublk.uapi import Feature

pytestmark = pytest.mark.timeout(180)

MIB = 1 << 20
RECORD = 48
Q, D, C = 1, 7, 8


class Methods(Target):
    """Fails writes beyond its first block."""

    def __init__(self) -> None:
        super().__init__(size=MIB)

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = bytes(len(buffer))

    def write(self, offset: int, buffer: memoryview) -> None:
        if offset:
            raise OSError(errno.ENOSPC, "full")


class Later(Target):
    """Reads are answered by another thread."""

    def __init__(self) -> None:
        super().__init__(size=MIB, read_only=True)

    def handle(self, io: pyublk.IO) -> None:
        io.defer()
        threading.Timer(0.01, io.complete).start()


def events(*files: Path) -> list[tuple[int, int, int]]:
    """Event, sector and error of each record."""
    found = []
    for file in files:
        data = file.read_bytes()
        for at in range(0, len(data), RECORD):
            number = int.from_bytes(data[at + 28 : at + 30], "little")
            sector = int.from_bytes(data[at + 16 : at + 24], "little")
            found.append((number, sector, int.from_bytes(data[at + 44 : at + 46], "little")))
    return found


def counted(disk: pyublk.Device) -> int:
    found = disk.stats()
    counts = {name: histogram.count for name, histogram in found.latency.items()}
    # What is answered is counted before the kernel has it.
    assert counts["read"] == found.total.reads
    assert sum(counts.values()) == found.total.requests
    assert all(one.quantile(1) > 0 for one in found.latency.values() if one.count)
    return counts["read"]


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("kind", ["null", "methods", "file", "later"])
def test_every_request_is_measured_and_recorded(
    kind: str, batch: bool, serve: Serve, tmp_path: Path
) -> None:
    if batch:
        needs(Feature.BATCH_IO)
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(MIB))
    targets = {
        "null": lambda: Null(size=MIB),
        "methods": Methods,
        "file": lambda: File(backing),
        "later": Later,
    }
    threads = 2 if kind == "null" and not batch else 1
    if threads > 1:
        needs(Feature.PER_IO_DAEMON)
    disk = serve(targets[kind](), batch=batch, threads=threads, queues=1)
    with Blocks(disk.path, os.O_RDONLY) as blocks:
        blocks.read(4096, 0)
        before = counted(disk)
        with disk.trace(tmp_path / "t", megabytes=1) as trace:
            for block in range(20):
                blocks.read(4096, block * 4096)
        assert counted(disk) >= before + 20
    summary = trace.stop()
    assert summary.lost == 0
    assert len(summary.files) == threads
    found = events(*summary.files)
    assert len(found) == summary.events
    for event in (Q, D, C):
        assert {(event, block * 8, 0) for block in range(20)} <= set(found)
    node = os.stat(disk.path)
    assert stat.S_ISBLK(node.st_mode)
    device = int.from_bytes(summary.files[0].read_bytes()[36:40], "little")
    assert (device >> 20, device & 0xFFFFF) == (os.major(node.st_rdev), os.minor(node.st_rdev))
    assert counted(disk) == disk.stats().total.reads


def test_failures_have_their_errno(serve: Serve, tmp_path: Path) -> None:
    disk = serve(Methods())
    with Blocks(disk.path) as blocks, disk.trace(tmp_path / "t", megabytes=1) as trace:
        blocks.write(bytes(4096), 0)
        with pytest.raises(OSError, match="No space"):
            blocks.write(bytes(4096), 8192)
    found = events(*trace.stop().files)
    assert (C, 0, 0) in found
    assert (C, 16, errno.ENOSPC) in found
    assert disk.stats().latency["write"].count == 2


def test_a_swap_keeps_what_was_measured_and_goes_on_recording(serve: Serve, tmp_path: Path) -> None:
    needs(Feature.QUIESCE)
    disk = serve(Null(size=MIB), recovery="resend", batch=False, path=DataPath.COPY)
    trace = disk.trace(tmp_path / "t", megabytes=1)
    with pytest.raises(pyublk.DeviceBusy, match="traced already"):
        disk.trace(tmp_path / "u", megabytes=1)
    with Blocks(disk.path, os.O_RDONLY) as blocks:
        blocks.read(4096, 0)
        before = counted(disk)
        disk.swap(Null(size=MIB))
        blocks.read(4096, 81920)
        assert counted(disk) > before
    disk.stop()
    assert trace.is_over  # with the disk
    found = events(*trace.stop().files)
    for sector in (0, 160):
        assert {(event, sector, 0) for event in (Q, D, C)} <= set(found)


@pytest.mark.thorough
def test_a_servers_disk_is_recorded_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the time is over, Ctrl-C, or the end of the client."""
    monkeypatch.chdir(tmp_path)
    try:
        disk = added("null", "--size", "1M")
        number = str(disk["id"])
        with Blocks(disk["path"], os.O_RDONLY) as blocks:

            def read_and_interrupt() -> None:
                until(Path("t.blktrace.0").exists)
                time.sleep(1.0)  # the command waits
                blocks.read(4096, 40960)
                os.kill(os.getpid(), signal.SIGINT)

            reader = threading.Thread(target=read_and_interrupt)
            reader.start()
            done = CliRunner().invoke(record, [number, "-o", "t", "--megabytes", "1", "--json"])
            reader.join()
            assert done.exit_code == 0, done.output
            told = json.loads(done.stdout)
            assert told["files"] == [str(tmp_path / "t.blktrace.0")]
            assert told["lost"] == 0
            assert (C, 80, 0) in events(tmp_path / "t.blktrace.0")
            with Client(socket_place(disk["id"])) as client:
                client.ask("trace", path=str(tmp_path / "u"), megabytes=1)
                blocks.read(4096, 0)
            until(lambda: (tmp_path / "u.blktrace.0").stat().st_size >= 3 * RECORD)
        done = CliRunner().invoke(record, [number, "-o", "v", "--seconds", "0.1"])
        assert done.exit_code == 0, done.output
        assert "none lost" in done.output
        printed = run_here("stats", number)
        assert "P99.9" in printed.output, printed.output
        assert run_here("stop", number).exit_code == 0
    finally:
        end_recorded_servers()
