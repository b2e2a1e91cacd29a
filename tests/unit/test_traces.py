"""Traces: what is read from blktrace's files, its numbers, and what other programs read of it."""

import csv
import errno
import io
import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pyublk import Target, errors, traces
from pyublk.cli import main
from pyublk.cli.failures import ExitCode
from pyublk.testing import Disk
from pyublk.traces import Category, Record, Request, Trace, TraceError
from pyublk.traces.exports import FORMATS
from pyublk.traces.plots import PLOTS
from pyublk.traces.summary import depth

K = 1024
#: Of two queues: a stream of reads with one more between them that is answered late, a write that
#: waits for 2 ms, a flush, a discard, a write that fails, and one that is never answered.
REQUESTS = [
    Request("read", 0, 4 * K, 0.000, 0.001),
    Request("read", 512 * K, 8 * K, 0.0005, 0.010, queue=1),
    Request("read", 4 * K, 4 * K, 0.001, 0.001),
    Request("read", 8 * K, 4 * K, 0.002, 0.001),
    Request("write", 1024 * K, 64 * K, 0.003, 0.005, waited=0.002, fua=True),
    Request("flush", 0, 0, 0.008, 0.002),
    Request("discard", 2048 * K, 1024 * K, 0.011, 0.001),
    Request("write", 1088 * K, 512, 0.012, 0.0005, error=5, queue=1),
    Request("write", 4096 * K, 4 * K, 0.013, None),
]


def seen(requests: Any) -> list[tuple[Any, ...]]:
    """Comparable: the times to a nanosecond."""
    return [
        tuple(round(one, 9) if isinstance(one, float) else one for one in request)
        for request in requests
    ]


@pytest.fixture
def name(tmp_path: Path) -> Path:
    """A trace with REQUESTS."""
    traces.write(tmp_path / "t", REQUESTS, device="259:3")
    return tmp_path / "t"


def many(count: int = 1000) -> list[Request]:
    """Random writes and reads of 4 KiB on two queues, one every 100 µs, each answered after 40."""
    return [
        Request(
            "read" if n % 3 else "write",
            n * 7919 % 4096 * 4 * K,
            4 * K,
            n * 1e-4,
            4e-5,
            queue=n % 2,
        )
        for n in range(count)
    ]


# ---- reading and writing ----


def test_requests_come_back_as_they_were_written(name: Path) -> None:
    trace = traces.read(name)
    assert seen(trace.requests) == seen(REQUESTS)
    assert (trace.device, trace.lost, trace.orphans) == ("259:3", 0, 0)
    assert trace.duration == pytest.approx(0.013)
    assert trace.requests[4].answered == pytest.approx(0.008)
    assert trace.requests[-1].answered is None


def test_a_single_file_is_read_by_its_own_name(name: Path) -> None:
    trace = traces.read(f"{name}.blktrace.1")
    # Its times count from its own first record.
    assert [one.arrived for one in trace.requests] == pytest.approx([0, 0.0115])


def test_the_files_are_blktraces_own(name: Path) -> None:
    """Each field at its place, by the layout of linux/blktrace_api.h."""
    data = Path(f"{name}.blktrace.1").read_bytes()
    assert len(data) == 2 * 3 * 48
    numbers = [
        int.from_bytes(data[at : at + size], "little")
        for at, size in ((0, 4), (4, 4), (8, 8), (16, 8), (24, 4), (28, 4), (36, 4), (40, 4))
    ]
    # magic and version, sequence, ns, sector, bytes, action (queued read), device, cpu
    assert numbers == [0x65617407, 1, 500_000, 1024, 8192, 0x110001, 259 << 20 | 3, 1]
    assert int.from_bytes(data[-4:-2], "little") == 5  # errno of the last answer


def records(*about: tuple[int, str, int], **fields: Any) -> list[Record]:
    """Records of reads: each with its time, the letter of its action, and its sector."""
    letters = {"Q": 1 | 0x110000, "D": 7 | 0x410000, "C": 8 | 0x810000}
    base = Record(0, 0, 0, 4096, 0, 0, 0, 0, 0)
    return [
        base._replace(sequence=n + 1, time=time, action=letters[letter], sector=sector, **fields)
        for n, (time, letter, sector) in enumerate(about)
    ]


