"""Every example's target, served without a kernel; tests/kernel/test_examples.py has real disks."""

import os
import runpy
import shutil
import struct
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from pyublk.testing import Disk

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))


def round_trip(disk: Disk) -> None:
    data = os.urandom(100 * 512)
    disk.pwrite(data, 512)
    assert disk.pread(len(data), 512) == data
    assert disk.pread(512, 0) == bytes(512)


def test_rot13(open_disk: Callable[..., Disk]) -> None:
    target = load("rot13").Rot13(1 << 20)
    disk = open_disk(target)
    target.data[:512] = bytes([13]) * 512  # as a zero is kept
    round_trip(disk)
    disk.pwrite(b"uryyb" + bytes(507), 0)
    assert bytes(target.data[:5]) == bytes(byte + 13 for byte in b"uryyb")


def test_protected(open_disk: Callable[..., Disk]) -> None:
    target = load("protected").Protected(1 << 20)
    disk = open_disk(target)
    assert disk.params.integrity == target.integrity
    round_trip(disk)  # without a kernel no request has metadata
    assert set(target.metadata) == {0xFF}


def test_async_disk(open_disk: Callable[..., Disk]) -> None:
    round_trip(open_disk(load("async_disk").Slow(1 << 20, delay=0.001)))


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler (cc)")
def test_pointer_ctypes(open_disk: Callable[..., Disk]) -> None:
    target = load("pointer_ctypes").Pattern()
    disk = open_disk(target)
    pattern = struct.pack("<64Q", *range(4096, 4096 + 512, 8))
    assert disk.pread(512, 4096) == pattern
    disk.pwrite(pattern, 4096)
    with pytest.raises(OSError, match="WRITE at 0 failed"):
        disk.pwrite(pattern, 0)
    assert target.served.value == 3


def test_pointer_cffi(open_disk: Callable[..., Disk]) -> None:
    pytest.importorskip("cffi", reason="cffi is not installed")
    round_trip(open_disk(load("pointer_cffi").Mirrored(size=1 << 20)))


def test_pointer_numba(open_disk: Callable[..., Disk]) -> None:
    pytest.importorskip("numba", reason="numba is not installed")
    round_trip(open_disk(load("pointer_numba").Inverted(size=1 << 20)))


def test_no_example_is_forgotten() -> None:
    """A new example needs a test here, or in the kernel suite."""
    named = {"rot13", "async_disk", "pointer_ctypes", "pointer_cffi", "pointer_numba", "protected"}
    by_hand = {"queue_by_hand", "mapped_by_hand", "threads_by_hand"}
    power_cuts = {"sqlite_power_cuts", "file_system_power_cuts"}  # tests/kernel/power_cuts.py
    stacked = {"encrypted", "deduplicated", "log_structured", "log_structured_plot", "zip_disk"}
    known = named | by_hand | power_cuts | stacked  # the last in test_example_layers.py
    assert {path.stem for path in EXAMPLES.glob("*.py")} == known
