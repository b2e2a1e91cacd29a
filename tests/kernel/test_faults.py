"""Rules for the requests of real disks; tests/target_contract.py has every fault on every kind."""

import errno
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from blocks import Blocks
from command_line import added, run_here
from conftest import Serve
from fio import fio
from needs import needs
from servers import end_recorded_servers, until

import pyublk
from pyublk import DataPath
from pyublk.targets import File, Ram
from pyublk.uapi import Feature

SIZE = 8 << 20


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("PYUBLK_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    end_recorded_servers()


def failure_of(blocks: Blocks, offset: int) -> int | None:
    try:
        blocks.read(4096, offset)
    except OSError as error:
        return error.errno
    return None


def test_others_pass_what_is_held_and_a_stop_lets_it_go(serve: Serve) -> None:
    disk = serve(Ram(size=SIZE), depth=8, queues=2)
    hung = disk.faults.hang("write", range=(4 << 20, 5 << 20))
    delayed = disk.faults.delay("read", 0.01, range=(4 << 20, SIZE))
    outcome: list[int] = []

    def write() -> None:
        with Blocks(disk.path) as blocks:
            outcome.append(blocks.write(b"held" * 1024, 4 << 20))

    clients = [threading.Thread(target=write) for _ in range(3)]
    for client in clients:
        client.start()
    until(lambda: hung.fired == 3, what="the writes are held")
    assert disk.stats().total.held == 3
    with Blocks(disk.path) as blocks:
        for number in range(50):
            blocks.write(b"pass" * 1024, number * 4096)
        assert blocks.read(4096, 4096) == b"pass" * 1024
        assert blocks.read(4096, 6 << 20) == bytes(4096)
    assert delayed.fired >= 1
    assert outcome == []
    disk.stop()  # no HandlerTimeout: nothing hung
    for client in clients:
        client.join(30)
    assert outcome == [4096] * 3


@pytest.mark.thorough
def test_a_thousand_delays_hold_no_thread(serve: Serve) -> None:
    """They wait in the ring of their queue, which takes what others ask for in the meantime."""
    disk = serve(Ram(size=SIZE), depth=4096)
    Path(f"/sys/block/{Path(disk.path).name}/queue/nomerges").write_text("2")
    delayed = disk.faults.delay("read", 8, jitter=2, range=(0, 4 << 20))
    threads = len(os.listdir("/proc/self/task"))
    settings = {"rw": "randread", "bs": 4096, "size": 1000 * 4096, "iodepth": 1000}
    others = 0
    with ThreadPoolExecutor(1) as pool, Blocks(disk.path) as blocks:
        report = pool.submit(fio, disk.path, **settings)
        until(lambda: disk.stats().total.held == 1000, what="a thousand reads wait")
        assert len(os.listdir("/proc/self/task")) == threads + 1  # fio's
        while disk.stats().total.held == 1000:
            blocks.write(b"pass" * 1024, 4 << 20)
            others += 1
        assert others > 10
        assert report.result(60).reads == 1000
    assert delayed.fired == 1000


def test_a_swap_lets_go_what_is_held_and_keeps_the_rules(serve: Serve, tmp_path: Path) -> None:
    needs(Feature.QUIESCE)
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    disk = serve(File(image), recovery="resend")
    torn = disk.faults.tear("write", sectors=1, range=(4 << 20, 5 << 20))
    hung = disk.faults.hang("write", range=(5 << 20, 6 << 20))

    def write() -> None:
        with Blocks(disk.path) as blocks:
            blocks.write(b"held" * 1024, 5 << 20)

    client = threading.Thread(target=write)
    client.start()
    until(lambda: hung.fired == 1, what="the write is held")
    disk.swap(File(image))
    client.join(30)
    with Blocks(disk.path) as blocks:
        blocks.write(b"torn" * 1024, 4 << 20)
        assert blocks.read(4096, 4 << 20) == b"torn" * 128 + bytes(3584)
        assert blocks.read(4096, 5 << 20) == b"held" * 1024
    assert (torn.fired, hung.fired) == (1, 1)


def test_bits_rot_where_the_server_copies(serve: Serve) -> None:
    disk = pyublk.Device(Ram(size=SIZE))
    rot = disk.faults.rot("read", bits=1, range=(4 << 20, SIZE))
    with disk:
        assert disk.data_path.path is DataPath.COPY
        with Blocks(disk.path) as blocks:
            blocks.write(bytes(4096), 4 << 20)
            assert sum(one.bit_count() for one in blocks.read(4096, 4 << 20)) == 1
            rot.remove()
            assert blocks.read(4096, 4 << 20) == bytes(4096)
    other = serve(Ram(size=SIZE), path="user-copy")
    with pytest.raises(ValueError, match=r'does not pass .* "user-copy": start .* path="copy"'):
        other.faults.rot("read")
    assert len(other.faults) == 0


def shown(*arguments: str) -> Any:
    done = run_here(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_the_command(place: Path) -> None:
    made = added(
        "null", "--size", "8M", "--fault", "fail:op=read,range=4M-5M", "--limit", "iops=1000000"
    )
    disk = str(made["id"])
    with Blocks(made["path"]) as blocks:
        assert failure_of(blocks, 4 << 20) == errno.EIO
        [rule] = shown("fault", disk, "list")["faults"]
        assert (rule["number"], rule["fired"]) == (1, 1)
        told = shown("fault", disk, "add", "fail:op=read,range=6M-7M,errno=ENOSPC", "hang:op=write")
        assert [rule["number"] for rule in told["faults"]] == [1, 2, 3]
        assert failure_of(blocks, 6 << 20) == errno.ENOSPC
        [told] = shown("info", disk)
        assert [rule["fired"] for rule in told["faults"]] == [1, 1, 0]
        assert told["limit"]["rule"] == "limit:op=all,iops=1000000,burst=0.1"
        told = shown("fault", disk, "clear", "1", "3")
        assert [rule["number"] for rule in told["faults"]] == [2]
        assert failure_of(blocks, 4 << 20) is None
        assert shown("fault", disk, "clear")["faults"] == []
        assert failure_of(blocks, 6 << 20) is None
    assert shown("limit", disk, "--off") is None
    assert "iops=5,burst=2" in run_here("limit", disk, "--iops", "5", "--burst", "2").output
    assert shown("limit", disk)["fired"] == 0
    words = run_here("info", disk).output
    assert "limit:op=all,iops=5,burst=2" in words
    wrong = run_here("fault", disk, "add", "fail:op=zone_append")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "no request of Null is a 'zone_append'" in wrong.stderr
    assert run_here("fault", disk, "add", "fail:op=reads").exit_code == 2
    assert run_here("fault", disk, "add", "fail:nothing").exit_code == 2
    assert run_here("stop", disk).exit_code == 0
