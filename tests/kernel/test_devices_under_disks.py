"""Disks on block devices, here one of our own, whose memory shows what reaches it."""

import errno
import struct
from contextlib import nullcontext
from pathlib import Path

import pytest
from blocks import BLKSSZGET, Blocks
from conftest import Serve
from filesystems import make_file_system, mounted, run
from memory import held
from test_discard import PUNCH_HOLE, fallocate

import pyublk
from pyublk import backing
from pyublk.targets import File, Mirror, Ram, Slice

MIB = 1 << 20


def base_of(serve: Serve, size: int = 16 * MIB, block_size: int = 512) -> tuple[Ram, Path]:
    ram = Ram(size=size, block_size=block_size)
    return ram, Path(serve(ram).path)


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
@pytest.mark.parametrize("block_size", [512, 4096])
def test_a_disk_on_a_device(serve: Serve, block_size: int, direct: bool) -> None:
    ram, path = base_of(serve, block_size=block_size)
    disk = serve(File(path, direct=direct))
    with Blocks(disk.path) as client:
        assert client.size == 16 * MIB
        assert client.number(BLKSSZGET) == block_size
        client.write(b"x" * 8 * MIB, 0)
        client.sync()  # out of the page cache of the device
        full = ram.resident()
        assert full >= 8 * MIB
        client.discard(2 * MIB, 4 * MIB)
        assert full - ram.resident() == 4 * MIB
        # The smallest discard, between two pages of the device's memory.
        client.discard(7 * MIB + block_size, block_size)
        fallocate(client, PUNCH_HOLE, MIB, MIB)
        assert full - ram.resident() >= 5 * MIB
        client.zero_out(7 * MIB + 8192, 4096)
        client.sync()
        found = client.read(8 * MIB, 0)
    assert found[: 7 * MIB] == b"x" * MIB + bytes(5 * MIB) + b"x" * MIB
    assert found[7 * MIB + 8192 :] == bytes(4096) + b"x" * (MIB - 8192 - 4096)
    assert held(ram) == found + bytes(8 * MIB)
    done = disk.stats().total
    assert done.bytes_discarded == 4 * MIB + block_size
    assert done.errors == 0


def test_a_disk_has_at_least_the_blocks_of_its_device(serve: Serve) -> None:
    _, path = base_of(serve, block_size=4096)
    assert serve(File(path, block_size=512)).target.block_size == 4096
    _, other = base_of(serve, block_size=512)
    assert serve(File(other, block_size=4096)).target.block_size == 4096


def test_a_partition_of_a_device_is_counted_in_its_blocks(serve: Serve) -> None:
    ram, path = base_of(serve, block_size=4096)
    table = bytearray(3 * 4096)
    table[4096:4104] = b"EFI PART"
    struct.pack_into("<QII", table, 4096 + 72, 2, 1, 128)
    table[8192] = 1
    struct.pack_into("<QQ", table, 8192 + 32, 40, 59)
    with Blocks(str(path)) as client:
        client.write(bytes(table), 0)
    disk = serve(Slice(path, partition=1))
    with Blocks(disk.path) as client:
        assert client.size == 20 * 4096
        client.write(b"p" * 4096, 0)
        client.sync()
    assert held(ram)[40 * 4096 : 41 * 4096] == b"p" * 4096


def test_a_device_in_use_is_refused(serve: Serve, tmp_path: Path) -> None:
    _, path = base_of(serve, 64 * MIB)
    make_file_system("ext4", str(path))
    with mounted(str(path), tmp_path / "mounted"):
        with pytest.raises(OSError, match=rf"{path} is in use \(mounted\?\)$") as refused:
            File(path).open()
        assert refused.value.errno == errno.EBUSY
        serve(File(path, read_only=True)).stop()  # looking is allowed
    first = serve(File(path))
    with pytest.raises(OSError, match=rf"{path} is in use \(mounted\?\)$"):
        pyublk.Device(File(path)).start()
    first.stop()
    serve(File(path))


@pytest.mark.parametrize("how", ["set", "mounted"])
def test_what_can_only_be_read_is_refused(serve: Serve, tmp_path: Path, how: str) -> None:
    """Instead of a disk on which every write fails."""
    _, path = base_of(serve)
    options: tuple[str, ...] = ()
    if how == "set":
        run("blockdev", "--setro", path)
    else:
        make_file_system("ext4", str(path))
        with mounted(str(path), tmp_path / "mounted"):
            (tmp_path / "mounted/image").write_bytes(bytes(MIB))
        path, options = tmp_path / "mounted/image", ("--read-only",)
    with mounted("/dev/ublkb0", tmp_path / "mounted", *options) if options else nullcontext():
        for target in (
            File(path),
            Slice(path, size=4096),
            Mirror(path, path, state=tmp_path / "s"),
        ):
            with pytest.raises(OSError, match=f"^.Errno 30. {path} can only be read: ") as refused:
                target.open()
            assert refused.value.errno == errno.EROFS
        disk = serve(File(path, read_only=True))
        assert Path(disk.path).read_bytes() == bytes(disk.target.size)
        disk.stop()


def test_direct_io_on_a_new_file_has_the_blocks_of_the_device_below(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hole can be read in any pieces, so that to try tells nothing."""
    _, path = base_of(serve, 64 * MIB, block_size=4096)
    make_file_system("ext4", str(path))
    with mounted(str(path), tmp_path / "mounted") as folder:
        monkeypatch.setattr(backing, "direct_alignment", lambda _fd: None)  # before Linux 6.1
        target = File(folder / "first", size=MIB, direct=True)
        target.open()
        target.close()
        assert target.block_size == 4096
        monkeypatch.undo()
        disk = serve(File(folder / "second", size=MIB, direct=True))
        assert disk.target.block_size == 4096
        with Blocks(disk.path) as client:
            client.write(b"x" * 4096, 8192)
            client.sync()
        assert disk.stats().total.errors == 0
        disk.stop()


def test_a_device_named_twice(serve: Serve, tmp_path: Path) -> None:
    _, path = base_of(serve)
    (tmp_path / "link").symlink_to(path)
    for other, words in ((path, "is named twice"), (tmp_path / "link", "are the same file")):
        with pytest.raises(ValueError, match=f"{words}: no byte of it can be in two places"):
            Mirror(path, other, state=tmp_path / "state").open()
    assert not (tmp_path / "state").exists()


def test_the_size_of_a_disk_on_a_device(serve: Serve) -> None:
    _, path = base_of(serve)
    disk = serve(File(path, size=MIB))
    with Blocks(disk.path) as client:
        assert client.size == MIB
    disk.stop()
    with pytest.raises(ValueError, match=f"size {17 * MIB} is more than {path} has, {16 * MIB} b"):
        File(path, size=17 * MIB).open()
    assert path.is_block_device()  # what was not made is not removed
