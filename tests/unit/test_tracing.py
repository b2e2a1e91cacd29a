"""A trace of a disk's requests, on a disk without a kernel."""

import errno
import shutil
import struct
import subprocess
import threading
from pathlib import Path

import pytest

from pyublk import DeviceBusy, DeviceClosed, Queue, Target
from pyublk._native import TraceBuffer
from pyublk.targets import File, Null, Ram
from pyublk.testing import Disk
from pyublk.uapi import Op

#: struct blk_io_trace: magic, sequence, time, sector, bytes, action, pid, device, cpu, error, pdu.
RECORD = struct.Struct("<IIQQIIIIIHH")
Q, D, C = 1, 7, 8
READ, WRITE, FLUSH, SYNC, DISCARD, FUA = (1 << bit for bit in (0, 1, 2, 3, 13, 15))


class Record:
    def __init__(self, raw: tuple[int, ...]) -> None:
        magic, self.sequence, self.time, self.sector, self.bytes, action, pid, self.device = raw[:8]
        self.cpu, self.error, pdu = raw[8:]
        assert (magic, pid, pdu) == (0x65617407, 0, 0)
        self.event, self.category = action & 0xFFFF, action >> 16


def records(path: Path) -> list[Record]:
    return [Record(raw) for raw in RECORD.iter_unpack(path.read_bytes())]


class FullAfterwards(Target):
    """Takes writes of its first block only."""

    def __init__(self) -> None:
        super().__init__(size=1 << 20)

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = bytes(len(buffer))

    def write(self, offset: int, buffer: memoryview) -> None:
        if offset:
            raise OSError(errno.ENOSPC, "full")

    def flush(self) -> None:
        return


def test_each_request_has_three_records(tmp_path: Path) -> None:
    with Disk(FullAfterwards()) as disk:
        disk.pread(4096, 0)  # before
        with disk.trace(tmp_path / "t", megabytes=1) as trace:
            disk.pread(8192, 4096)
            disk.pwrite(bytes(512), 0, fua=True)
            disk.flush()
            with pytest.raises(OSError, match="WRITE at 512 failed"):
                disk.pwrite(bytes(512), 512)
        disk.pread(4096, 0)  # afterwards
        summary = trace.stop()
    assert (summary.events, summary.lost) == (15, 0)
    assert summary.files == (tmp_path / "t.blktrace.0",)
    found = records(summary.files[0])
    assert [one.event for one in found] == [Q, D, C] * 5
    assert [one.sequence for one in found] == list(range(15))
    assert [one.time for one in found] == sorted(one.time for one in found)
    assert [one.error for one in found if one.event == C] == [0, 0, 0, 0, errno.ENOSPC]
    what = [(one.category & 0xF00F, one.sector, one.bytes) for one in found if one.event == Q]
    assert what == [
        (READ, 8, 8192),
        (WRITE, 0, 512),
        (WRITE | FLUSH | SYNC, 0, 0),
        (WRITE | FLUSH | SYNC, 0, 0),
        (WRITE, 1, 512),
    ]


@pytest.mark.parametrize("kind", ["null", "ram", "file"])
def test_native_and_mapped_targets_are_traced_too(kind: str, tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(1 << 20))
    target = {"null": Null(size=1 << 20), "ram": Ram(size=1 << 20), "file": File(backing)}[kind]
    with Disk(target, max_io_size=4096) as disk, disk.trace(tmp_path / "t", megabytes=1) as trace:
        disk.pread(32768, 0)
        disk.pwrite(bytes(32768), 0)
        disk.discard(0, 4096)
    found = records(trace.stop().files[0])
    assert {one.event for one in found} == {Q, D, C}
    assert sum(one.event == Q for one in found) == sum(one.event == C for one in found) == 17
    assert sum(one.category & DISCARD > 0 for one in found) == 3


def test_what_finds_no_room_is_counted(tmp_path: Path) -> None:
    with Disk(Null(size=1 << 20), max_io_size=4096) as disk:
        trace = disk.trace(tmp_path / "t", megabytes=1)
        for _ in range(30):
            disk.pread(1 << 20, 0)  # 256 requests, 768 records
        summary = trace.stop()
    assert summary.events == (1 << 20) // RECORD.size
    assert summary.events + summary.lost == 30 * 768
    assert summary.files[0].stat().st_size == summary.events * RECORD.size


