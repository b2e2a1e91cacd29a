"""Every example on a real disk."""

import os
import runpy
import signal
import struct
import subprocess
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from blocks import Blocks
from needs import needs
from variations import variations

import pyublk
from pyublk.uapi import Feature

EXAMPLES = Path(__file__).parents[2] / "examples"

Serve = Callable[..., pyublk.Device]


def load(name: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))


def round_trip(path: str) -> None:
    with Blocks(path) as disk:
        data = os.urandom(65536)
        disk.write(data, 4096)
        assert disk.read(65536, 4096) == data


def test_pointer_ctypes(serve: Serve) -> None:
    disk = serve(load("pointer_ctypes").Pattern(), queues=2)
    with Blocks(disk.path) as blocks:
        assert blocks.read(4096, 8192) == struct.pack("<512Q", *range(8192, 8192 + 4096, 8))
        with pytest.raises(OSError, match="Invalid or incomplete"):
            blocks.write(bytes(4096), 0)


def test_queue_by_hand() -> None:
    load("queue_by_hand").main(round_trip)


def test_mapped_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "disk.img"
    file.write_bytes(bytes(1 << 20))
    before = set(threading.enumerate())
    threads: set[threading.Thread] = set()

    def use(path: str) -> None:
        threads.update(set(threading.enumerate()) - before)
        busy(path, 1 << 20)
        with Blocks(path) as disk:
            disk.write(b"through".ljust(4096), 65536)

    load("mapped_by_hand").main(str(file), use)
    assert len(threads) == 1, "one for all queues"
    assert file.read_bytes()[65536:65543] == b"through"


def test_threads_by_hand() -> None:
    needs(Feature.PER_IO_DAEMON)
    example = load("threads_by_hand")
    answer, by = example.answer, Counter[int]()

    def counted(io: pyublk.IO) -> None:
        by[threading.get_ident()] += 1
        answer(io)

    example.serve.__globals__["answer"] = counted
    example.main(lambda path: busy(path, 16 << 20))
    assert len(by) == example.THREADS, by


def busy(path: str, size: int) -> None:
    """Several clients at once write and read back what is theirs."""

    def client(number: int, count: int = 4) -> None:
        with Blocks(path) as disk:
            share = size // count
            for at in range(number * share, number * share + 64 * 4096, 4096):
                data = os.urandom(4096)
                disk.write(data, at)
                assert disk.read(4096, at) == data

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(client, range(4)))


@pytest.mark.parametrize("name", ["rot13", "async_disk"])
def test_programs_print_their_disks_and_end_on_a_signal(name: str) -> None:
    command = [sys.executable, "-u", EXAMPLES / f"{name}.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        try:
            paths = program.stdout.readline().split()
            assert paths, "the program printed no path"
            for path in paths:
                round_trip(path)
            program.send_signal(signal.SIGINT)
            program.wait(30)
        finally:
            program.kill()
    assert not any(os.path.exists(path) for path in paths)


@pytest.mark.parametrize("project", variations(["pytest", "pytest-power-cut"], []))
def test_projects_that_test_with_the_plugin(project: str) -> None:
    """Here they find ublk, and run at once."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--ublk-require"],
        cwd=EXAMPLES / project,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
