"""Every example on a real disk."""

import os
import runpy
import signal
import struct
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from blocks import Blocks

import pyublk

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


def test_pointer_cffi(serve: Serve) -> None:
    pytest.importorskip("cffi", reason="cffi is not installed")
    round_trip(serve(load("pointer_cffi").Mirrored()).path)


def test_pointer_numba(serve: Serve) -> None:
    pytest.importorskip("numba", reason="numba is not installed")
    round_trip(serve(load("pointer_numba").Inverted()).path)


def test_queue_by_hand() -> None:
    load("queue_by_hand").main(round_trip)


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
