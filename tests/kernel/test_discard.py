"""Discard and write-zeroes: the bytes are gone, their space is given back, the neighbours stay."""

import ctypes
import errno
import os
from pathlib import Path

import pytest
from blocks import Blocks
from conftest import Serve
from filesystems import SIZES, make_file_system, mounted, run
from memory import FullMemory, held, make
from variations import variations

import pyublk
from pyublk.targets import File, Ram

MIB = 1 << 20
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16

KEEPERS = ["ram", "file"]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def fallocate(disk: Blocks, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate(disk.fd, mode | KEEP_SIZE, offset, length):
        raise OSError(ctypes.get_errno(), "fallocate")


def occupied(target: pyublk.Target) -> int:
    """Bytes of memory or storage that the target's content takes."""
    if isinstance(target, File):
        return os.stat(target.path).st_blocks * 512
    assert isinstance(target, Ram)
    return target.resident()


@pytest.mark.parametrize("kind", KEEPERS)
def test_disk_takes_space_as_it_is_written(serve: Serve, tmp_path: Path, kind: str) -> None:
    target = make(kind, 64 * MIB, tmp_path)
    disk = serve(target)
    assert occupied(target) < MIB
    with Blocks(disk.path) as client:
        client.write(b"x" * MIB, 32 * MIB)
        assert client.read(MIB, 30 * MIB) == bytes(MIB)
    assert MIB <= occupied(target) < 2 * MIB


@pytest.mark.parametrize("kind", KEEPERS)
def test_discard_gives_space_back(serve: Serve, tmp_path: Path, kind: str) -> None:
    target = make(kind, 16 * MIB, tmp_path)
    disk = serve(target)
    with Blocks(disk.path) as client:
        client.write(b"x" * 8 * MIB, 0)
        full = occupied(target)
        client.discard(2 * MIB, 4 * MIB)
        assert full - occupied(target) == 4 * MIB
        assert client.read(8 * MIB, 0) == b"x" * 2 * MIB + bytes(4 * MIB) + b"x" * 2 * MIB
        client.discard(0, 16 * MIB)
        assert occupied(target) < MIB
        assert client.read(8 * MIB, 0) == bytes(8 * MIB)
    done = disk.stats().total
    assert done.discards >= 2
    assert done.bytes_discarded == 20 * MIB
    assert done.errors == 0


@pytest.mark.parametrize("kind", KEEPERS)
def test_punched_hole_gives_space_back(serve: Serve, tmp_path: Path, kind: str) -> None:
    """fallocate(PUNCH_HOLE) on the disk: zeroes that may be deallocated."""
    target = make(kind, 16 * MIB, tmp_path)
    disk = serve(target)
    with Blocks(disk.path) as client:
        client.write(b"x" * 4 * MIB, 0)
        full = occupied(target)
        fallocate(client, PUNCH_HOLE, MIB, 2 * MIB)
        assert full - occupied(target) == 2 * MIB
        assert client.read(4 * MIB, 0) == b"x" * MIB + bytes(2 * MIB) + b"x" * MIB
    assert disk.stats().total.bytes_zeroed == 2 * MIB


@pytest.mark.parametrize("kind", KEEPERS)
def test_zero_out_keeps_the_space(serve: Serve, tmp_path: Path, kind: str) -> None:
    """BLKZEROOUT comes with NOUNMAP: the zeroes stay allocated."""
    target = make(kind, 16 * MIB, tmp_path)
    disk = serve(target)
    with Blocks(disk.path) as client:
        client.write(b"x" * 4 * MIB, 0)
        full = occupied(target)
        client.zero_out(MIB, 2 * MIB)
        assert occupied(target) == full
        assert client.read(4 * MIB, 0) == b"x" * MIB + bytes(2 * MIB) + b"x" * MIB
        # Never written before: now it must have its space.
        client.zero_out(8 * MIB, MIB)
        assert occupied(target) == full + MIB
    assert disk.stats().total.bytes_zeroed == 3 * MIB


def test_nounmap_reaches_the_method(serve: Serve) -> None:
    target = FullMemory(MIB)
    disk = serve(target)
    with Blocks(disk.path) as client:
        client.zero_out(0, 65536)
        fallocate(client, PUNCH_HOLE, 131072, 4096)
        fallocate(client, ZERO_RANGE, 262144, 8192)
        client.discard(524288, 4096)
    assert [call for call in target.calls if call[0] != "flush"] == [
        ("write_zeroes", 0, 65536, False),
        ("write_zeroes", 131072, 4096, True),
        ("write_zeroes", 262144, 8192, False),
        ("discard", 524288, 4096),
    ]


#: Offset and length of ranges that begin or end between pages.
RAGGED = [
    (512, 512),
    (512, 4096),
    (3584, 1024),
    (4096, 12800),
    (1536, 3 * 4096),
    (8192, 65536 + 512),
]


@pytest.mark.parametrize("kind", KEEPERS)
def test_edges_between_pages(serve: Serve, tmp_path: Path, kind: str) -> None:
    """Whatever is not discarded stays; what is zeroed is zero to the byte."""
    size = 128 * 1024
    target = make(kind, size, tmp_path)
    disk = serve(target)
    with Blocks(disk.path) as client:
        for offset, length in RAGGED:
            end = offset + length
            client.write(b"x" * size, 0)
            client.discard(offset, length)
            found = client.read(size, 0)
            assert found[:offset] == b"x" * offset
            assert found[end:] == b"x" * (size - end)
            pages = found[-(-offset // 4096) * 4096 : end // 4096 * 4096]
            assert pages == bytes(len(pages)), f"{length} bytes at {offset}"
            expected = b"x" * offset + bytes(length) + b"x" * (size - end)
            for clear in (client.zero_out, lambda *span: fallocate(client, PUNCH_HOLE, *span)):
                client.write(b"x" * size, 0)
                clear(offset, length)
                assert client.read(size, 0) == expected, f"{length} bytes at {offset}"
                assert held(target) == expected


def test_large_discards_are_split(serve: Serve) -> None:
    target = FullMemory(4 * MIB, max_discard=256 * 1024)
    disk = serve(target)
    with Blocks(disk.path) as client:
        client.discard(MIB, 2 * MIB)
        client.zero_out(0, MIB)
    spans = [call[1:3] for call in target.calls if call[0] == "discard"]
    assert sorted(spans) == [(MIB + n * 262144, 262144) for n in range(8)]
    spans = [call[1:3] for call in target.calls if call[0] == "write_zeroes"]
    assert sorted(spans) == [(n * 262144, 262144) for n in range(4)]


def test_without_the_methods_discard_is_refused(serve: Serve) -> None:
    disk = serve(make("sync", MIB, Path()))
    with Blocks(disk.path) as client:
        client.write(b"x" * 65536, 0)
        with pytest.raises(OSError, match="not supported") as refused:
            client.discard(0, 65536)
        assert refused.value.errno == errno.EOPNOTSUPP
        client.zero_out(4096, 4096)  # the kernel writes zeroes instead
        assert client.read(12288, 0) == b"x" * 4096 + bytes(4096) + b"x" * 4096
    done = disk.stats().total
    assert (done.discards, done.write_zeroes) == (0, 0)


def test_a_file_system_that_cannot_punch(serve: Serve, tmp_path: Path) -> None:
    """ramfs has no holes: discards do nothing, zeroes are written."""
    with mounted("none", tmp_path / "ramfs", "-t", "ramfs") as place:
        target = make("file", MIB, place)
        disk = serve(target)
        with Blocks(disk.path) as client:
            client.write(b"x" * MIB, 0)
            client.discard(4096, 8192)
            assert client.read(4096, 0) == b"x" * 4096
            client.zero_out(512, 70000 // 512 * 512)
            fallocate(client, PUNCH_HOLE, 524288, 1024)
            found = client.read(MIB, 0)
        zeroed = 70000 // 512 * 512
        assert found[:512] == b"x" * 512
        assert found[512 : 512 + zeroed] == bytes(zeroed)
        assert found[512 + zeroed : 524288] == b"x" * (524288 - 512 - zeroed)
        assert found[524288:] == bytes(1024) + b"x" * (524288 - 1024)
        assert held(target) == found
        assert disk.stats().total.errors == 0
        disk.stop()


@pytest.mark.parametrize("kind", KEEPERS)
@pytest.mark.parametrize("file_system", variations(["ext4", "xfs"], ["ext4"]))
def test_fstrim(serve: Serve, tmp_path: Path, file_system: str, kind: str) -> None:
    """The space of deleted files comes back when the file system is trimmed."""
    target = make(kind, SIZES[file_system], tmp_path)
    disk = serve(target)
    make_file_system(file_system, disk.path)
    with mounted(disk.path, tmp_path / "mounted") as place:
        (place / "kept").write_bytes(b"k" * MIB)
        os.sync()
        empty = occupied(target)
        (place / "large").write_bytes(os.urandom(8 * MIB))
        os.sync()
        full = occupied(target)
        assert full - empty >= 7 * MIB  # a block or two of the journal may become free
        (place / "large").unlink()
        os.sync()
        assert "trimmed" in run("fstrim", "-v", place)
        assert full - occupied(target) >= 7 * MIB
        assert (place / "kept").read_bytes() == b"k" * MIB
    assert disk.stats().total.bytes_discarded >= 8 * MIB
    assert disk.stats().total.errors == 0
