"""What disks do is seen, the whole way: from a request to `top`, to Prometheus and in a trace."""

import json
import mmap
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import added, run_here
from conftest import Serve

from pyublk.service.records import Record
from pyublk.targets import Ram

BLOCK = 4096


@contextmanager
def writing(*paths: str) -> Iterator[None]:
    """Writes of 4 KiB to each of them, one after the other, through all of the first MiB again and
    again, until the end."""
    begun = [threading.Event() for _ in paths]
    over = threading.Event()

    def write(path: str, first: threading.Event) -> None:
        disk = os.open(path, os.O_WRONLY | os.O_DIRECT)
        with mmap.mmap(-1, BLOCK) as block:
            while not over.is_set():
                for place in range(0, 1 << 20, BLOCK):
                    os.pwritev(disk, [block], place)
                    first.set()
        os.close(disk)

    threads = [threading.Thread(target=write, args=one) for one in zip(paths, begun, strict=True)]
    for thread in threads:
        thread.start()
    try:
        assert all(first.wait(30) for first in begun)
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


@pytest.mark.usefixtures("place")
def test_what_disks_do_is_seen(serve: Serve) -> None:
    pytest.importorskip("prometheus_client")
    disk = added("ram", "--size", "64M")
    theirs = serve(Ram(size=1 << 20))  # of no `pyublk add`: to the command, another program's
    with writing(disk["path"], theirs.path):
        result = run_here("top", "--once", "--json", "--interval", "1")
        assert (result.exit_code, result.stderr) == (0, "")
        recorded = run_here("trace", "record", str(disk["id"]), "-o", "t", "--seconds", "1")
        assert recorded.exit_code == 0, recorded.stderr
    seen = {one["id"]: one for one in json.loads(result.stdout)}
    ours, other = seen[disk["id"]], seen[theirs.id]
    assert ours["iops"] == ours["write_iops"] > 0
    assert ours["bytes_written_per_second"] == pytest.approx(ours["iops"] * BLOCK)
    assert 0 < ours["latency"]["p50"] <= ours["latency"]["p99"] <= ours["latency"]["p99.9"] < 10
    assert (ours["errors"], ours["restarts"], ours["target"]) == (0, 0, "ram")
    assert other["iops"] > 0
    assert (other["answers"], other["errors"], other["latency"]["p99"]) == (False, None, None)

    written = re.search(r"^(\d+) records in ", recorded.stdout)
    assert written is not None
    summary = json.loads(run_here("trace", "summary", "t", "--json").stdout)
    (writes,) = [one for one in summary["operations"] if one["operation"] == "write"]
    assert writes["requests"] > 0
    assert writes["sizes"] == {str(BLOCK): writes["requests"]}
    assert writes["errors"] == 0
    assert summary["sequential"] > 0.9
    assert summary["largest_depth"] == 1
    assert summary["device"] == ":".join(
        Path(f"/sys/class/block/ublkb{disk['id']}/dev").read_text().strip().split(":")
    )

    result = run_here("metrics", "--once")
    assert (result.exit_code, result.stderr) == (0, "")
    metrics = dict(re.findall(r"^(pyublk\S+) (\S+)$", result.stdout, re.M))
    device = f'device="ublkb{disk["id"]}"'
    count = float(metrics[f'pyublk_requests_total{{{device},operation="write"}}'])
    assert count >= writes["requests"]
    name = "pyublk_request_duration_seconds"
    assert float(metrics[f'{name}_count{{{device},operation="write"}}']) == count
    assert float(metrics[f'{name}_bucket{{{device},le="+Inf",operation="write"}}']) == count
    assert float(metrics[f"pyublk_disk_size_bytes{{{device}}}"]) == 64 << 20
    assert f'pyublk_server_up{{device="ublkb{theirs.id}"}}' not in metrics


@pytest.mark.usefixtures("place")
def test_a_server_that_does_not_answer_is_told() -> None:
    disk = added("null")
    record = Record.read(disk["id"])
    assert record is not None
    os.kill(record.server.pid, signal.SIGSTOP)
    try:
        (seen,) = json.loads(run_here("top", "--once", "--json", "--interval", "0.1").stdout)
    finally:
        os.kill(record.server.pid, signal.SIGCONT)
    assert (seen["state"], seen["answers"]) == ("live", False)
    assert re.fullmatch("the server behind .* did not answer within 1 s", seen["silence"])
