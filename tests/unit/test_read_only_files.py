"""Mapped disks that can be written, of which some files can only be read."""

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pyublk
from pyublk.targets import File
from pyublk.testing import Disk

SIZE = 64 << 10
HALF = SIZE // 2


class Halves(pyublk.MappedTarget):
    """The first half is in file 0, which can only be read, the second half in file 1."""

    def __init__(self, base: Path, upper: Path, **options: Any) -> None:
        super().__init__([base, upper], size=SIZE, read_only_files={0}, **options)

    def map(self, op: int, offset: int, length: int) -> object:  # type: ignore[override]
        first = max(0, min(length, HALF - offset))
        parts = [(0, offset, first), (1, max(0, offset - HALF), length - first)]
        return [part for part in parts if part[2]]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    base, upper = tmp_path / "base", tmp_path / "upper"
    base.write_bytes(b"b" * HALF)
    base.chmod(0o444)
    upper.write_bytes(b"u" * HALF)
    return base, upper


@pytest.mark.parametrize("direct", [False, True], ids=["page cache", "direct"])
def test_each_file_is_read_and_only_one_is_written(files: tuple[Path, Path], direct: bool) -> None:
    target = Halves(*files, direct=direct)
    with Disk(target) as disk:
        flags = [fcntl.fcntl(one.fd, fcntl.F_GETFL) & os.O_ACCMODE for one in target.backing]
        assert flags == [os.O_RDONLY, os.O_RDWR]
        assert disk.pread(SIZE, 0) == b"b" * HALF + b"u" * HALF
        disk.pwrite(b"n" * 4096, HALF)
        disk.flush()
        assert disk.pread(4096, HALF) == b"n" * 4096
    assert files[0].read_bytes() == b"b" * HALF


CHANGES: dict[str, Callable[[Disk, int, int], object]] = {
    "write": lambda disk, offset, length: disk.pwrite(b"x" * length, offset),
    "fua": lambda disk, offset, length: disk.pwrite(b"x" * length, offset, fua=True),
    "discard": lambda disk, offset, length: disk.discard(offset, length),
    "zeroes": lambda disk, offset, length: disk.write_zeroes(offset, length),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("offset", [0, HALF - 4096], ids=["inside", "across"])
def test_a_request_that_would_change_it_fails_as_a_whole(
    files: tuple[Path, Path], change: str, offset: int, caplog: pytest.LogCaptureFixture
) -> None:
    with Disk(Halves(*files)) as disk:
        with pytest.raises(OSError, match="failed") as raised:
            CHANGES[change](disk, offset, 8192)
        assert raised.value.errno == errno.EIO
        assert "one of these files was opened for reading" in caplog.text
        CHANGES[change](disk, HALF, 4096)  # goes on
        assert disk.pread(4096, HALF) != b"u" * 4096 or change == "discard"
    assert files[0].read_bytes() == b"b" * HALF
    assert files[1].read_bytes()[4096:] == b"u" * (HALF - 4096)


def test_many_disks_share_what_they_only_read(files: tuple[Path, Path], tmp_path: Path) -> None:
    base, upper = files
    others = [tmp_path / f"upper{number}" for number in range(3)]
    for other in others:
        other.write_bytes(bytes(HALF))
    disks = [Disk(Halves(base, one)) for one in [upper, *others]]
    with disks[0], disks[1], disks[2], disks[3], Disk(File(base, read_only=True)) as plain:
        for disk in disks:
            assert disk.pread(4096, 0) == plain.pread(4096, 0)
        with pytest.raises(OSError, match="is in use: this process serves it already"):
            Disk(Halves(base, upper)).__enter__()
        # Another process that wants it for writing sees the lock.
        base.chmod(0o644)
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        with base.open("r+b") as file, pytest.raises(BlockingIOError):
            fcntl.fcntl(file.fileno(), fcntl.F_OFD_SETLK, lock)
        with pytest.raises(OSError, match=r"base is in use: "):
            Disk(File(base)).__enter__()


def test_what_is_served_for_writing_is_no_base(files: tuple[Path, Path]) -> None:
    files[0].chmod(0o644)
    with Disk(File(files[0])), pytest.raises(OSError, match=r"base is in use: "):
        Disk(Halves(*files)).__enter__()


def test_a_table_that_would_have_them_written_is_refused(files: tuple[Path, Path]) -> None:
    class Rows(pyublk.MappedTarget):
        def extents(self) -> list[tuple[int, int, int]]:
            return [(1, 0, HALF)] + ([] if self.only_upper else [(0, 0, HALF)])

        only_upper = False

    target = Rows(files, read_only_files=[0])
    with pytest.raises(ValueError, match=r"part of the disk is in .*base, which is opened for re"):
        Disk(target).__enter__()
    assert target.backing == []
    target.only_upper = True  # it may still be read by the target itself
    with Disk(target) as disk:
        disk.pwrite(b"x" * 4096, 0)
        assert os.pread(target.backing[0].fd, 4, 0) == b"bbbb"
    with Disk(Rows(files, read_only_files=[0], read_only=True)) as disk:
        assert disk.pread(4096, HALF) == b"b" * 4096


@pytest.mark.parametrize("wrong", [[2], [-1]])
def test_files_that_are_not_there_are_told(files: tuple[Path, Path], wrong: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"names file {wrong[0]}; there are 2"):
        pyublk.MappedTarget(files, size=SIZE, read_only_files=wrong)


def test_a_layer_over_it_gets_the_same_answers(files: tuple[Path, Path]) -> None:
    with Disk(pyublk.Layer(Halves(*files))) as disk:
        assert disk.pread(4096, 0) == b"b" * 4096
        disk.pwrite(b"n" * 4096, HALF)
        with pytest.raises(OSError, match="WRITE at 0 failed"):
            disk.pwrite(b"n" * 4096, 0)