def read_of(tmp_path: Path, *files: list[Record]) -> Trace:
    for number, found in enumerate(files):
        traces.write_records(tmp_path / f"r.blktrace.{number}", found)
    return traces.read(tmp_path / "r")


def test_the_oldest_of_a_place_is_answered_first(tmp_path: Path) -> None:
    trace = read_of(tmp_path, records((0, "Q", 8), (10, "Q", 8), (30, "C", 8), (70, "C", 8)))
    assert [one.latency for one in trace.requests] == pytest.approx([30e-9, 60e-9])


def test_of_two_queues_at_one_place_the_same_queue_is_answered(tmp_path: Path) -> None:
    trace = read_of(
        tmp_path,
        records((0, "Q", 8), (90, "C", 8)),
        records((10, "Q", 8), (30, "C", 8), cpu=1),
    )
    assert [one.latency for one in trace.requests] == pytest.approx([90e-9, 20e-9])


def test_a_trace_without_arrivals_counts_from_the_issue(tmp_path: Path) -> None:
    trace = read_of(tmp_path, records((0, "D", 8), (5, "D", 16), (30, "C", 16), (31, "C", 8)))
    assert [one.latency for one in trace.requests] == pytest.approx([31e-9, 25e-9])
    assert [one.waited for one in trace.requests] == [0, 0]


def test_an_answer_without_a_request_is_counted(tmp_path: Path) -> None:
    trace = read_of(tmp_path, records((0, "C", 8), (5, "Q", 16)))
    assert trace.orphans == 1
    assert [one.latency for one in trace.requests] == [None]


def test_gaps_in_the_sequence_are_losses(tmp_path: Path) -> None:
    found = records(*((n, "Q", n * 8) for n in range(10)))
    trace = read_of(tmp_path, [*found[:3], *found[5:6], *found[9:]])
    assert trace.lost == 2 + 3


def test_other_records_are_skipped(tmp_path: Path) -> None:
    found = records((0, "Q", 8), (9, "C", 8))
    message = found[0]._replace(action=2 | Category.NOTIFY << 16, pdu=b"hello")
    merge = found[0]._replace(action=2 | Category.READ << 16, sector=800)
    trace = read_of(tmp_path, [message, found[0], merge, found[1]])
    assert len(trace.requests) == 1


def test_an_error_is_an_errno_in_either_sign(tmp_path: Path) -> None:
    found = records((0, "Q", 8), (1, "C", 8), (2, "Q", 8), (3, "C", 8))
    found[1] = found[1]._replace(error=28)
    found[3] = found[3]._replace(error=0x10000 - 5)  # as the kernel has it
    assert [one.error for one in read_of(tmp_path, found).requests] == [28, 5]


def test_zeros_at_the_end_are_not_read(name: Path) -> None:
    file = Path(f"{name}.blktrace.0")
    for more in (b"\0" * 4096, b"\0" * 17):
        whole = file.read_bytes()
        file.write_bytes(whole + more)
        assert seen(traces.read(name).requests) == seen(REQUESTS)
        file.write_bytes(whole)


@pytest.mark.parametrize(
    "request_",
    [
        Request("read", 100, 512, 0, 1),
        Request("read", 0, 100, 0, 1),
        Request("read", 0, 1 << 33, 0, 1),
        Request("read", -512, 512, 0, 1),
    ],
)
def test_what_does_not_fit_is_refused(request_: Request, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"multiples of 512|does not fit blktrace's format"):
        traces.write(tmp_path / "t", [request_])


class Half(Target):
    """Its second half cannot be written."""

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = bytes(len(buffer))

    def write(self, offset: int, data: memoryview) -> None:
        if offset >= self.size // 2:
            raise OSError(errno.ENOSPC, "full")

    def flush(self) -> None:
        pass

    def discard(self, offset: int, length: int) -> None:
        pass