def test_one_trace_at_a_time_and_the_end_of_the_disk_ends_it(tmp_path: Path) -> None:
    disk = Disk(Ram(size=1 << 20))
    with pytest.raises(DeviceClosed):
        disk.trace(tmp_path / "t")
    with disk:
        trace = disk.trace(tmp_path / "t", megabytes=1)
        with pytest.raises(DeviceBusy, match=r"traced already, to .*t\.blktrace\.0"):
            disk.trace(tmp_path / "u", megabytes=1)
        assert trace.stop() == trace.stop()
        last = disk.trace(tmp_path / "u", megabytes=1)
        disk.pread(4096, 0)
    assert last.is_over
    assert len(records(tmp_path / "u.blktrace.0")) == last.stop().events == 3


def test_bad_places_and_sizes_are_told_at_the_start(tmp_path: Path) -> None:
    with Disk(Null(size=1 << 20)) as disk:
        with pytest.raises(FileNotFoundError):
            disk.trace(tmp_path / "none" / "t", megabytes=1)
        with pytest.raises(ValueError, match="megabytes"):
            disk.trace(tmp_path / "t", megabytes=0)
        disk.trace(tmp_path / "t", megabytes=1).stop()  # and nothing is in its way


def test_a_full_file_system_is_told_by_stop(tmp_path: Path) -> None:
    (tmp_path / "t.blktrace.0").symlink_to("/dev/full")
    with Disk(Null(size=1 << 20)) as disk:
        trace = disk.trace(tmp_path / "t", megabytes=1)
        disk.pread(4096, 0)
        for _ in range(2):
            with pytest.raises(OSError, match="No space"):
                trace.stop()


def test_traces_come_and_go_while_requests_are_served(tmp_path: Path) -> None:
    """The server is never found writing to what another thread has taken away."""
    over = threading.Event()
    kept = []

    def come_and_go(queue: Queue) -> None:
        while not over.is_set():
            buffer = TraceBuffer(48 * 1000)
            queue.trace(buffer)
            queue.trace(None)
            before = bytes(buffer.records())
            kept.append(len(before))
            assert bytes(buffer.records()) == before

    with Disk(Null(size=1 << 20), max_io_size=4096) as disk:
        queue = disk._queue
        assert queue is not None
        thread = threading.Thread(target=come_and_go, args=(queue,))
        thread.start()
        try:
            for _ in range(200):
                disk.pread(1 << 20, 0)
        finally:
            over.set()
            thread.join()
        assert disk.stats().latency["read"].count == 200 * 256
    assert kept


def test_a_buffer_is_as_large_as_a_record() -> None:
    with pytest.raises(ValueError, match="48 bytes"):
        TraceBuffer(47)


def test_the_answers_of_other_threads_have_records() -> None:
    buffer = TraceBuffer(4800, device=5, number=7)
    with Queue.loopback(depth=4, buffer_size=4096) as queue:
        queue.fetch()
        queue.trace(buffer)
        for tag in range(4):
            queue.inject(tag, Op.WRITE, 4096, 4096)
        ios = queue.wait(0)
        assert ios is not None
        thread = threading.Thread(target=lambda: [io.complete() for io in ios])
        thread.start()
        thread.join()
        queue.wait(0)
        queue.trace(None)
    found = [Record(raw) for raw in RECORD.iter_unpack(buffer.records())]
    assert [one.event for one in found] == [Q, D] * 4 + [C] * 4
    assert {(one.device, one.cpu, one.sector) for one in found} == {(5, 7, 8)}


def blktrace_tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian's package blktrace)")
    return found


def test_blkparse_and_btt_read_it(tmp_path: Path) -> None:
    blkparse, btt = blktrace_tool("blkparse"), blktrace_tool("btt")
    with Disk(Ram(size=1 << 20)) as disk, disk.trace(tmp_path / "t", megabytes=1):
        for block in range(100):
            disk.pwrite(bytes(4096), block * 4096)
            disk.pread(4096, block * 4096)
    parsed = subprocess.run(
        [blkparse, "-i", tmp_path / "t", "-d", tmp_path / "t.bin"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    lines = parsed.splitlines()
    assert sum(" Q  " in line for line in lines) == 200
    assert "Reads Queued:         100,      400KiB" in parsed
    assert "Writes Completed:      100,      400KiB" in parsed
    told = subprocess.run(
        [btt, "-i", "t.bin"], capture_output=True, text=True, check=True, timeout=60, cwd=tmp_path
    ).stdout
    for row in ("D2C", "Q2C"):
        line = next(line for line in told.splitlines() if line.startswith(f"{row} "))
        assert line.split()[-1] == "200", told