def test_what_a_disk_records_is_read(tmp_path: Path) -> None:
    """Every operation, by the engine that serves the kernel."""
    with Disk(Half(size=1 << 20)) as disk, disk.trace(tmp_path / "t", megabytes=1):
        disk.pread(8192, 4096)
        disk.pwrite(bytes(512), 1024, fua=True)
        disk.discard(65536, 4096)
        with pytest.raises(OSError, match="failed"):
            disk.pwrite(bytes(512), 1 << 19)
    found = traces.read(tmp_path / "t")
    what = [(one.operation, one.offset, one.length, one.error) for one in found.requests]
    assert [one for one in what if one[0] != "flush"] == [
        ("read", 4096, 8192, 0),
        ("write", 1024, 512, 0),
        ("discard", 65536, 4096, 0),
        ("write", 1 << 19, 512, errno.ENOSPC),
    ]
    assert all(one.latency is not None and one.waited >= 0 for one in found.requests)
    assert (found.lost, found.orphans) == (0, 0)
    told = output_of("blkparse", "-i", tmp_path / "t", where=tmp_path)
    assert re.search(r" Q +D 128 \+ 8 ", told)


# ---- files that are no trace ----


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments], prog_name="pyublk")


def damaged(whole: bytes) -> dict[str, tuple[bytes, str]]:
    """Contents of a file, and what is told of it."""
    return {
        "cut": (whole[:-1], "ends in the middle of a record, which begins at byte 1056"),
        "cut in its first": (whole[:40], "in the middle of a record, which begins at byte 0"),
        "text": (b"fio version 3 iolog\n" * 9, "is not a trace: it does not begin with a record"),
        "zeros": (bytes(480), "is not a trace"),
        "empty": (b"", "is an empty trace: no record is in "),
        "version 8": (b"\x08" + whole[1:], "is of version 8 of blktrace's format; only 7 is read"),
        "big-endian": (whole[3::-1] + whole[4:], "on a machine of the other byte order"),
        "overwritten": (
            whole[:480] + b"?" * 48 + whole[528:],
            "has something at byte 480 that is not a record of blktrace",
        ),
        "pdu": (
            whole[:-2] + b"\x09\x00",
            "ends in the middle of a record, which begins at byte 1056",
        ),
    }


@pytest.mark.parametrize("what", sorted(damaged(bytes(48))))
@pytest.mark.parametrize(
    "command", [["summary"], ["export", "--format", "csv"], ["plot"]], ids=lambda words: words[0]
)
def test_another_file_is_told_in_a_sentence(command: list[str], what: str, tmp_path: Path) -> None:
    place = tmp_path / "t"
    traces.write(place, [one._replace(queue=0) for one in REQUESTS[:-2]] + REQUESTS[-1:])
    file = Path(f"{place}.blktrace.0")
    content, told = damaged(file.read_bytes())[what]
    file.write_bytes(content)
    with pytest.raises(TraceError):
        traces.read(place)
    result = run("trace", *command, place)
    assert result.exit_code == ExitCode.FAILED
    assert len(result.stderr.splitlines()) == 1
    assert told in result.stderr
    assert str(place) in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("where", ["none", "no/such/directory"])
def test_a_trace_that_is_not_there_is_told(where: str, tmp_path: Path) -> None:
    result = run("trace", "summary", tmp_path / where)
    assert result.exit_code == ExitCode.FAILED
    assert result.stderr == f"pyublk: there is no such trace: '{tmp_path / where}.blktrace.0'\n"


def test_losses_are_told(tmp_path: Path) -> None:
    found = records((0, "Q", 8), (1, "C", 8), (2, "C", 800), (5, "Q", 8))
    read_of(tmp_path, [*found[:3], found[3]._replace(sequence=9)])
    result = run("trace", "summary", tmp_path / "r", "--json")
    assert result.exit_code == 0
    assert result.stderr == (
        f"pyublk: 5 records are missing from {tmp_path}/r\n"
        f"pyublk: 1 requests were answered in {tmp_path}/r that began before it\n"
    )
    assert (json.loads(result.stdout)["lost"], json.loads(result.stdout)["orphans"]) == (5, 1)


# ---- numbers ----


def test_summary(name: Path) -> None:
    summary = traces.summarize(traces.read(name))
    by_name = {one.operation: one for one in summary.operations}
    assert {name: one.requests for name, one in by_name.items()} == {
        "read": 4, "write": 3, "flush": 1, "discard": 1,
    }  # fmt: skip
    assert by_name["read"].sizes == {4096: 3, 8192: 1}
    assert by_name["read"].bytes == 20 * K
    assert by_name["write"].errors == 1
    assert by_name["write"].unanswered == 1
    assert by_name["read"].latency == pytest.approx({0.5: 1e-3, 0.9: 1e-2, 0.99: 1e-2, 0.999: 1e-2})
    assert by_name["read"].mean == pytest.approx(13e-3 / 4)
    assert by_name["read"].longest == pytest.approx(1e-2)
    # Two of the reads, and the write that failed, begin where another ended.
    assert summary.sequential == pytest.approx(3 / 7)
    # 22 ms of request time (the last one none, at the end of the trace) in 13 ms.
    assert summary.mean_depth == pytest.approx(21.5 / 13)
    assert summary.largest_depth == 2
    best = summary.busiest[0]
    assert (best.offset, best.length, best.requests, best.bytes) == (1024 * K, 128 * K, 2, 66048)


def test_depth_of_requests_that_meet_at_a_moment(tmp_path: Path) -> None:
    """One that comes when another goes makes no peak."""
    traces.write(tmp_path / "t", [Request("read", 0, 512, n * 1e-3, 1e-3) for n in range(5)])
    assert {have for _, have in depth(traces.read(tmp_path / "t"))} == {0, 1}


def test_quantiles_of_many(tmp_path: Path) -> None:
    requests = [Request("read", n * 512, 512, n * 1e-3, (n + 1) * 1e-6) for n in range(1000)]
    traces.write(tmp_path / "t", requests)
    (reads,) = traces.summarize(traces.read(tmp_path / "t")).operations
    assert reads.latency == pytest.approx({0.5: 500e-6, 0.9: 900e-6, 0.99: 990e-6, 0.999: 999e-6})


def test_the_command_prints_them(name: Path) -> None:
    result = run("trace", "summary", name)
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.search(r"^device +259:3$", result.stdout, re.M)
    assert re.search(r"^queue depth +1\.7 on average, at most 2$", result.stdout, re.M)
    assert re.search(r"^sequential +42\.9% of reads and writes$", result.stdout, re.M)
    row = r"^read +4 +20\.0KiB +0 +0 +1\.00ms +10\.0ms +10\.0ms +10\.0ms +10\.0ms$"
    assert re.search(row, result.stdout, re.M)
    assert re.search(r"^read +4KiB +3$", result.stdout, re.M)
    assert re.search(r"^0x100000 +128KiB +2 +64\.5KiB$", result.stdout, re.M)


def test_a_trace_of_flushes_only(tmp_path: Path) -> None:
    traces.write(tmp_path / "t", [Request("flush", 0, 0, 0, None)])
    result = run("trace", "summary", tmp_path / "t")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "sequential" not in result.stdout
    assert run("trace", "export", "--format", "chrome", tmp_path / "t").exit_code == 0


# ---- other programs ----


def tool(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed (./run setup installs it)")
    return found


def output_of(program: str, *arguments: object, where: Path) -> str:
    done = subprocess.run(
        [tool(program), *map(str, arguments)],
        cwd=where, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_blkparse_reads_it(name: Path, tmp_path: Path) -> None:
    told = output_of("blkparse", "-i", name, where=tmp_path)
    lines = [line.split() for line in told.splitlines() if line.startswith("259,3")]
    assert len(lines) == 3 * len(REQUESTS) - 1
    # device, queue, sequence, time, pid, action, what, sector + sectors
    assert lines[0][1:] == ["0", "1", "0.000000000", "0", "Q", "R", "0", "+", "8", "[(null)]"]
    queued = [line[6] for line in lines if line[5] == "Q"]
    assert queued == ["R", "R", "R", "R", "WF", "FW", "D", "W", "W"]
    assert re.search(r"C +W 2176 \+ 1 \[5\]", told), "the failed write, with its errno"
    assert re.search(r"Skips: 0 forward \(0 -   0\.0%\)", told)


def test_btt_has_the_same_latencies(tmp_path: Path) -> None:
    traces.write(tmp_path / "t", many())
    output_of("blkparse", "-i", "t", "-d", "t.bin", "-O", where=tmp_path)
    told = output_of("btt", "-i", "t.bin", where=tmp_path)
    for what in ("Q2C", "D2C"):
        row = re.search(rf"^{what} +(\S+) +(\S+) +(\S+) +(\d+)$", told, re.M)
        assert row is not None, told
        assert [float(one) for one in row.groups()] == pytest.approx([4e-5, 4e-5, 4e-5, 1000])


def test_our_reader_reads_what_blkparse_writes(name: Path, tmp_path: Path) -> None:
    output_of("blkparse", "-i", name, "-d", "t.bin", "-O", where=tmp_path)
    assert seen(traces.read(tmp_path / "t.bin").requests) == seen(REQUESTS)


def replay(log: Path, where: Path) -> dict[str, Any]:
    """What `fio` says of replaying it to a file."""
    (where / "disk").write_bytes(bytes(16 << 20))
    told = output_of(
        "fio", "--name=replay", f"--read_iolog={log.name}", "--replay_redirect=disk",
        "--ioengine=psync", "--replay_no_stall=1", "--output-format=json", where=where,
    )  # fmt: skip
    job: dict[str, Any] = json.loads(told[told.index("{") :])["jobs"][0]
    return job


def test_fio_replays_a_trace(tmp_path: Path) -> None:
    traces.write(tmp_path / "t", many())
    output_of("blkparse", "-i", "t", "-d", "t.bin", "-O", where=tmp_path)
    job = replay(tmp_path / "t.bin", tmp_path)
    assert (job["read"]["total_ios"], job["write"]["total_ios"]) == (666, 334)
    assert job["read"]["io_bytes"] == 666 * 4 * K


def test_fio_replays_an_iolog(tmp_path: Path) -> None:
    traces.write(tmp_path / "t", [*many(), Request("flush", 0, 0, 0.2, 0.001)])
    log = tmp_path / "t.iolog"
    result = run("trace", "export", "--format", "fio", tmp_path / "t", "-o", log)
    assert (result.exit_code, result.output) == (0, "")
    job = replay(log, tmp_path)
    assert (job["read"]["total_ios"], job["write"]["total_ios"]) == (666, 334)
    assert job["sync"]["total_ios"] == 1
    assert job["write"]["io_bytes"] == 334 * 4 * K


def test_fio_replays_an_iolog_in_its_own_time(tmp_path: Path) -> None:
    """Its times are microseconds: a replay is at least as long as the trace."""
    traces.write(tmp_path / "t", [Request("read", 0, 4096, n * 0.1, 0.01) for n in range(4)])
    log = tmp_path / "t.iolog"
    run("trace", "export", "--format", "fio", tmp_path / "t", "-o", log)
    (tmp_path / "disk").write_bytes(bytes(4096))
    told = output_of(
        "fio", "--name=replay", "--read_iolog=t.iolog", "--replay_redirect=disk",
        "--ioengine=psync", "--output-format=json", where=tmp_path,
    )  # fmt: skip
    assert 300 <= json.loads(told)["jobs"][0]["read"]["runtime"] < 30_000


# ---- exports ----


def test_the_iolog_leaves_out_what_fio_does_not_know(tmp_path: Path) -> None:
    traces.write(tmp_path / "t", [*REQUESTS, Request("other", 0, 0, 0.02, 0.1)])
    result = run("trace", "export", "--format", "fio", tmp_path / "t")
    assert result.stderr == "pyublk: 1 requests have no form in fio and were left out\n"
    lines = result.stdout.splitlines()
    assert lines[:4] == ["fio version 3 iolog", "0 disk add", "0 disk open", "1 disk read 0 4096"]
    assert lines[8:10] == ["8001 disk sync 0 0", "11001 disk trim 2097152 1048576"]
    assert lines[-1] == "13001 disk close"


def test_csv(name: Path) -> None:
    rows = list(csv.DictReader(run("trace", "export", "--format", "csv", name).stdout.splitlines()))
    assert len(rows) == len(REQUESTS)
    assert rows[4] == {
        "operation": "write", "offset": "1048576", "length": "65536", "arrived": "0.003000000",
        "latency": "0.005000000", "waited": "0.002000000", "error": "0", "queue": "0", "fua": "1",
    }  # fmt: skip
    assert rows[-1]["latency"] == ""


def test_chromes_events(tmp_path: Path) -> None:
    overlapping = [
        Request("read", n * 4096, 4096, n * 1e-3, 2.5e-3, queue=n % 2) for n in range(40)
    ]
    traces.write(tmp_path / "t", overlapping)
    found = json.loads(run("trace", "export", "--format", "chrome", tmp_path / "t").stdout)
    slices = [one for one in found["traceEvents"] if one["ph"] == "X"]
    assert len(slices) == 40
    assert (slices[3]["ts"], slices[3]["dur"]) == pytest.approx((3000, 2500))
    assert slices[3]["args"]["offset"] == 3 * 4096
    lanes: dict[int, list[tuple[float, float]]] = {}
    for one in slices:
        lanes.setdefault(one["tid"], []).append((one["ts"], one["ts"] + one["dur"]))
    # Each queue has two at a time, and a lane never has two: viewers would nest them.
    assert len(lanes) == 4
    for lane in lanes.values():
        assert all(end <= begin for (_, end), (begin, _) in pairwise(lane))
    names = {
        one["tid"]: one["args"]["name"]
        for one in found["traceEvents"]
        if one["name"] == "thread_name"
    }
    assert names.keys() == lanes.keys()
    assert max(one["args"]["requests"] for one in found["traceEvents"] if one["ph"] == "C") == 3


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_every_format_takes_every_request(form: str, name: Path) -> None:
    out = io.StringIO()
    FORMATS[form](traces.read(name), out)
    assert len(out.getvalue().splitlines()) >= len(REQUESTS)


def test_an_export_to_a_place_that_cannot_be_written(name: Path, tmp_path: Path) -> None:
    result = run("trace", "export", "--format", "csv", name, "-o", tmp_path / "no" / "file")
    assert result.exit_code == ExitCode.FAILED
    assert result.stderr == f"pyublk: No such file or directory: '{tmp_path}/no/file'\n"


# ---- pictures ----


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_is_drawn(suffix: str, name: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    place = tmp_path / f"picture.{suffix}"
    result = run("trace", "plot", name, "-o", place)
    assert (result.exit_code, result.output) == (0, f"{place}\n")
    begin = place.read_bytes()[:200]
    assert begin.startswith(b"\x89PNG") if suffix == "png" else b"<?xml" in begin


def test_a_picture_of_flushes_only(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    traces.write(tmp_path / "t", [Request("flush", 0, 0, 0, None)])
    assert run("trace", "plot", tmp_path / "t").exit_code == 0


def test_one_plot_has_one_panel(name: Path) -> None:
    """And shows where each request was."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    PLOTS["offsets"](panel := figure.subplots(), traces.read(name))
    drawn = {points.get_label(): points.get_offsets().tolist() for points in panel.collections}
    assert drawn.keys() == {"read", "write", "discard"}
    assert drawn["discard"] == [pytest.approx([0.011, 2048])]


def test_the_heat_map_has_every_answered_request(tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    traces.write(tmp_path / "t", [*many(), Request("read", 0, 512, 0.0, None)])
    PLOTS["latency"](panel := figure.subplots(), traces.read(tmp_path / "t"))
    assert panel.collections[0].get_array().sum() == 1000
    assert panel.get_yscale() == "log"


@pytest.mark.parametrize("sizes", [4, 40])
def test_the_sizes_add_up(sizes: int, tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    requests = [Request("read", 0, (n % sizes + 1) * 512, n * 1e-3, 1e-4) for n in range(200)]
    traces.write(tmp_path / "t", requests)
    PLOTS["sizes"](panel := figure.subplots(), traces.read(tmp_path / "t"))
    assert sum(bar.get_width() for bar in panel.patches) == 200
    assert len(panel.patches) == (4 if sizes == 4 else 6)


def test_wrong_pictures(name: Path, tmp_path: Path) -> None:
    result = run("trace", "plot", name, "-o", tmp_path / "picture.gif")
    assert result.exit_code == ExitCode.USAGE
    assert "a picture's name ends in .png or .svg, unlike" in result.stderr
    with pytest.raises(ValueError, match="no plot 'colors'; there are: offsets, latency"):
        traces.plot(traces.read(name), tmp_path / "x.png", plots=["colors"])


def test_without_matplotlib(name: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [one for one in sys.modules if one.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(errors.ExtraMissing):
        traces.plot(traces.read(name), "x.png")
    result = run("trace", "plot", name)
    assert result.exit_code == ExitCode.FAILED
    assert result.stderr == "pyublk: matplotlib is not installed: pip install 'pyublk[plot]'\n"
